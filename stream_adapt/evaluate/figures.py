"""The figures of one method: how well its probabilities, said before each outcome was known, did on some events.

Each has the name that `stream-adapt replay --json` gives it. Over several seeds a figure is the mean, and its spread
is the largest value less the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.metrics import Floats, Longs

#: Bins of the expected calibration error.
CALIBRATION_BINS = 20

#: What has a spread.
NAMES = ("auc", "logloss", "ece", "gauc", "accuracy", "precision", "recall", "f1")


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """Users' `n_from`-th to `n_to`-th events (None: and all later ones), counted from their first of the whole log."""

    n_from: int
    n_to: int | None
    events: int
    logloss: float
    auc: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """How good n probabilities were. Precision, recall, F1 and accuracy call a yes what is at or above `threshold`."""

    auc: float
    logloss: float
    ece: float
    gauc: float
    accuracy: float
    precision: float
    recall: float
    f1: float
    threshold: float
    cold_start: list[ColdStart]
    train_s: float | None = None  # to learn from the first half; None: it came ready
    events_per_s: float | None = None  # scored and learned in the second half; None: not a method of its own


class Outcomes(msgspec.Struct, frozen=True):
    """What happened: columns of n events with feedback, in the order of time."""

    targets: Longs  # [n] 0 or 1
    users: Longs  # [n] a number for each user
    nth: Longs  # [n] which of its user's events each is, from 1

    def __len__(self) -> int:
        return len(self.targets)


def figures(
    probabilities: Floats,
    outcomes: Outcomes,
    threshold: float,
    train_s: float | None = None,
    events_per_s: float | None = None,
) -> Figures:
    """Figures of probabilities `[n]` against what happened."""
    targets = outcomes.targets
    said = probabilities >= threshold  # [n]
    right = float((said & (targets == 1)).sum())
    precision, recall = _share(right, said.sum()), _share(right, targets.sum())
    return Figures(
        auc=metrics.auc(probabilities, targets),
        logloss=metrics.log_loss(probabilities, targets),
        ece=metrics.calibration_error(probabilities, targets, CALIBRATION_BINS),
        gauc=metrics.grouped_auc(probabilities, targets, outcomes.users),
        accuracy=_share(float((said == (targets == 1)).sum()), len(targets)),
        precision=precision,
        recall=recall,
        f1=_share(2 * right, said.sum() + targets.sum()),
        threshold=threshold,
        cold_start=_cold_start(probabilities, outcomes),
        train_s=train_s,
        events_per_s=events_per_s,
    )


def best_threshold(probabilities: Floats, targets: Longs) -> float:
    """The probability from which on a yes has the highest F1; 0.5 where there is no yes to be found."""
    if not targets.sum():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    said = probabilities[order]
    right = np.cumsum(targets[order])  # [n] yeses among the k highest
    f1 = 2 * right / (np.arange(1, len(said) + 1) + targets.sum())
    last_of_equals = np.append(said[1:] != said[:-1], True)
    return float(said[np.argmax(np.where(last_of_equals, f1, -1.0))])


def mean(of: Sequence[Figures]) -> Figures:
    """The mean of each figure over several runs on the same events."""
    curves = zip(*(one.cold_start for one in of), strict=True)
    return Figures(
        **{name: _mean([getattr(one, name) for one in of]) for name in (*NAMES, "threshold")},
        cold_start=[_mean_bucket(buckets) for buckets in curves],
        train_s=_mean_or_none([one.train_s for one in of]),
        events_per_s=_mean_or_none([one.events_per_s for one in of]),
    )


def spread(of: Sequence[Figures]) -> dict[str, float]:
    """The largest less the smallest of each figure over several runs; 0 for one."""
    columns = {name: [getattr(one, name) for one in of] for name in NAMES}
    return {name: max(column) - min(column) for name, column in columns.items()}


def _cold_start(probabilities: Floats, outcomes: Outcomes) -> list[ColdStart]:
    curve = metrics.by_nth_event(metrics.losses(probabilities, outcomes.targets), outcomes.nth)
    return [
        ColdStart(
            n_from=bucket.first,
            n_to=bucket.last,
            events=bucket.events,
            logloss=bucket.value,
            auc=metrics.auc(probabilities[inside], outcomes.targets[inside]),
        )
        for bucket in curve
        for inside in [(outcomes.nth >= bucket.first) & (outcomes.nth <= (bucket.last or math.inf))]
    ]


def _mean_bucket(of: Sequence[ColdStart]) -> ColdStart:
    logloss, auc = _mean([one.logloss for one in of]), _mean([one.auc for one in of])
    return msgspec.structs.replace(of[0], logloss=logloss, auc=auc)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
