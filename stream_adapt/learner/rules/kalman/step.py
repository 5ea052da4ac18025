"""The Kalman rule, one event at a time: the equations as service runs them, compiled for the CPU.

`step` scores one event with its user's and item's rows and then, if the event carries a level, learns from it;
`adapt` does so for a batch in order. Rows are records of the slab, float32, and are written in place; arithmetic is
float64 and strictly sequential, so that results do not depend on how a stream was cut into batches.

All that a step touches is a record (θ's numbers, a user, an item, the event, the work space): compiled code takes
records by address, where a tuple of arrays costs a reference count for each array at every call.

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
from collections.abc import Callable
from functools import cache
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
#: Bits of Flag, as compiled code takes them.
SCORE_ONLY, NAN_UNDONE, LATE = int(Flag.SCORE_ONLY), int(Flag.NAN_UNDONE), int(Flag.LATE)


class Theta(NamedTuple):
    """θ as the compiled code reads it: its numbers in one record, and the tables that events look things up in."""

    numbers: Array  # [1] of `_numbers_type`
    item_vector: Array  # [n+1, D+1] of n known items, and a last row of zeros for all others
    item_events: Array  # [n+1]
    feature_vector: Array  # [F+1, D+1]; the last row, of zeros, keeps it from being empty

    @classmethod
    def of(cls, weights: SlowWeights) -> Theta:
        """θ of a loaded model."""
        numbers = np.zeros(1, numbers_type(len(weights.prior_variance), len(weights.level_scores)))
        numbers["bias"], numbers["noise"] = weights.bias, weights.noise
        numbers["leak_a"], numbers["leak_b"] = weights.leak
        numbers["alpha"], numbers["kappa"], numbers["beta"] = weights.readout
        numbers["bias_variance"], numbers["offset_variance"] = weights.item_variance
        numbers["prior_variance"], numbers["level_scores"] = weights.prior_variance, weights.level_scores
        return cls.of_numbers(numbers, weights)

    @classmethod
    def of_numbers(cls, numbers: Array, weights: SlowWeights) -> Theta:
        """A rule's numbers beside the tables of a loaded model."""
        tables = (weights.item_vector, weights.item_events, weights.feature_vector)
        return cls(numbers, *(np.concatenate([t, np.zeros((1, *t.shape[1:]), t.dtype)]) for t in tables))


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


def adapt(theta: Theta, users: Array, items: Array, events: Events, out: Scores) -> None:
    """`step` for n events in order.

    Args:
        theta: slow weights.
        users: slab of users, changed in place.
        items: slab of items, changed in place.
        events: encoded.
        out: filled in.
    """
    adapt_with(_adapt, scratch_type(users["d"].shape[1], users["P"].shape[1]), theta, users, items, events, out)


def adapt_with(
    compiled: Callable[..., None],
    scratch: np.dtype[Any],
    theta: Theta,
    users: Array,
    items: Array,
    events: Events,
    out: Scores,
) -> None:
    """Runs a rule's compiled loop over n events, with a work space of its own."""
    seen = np.zeros(len(events.user), EVENT_TYPE)
    for name in ("user", "item", "window", "time_ms", "level"):
        seen[name] = getattr(events, name)
    seen["item_events"] = theta.item_events[events.known]
    compiled(
        theta.numbers, users, items, seen, np.zeros(1, scratch),
        events.known, theta.item_vector, events.content, events.content_vectors, events.prior, events.prior_vectors,
        events.pointers, events.rows, events.weights, theta.feature_vector,
    )  # fmt: skip
    for name, column in zip(out._fields, out, strict=True):
        column[:] = seen[name]


#: One event and what is said of it.
EVENT_TYPE = np.dtype(
    [(name, "<i8") for name in ("user", "item", "window", "time_ms", "level", "adaptations", "flags")]
    + [(name, "<f8") for name in ("item_events", "score", "frozen", "updated", "uncertainty")]
)


@cache
def numbers_type(width: int, levels: int) -> np.dtype[Any]:
    """θ's numbers: b, σ², leak, readout, an item's first variances, P₀ `[D+1]`, s `[L]`."""
    single = ("bias", "noise", "leak_a", "leak_b", "alpha", "kappa", "beta", "bias_variance", "offset_variance")
    arrays = [("prior_variance", "<f8", (width,)), ("level_scores", "<f8", (levels,))]
    return np.dtype([*((name, "<f8") for name in single), *arrays])


@cache
def scratch_type(width: int, floats: int) -> np.dtype[Any]:
    """Work space of one step.

    x0, x: x̃ without and with the item's offset. w0, w, d, P: as in the equations, after the leak. g = P x̃. c, c_var,
    delta, delta_var: the item's deviation from θ, with the pending sums of earlier windows applied.
    """
    of_width = [(name, "<f8", (width,)) for name in ("x0", "x", "w0", "w", "d", "g")]
    of_item = [("delta", "<f8", (width - 1,)), ("delta_var", "<f8", (width - 1,)), ("c", "<f8"), ("c_var", "<f8")]
    covariance = [("P", "<f8", (floats,))] if floats else []
    return np.dtype([*of_width, *covariance, *of_item])


@njit(cache=True, error_model="numpy", nogil=True)
def _adapt(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    theta, users, items, events, scratch,
    known, item_vector, content, content_vectors, prior, prior_vectors, pointers, rows, weights, feature_vector,
):  # fmt: skip
    """Encodes every event into the work space, and takes its step."""
    s = scratch[0]
    for i in range(events.shape[0]):
        encode(
            i, s, known, item_vector, content, content_vectors, prior, prior_vectors,
            pointers, rows, weights, feature_vector,
        )  # fmt: skip
        step(theta[0], users[events[i].user], items[events[i].item], events[i], s)


@njit(cache=True, error_model="numpy")
def encode(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    i, s, known, item_vector, content, content_vectors, prior, prior_vectors, pointers, rows, weights, feature_vector
):
    """Fills x̃ without the item's offset, with the item's bias under θ where x̃ has its 1, and the prior mean w₀."""
    x0, w0 = s.x0, s.w0
    for j in range(x0.shape[0]):
        x0[j] = item_vector[known[i], j] + content_vectors[content[i], j]
        w0[j] = prior_vectors[prior[i], j]
    for k in range(pointers[i], pointers[i + 1]):
        for j in range(x0.shape[0]):
            x0[j] += weights[k] * feature_vector[rows[k], j]


@njit(cache=True, error_model="numpy")
def step(theta, user, item, event, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Scores an event that is encoded in `s`, then learns from it if it carries a level."""
    x0, x, w0, w, d = s.x0, s.x, s.w0, s.w, s.d
    size = x.shape[0] - 1
    c0 = x0[size]  # the item's bias under θ lies where x̃ has its 1
    x0[size] = 1.0
    read_item(item, event.window, s)
    _leak(theta, user, event.time_ms, s)

    z, v_item = theta.bias + c0 + s.c, s.c_var
    for j in range(size + 1):
        w[j] = w0[j] + d[j]
        x[j] = x0[j] + (s.delta[j] if j < size else 0.0)
        z += w[j] * x[j]
        if j < size:
            v_item += w[j] * w[j] * s.delta_var[j]
    v = _times_P(s)

    event.score = read_out(theta, z, v + v_item)
    event.updated = event.score
    event.frozen = _frozen(theta, event.item_events, c0, s)
    event.uncertainty = math.sqrt(v + v_item)
    event.flags = LATE if user.count > 0 and event.time_ms < user.last_ms else 0
    if event.level < 0:
        event.flags |= SCORE_ONLY
    else:
        e, r = theta.level_scores[event.level] - z, v + theta.noise
        v_new, fits = _learn_user(e, r + v_item, s)
        if fits and item_fits(r, e, s):
            z_new = z
            for j in range(size + 1):
                z_new += (w0[j] + d[j] - w[j]) * x[j]
            event.updated = read_out(theta, z_new, v_new + v_item)
            _write_user(user, event, item.hash, z, s)
            write_item(item, event.window, 1.0 / r, e / r, s)
        else:
            event.flags |= NAN_UNDONE
    event.adaptations = user.count


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
def read_item(item, window, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills Δc, δ and their variances as of the start of `window`.

    They are rounded as `write_item` stores them: it makes no difference who is first to touch an item in a window.
    """
    c, c_var = float(item.c), float(item.c_var)
    delta, delta_var, info, total = item.delta, item.delta_var, item.delta_info, item.delta_sum
    due = item.pending_count > 0 and item.window != window
    if due:
        variance = 1.0 / (1.0 / c_var + item.c_info)
        c = float(np.float32(c + variance * item.c_sum))
        c_var = float(np.float32(variance))
    s.c, s.c_var = c, c_var
    for j in range(delta.shape[0]):
        mean, variance = float(delta[j]), float(delta_var[j])
        if due:
            variance = 1.0 / (1.0 / variance + info[j])
            mean = float(np.float32(mean + variance * total[j]))
            variance = float(np.float32(variance))
        s.delta[j] = mean
        s.delta_var[j] = variance


@njit(cache=True, error_model="numpy")
def _leak(theta, user, time_ms, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills d and P after the leak to the prior. A row that has learned nothing is at its prior already."""
    d, P, row_d, row_P, prior = s.d, s.P, user.d, user.P, theta.prior_variance  # noqa: N806
    gamma = 0.0
    if user.count > 0:
        hours = max(0, time_ms - user.last_ms) / MS_PER_HOUR
        gamma = math.exp(-(theta.leak_a + theta.leak_b * math.log1p(hours)))
    square = gamma * gamma
    for j in range(d.shape[0]):
        d[j] = gamma * row_d[j]
    for k in range(P.shape[0]):
        P[k] = square * row_P[k]
    full = P.shape[0] != d.shape[0]
    for j in range(d.shape[0]):
        P[j * (j + 3) // 2 if full else j] += (1.0 - square) * prior[j]


@njit(cache=True, error_model="numpy")
def _times_P(s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled  # noqa: N802
    """g = P x̃; returns v = x̃ᵀP x̃."""
    x, g, P = s.x, s.g, s.P  # noqa: N806
    width = x.shape[0]
    if P.shape[0] == width:
        for j in range(width):
            g[j] = P[j] * x[j]
    else:
        for j in range(width):
            start, total = j * (j + 1) // 2, 0.0
            for k in range(j):
                total += P[start + k] * x[k]
                g[k] += P[start + k] * x[j]
            g[j] = total + P[start + j] * x[j]
    v = 0.0
    for j in range(width):
        v += g[j] * x[j]
    return max(v, 0.0)


@njit(cache=True, error_model="numpy")
def _frozen(theta, item_events, c, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The score of the same model without adaptation: d = 0, P = P₀, no offsets, the item's first variances."""
    x0, w0, prior = s.x0, s.w0, theta.prior_variance
    size = x0.shape[0] - 1
    seen = item_events / theta.noise
    z = theta.bias + c
    variance = 1.0 / (1.0 / theta.bias_variance + seen)
    offset_var = 1.0 / (1.0 / theta.offset_variance + seen)
    for j in range(size + 1):
        z += w0[j] * x0[j]
        variance += prior[j] * x0[j] * x0[j]
        if j < size:
            variance += w0[j] * w0[j] * offset_var
    return read_out(theta, z, variance)


@njit(cache=True, error_model="numpy")
def _learn_user(e, total, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """d += g e/T, P −= g gᵀ/T in the work space; returns the new x̃ᵀP x̃ and whether a row can hold them."""
    d, g, x, P = s.d, s.g, s.x, s.P  # noqa: N806
    width = d.shape[0]
    gain, shrink, unfit, v = e / total, 1.0 / total, 0, 0.0
    for j in range(width):
        d[j] += gain * g[j]
        unfit += not abs(d[j]) < LARGEST  # NaN compares false
    if P.shape[0] == width:
        for j in range(width):
            P[j] -= shrink * g[j] * g[j]
            v += P[j] * x[j] * x[j]
            unfit += not abs(P[j]) < LARGEST
    else:
        for j in range(width):
            start = j * (j + 1) // 2
            scaled = shrink * g[j]
            for k in range(j + 1):
                P[start + k] -= scaled * g[k]
                unfit += not abs(P[start + k]) < LARGEST
            for k in range(j):
                v += 2.0 * P[start + k] * x[j] * x[k]
            v += P[start + j] * x[j] * x[j]
    return max(v, 0.0), unfit == 0


@njit(cache=True, error_model="numpy")
def item_fits(r, e, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether the pending sums can hold 1/R, e/R, w²/R and w e/R."""
    w, reach = s.w, 1.0
    for j in range(w.shape[0]):
        reach = max(reach, abs(w[j]))
    return abs(e) < LARGEST and reach * max(reach, abs(e)) / r < LARGEST


@njit(cache=True, error_model="numpy")
def _write_user(user, event, item_hash, z, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The learned row."""
    d, P, row_d, row_P = s.d, s.P, user.d, user.P  # noqa: N806
    for j in range(d.shape[0]):
        row_d[j] = d[j]
    for k in range(P.shape[0]):
        row_P[k] = P[k]
    remember(user, event, item_hash, z)


@njit(cache=True, error_model="numpy")
def remember(user, event, item_hash, z):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Counts a learned event, and puts it into the ring of recent ones."""
    at = user.count % user.ring_item.shape[0]
    user.ring_item[at] = item_hash
    user.ring_time_s[at] = event.time_ms // 1000
    user.ring_level[at] = event.level
    user.ring_logit[at] = z
    user.last_ms = max(user.last_ms, event.time_ms)
    user.count += 1


@njit(cache=True, error_model="numpy")
def write_item(item, window, precision, pull, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Applies what was due, then adds this event's 1/R and e/R to the sums of its window."""
    delta, delta_var, info, total, w = item.delta, item.delta_var, item.delta_info, item.delta_sum, s.w
    if item.window != window:
        item.c, item.c_var = s.c, s.c_var
        item.c_info = 0.0
        item.c_sum = 0.0
        for j in range(delta.shape[0]):
            delta[j] = s.delta[j]
            delta_var[j] = s.delta_var[j]
            info[j] = 0.0
            total[j] = 0.0
        item.window = window
        item.pending_count = 0
    item.c_info += precision
    item.c_sum += pull
    for j in range(delta.shape[0]):
        info[j] += precision * w[j] * w[j]
        total[j] += pull * w[j]
    item.pending_count += 1
    item.count += 1
