"""The Kalman rule, one event at a time: the equations as service runs them, compiled for the CPU.

`step` scores event i with its user's and item's rows and then, if the event carries a level, learns from it;
`adapt` does so for a batch in order. Rows are float32 views of the slab and are written in place; arithmetic is
float64 and strictly sequential, so that results do not depend on how a stream was cut into batches.

With x̃ = [x + δ ; 1], w = w₀ + d, and P kept as its diagonal or its packed lower triangle:

    leak      γ = exp(−(a + b·log(1 + Δt/1 h)))    d ← γ d      P ← γ²P + (1 − γ²)P₀
    read      z = b + c + ⟨w, x̃⟩     v = x̃ᵀP x̃     v_item = V_c + Σⱼ wⱼ² V_δⱼ
    score     p = σ(α z / √(1 + κ(v + v_item)) + β)
    learn     e = s − z     T = v + σ² + v_item     d += P x̃ e/T     P −= P x̃ x̃ᵀP/T
    item      R = v + σ²    Σ 1/R, Σ e/R (bias)    Σ w²/R, Σ w e/R (offset), applied in a later window

Sources: Kalman 1960; the prior is meta-learned as in Harrison et al. 2018 (ALPaCA, arXiv 1807.08912); the leak is an
Ornstein–Uhlenbeck process sampled at the events; the readout is MacKay's 1992 approximation of a logistic-normal
integral with learned constants.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stream_adapt.models import SlowWeights
from stream_adapt.record import Flag

Array = npt.NDArray[Any]

MS_PER_HOUR = 3_600_000.0
#: A row's numbers stay below it, and so do an event's parts of the pending sums: float32 holds 10⁸ of them.
LARGEST = 1e30
_SCORE_ONLY, _NAN_UNDONE, _LATE = int(Flag.SCORE_ONLY), int(Flag.NAN_UNDONE), int(Flag.LATE)


class Theta(NamedTuple):
    """θ as the compiled code reads it; L levels, n known items and a last row of zeros for all others."""

    bias: float  # b
    noise: float  # σ²
    leak_a: float
    leak_b: float
    alpha: float
    kappa: float
    beta: float
    item_bias_variance: float  # V₀ of c
    item_offset_variance: float  # V₀ of each coordinate of δ
    level_scores: Array  # [L] float64
    prior_variance: Array  # [D+1] float64
    item_vector: Array  # [n+1, D+1]
    item_events: Array  # [n+1]
    feature_vector: Array  # [F, D+1]

    @classmethod
    def of(cls, weights: SlowWeights) -> Theta:
        """θ of a loaded model."""
        width = weights.item_vector.shape[1]
        return cls(
            bias=float(weights.bias[0]),
            noise=float(weights.noise[0]),
            leak_a=float(weights.leak[0]),
            leak_b=float(weights.leak[1]),
            alpha=float(weights.readout[0]),
            kappa=float(weights.readout[1]),
            beta=float(weights.readout[2]),
            item_bias_variance=float(weights.item_variance[0]),
            item_offset_variance=float(weights.item_variance[1]),
            level_scores=weights.level_scores.astype(np.float64),
            prior_variance=weights.prior_variance.astype(np.float64),
            item_vector=np.concatenate([weights.item_vector, np.zeros((1, width), np.float32)]),
            item_events=np.concatenate([weights.item_events, np.zeros(1, np.float32)]),
            feature_vector=np.concatenate([weights.feature_vector, np.zeros((1, width), np.float32)]),  # never empty
        )


class UserRows(NamedTuple):
    """Views of the user slab, `layout.user_layout`."""

    last_ms: Array
    count: Array  # type: ignore[assignment]  # not tuple's
    d: Array
    P: Array
    ring_item: Array
    ring_time_s: Array
    ring_level: Array
    ring_logit: Array

    @classmethod
    def of(cls, rows: Array) -> UserRows:
        return cls(*(rows[name] for name in cls._fields))


class ItemRows(NamedTuple):
    """Views of the item slab, `layout.item_layout`."""

    hash: Array
    window: Array
    count: Array  # type: ignore[assignment]  # not tuple's
    pending_count: Array
    c: Array
    c_var: Array
    delta: Array
    delta_var: Array
    c_info: Array
    c_sum: Array
    delta_info: Array
    delta_sum: Array

    @classmethod
    def of(cls, rows: Array) -> ItemRows:
        return cls(*(rows[name] for name in cls._fields))


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


class Scratch(NamedTuple):
    """Work space of one step, float64."""

    x: Array  # [D+1] x̃, with the item's offset
    x0: Array  # [D+1] x̃ without it
    w0: Array  # [D+1]
    w: Array  # [D+1]
    d: Array  # [D+1] after the leak
    P: Array  # as in the row, after the leak
    g: Array  # [D+1] P x̃
    delta: Array  # [D] δ with the pending sums of earlier windows applied
    delta_var: Array  # [D]

    @classmethod
    def for_rows(cls, users: UserRows) -> Scratch:
        width = users.d.shape[1]
        return cls._make(np.empty(n) for n in (*[width] * 5, users.P.shape[1], width, width - 1, width - 1))


@njit(cache=True, error_model="numpy")
def sigmoid(z):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """1/(1 + exp(−z)) without overflow."""
    if z >= 0.0:
        return 1.0 / (1.0 + math.exp(-z))
    return math.exp(z) / (1.0 + math.exp(z))


@njit(cache=True, error_model="numpy")
def read_out(theta, z, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """p = σ(α z/√(1 + κ·variance) + β)."""
    return sigmoid(theta.alpha * z / math.sqrt(1.0 + theta.kappa * variance) + theta.beta)


@njit(cache=True, error_model="numpy")
def _encode(theta, events, i, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills x0 and w0; returns the item's bias under θ."""
    size = s.x.shape[0] - 1
    for j in range(size + 1):
        s.x0[j] = theta.item_vector[events.known[i], j] + events.content_vectors[events.content[i], j]
        s.w0[j] = events.prior_vectors[events.prior[i], j]
    for k in range(events.pointers[i], events.pointers[i + 1]):
        for j in range(size + 1):
            s.x0[j] += events.weights[k] * theta.feature_vector[events.rows[k], j]
    c = s.x0[size]
    s.x0[size] = 1.0
    return c


@njit(cache=True, error_model="numpy")
def _read_item(items, it, window, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills δ and its variances as of the start of `window`; returns Δc and its variance.

    They are rounded as `_write_item` stores them: it makes no difference who is first to touch an item in a window.
    """
    c, c_var = float(items.c[it]), float(items.c_var[it])
    due = items.pending_count[it] > 0 and items.window[it] != window
    if due:
        variance = 1.0 / (1.0 / c_var + items.c_info[it])
        c = float(np.float32(c + variance * items.c_sum[it]))
        c_var = float(np.float32(variance))
    for j in range(s.delta.shape[0]):
        s.delta[j] = items.delta[it, j]
        s.delta_var[j] = items.delta_var[it, j]
        if due:
            variance = 1.0 / (1.0 / s.delta_var[j] + items.delta_info[it, j])
            s.delta[j] = np.float32(s.delta[j] + variance * items.delta_sum[it, j])
            s.delta_var[j] = np.float32(variance)
    return c, c_var


@njit(cache=True, error_model="numpy")
def _leak(theta, users, u, time_ms, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills d and P after the leak to the prior. A row that has learned nothing is at its prior already."""
    width = s.d.shape[0]
    full = s.P.shape[0] != width
    gamma = 0.0
    if users.count[u] > 0:
        hours = max(0, time_ms - users.last_ms[u]) / MS_PER_HOUR
        gamma = math.exp(-(theta.leak_a + theta.leak_b * math.log1p(hours)))
    square = gamma * gamma
    for j in range(width):
        s.d[j] = gamma * users.d[u, j]
    for k in range(s.P.shape[0]):
        s.P[k] = square * users.P[u, k]
    for j in range(width):
        diagonal = j * (j + 3) // 2 if full else j
        s.P[diagonal] += (1.0 - square) * theta.prior_variance[j]


@njit(cache=True, error_model="numpy")
def _times_P(s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled  # noqa: N802
    """g = P x̃; returns v = x̃ᵀP x̃."""
    width = s.d.shape[0]
    if s.P.shape[0] == width:
        for j in range(width):
            s.g[j] = s.P[j] * s.x[j]
    else:
        for j in range(width):
            s.g[j] = 0.0
            start = j * (j + 1) // 2
            for k in range(j):
                s.g[j] += s.P[start + k] * s.x[k]
                s.g[k] += s.P[start + k] * s.x[j]
            s.g[j] += s.P[start + j] * s.x[j]
    v = 0.0
    for j in range(width):
        v += s.g[j] * s.x[j]
    return max(v, 0.0)


@njit(cache=True, error_model="numpy")
def _frozen(theta, events, i, c, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The score of the same model without adaptation: d = 0, P = P₀, no offsets, the item's first variances."""
    size = s.x.shape[0] - 1
    seen = theta.item_events[events.known[i]] / theta.noise
    z = theta.bias + c
    variance = 1.0 / (1.0 / theta.item_bias_variance + seen)
    offset_var = 1.0 / (1.0 / theta.item_offset_variance + seen)
    for j in range(size + 1):
        z += s.w0[j] * s.x0[j]
        variance += theta.prior_variance[j] * s.x0[j] * s.x0[j]
        if j < size:
            variance += s.w0[j] * s.w0[j] * offset_var
    return read_out(theta, z, variance)


@njit(cache=True, error_model="numpy")
def _learn_user(e, total, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """d += g e/T, P −= g gᵀ/T in the scratch; returns the new x̃ᵀP x̃ and whether a row can hold them."""
    width = s.d.shape[0]
    fits, v = True, 0.0
    for j in range(width):
        s.d[j] += s.g[j] * e / total
        fits = fits and abs(s.d[j]) < LARGEST  # NaN compares false
    if s.P.shape[0] == width:
        for j in range(width):
            s.P[j] -= s.g[j] * s.g[j] / total
            v += s.P[j] * s.x[j] * s.x[j]
            fits = fits and abs(s.P[j]) < LARGEST
    else:
        for j in range(width):
            start = j * (j + 1) // 2
            for k in range(j + 1):
                s.P[start + k] -= s.g[j] * s.g[k] / total
                fits = fits and abs(s.P[start + k]) < LARGEST
                v += s.P[start + k] * s.x[j] * s.x[k] * (1.0 if j == k else 2.0)
    return max(v, 0.0), fits


@njit(cache=True, error_model="numpy")
def _item_fits(r, e, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether the pending sums can hold 1/R, e/R, w²/R and w e/R."""
    reach = 1.0
    for j in range(s.w.shape[0]):
        reach = max(reach, abs(s.w[j]))
    return abs(e) < LARGEST and reach * max(reach, abs(e)) / r < LARGEST


@njit(cache=True, error_model="numpy")
def _write_user(users, u, events, i, z, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The learned row, its counters and its ring of recent events."""
    for j in range(s.d.shape[0]):
        users.d[u, j] = s.d[j]
    for k in range(s.P.shape[0]):
        users.P[u, k] = s.P[k]
    at = users.count[u] % users.ring_item.shape[1]
    users.ring_time_s[u, at] = events.time_ms[i] // 1000
    users.ring_level[u, at] = events.level[i]
    users.ring_logit[u, at] = z
    users.last_ms[u] = max(users.last_ms[u], events.time_ms[i])
    users.count[u] += 1
    return at


@njit(cache=True, error_model="numpy")
def _write_item(items, it, window, c, c_var, r, e, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Applies what was due, then adds this event to the sums of its window."""
    if items.window[it] != window:
        items.c[it] = c
        items.c_var[it] = c_var
        items.c_info[it] = 0.0
        items.c_sum[it] = 0.0
        for j in range(s.delta.shape[0]):
            items.delta[it, j] = s.delta[j]
            items.delta_var[it, j] = s.delta_var[j]
            items.delta_info[it, j] = 0.0
            items.delta_sum[it, j] = 0.0
        items.window[it] = window
        items.pending_count[it] = 0
    items.c_info[it] += 1.0 / r
    items.c_sum[it] += e / r
    for j in range(s.delta.shape[0]):
        items.delta_info[it, j] += s.w[j] * s.w[j] / r
        items.delta_sum[it, j] += s.w[j] * e / r
    items.pending_count[it] += 1
    items.count[it] += 1


@njit(cache=True, error_model="numpy")
def step(theta, users, items, events, out, i, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Scores event i, then learns from it if it carries a level."""
    u, it, size = events.user[i], events.item[i], s.x.shape[0] - 1
    c0 = _encode(theta, events, i, s)
    dc, c_var = _read_item(items, it, events.window[i], s)
    _leak(theta, users, u, events.time_ms[i], s)

    z, v_item = theta.bias + c0 + dc, c_var
    for j in range(size + 1):
        s.w[j] = s.w0[j] + s.d[j]
        s.x[j] = s.x0[j] + (s.delta[j] if j < size else 0.0)
        z += s.w[j] * s.x[j]
        if j < size:
            v_item += s.w[j] * s.w[j] * s.delta_var[j]
    v = _times_P(s)

    out.score[i] = read_out(theta, z, v + v_item)
    out.updated[i] = out.score[i]
    out.frozen[i] = _frozen(theta, events, i, c0, s)
    out.uncertainty[i] = math.sqrt(v + v_item)
    out.flags[i] = 0
    if users.count[u] > 0 and events.time_ms[i] < users.last_ms[u]:
        out.flags[i] |= _LATE
    if events.level[i] < 0:
        out.flags[i] |= _SCORE_ONLY
    else:
        e, r = theta.level_scores[events.level[i]] - z, v + theta.noise
        v_new, fits = _learn_user(e, r + v_item, s)
        if fits and _item_fits(r, e, s):
            z_new = z
            for j in range(size + 1):
                z_new += (s.w0[j] + s.d[j] - s.w[j]) * s.x[j]
            out.updated[i] = read_out(theta, z_new, v_new + v_item)
            at = _write_user(users, u, events, i, z, s)
            users.ring_item[u, at] = items.hash[it]
            _write_item(items, it, events.window[i], dc, c_var, r, e, s)
        else:
            out.flags[i] |= _NAN_UNDONE
    out.adaptations[i] = users.count[u]


@njit(cache=True, error_model="numpy", nogil=True)
def adapt(theta, users, items, events, out, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """`step` for every event of the batch, in order."""
    for i in range(events.user.shape[0]):
        step(theta, users, items, events, out, i, s)
