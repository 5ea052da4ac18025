"""The gradient rule, one event at a time: one step of logistic regression with meta-learned rates, compiled.

Rows are records of the slab, float32, and are written in place, if they can hold the numbers; arithmetic is float64,
one event after the other, so that results do not depend on how a stream was cut into batches.

With x̃ = [x + δ ; 1] and w = w₀ + d, everything with an index j learned in θ for each coordinate:

    prior     w₀ = m₀ + A·a_u + B ψ     ψ = Σ f(item) / √((1 + n)(1 + n/512)) of the n events learned
    leak      γⱼ = exp(−(aⱼ + bⱼ·log(1 + Δt/1 h)))     dⱼ ← γⱼ dⱼ
    read      z = b + c + Δc + ⟨w, x̃⟩    q = σ(z)       v_item = V_c + Σⱼ wⱼ² V_δⱼ
    score     p = σ(α z / √(1 + κ v_item) + β)
    learn     e = y_ℓ − q    dⱼ += ηⱼ x̃ⱼ e/N            N = 1, or normalized: 1 + q(1 − q) Σⱼ ηⱼ x̃ⱼ²
    item      h = q(1 − q)   Σ h, Σ e (bias)            Σ w²h, Σ w e (offset), applied in a later window

Sources: MAML (Finn et al. 2017, arXiv 1703.03400), of which only the head is adapted (ANIL, Raghu et al. 2020, arXiv
1909.09157), with learned rates for each coordinate (Meta-SGD, Li et al. 2017, arXiv 1707.09835); the normalized step
is NLMS (Nagumo and Noda 1967) for a logistic loss. The item's sums are of the same loss: gradient and curvature.
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
    sigmoid,
    write_item,
)
from stream_adapt.learner.rules.events import Array, Events, Scores
from stream_adapt.models import Model


def theta_of(model: Model) -> Theta:
    """θ of a loaded model as the compiled code reads it."""
    weights = model.weights
    hidden, width = weights.implicit_map.shape
    numbers = np.zeros(1, _numbers_type(width, len(weights.level_scores), hidden, model.spec.calibrator_terms))
    numbers["normalized"] = model.spec.normalized
    numbers["bias"], numbers["noise"] = weights.bias, weights.noise
    numbers["alpha"], numbers["kappa"], numbers["beta"] = weights.readout
    numbers["bias_variance"], numbers["offset_variance"] = weights.item_variance
    numbers["leak_a"], numbers["leak_b"] = weights.leak
    numbers["rates"], numbers["targets"] = weights.prior_variance, [sigmoid(s) for s in weights.level_scores.tolist()]
    numbers["implicit_map"] = weights.implicit_map.ravel()
    for name, value in calibrator_numbers(model).items():
        numbers[name] = value
    return Theta.of(numbers, weights)


@cache
def _numbers_type(width: int, levels: int, hidden: int, terms: int) -> np.dtype[Any]:
    """θ's numbers: b, σ², readout, an item's first variances; a, b, η `[D+1]` each, y `[L]`, Bᵀ `[H·(D+1)]`, a."""
    single = ("bias", "noise", "alpha", "kappa", "beta", "bias_variance", "offset_variance")
    arrays = [(name, "<f8", (width,)) for name in ("leak_a", "leak_b", "rates")]
    single_fields = [("normalized", "<i8"), *((name, "<f8") for name in single)]
    arrays += [("targets", "<f8", (levels,)), ("implicit_map", "<f8", (hidden * width,))]
    return np.dtype([*calibrator_fields(terms), *single_fields, *arrays])


def adapt(theta: Theta, users: Array, items: Array, events: Events, out: Scores) -> None:
    """`step` for n events in order.

    Args:
        theta: slow weights.
        users: slab of users, changed in place.
        items: slab of items, changed in place.
        events: encoded.
        out: filled in.
    """
    width, hidden = (users[name].shape[1] for name in ("d", "implicit"))
    adapt_with(_adapt, scratch_type(width, hidden), theta, users, items, events, out)


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
    event.frozen = _frozen(theta, event.item_events, c0, s)
    lean(theta, user, s)
    read_item(item, event.window, s)
    _leak(theta, user, event.time_ms, s)

    for j in range(size):
        w[j] = w0[j] + d[j]
        x[j] = x0[j] + s.delta[j]
        square[j] = w[j] * w[j]
    w[size], x[size] = w0[size] + d[size], 1.0
    z = theta.bias + c0 + s.c + dot(w, x, size + 1)
    v_item = s.c_var + dot(square, s.delta_var, size)

    added = calibration(theta, user, event, v_item)
    event.score = calibrated(theta, z, v_item, added)
    event.updated = event.score
    event.uncertainty = math.sqrt(v_item)
    event.flags = screened(user, event)
    if event.level < 0:
        event.flags |= SCORE_ONLY
    elif event.flags & event.barred == 0:
        q = sigmoid(z)
        e, h = theta.targets[event.level] - q, q * (1.0 - q)
        moved, fits = _learn_user(theta, e, h, s)
        if fits and item_fits(1.0, e, s):
            event.updated = calibrated(theta, z + moved, v_item, added)
            take_note(theta, user, event, z, v_item)
            _write_user(user, event, item.hash, z, s)
            write_item(item, event.window, h, e, s)
        else:
            event.flags |= NAN_UNDONE
    event.adaptations = user.count


@inlined
def _leak(theta, user, time_ms, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills d after the leak to the prior. A row that has learned nothing is at its prior already."""
    d, row_d, clock = s.d, user.d, 0.0
    if user.count > 0:
        clock = math.log1p(max(0, time_ms - user.last_ms) / MS_PER_HOUR)
    for j in range(s.size + 1):
        gamma = math.exp(-(theta.leak_a[j] + theta.leak_b[j] * clock)) if user.count > 0 else 0.0
        d[j] = gamma * row_d[j]


@inlined
def _frozen(theta, item_events, c, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The score of the same model without adaptation: d = 0, no offsets, the item's first variances."""
    x0, w0, size = s.x0, s.w0, s.size
    seen = item_events / theta.noise
    variance = 1.0 / (1.0 / theta.bias_variance + seen) + dot(w0, w0, size) / (1.0 / theta.offset_variance + seen)
    return read_out(theta, theta.bias + c + dot(w0, x0, size + 1), variance)


@inlined
def _learn_user(theta, e, h, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """d += η x̃ e/N in the work space; returns by how much ⟨w, x̃⟩ moved, and whether a row can hold it."""
    d, x, g, rates, width = s.d, s.x, s.g, theta.rates, s.size + 1
    for j in range(width):
        g[j] = rates[j] * x[j]
    power = dot(g, x, width)
    gain, unfit = e / (1.0 + h * power) if theta.normalized else e, 0
    for j in range(width):
        d[j] += gain * g[j]
        unfit += not abs(d[j]) < LARGEST  # NaN compares false
    return gain * power, unfit == 0


@inlined
def _write_user(user, event, item_hash, z, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The learned row."""
    d, row_d = s.d, user.d
    for j in range(s.size + 1):
        row_d[j] = d[j]
    remember(user, event, item_hash, z, s)
