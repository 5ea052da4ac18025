"""What an update rule is given, and what it gives back: a batch of encoded events, and columns to fill in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Screen(NamedTuple):
    """Which events are told apart by what their user's row remembers, and which of them teach nothing."""

    late_after_ms: int = 0  # how much older than its user's last event learned an event may be without being late
    barred: int = 0  # bits of Flag: an event that has one of them is scored and teaches nothing


#: Late events teach, too, and nobody looks for duplicates.
LEARN_ALL = Screen()


class Events(NamedTuple):
    """A batch of n events in consumption order, encoded."""

    user: Array  # [n] slot of the user's row
    item: Array  # [n] slot of the item's row
    partition: Array  # [n] that the event came from
    known: Array  # [n] the item's row in θ; the last row if it is unknown
    window: Array  # [n] offset // W
    time_ms: Array  # [n]
    level: Array  # [n] or NO_LEVEL
    content: Array  # [n] row of content_vectors
    content_vectors: Array  # [C, D+1] encodings of item features
    prior: Array  # [n] row of prior_vectors
    prior_vectors: Array  # [U, D+1] m₀ + A·a_u
    pointers: Array  # [n+1] of the event features' sparse pairs
    rows: Array  # [k]
    weights: Array  # [k]
    event_hash: Array  # [n] what rings keep of the event's id, 0: nothing
    screen: Screen = LEARN_ALL


class Scores(NamedTuple):
    """What `adapt` fills in; columns of length n."""

    score: Array
    frozen: Array
    updated: Array
    uncertainty: Array
    adaptations: Array
    flags: Array

    @classmethod
    def empty(cls, n: int) -> Scores:
        return cls._make([*(np.empty(n) for _ in range(4)), np.empty(n, np.int64), np.zeros(n, np.uint8)])
