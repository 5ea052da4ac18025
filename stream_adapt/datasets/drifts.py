"""Known drifts, put into any log at a known event: so that what detects and repairs drift can be measured.

| kind | what changes |
|---|---|
| `flip` | the label of every event with one of half the items turns round: l becomes low + high − l |
| `permute` | items are taken for one another: an event has the id and the content of another item |
| `gradual` | as `flip`, and more and more events are turned: a share that grows from 0 to 1 over 20,000 events |
| `recurring` | as `flip`, for 20,000 events, then 20,000 as before, and so on |
| `base_rate` | nothing that is to be learned anew: a third of the events below the target is left out |

What happens to an event follows from the seed and its ids alone, so equal seeds give equal logs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import msgspec
import numpy as np
import xxhash

from stream_adapt.datasets.source import Source
from stream_adapt.errors import ConfigError
from stream_adapt.record import FeatureValue, ItemId, UserEvent

DriftKind = Literal["flip", "permute", "gradual", "recurring", "base_rate"]

#: Every kind of drift.
KINDS: tuple[DriftKind, ...] = get_args(DriftKind)
#: Those after which nothing has to be learned anew.
HARMLESS: tuple[DriftKind, ...] = ("base_rate",)
#: Those that are complete with their first event.
ABRUPT: tuple[DriftKind, ...] = ("flip", "permute")
#: Those that turn labels round.
_TURNING: tuple[DriftKind, ...] = ("flip", "gradual", "recurring")

#: The share of events below the target that `base_rate` leaves out.
_LEFT_OUT = 1 / 3


@dataclass(frozen=True)
class Drift:
    """What changes, and from which event on."""

    kind: DriftKind
    at: int  # index of the first event that may be changed
    share: float | None = None  # of the items; None: half of them are turned round, all of them permuted
    over: int = 20_000  # events: how long `gradual` takes, and half a period of `recurring`
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"drift kind={self.kind!r}: one of {', '.join(KINDS)}")
        if self.at < 0 or self.over < 1 or not 0 < (1 if self.share is None else self.share) <= 1:
            raise ConfigError(f"drift: at must not be negative, over at least 1, share above 0 and up to 1: {self}")


def splice(source: Source, drift: Drift) -> Source:
    """The same log with a drift in it; `drift_at` says where.

    Raises:
        ConfigError: labels are to be turned, and the log has none with a range.
    """
    if drift.kind in _TURNING and source.feedback.label is None:
        raise ConfigError(f"{source.name}: {drift.kind} turns labels round, and its feedback has none; use permute")
    changes = {"permute": _permuted, "base_rate": _thinned}.get(drift.kind, _flipped)
    return replace(
        source,
        events=lambda: _from(source.events(), drift.at, changes(source, drift)),
        count=None if drift.kind == "base_rate" else source.count,
        drift_at=drift.at,
    )


#: An event and its index; the event in its place, or None.
_Change = Callable[[UserEvent, int], UserEvent | None]


def _from(events: Iterator[UserEvent], at: int, change: _Change) -> Iterator[UserEvent]:
    for index, event in enumerate(events):
        changed = event if index < at else change(event, index)
        if changed is not None:
            yield changed


def _uniform(name: str, seed: int) -> float:
    """A number in [0, 1) that follows from a name."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed) / 2.0**64


def _flipped(source: Source, drift: Drift) -> _Change:
    assert source.feedback.label is not None
    ends = sum(source.feedback.label.range)
    chosen: dict[str, bool] = {}

    def change(event: UserEvent, index: int) -> UserEvent:
        if event.label is None or not _is_on(drift, index - drift.at, event.event_id):
            return event
        turned = chosen.get(event.item_id)
        if turned is None:
            turned = chosen[event.item_id] = _uniform(event.item_id, drift.seed) < (drift.share or 0.5)
        return msgspec.structs.replace(event, label=ends - event.label) if turned else event

    return change


def _is_on(drift: Drift, since: int, event_id: str) -> bool:
    """Whether the event that is the `since`-th after the drift's begin belongs to the new world."""
    if drift.kind == "gradual":
        return _uniform(event_id, drift.seed) < since / drift.over
    return drift.kind != "recurring" or since // drift.over % 2 == 0


def _permuted(source: Source, drift: Drift) -> _Change:
    content = _content_of_items(source)
    chosen = sorted(item for item in content if _uniform(item, drift.seed) < (drift.share or 1.0))
    shuffled = np.random.default_rng(drift.seed).permutation(len(chosen)).tolist()
    taken_for = {item: ItemId(chosen[to]) for item, to in zip(chosen, shuffled, strict=True)}

    def change(event: UserEvent, _index: int) -> UserEvent:
        other = taken_for.get(event.item_id)
        if other is None:
            return event
        rest = {name: value for name, value in event.features.items() if name not in content[event.item_id]}
        return msgspec.structs.replace(event, item_id=other, features=rest | content[other])

    return change


def _content_of_items(source: Source) -> dict[str, dict[str, FeatureValue]]:
    """What is known of each item, as its first event says."""
    names = [name for name, feature in source.features.items() if feature.of == "item"]
    found: dict[str, dict[str, FeatureValue]] = {}
    for event in source.events():
        if event.item_id not in found:
            found[event.item_id] = {name: event.features.get(name) for name in names}
    return found


def _thinned(source: Source, drift: Drift) -> _Change:
    feedback = source.feedback

    def change(event: UserEvent, _index: int) -> UserEvent | None:
        (level,) = feedback.level_of([event.label], [event.event_type]).tolist()
        below = 0 <= level < feedback.target_level
        return None if below and _uniform(event.event_id, drift.seed) < _LEFT_OUT else event

    return change
