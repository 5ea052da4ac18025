"""What the compiled rules share: encoding, items, the ring, screening and the readout, one event at a time.

A rule's `step.py` calls these from compiled code of its own. All that a step touches is a record (θ's numbers, a user,
an item, the event, the work space `s`): compiled code takes records by address, where a tuple of arrays costs a
reference count for each array at every call. Records have the fields that `numbers_type` and `scratch_type` of the rule
name; arithmetic is float64. What runs for every event is inlined (`inlined`): calls, and arrays that they hand on, cost
a quarter of it. Loops over dimensions end at a number that is read from the work space: where LLVM knows the number it
unrolls them, and then finds no vectors any more.

Numba keeps compiled code under the age of the file that holds a loop, and does not see that this one changed: remove
`__pycache__` then (`tests/conftest.py` does so for tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from stream_adapt.learner.rules.events import Array, Events, Scores
from stream_adapt.models import SlowWeights
from stream_adapt.record import Flag

MS_PER_HOUR = 3_600_000.0
#: A row's numbers stay below it, and so do an event's parts of the pending sums: float32 holds 10⁸ of them.
LARGEST = 1e30
#: Events learned from which on the implicit state becomes a mean: up to there it grows with √n, as in training.
HORIZON = 512.0
#: Bits of Flag, as compiled code takes them.
SCORE_ONLY, NAN_UNDONE = int(Flag.SCORE_ONLY), int(Flag.NAN_UNDONE)
LATE, DUPLICATE = int(Flag.LATE), int(Flag.DUPLICATE)


#: Rows are fetched from memory so many events before they are read.
AHEAD = 2
#: What memory is fetched in, in bytes; arrays of the work space begin where a line does.
_LINE = 64

#: Of compiled functions that are a part of a rule's loop.
inlined = njit(cache=True, error_model="numpy", forceinline=True)


class Theta(NamedTuple):
    """θ as compiled code reads it: a rule's numbers in one record, and the tables that events look things up in."""

    numbers: Array  # [1] of the rule's `numbers_type`
    item_vector: Array  # [n+1, D+1] of n known items, and a last row of zeros for all others
    item_events: Array  # [n+1]
    feature_vector: Array  # [F+1, D+1]; the last row, of zeros, keeps it from being empty
    implicit_item: Array  # [n+1, H]; the last row is of zeros
    item_mean: Array  # [n+1], or without a calibrator [1]

    @classmethod
    def of(cls, numbers: Array, weights: SlowWeights) -> Theta:
        """A rule's numbers beside the tables of a loaded model."""
        names = ("item_vector", "item_events", "feature_vector", "implicit_item", "item_mean")
        tables = [getattr(weights, name) for name in names]
        return cls(numbers, *(np.concatenate([t, np.zeros((1, *t.shape[1:]), t.dtype)]) for t in tables))


#: One event and what is said of it.
EVENT_TYPE = np.dtype(
    [(name, "<i8") for name in ("window", "time_ms", "level", "adaptations", "flags")]
    + [(name, "<i8") for name in ("event_hash", "late_after_ms", "barred")]
    + [(name, "<f8") for name in ("item_events", "item_mean", "score", "frozen", "updated", "uncertainty")]
)


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
    event, space = np.zeros(1, EVENT_TYPE), np.zeros(1, scratch)
    event["late_after_ms"], event["barred"] = events.screen
    space["size"] = space["delta"].shape[1]
    space["floats"] = space["P"].shape[1] if "P" in (scratch.names or ()) else 0
    compiled(
        theta.numbers, users, items, event, space,
        events.user, events.item, events.window, events.time_ms, events.level, events.event_hash,
        theta.item_events, theta.item_mean,
        events.known, theta.item_vector, events.content, events.content_vectors, events.prior, events.prior_vectors,
        events.pointers, events.rows, events.weights, theta.feature_vector, theta.implicit_item,
        out.score, out.frozen, out.updated, out.uncertainty, out.adaptations, out.flags,
    )  # fmt: skip


def scratch_type(width: int, hidden: int, floats: int = 0) -> np.dtype[Any]:
    """Work space of one step.

    size: D. floats: numbers of P. x0, x: x̃ without and with the item's offset. w0, w, d, P: as in a rule's equations,
    after the leak. g: P x̃ or η x̃. square: of what is summed next. c, c_var, delta, delta_var: the item's deviation from
    θ, with the pending sums of earlier windows applied. f: of the item.

    Args:
        width: D + 1.
        hidden: H, numbers of the implicit state.
        floats: numbers of P, if the rule has one.
    """
    of_width = [(name, "<f8", (width,)) for name in ("x0", "x", "w0", "w", "d", "g", "square")]
    of_item = [("delta", "<f8", (width - 1,)), ("delta_var", "<f8", (width - 1,)), ("c", "<f8"), ("c_var", "<f8")]
    of_rule = [("P", "<f8", (floats,))] if floats else []
    fields = [*of_width, *of_rule, *of_item, ("f", "<f8", (hidden,)), ("size", "<i8"), ("floats", "<i8")]
    return _on_lines(np.dtype(fields))


def _on_lines(packed: np.dtype[Any]) -> np.dtype[Any]:
    """The same fields, each from the start of a line on.

    LLVM sees one record: where fields are no whole vectors apart, it takes a loop that reads one and writes another for
    a loop whose vectors would wait for each other, and makes none.
    """
    names = list(packed.names or ())
    formats = [packed[name] for name in names]
    ends = np.cumsum([-(-each.itemsize // _LINE) * _LINE for each in formats]).tolist()
    return np.dtype({"names": names, "formats": formats, "offsets": [0, *ends[:-1]], "itemsize": ends[-1]})


@intrinsic
def _prefetch(_context: Any, record: Any) -> Any:
    """Tells the processor that a record will be read and written soon; LLVM's `llvm.prefetch`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        for offset in range(0, record.size, _LINE):
            _fetch_line(builder, arguments[0], offset, written=True)
        return context.get_dummy_value()

    return types.void(record), generate


@intrinsic
def _prefetch_row(_context: Any, table: Any, row: Any) -> Any:
    """Tells the processor that a row `[n]` of float32 will be read soon: two lines, which hold n ≤ 17.

    Args:
        table: `[m, n]`.
        row: which.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        array, at = context.make_array(table)(context, builder, arguments[0]), arguments[1]
        first = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        stride = builder.extract_value(array.strides, 0)
        start = builder.gep(first, [builder.mul(context.cast(builder, at, row, types.intp), stride)])
        for offset in (0, _LINE):
            _fetch_line(builder, start, offset, written=False)
        return context.get_dummy_value()

    return types.void(table, row), generate


def _fetch_line(builder: Any, start: Any, offset: int, *, written: bool) -> None:
    """Code that asks for the line of memory `offset` bytes from a pointer on."""
    number, address = ir.IntType(32), ir.IntType(8).as_pointer()
    told = ir.FunctionType(ir.VoidType(), [address, number, number, number])
    function = builder.module.declare_intrinsic("llvm.prefetch", [address], told)
    place = builder.gep(builder.bitcast(start, address), [number(offset)])
    keep, data = number(3), number(1)
    builder.call(function, [place, number(int(written)), keep, data])


@inlined
def fetch_ahead(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    i, users, items, user, item, known, item_vector, content, content_vectors, prior, prior_vectors, implicit_item
):
    """Asks for the rows of an event to come, in θ's tables, too: those of many users and items lie in no cache."""
    soon = min(i + AHEAD, user.shape[0] - 1)
    _prefetch(users[user[soon]])  # type: ignore[call-arg]  # an intrinsic's context is Numba's to give
    _prefetch(items[item[soon]])
    _prefetch_row(item_vector, known[soon])
    _prefetch_row(implicit_item, known[soon])
    _prefetch_row(content_vectors, content[soon])
    _prefetch_row(prior_vectors, prior[soon])


@inlined
def next_event(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    i, event, known, window, time_ms, level, event_hash, item_events, item_mean
):
    """Makes `event` the i-th of a batch; without a calibrator there is one `item_mean`, of no meaning."""
    event.window, event.time_ms, event.level, event.event_hash = window[i], time_ms[i], level[i], event_hash[i]
    event.item_events = item_events[known[i]]
    event.item_mean = item_mean[min(known[i], item_mean.shape[0] - 1)]


@inlined
def encode(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    i, s, known, item_vector, content, content_vectors, prior, prior_vectors, pointers, rows, weights, feature_vector,
    implicit_item,
):  # fmt: skip
    """Fills x̃ without the item's offset, with the item's bias under θ where x̃ has its 1, the prior mean w₀, and f."""
    x0, w0, f, width = s.x0, s.w0, s.f, s.size + 1
    item, text, user = known[i], content[i], prior[i]
    for h in range(f.shape[0]):
        f[h] = implicit_item[item, h]
    for j in range(width):
        x0[j] = item_vector[item, j] + content_vectors[text, j]
    for j in range(width):  # by itself: LLVM asks what overlaps before a loop's vectors, and with both asks too much
        w0[j] = prior_vectors[user, j]
    for k in range(pointers[i], pointers[i + 1]):
        row, weight = rows[k], weights[k]
        for j in range(width):
            x0[j] += weight * feature_vector[row, j]


@njit(cache=True, error_model="numpy", forceinline=True, fastmath={"reassoc"})
def dot(a, b, n):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Σ aⱼ·bⱼ of n numbers, in the order that suits the machine's vectors."""
    total = 0.0
    for j in range(n):
        total += a[j] * b[j]
    return total


@inlined
def lean(theta, user, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Adds to w₀ what the items that the user has learned of say: w₀ ← w₀ + B ψ."""
    w0, total, n, B, width = s.w0, user.implicit, float(user.count), theta.implicit_map, s.w0.shape[0]  # noqa: N806
    scale = 1.0 / math.sqrt((1.0 + n) * (1.0 + n / HORIZON))
    fours = total.shape[0] - total.shape[0] % 4
    for h in range(0, fours, 4):  # four at a time: w₀ is read and written once for them
        p, q, u, v = scale * total[h], scale * total[h + 1], scale * total[h + 2], scale * total[h + 3]
        first, second, third, fourth = h * width, (h + 1) * width, (h + 2) * width, (h + 3) * width
        for j in range(s.size + 1):
            w0[j] += (p * B[first + j] + q * B[second + j]) + (u * B[third + j] + v * B[fourth + j])
    for h in range(fours, total.shape[0]):
        p, first = scale * total[h], h * width
        for j in range(s.size + 1):
            w0[j] += p * B[first + j]


@inlined
def screened(user, event):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Flags that an event has for what its user's row remembers: late, duplicate."""
    flags = 0
    if user.count > 0 and event.time_ms < user.last_ms - event.late_after_ms:
        flags |= LATE
    if event.barred & DUPLICATE:
        for k in range(user.ring_event.shape[0]):
            if user.ring_event[k] == event.event_hash:
                flags |= DUPLICATE
    return flags


@inlined
def sigmoid(z):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """1/(1 + exp(−z)) without overflow."""
    e = math.exp(-abs(z))
    return (1.0 if z >= 0.0 else e) / (1.0 + e)  # no branch: half of them would be guessed wrong


@inlined
def read_out(theta, z, variance):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """p = σ(α z/√(1 + κ·variance) + β)."""
    return sigmoid(theta.alpha * z / math.sqrt(1.0 + theta.kappa * variance) + theta.beta)


@inlined
def read_item(item, window, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Fills Δc, δ and their variances as of the start of `window`.

    They are rounded as `write_item` stores them: it makes no difference who is first to touch an item in a window.
    """
    c, c_var = float(item.c), float(item.c_var)
    delta, delta_var, info, total = item.delta, item.delta_var, item.delta_info, item.delta_sum
    due = item.pending_count > 0 and item.window != window
    if due:
        variance = c_var / (1.0 + c_var * item.c_info)
        c = float(np.float32(c + variance * item.c_sum))
        c_var = float(np.float32(variance))
    s.c, s.c_var = c, c_var
    for j in range(s.size):
        s.delta[j], s.delta_var[j] = delta[j], delta_var[j]
    if due:
        for j in range(s.size):
            variance = s.delta_var[j] / (1.0 + s.delta_var[j] * info[j])
            s.delta[j] = np.float32(s.delta[j] + variance * total[j])
            s.delta_var[j] = np.float32(variance)


@inlined
def item_fits(q, a, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether the pending sums can hold q = 1/R, a = e/R, w² q and w a."""
    w, unfit = s.w, 0
    most = min(math.sqrt(LARGEST / q), LARGEST / max(abs(a), q))
    for j in range(s.size + 1):
        unfit += not abs(w[j]) < most  # NaN compares false
    return unfit == 0 and abs(a) < LARGEST and most > 1.0


@inlined
def remember(user, event, item_hash, z, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Counts a learned event, adds to the implicit state, and puts the event into the ring of recent ones."""
    for h in range(s.f.shape[0]):
        user.implicit[h] += s.f[h]
    at = user.count % user.ring_item.shape[0]
    user.ring_item[at] = item_hash
    user.ring_time_s[at] = event.time_ms // 1000
    user.ring_event[at] = event.event_hash
    user.ring_level[at] = event.level
    user.ring_logit[at] = z
    user.last_ms = max(user.last_ms, event.time_ms)
    user.count += 1


@inlined
def write_item(item, window, precision, pull, s):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Applies what was due, then adds this event's 1/R and e/R to the sums of its window."""
    delta, delta_var, info, total, w = item.delta, item.delta_var, item.delta_info, item.delta_sum, s.w
    if item.window != window:
        item.c, item.c_var = s.c, s.c_var
        for j in range(s.size):
            delta[j] = s.delta[j]
            delta_var[j] = s.delta_var[j]
        item.window = window
        item.pending_count = 0
        item.c_info = precision
        item.c_sum = pull
        for j in range(s.size):
            info[j] = precision * w[j] * w[j]
            total[j] = pull * w[j]
    else:
        item.c_info += precision
        item.c_sum += pull
        for j in range(s.size):
            info[j] += precision * w[j] * w[j]
            total[j] += pull * w[j]
    item.pending_count += 1
    item.count += 1
