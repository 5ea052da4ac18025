"""Feedback is a level: one of L ordered levels, from the least to the most that a user can say of an item.

An explicit label is cut into levels; without one the event type may stand for a level; with neither the event is
scored and teaches nothing. The target is a yes or no: `level >= target`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from stream_adapt.errors import ConfigError
from stream_adapt.record import NO_LEVEL

#: Levels are counted from 0 in 8 bits with a sign.
MOST_LEVELS = 128


class LabelCuts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a numeric label becomes a level: `level = number of cuts <= label`.

    Stars 1–5 as five levels: `range: [1, 5]`, `cuts: [2, 3, 4, 5]`. Yes or no: `range: [0, 1]`, `cuts: [1]`.
    """

    range: tuple[float, float]
    cuts: tuple[float, ...]


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ordered levels, at most 128, what maps to them, and from which level on the target is 1."""

    levels: tuple[str, ...] = ("no", "yes")
    target: str = "yes"
    label: LabelCuts | None = LabelCuts((0.0, 1.0), (1.0,))
    event_types: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ConfigError(f"feedback: {problem}")

    def _problems(self) -> list[str]:
        problems = []
        if len(self.levels) < 2 or len(set(self.levels)) != len(self.levels):
            problems.append(f"levels={list(self.levels)} must be two or more different names, least first")
        if len(self.levels) > MOST_LEVELS:
            problems.append(f"{len(self.levels)} levels are more than {MOST_LEVELS}: cut the label less finely")
        if self.target not in self.levels[1:]:
            problems.append(f"target={self.target!r} must be one of {list(self.levels[1:])}")
        for event_type, level in self.event_types.items():
            if level not in self.levels:
                problems.append(f"event_types.{event_type}={level!r} is not one of levels={list(self.levels)}")
        if self.label is not None:
            problems += self._label_problems(self.label)
        elif not self.event_types:
            problems.append("neither label nor event_types maps anything to a level: nothing would be learned")
        return problems

    def _label_problems(self, label: LabelCuts) -> list[str]:
        low, high = label.range
        problems = []
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            problems.append(f"label.range={[low, high]} must be two finite numbers, the lower first")
        if len(label.cuts) != len(self.levels) - 1:
            problems.append(f"label.cuts has {len(label.cuts)} cuts; {len(self.levels)} levels need one fewer")
        if any(a >= b for a, b in pairwise(label.cuts)) or any(not low <= cut <= high for cut in label.cuts):
            problems.append(f"label.cuts={list(label.cuts)} must rise and lie inside label.range={[low, high]}")
        return problems

    @property
    def target_level(self) -> int:
        """Index of the first level whose target is 1."""
        return self.levels.index(self.target)

    def level_of(self, labels: Sequence[float | None], event_types: Sequence[str]) -> npt.NDArray[np.int8]:
        """Levels `[n]` of labels `[n]` (None: not given) and event types `[n]`; NO_LEVEL where neither maps."""
        levels = self._levels_of_types(event_types)
        if self.label is None:
            return levels
        values = np.array(labels, dtype=np.float64)  # None becomes NaN
        cut = np.searchsorted(np.asarray(self.label.cuts), values, side="right")
        return np.where(np.isnan(values), levels, cut).astype(np.int8)

    def _levels_of_types(self, event_types: Sequence[str]) -> npt.NDArray[np.int8]:
        if not self.event_types:
            return np.full(len(event_types), NO_LEVEL, dtype=np.int8)
        table = {event_type: self.levels.index(level) for event_type, level in self.event_types.items()}
        return np.array([table.get(event_type, NO_LEVEL) for event_type in event_types], dtype=np.int8)
