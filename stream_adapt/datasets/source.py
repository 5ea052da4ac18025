"""What every data set is: declared features, a feedback mapping, and events that can be read again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from stream_adapt.learner.encoder import Feature
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.record import UserEvent

#: One to five stars as five levels; the target is "four or more".
STARS = Feedback(
    levels=("1", "2", "3", "4", "5"),
    target="4",
    label=LabelCuts(range=(1.0, 5.0), cuts=(2.0, 3.0, 4.0, 5.0)),
)


@dataclass(frozen=True)
class Source:
    """A data set that can be streamed."""

    name: str
    features: dict[str, Feature]
    #: How labels and event types become levels, unless the configuration says otherwise.
    feedback: Feedback
    #: Starts a new pass: events in the order of time, ties in the order in which the data set has them.
    events: Callable[[], Iterator[UserEvent]]
    #: Number of events of a pass, where it is known beforehand.
    count: int | None
    #: Index of the first event after a drift that was put there on purpose.
    drift_at: int | None = None


def ties_drawn(source: Source, seed: int = 0) -> Source:
    """The same events; those that follow each other with one time stand in an order that is drawn, once for a seed.

    Sets whose clock is coarse do not tell the order within a tick, but what is said of users' first events hangs on it.
    """

    def events() -> Iterator[UserEvent]:
        given = list(source.events())
        ticks = np.cumsum(np.diff([event.timestamp for event in given], prepend=0) != 0)
        order = np.lexsort((np.random.default_rng(seed).random(len(given)), ticks))
        return (given[at] for at in order.tolist())

    return replace(source, events=events)
