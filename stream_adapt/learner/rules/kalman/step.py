"""The Kalman rule, one event at a time: the equations as service runs them, compiled for the CPU.

`step` scores one event with its user's and item's rows and then, if the event carries a level, learns from it;
`adapt` does so for a batch in order. Rows are records of the slab, float32, and are written in place; arithmetic is
float64, one event after the other, so that results do not depend on how a stream was cut into batches.

With x̃ = [x + δ ; 1], w = w₀ + d, and P kept as its diagonal or its packed lower triangle:

    prior     w₀ = m₀ + A·a_u + B ψ     ψ = Σ f(item) / √((1 + n)(1 + n/512)) of the n events learned
    leak      γ = exp(−(a + b·log(1 + Δt/1 h)))    d ← γ d      P ← γ²P + (1 − γ²)P₀
    read      z = b + c + ⟨w, x̃⟩     v = x̃ᵀP x̃     v_item = V_c + Σⱼ wⱼ² V_δⱼ
    score     p = σ(α z / √(1 + κ(v + v_item)) + β)
    weigh     e = s − z     T = v + σ²_ℓ + v_item     α' = α/√(1 + κ(v + v_item))     y: whether the target is reached
              u = (1 − λ) e/T + λ α'(y − p)     h = (1 − λ)/T + λ α'² p(1 − p)
    learn     d += P x̃ u     P −= h P x̃ x̃ᵀP
    item      q = h/(1 − h v_item)    a = u/(1 − h v_item)    Σ q, Σ a (bias)    Σ w² q, Σ w a (offset), applied in a
              later window

Sources: Kalman 1960; the prior is meta-learned as in Harrison et al. 2018 (ALPaCA, arXiv 1807.08912); the leak is an
Ornstein–Uhlenbeck process sampled at the events; the readout is MacKay's 1992 approximation of a logistic-normal
integral with learned constants. With λ > 0 an event is learned as two that count 1 − λ and λ: as an observation of its
level's score, and as the outcome that p predicted, by the slope and the curvature of log p.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from stream_adapt.learner.rules.calibrator import (
    calibrated,
    calibration,
    calibrator_fields,
    calibrator_numbers,
    take_note,
    uncalibrated,
)
from stream_adapt.learner.rules.compiled import (
    LARGEST,
    MS_PER_HOUR,
    NAN_UNDONE,
    SCORE_ONLY,
    Theta,
    adapt_with,
    dot,
    encode,
    fetch_ahead,
    inlined,
    item_fits,
    lean,
    next_event,
    read_item,
    read_out,
    remember,
    scratch_type,
    screened,
    write_item,
)
from stream_adapt.learner.rules.events import Array, Events, Scores
from stream_adapt.models import Model

#: What an event tells is held below that of an observation with so much of σ²_ℓ: P stays positive where κ is small.
LEAST_NOISE = 0.25


def theta_of(model: Model) -> Theta:
    """θ of a loaded model as the compiled code reads it."""
    weights = model.weights
    hidden, width = weights.implicit_map.shape
    numbers = np.zeros(1, _numbers_type(width, len(weights.level_scores), hidden, model.spec.calibrator_terms))
    numbers["bias"], numbers["noise"] = weights.bias, weights.noise
    numbers["leak_a"], numbers["leak_b"] = weights.leak
    numbers["alpha"], numbers["kappa"], numbers["beta"] = weights.readout
    numbers["bias_variance"], numbers["offset_variance"] = weights.item_variance
    numbers["prior_variance"], numbers["level_scores"] = weights.prior_variance, weights.level_scores
    numbers["level_noise"] = np.multiply(weights.noise, weights.level_noise, dtype=np.float64)
    numbers["outcome_weight"] = weights.outcome_weight
    numbers["reached"] = np.arange(len(weights.level_scores)) >= model.spec.feedback.target_level
    numbers["implicit_map"] = weights.implicit_map.ravel()
    for name, value in calibrator_numbers(model).items():
        numbers[name] = value
    return Theta.of(numbers, weights)


def adapt(theta: Theta, users: Array, items: Array, events: Events, out: Scores) -> None:
    """`step` for n events in order.

    Args:
        theta: slow weights.
        users: slab of users, changed in place.
        items: slab of items, changed in place.
        events: encoded.
        out: filled in.
    """
    width, hidden, floats = (users[name].shape[1] for name in ("d", "implicit", "P"))
    adapt_with(_adapt, scratch_type(width, hidden, floats), theta, users, items, events, out)


@cache
def _numbers_type(width: int, levels: int, hidden: int, terms: int) -> np.dtype[Any]:
    """θ's numbers.

    b, σ², leak, readout, an item's first variances, λ, P₀ `[D+1]`, Bᵀ `[H·(D+1)]`, s, σ²_ℓ and y `[L]`, a `[K]`.
    """
    single = ["bias", "noise", "leak_a", "leak_b", "alpha", "kappa", "beta"]
    single += ["bias_variance", "offset_variance", "outcome_weight"]
    arrays = [("prior_variance", "<f8", (width,)), ("implicit_map", "<f8", (hidden * width,))]
    arrays += [(name, "<f8", (levels,)) for name in ("level_scores", "level_noise", "reached")]
    return np.dtype([*calibrator_fields(terms), *((name, "<f8") for name in single), *arrays])


@njit(cache=True, error_model="numpy", nogil=True)
def _adapt(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    theta, users, items, event, scratch,
    user, item, window, time_ms, level, event_hash, item_events, item_mean,
    known, item_vector, content, content_vectors, prior, prior_vectors, pointers, rows, weights, feature_vector,
    implicit_item,
    score, frozen, updated, uncertainty, adaptations, flags,
):  # fmt: skip
    """Encodes every event into the work space, and takes its step."""
    s, e = scratch[0], event[0]
    for i in range(user.shape[0]):
        fetch_ahead(
            i, users, items, user, item, known, item_vector, content, content_vectors, prior, prior_vectors,
            implicit_item,
        )  # fmt: skip
        next_event(i, e, known, window, time_ms, level, event_hash, item_events, item_mean)
        encode(
            i, s, known, item_vector, content, content_vectors, prior, prior_vectors,
            pointers, rows, weights, feature_vector, implicit_item,
        )  # fmt: skip
        step(theta[0], users[user[i]], items[item[i]], e, s)
        score[i], frozen[i], updated[i], uncertainty[i] = e.score, e.frozen, e.updated, e.uncertainty
        adaptations[i], flags[i] = e.adaptations, e.flags


@inlined
def step(theta, user, item, event, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Scores an event that is encoded in `s`, then learns from it if it carries a level."""
    x0, x, w0, w, d, square, size = s.x0, s.x, s.w0, s.w, s.d, s.square, s.size
    c0 = x0[size]  # the item's bias under θ lies where x̃ has its 1
    x0[size] = 1.0
    gamma = _gamma(theta, user, event.time_ms)
    event.frozen = _frozen(theta, event.item_events, c0, s)
    lean(theta, user, s)
    read_item(item, event.window, s)
    _leak(theta, user, gamma, s)

    for j in range(size):
        w[j] = w0[j] + d[j]
        x[j] = x0[j] + s.delta[j]
        square[j] = w[j] * w[j]
    w[size], x[size] = w0[size] + d[size], 1.0
    z = theta.bias + c0 + s.c + dot(w, x, size + 1)
    v_item = s.c_var + dot(square, s.delta_var, size)
    v = _times_P(s)

    added = calibration(theta, user, event, v + v_item)
    event.score = calibrated(theta, z, v + v_item, added)
    event.updated = event.score
    event.uncertainty = math.sqrt(v + v_item)
    event.flags = screened(user, event)
    if event.level < 0:
        event.flags |= SCORE_ONLY
    elif event.flags & event.barred == 0:
        p = uncalibrated(theta, event.score, z, v + v_item)
        u, h = _weighed(theta, event.level, z, v + v_item, p)
        rest = 1.0 / (1.0 - h * v_item)
        q, a = h * rest, u * rest
        v_new, fits = _learn_user(u, h, v, s)
        if fits and item_fits(q, a, s):
            event.updated = calibrated(theta, z + v * u, v_new + v_item, added)
            take_note(theta, user, event, z, v + v_item)
            _write_user(user, event, item.hash, z, s)
            write_item(item, event.window, q, a, s)
        else:
            event.flags |= NAN_UNDONE
    event.adaptations = user.count


@inlined
def _gamma(theta, user, time_ms):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """γ of the leak; 0 for a row that has learned nothing, which is at its prior already."""
    if user.count == 0:
        return 0.0
    hours = max(0, time_ms - user.last_ms) / MS_PER_HOUR
    return math.exp(-(theta.leak_a + theta.leak_b * math.log1p(hours)))


@inlined
def _leak(theta, user, gamma, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills d and P after the leak to the prior."""
    d, P, row_d, row_P, prior = s.d, s.P, user.d, user.P, theta.prior_variance  # noqa: N806
    width, square = s.size + 1, gamma * gamma
    for j in range(width):
        d[j] = gamma * row_d[j]
    for k in range(s.floats):
        P[k] = square * row_P[k]
    if P.shape[0] == d.shape[0]:
        for j in range(width):
            P[j] += (1.0 - square) * prior[j]
    else:
        for j in range(width):
            P[j * (j + 3) // 2] += (1.0 - square) * prior[j]


@inlined
def _times_P(s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled  # noqa: N802
    """g = P x̃; returns v = x̃ᵀP x̃."""
    x, g, P, width = s.x, s.g, s.P, s.size + 1  # noqa: N806
    if P.shape[0] == x.shape[0]:
        for j in range(width):
            g[j] = P[j] * x[j]
    else:
        for j in range(width):
            start = j * (j + 1) // 2
            for k in range(j):
                g[k] += P[start + k] * x[j]
            g[j] = _row_dot(P, start, x, j + 1)
    return max(dot(g, x, width), 0.0)


@inlined
def _row_dot(P, start, x, n):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled  # noqa: N803
    """Σ P[start + j]·xⱼ of n numbers: rows of a triangle are too short for vectors, four sums side by side are not."""
    first, second, third, fourth, fours = 0.0, 0.0, 0.0, 0.0, n - n % 4
    for j in range(0, fours, 4):
        at = start + j
        first += P[at] * x[j]
        second += P[at + 1] * x[j + 1]
        third += P[at + 2] * x[j + 2]
        fourth += P[at + 3] * x[j + 3]
    for j in range(fours, n):
        first += P[start + j] * x[j]
    return (first + second) + (third + fourth)


@inlined
def _frozen(theta, item_events, c, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The score of the same model without adaptation: d = 0, P = P₀, no offsets, the item's first variances."""
    x0, w0, square, size = s.x0, s.w0, s.square, s.size
    seen = item_events / theta.noise
    for j in range(size + 1):
        square[j] = x0[j] * x0[j]
    variance = 1.0 / (1.0 / theta.bias_variance + seen) + dot(theta.prior_variance, square, size + 1)
    variance += dot(w0, w0, size) / (1.0 / theta.offset_variance + seen)
    return read_out(theta, theta.bias + c + dot(w0, x0, size + 1), variance)


@inlined
def _weighed(theta, level, z, variance, p):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """u and h: how far an event of a level moves its logit for each unit of variance, and what it tells."""
    share, noise = theta.outcome_weight, theta.level_noise[level]
    slope = theta.alpha / math.sqrt(1.0 + theta.kappa * variance)
    precision = (1.0 - share) / (variance + noise)
    u = precision * (theta.level_scores[level] - z) + share * slope * (theta.reached[level] - p)
    h = precision + share * slope * slope * p * (1.0 - p)
    most = variance + LEAST_NOISE * noise
    return u, h if h * most <= 1.0 else 1.0 / most


@inlined
def _learn_user(u, h, v, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """d += u g, P −= h g gᵀ in the work space; returns the new x̃ᵀP x̃ and whether a row can hold them."""
    d, g, x, P, square = s.d, s.g, s.x, s.P, s.square  # noqa: N806
    width, unfit = s.size + 1, 0
    for j in range(width):
        d[j] += u * g[j]
        unfit += not abs(d[j]) < LARGEST  # NaN compares false
    if P.shape[0] == d.shape[0]:
        for j in range(width):
            P[j] -= h * g[j] * g[j]
            square[j] = x[j] * x[j]
            unfit += not abs(P[j]) < LARGEST
        left = dot(P, square, width)
    else:
        for j in range(width):
            start = j * (j + 1) // 2
            scaled = h * g[j]
            for k in range(j + 1):
                P[start + k] -= scaled * g[k]
                unfit += not abs(P[start + k]) < LARGEST
        left = v * (1.0 - h * v)  # of the diagonal this is not true
    return max(left, 0.0), unfit == 0


@inlined
def _write_user(user, event, item_hash, z, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The learned row."""
    d, P, row_d, row_P = s.d, s.P, user.d, user.P  # noqa: N806
    for j in range(s.size + 1):
        row_d[j] = d[j]
    for k in range(s.floats):
        row_P[k] = P[k]
    remember(user, event, item_hash, z, s)
