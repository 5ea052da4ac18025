"""The calibrator in compiled code: what a model with one adds to the logit of a score, from what rows remember.

    p = σ(ℓ + Σₖ aₖ φₖ)     ℓ = α z/√(1 + κ v) + β, the readout's

Numba compiles it into a rule's step where θ's numbers have a calibrator; where they have none, nothing is left of it.
Platt 1999, *Probabilistic outputs for support vector machines*, is the case of the first two terms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import overload

from stream_adapt.learner.rules.compiled import read_out, sigmoid
from stream_adapt.models import Model

#: What a linear calibrator counts on: events before a user's mean miss counts half; weight of no miss at all among the
#: recent ones, an event of this second having 1; beyond ± BEND a logit's cube stays.
MISSED_EVENTS, LATELY_WEIGHT, BEND = 200.0, 2.0, 5.0


def calibrator_numbers(model: Model) -> dict[str, Any]:
    """What θ's numbers of a rule have of a calibrator: nothing, where the model has none."""
    if not model.spec.calibrator_terms:
        return {}
    return {"calibrator": model.weights.calibrator.astype(np.float64), "target": model.spec.feedback.target_level}


def calibrator_fields(terms: int) -> list[tuple[Any, ...]]:
    """Their types, for a calibrator of so many terms: compiled code asks whether they are there.

    They come first: Numba takes a record that only has more fields at its end for one of the kind without them.
    """
    return [("calibrator", "<f8", (terms,)), ("target", "<i8")] if terms else []


def calibration(theta: Any, user: Any, event: Any, variance: Any) -> Any:
    """What a calibrator adds to an event's logit for all but the logit itself, from the row before the event."""
    raise NotImplementedError  # compiled code alone: `_calibration`


@overload(calibration, jit_options={"error_model": "numpy"})
def _calibration(theta, user, event, variance):  # type: ignore[no-untyped-def]
    def nothing(theta, user, event, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        return 0.0

    def linear(theta, user, event, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        lately, weight, second = 0.0, LATELY_WEIGHT, event.time_ms // 1000
        for k in range(min(user.count, user.ring_level.shape[0])):
            near = 1.0 / math.sqrt(1.0 + max(0, second - user.ring_time_s[k]))
            said = read_out(theta, float(user.ring_logit[k]), variance)
            lately += near * ((1.0 if user.ring_level[k] >= theta.target else 0.0) - said)
            weight += near
        gap_s = max(0, event.time_ms - user.last_ms) / 1000.0 if user.count > 0 else 0.0
        a = theta.calibrator
        total = a[0] + a[3] * user.missed / (user.count + MISSED_EVENTS) + a[4] * lately / weight
        return total + a[5] * event.item_mean + a[6] * math.sqrt(variance) + a[7] * math.log1p(gap_s)

    return linear if _calibrates(theta) else nothing


def calibrated(theta: Any, z: Any, variance: Any, added: Any) -> Any:
    """The score: `read_out`, with a calibrator's terms."""
    raise NotImplementedError  # compiled code alone: `_calibrated`


@overload(calibrated, jit_options={"error_model": "numpy"})
def _calibrated(theta, z, variance, added):  # type: ignore[no-untyped-def]
    def plain(theta, z, variance, added):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        return read_out(theta, z, variance)

    def linear(theta, z, variance, added):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        logit = theta.alpha * z / math.sqrt(1.0 + theta.kappa * variance) + theta.beta
        bend = min(max(logit, -BEND), BEND)
        a = theta.calibrator
        return sigmoid(logit + added + a[1] * logit + a[2] * bend * bend * bend)

    return linear if _calibrates(theta) else plain


def uncalibrated(theta: Any, score: Any, z: Any, variance: Any) -> Any:
    """`read_out`, which is the score already where there is no calibrator."""
    raise NotImplementedError  # compiled code alone: `_uncalibrated`


@overload(uncalibrated, jit_options={"error_model": "numpy"})
def _uncalibrated(theta, score, z, variance):  # type: ignore[no-untyped-def]
    def same(theta, score, z, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        return score

    def anew(theta, score, z, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        return read_out(theta, z, variance)

    return anew if _calibrates(theta) else same


def take_note(theta: Any, user: Any, event: Any, z: Any, variance: Any) -> Any:
    """Adds to a learned row what a calibrator will ask of it."""
    raise NotImplementedError  # compiled code alone: `_take_note`


@overload(take_note, jit_options={"error_model": "numpy"})
def _take_note(theta, user, event, z, variance):  # type: ignore[no-untyped-def]
    def nothing(theta, user, event, z, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        pass

    def linear(theta, user, event, z, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        user.missed += (1.0 if event.level >= theta.target else 0.0) - read_out(theta, z, variance)

    return linear if _calibrates(theta) else nothing


def _calibrates(theta: Any) -> bool:
    """Whether θ's numbers, as Numba knows their type, have a calibrator."""
    return "calibrator" in theta.fields
