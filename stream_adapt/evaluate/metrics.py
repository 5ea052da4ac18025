"""Figures of probabilities against outcomes: AUC, log-loss, calibration, and the cold-start curve.

n events, G groups (users). Probabilities are that the outcome, 0 or 1, is 1. Where a figure does not exist (no events,
or for AUC only one kind of outcome) it is NaN, never a made-up 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from itertools import zip_longest

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

#: A probability of exactly 0 or 1 that turns out wrong costs −log of this (about 16), not infinity.
CLIP = 1e-7

#: First n of each bucket of the cold-start curve; the last one is open.
COLD_START_FROM = (1, 2, 5, 10, 20, 40, 50, 100)


class Bucket(msgspec.Struct, frozen=True):
    """Users' `first`-th to `last`-th events (None: and all later ones)."""

    first: int
    last: int | None
    events: int
    value: float

    @property
    def name(self) -> str:
        if self.last is None:
            return f"{self.first}+"
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


def auc(scores: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a 1 is scored above a 0, ties counting half.

    By the ranks of the 1s (Mann and Whitney, 1947), equal scores sharing their mean rank: O(n log n).

    Args:
        scores: `[n]`, probabilities or anything else that ranks.
        outcomes: `[n]`, 0 or 1.
    """
    said, happened = _columns(scores, outcomes)
    yes = int(happened.sum())
    no = len(happened) - yes
    if not yes or not no:
        return math.nan
    _, group, sizes = np.unique(said, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]  # [n] from 1, equal scores share the mean
    return float((ranks[happened == 1].sum() - yes * (yes + 1) / 2) / (yes * no))


def grouped_auc(scores: npt.ArrayLike, outcomes: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """AUC within each group (GAUC), averaged with the groups' events as weights.

    Knowing that one user likes more than another does not help here: this is what is personal about a ranking.
    Groups with one kind of outcome alone have no AUC and are left out.

    Args:
        scores: `[n]`.
        outcomes: `[n]`, 0 or 1.
        groups: `[n]`, a whole number per group.
    """
    said, happened = _columns(scores, outcomes)
    of = np.asarray(groups)
    order = np.argsort(of, kind="stable")
    ends = np.flatnonzero(np.diff(of[order])) + 1
    parts = [part for part in np.split(order, ends) if len(part)]
    figures = [(auc(said[part], happened[part]), len(part)) for part in parts]
    weights = sum(size for value, size in figures if not math.isnan(value))
    return sum(value * size for value, size in figures if not math.isnan(value)) / weights if weights else math.nan


def losses(probabilities: npt.ArrayLike, outcomes: npt.ArrayLike) -> Floats:
    """Each event's log-loss `[n]`, natural logarithm; probabilities are kept `CLIP` away from 0 and 1."""
    said, happened = _columns(probabilities, outcomes)
    clipped = np.clip(said, CLIP, 1 - CLIP)
    return np.asarray(-np.log(np.where(happened == 1, clipped, 1 - clipped)))


def log_loss(probabilities: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
    """Mean of `losses`."""
    return _mean(losses(probabilities, outcomes))


def calibration_error(probabilities: npt.ArrayLike, outcomes: npt.ArrayLike, bins: int = 20) -> float:
    """Expected calibration error: |mean probability − share of 1s| in bins of equal width, weighted by events.

    Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.
    """
    said, happened = _columns(probabilities, outcomes)
    if not len(said):
        return math.nan
    where = np.minimum((said * bins).astype(np.int64), bins - 1)  # [n]
    gaps = np.bincount(where, weights=said - happened, minlength=bins)  # [bins]
    return float(np.abs(gaps).sum() / len(said))


def nth_events(groups: Iterable[Hashable]) -> Longs:
    """Which of its group's events each one is `[n]`, from 1, in the order given."""
    seen: dict[Hashable, int] = {}
    numbers = []
    for group in groups:
        seen[group] = seen.get(group, 0) + 1
        numbers.append(seen[group])
    return np.array(numbers, dtype=np.int64)


def by_nth_event(values: npt.ArrayLike, nth: npt.ArrayLike, starts: tuple[int, ...] = COLD_START_FROM) -> list[Bucket]:
    """Mean of values `[n]` in buckets of their users' n-th events: with `losses` the cold-start curve.

    Args:
        values: `[n]`.
        nth: `[n]`, which of its user's events each is, from 1.
        starts: first n of each bucket, rising. Buckets without events are there, with NaN.
    """
    column, numbers = np.asarray(values, dtype=np.float64), np.asarray(nth)
    buckets = []
    for first, after in zip_longest(starts, starts[1:]):
        inside = column[(numbers >= first) & (True if after is None else numbers < after)]
        buckets.append(Bucket(first, None if after is None else after - 1, len(inside), _mean(inside)))
    return buckets


def _columns(values: npt.ArrayLike, outcomes: npt.ArrayLike) -> tuple[Floats, Floats]:
    said, happened = np.asarray(values, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if said.shape != happened.shape or said.ndim != 1:
        raise ValueError(f"values {said.shape} and outcomes {happened.shape} must be columns of one length")
    return said, happened


def _mean(column: Floats) -> float:
    return float(column.mean()) if len(column) else math.nan
