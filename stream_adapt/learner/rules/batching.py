"""What the batched rules share: many events of many users at once, in torch.

A rule's `batched.py` has what is its own, as `Equations`: rows of users, `read` and `write`. Here is all else, as pure
functions, rows in and rows out, differentiable in θ, in the rows and in what was seen:

    init_items              θ → rows as a new item has them
    encode                  θ, events → x̃ without the item's offset
    settle                  items as of the start of a window
    add_pending             items, what a window's events taught → items with the window's sums
    screened, remember      flags that a user's row tells; counters and ring after events
    read_out                z, variance → p
    recent, take_note       what a calibrator asks of rows, and what rows keep for it

Rows of float32 are rounded after every event, as in service; rows of float64 are not, which gradients need. Arithmetic
is float64. `adapt_with` does for a micro-batch over the slab what `compiled.adapt_with` does: windows of a partition in
order, partitions beside each other; within a window the k-th events of all users at once.

Capital letters: D dimensions, N events of a ring, L levels. m rows or events, n events of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_adapt.errors import ConfigError
from stream_adapt.learner.rules.calibrator import BEND, LATELY_WEIGHT, MISSED_EVENTS
from stream_adapt.learner.rules.compiled import HORIZON, LARGEST, MS_PER_HOUR
from stream_adapt.learner.rules.events import Array, Events, Scores, Screen
from stream_adapt.models import SlowWeights
from stream_adapt.record import Flag

Longs = npt.NDArray[np.int64]


class Theta(NamedTuple):
    """θ as tensors on one device: float64, but for the tables, which stay float32."""

    bias: Tensor  # [1] b
    noise: Tensor  # [1] σ²
    leak: Tensor  # [2] a, b of γ = exp(−(a + b·log(1 + Δt/1 h)))
    readout: Tensor  # [3] α, κ, β
    item_variance: Tensor  # [2] V₀ of c and of each coordinate of δ
    level_scores: Tensor  # [L] s
    level_noise: Tensor  # [L] factors on σ²
    outcome_weight: Tensor  # [1] λ
    prior_variance: Tensor  # [D+1] diagonal of P₀
    item_vector: Tensor  # [I+1, D+1] of I known items, and a last row of zeros for all others
    item_events: Tensor  # [I+1]
    feature_vector: Tensor  # [F+1, D+1]
    implicit_item: Tensor  # [I+1, H]
    implicit_map: Tensor  # [H, D+1] Bᵀ, float64
    calibrator: Tensor  # [K] a; empty: none
    item_mean: Tensor  # [I+1]; without a calibrator [1]
    target: Tensor  # [1] the target's level

    @classmethod
    def of(cls, weights: SlowWeights, device: torch.device | str, target: int) -> Theta:
        """θ of a loaded model, and the level from which on an event counts as the target.

        Raises:
            ConfigError: torch cannot use the device.
        """
        where = _usable(device)
        tables = ("item_vector", "item_events", "feature_vector", "implicit_item", "item_mean")
        arrays = {
            name: _with_zeros(getattr(weights, name), where) if name in tables else _double(weights, name, where)
            for name in cls._fields
            if name != "target"
        }
        return cls(**arrays, target=torch.tensor([target], device=where))


class Items(NamedTuple):
    """m rows of items, `layout.item_layout`; unsigned fields as signed ones of the same bits."""

    hash: Tensor  # [m]
    window: Tensor  # [m]
    count: Tensor  # type: ignore[assignment]  # [m], not tuple's
    pending_count: Tensor  # [m]
    c: Tensor  # [m]
    c_var: Tensor  # [m]
    delta: Tensor  # [m, D]
    delta_var: Tensor  # [m, D]
    c_info: Tensor  # [m]
    c_sum: Tensor  # [m]
    delta_info: Tensor  # [m, D]
    delta_sum: Tensor  # [m, D]


class Seen(NamedTuple):
    """m events of m different users: what they read of θ and of their items, and what was said."""

    x: Tensor  # [m, D+1] x̃ = [x + δ ; 1]
    w0: Tensor  # [m, D+1] prior mean
    offset: Tensor  # [m] b + c + Δc
    c_var: Tensor  # [m] V_c
    delta_var: Tensor  # [m, D] V_δ
    item_hash: Tensor  # [m] int64
    time_ms: Tensor  # [m] int64
    level: Tensor  # [m] int64; negative: none, nothing is learned
    event_hash: Tensor  # [m] int32, the bits of what rings keep of the event's id
    added: Tensor  # [m, H] f of the item


class Lesson(NamedTuple):
    """What m events teach their items."""

    taught: Tensor  # [m] bool: the event carried a level, and its update was finite
    w: Tensor  # [m, D+1] of the user, before the update
    precision: Tensor  # [m] 1/R
    pull: Tensor  # [m] e/R


class Written(NamedTuple):
    """m rows after their events, and what the rule would say of these events now."""

    users: Any
    lesson: Lesson
    z: Tensor  # [m]
    v: Tensor  # [m]


def init_items(theta: Theta, hashes: Tensor, known: Tensor, dtype: torch.dtype = torch.float32) -> Items:
    """Rows of m items before their first event: V = 1/(1/V₀ + n/σ²), n the item's events in pretraining.

    Args:
        theta: slow weights.
        hashes: `[m]` int64, the bits of xxh3-64 of the ids.
        known: `[m]` rows of the items in θ.
        dtype: of the rows' numbers.
    """
    c_var, delta_var = (v.to(dtype) for v in item_variances(theta, known))  # [m], [m]
    count, zeros = torch.zeros_like(hashes).int(), torch.zeros(len(hashes), len(theta.prior_variance) - 1).to(c_var)
    return Items(
        hash=hashes,
        window=torch.zeros_like(hashes),
        count=count,
        pending_count=count,
        c=torch.zeros_like(c_var),
        c_var=c_var,
        delta=zeros,
        delta_var=delta_var[:, None].expand_as(zeros),
        c_info=torch.zeros_like(c_var).double(),
        c_sum=torch.zeros_like(c_var).double(),
        delta_info=zeros,
        delta_sum=zeros,
    )


def encode(theta: Theta, known: Tensor, content: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """x̃ without the item's offset, and the item's bias c under θ.

    Args:
        theta: slow weights.
        known: `[m]` rows of the items in θ.
        content: `[m, D+1]` encodings of the items' features.
        pairs: event features, sparse: event `[k]`, row of the feature table `[k]`, weight `[k]`.

    Returns:
        `[m, D+1]` with a last column of ones, and `[m]`.
    """
    event, row, weight = pairs
    x = (theta.item_vector[known] + content).double()  # [m, D+1]
    x = x.index_put((event,), (weight[:, None] * theta.feature_vector[row]).double(), accumulate=True)  # [m, D+1]
    return torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], 1), x[:, -1]


def settle(items: Items, window: Tensor) -> Items:
    """Items as of the start of `window` `[m]`: the sums of an earlier window are applied, and begin anew.

    V ← 1/(1/V + Σ 1/R) and Δc ← Δc + V Σ e/R; each coordinate of δ alike, with Σ w²/R and Σ w e/R.
    """
    other = items.window != window  # [m]
    due = other & (items.pending_count > 0)  # [m]
    c_var = 1.0 / (1.0 / items.c_var.double() + items.c_info)  # [m]
    delta_var = 1.0 / (1.0 / items.delta_var.double() + items.delta_info)  # [m, D]
    return items._replace(
        window=window,
        pending_count=items.pending_count.masked_fill(other, 0),
        c=chosen(due, items.c + c_var * items.c_sum, items.c),
        c_var=chosen(due, c_var, items.c_var),
        delta=chosen(due, items.delta + delta_var * items.delta_sum, items.delta),
        delta_var=chosen(due, delta_var, items.delta_var),
        c_info=items.c_info.masked_fill(other, 0.0),
        c_sum=items.c_sum.masked_fill(other, 0.0),
        delta_info=items.delta_info.masked_fill(other[:, None], 0.0),
        delta_sum=items.delta_sum.masked_fill(other[:, None], 0.0),
    )


def add_pending(items: Items, settled: Items, at: Tensor, lesson: Lesson) -> Items:
    """Items after the n events of one window; an item that none of them taught stays as it was.

    Args:
        items: m rows as they were.
        settled: the same as of the start of the window.
        at: `[n]` row of each event's item.
        lesson: of the n events.
    """
    w, precision, pull = lesson.w[:, :-1], lesson.precision[:, None], lesson.pull[:, None]  # [n, D], [n, 1], [n, 1]
    parts = torch.cat([precision, pull, precision * w * w, pull * w], 1)  # [n, 2+2D]
    parts = torch.where(lesson.taught[:, None], parts, 0.0)  # [n, 2+2D]
    sums = parts.new_zeros(len(items.c), parts.shape[1]).index_put((at,), parts, accumulate=True)  # [m, 2+2D]
    counts = torch.zeros_like(items.count).index_put((at,), lesson.taught.to(items.count), accumulate=True)  # [m]
    info, error = sums[:, 2:].chunk(2, 1)  # [m, D], [m, D]
    after = settled._replace(
        count=settled.count + counts,
        pending_count=settled.pending_count + counts,
        c_info=settled.c_info + sums[:, 0],
        c_sum=settled.c_sum + sums[:, 1],
        delta_info=settled.delta_info + info,
        delta_sum=settled.delta_sum + error,
    )
    return Items._make(chosen(counts > 0, new, old) for new, old in zip(after, items, strict=True))


def read_out(theta: Theta, z: Tensor, variance: Tensor) -> Tensor:
    """p = σ(α z/√(1 + κ·variance) + β), for z `[m]` and variance `[m]`."""
    alpha, kappa, beta = theta.readout
    return torch.sigmoid(alpha * z / torch.sqrt(1.0 + kappa * variance) + beta)


def recent(theta: Theta, users: Any, seen: Seen, variance: Tensor) -> Tensor:
    """What a calibrator asks of m rows before their events, `[m, 3]`: mean miss, recent miss, log of the gap.

    As `calibrator.calibration`; the README of the rules says what they are. `[m, 0]` without a calibrator.
    """
    if not len(theta.calibrator):
        return seen.x[:, :0]
    ring = users.ring_level.shape[1]
    there = torch.arange(ring, device=variance.device) < users.count[:, None]  # [m, N]
    seconds = ((seen.time_ms // 1000)[:, None] - (users.ring_time_s.long() & 0xFFFFFFFF)).clamp(min=0)  # [m, N]
    near = torch.rsqrt(1.0 + seconds.double()) * there  # [m, N]
    said = read_out(theta, users.ring_logit.double(), variance[:, None])  # [m, N]
    lately = (near * ((users.ring_level >= theta.target).double() - said)).sum(1)  # [m]
    missed = users.missed.double() / (users.count + MISSED_EVENTS)  # [m]
    gap_s = (seen.time_ms - users.last_ms).clamp(min=0).double() / 1000.0 * (users.count > 0)  # [m]
    return torch.stack([missed, lately / (LATELY_WEIGHT + near.sum(1)), torch.log1p(gap_s)], 1)  # [m, 3]


def take_note(theta: Theta, users: Any, seen: Seen, score: Tensor, taught: Tensor) -> Any:
    """Rows after m events, with what a calibrator will ask of them. `score` `[m]` is the one without calibrator."""
    if not len(theta.calibrator):
        return users
    missed = (seen.level >= theta.target).double() - score  # [m]
    return users._replace(missed=chosen(taught, users.missed.double() + missed, users.missed))


class Equations(NamedTuple):
    """What one rule has of its own, for `adapt_with`."""

    users: type[Any]  # rows of users, as `Users`
    read: Callable[[Theta, Any, Seen, Screen], Any]  # → z, v, v_item, flags, and what `write` needs
    write: Callable[[Theta, Any, Seen, Any, Screen], Written]
    frozen: Callable[[Theta, Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def adapt_with(rule: Equations, theta: Theta, user_rows: Array, item_rows: Array, events: Events, out: Scores) -> None:
    """Learns n events in order by a rule's equations, on θ's device.

    Args:
        rule: its equations.
        theta: slow weights.
        user_rows: slab of users; rows that the events touch are fetched, and written back at the end.
        item_rows: slab of items; alike.
        events: encoded; offsets ascend within a partition.
        out: filled in.
    """
    where = theta.bias.device
    plan = plan_rounds(events.user, events.partition, events.window)
    user_slots, user_at = np.unique(events.user, return_inverse=True)
    item_slots, item_at = np.unique(events.item, return_inverse=True)
    users, items = _load(rule.users, user_rows[user_slots], where), _load(Items, item_rows[item_slots], where)
    columns = _columns(rule, theta, events, user_at, item_at)
    ordered = _take(columns, torch.from_numpy(plan.order).to(where))
    windows = [
        _adapt_window(rule, theta, users, items, _take(ordered, slice(w[0], w[-1])), w, events.screen)
        for w in plan.windows
    ]
    _store(user_rows, user_slots, users)
    _store(item_rows, item_slots, items)
    if windows:
        _report(out, plan.order, events, ordered.frozen, _scores(theta, _concatenate(windows), ordered.item_mean))


class Plan(NamedTuple):
    """In which order n events are learned."""

    order: Longs  # [n] indices of events: by window, then by round, then by user, those with most events first
    windows: list[list[int]]  # for each window the bounds of its rounds in `order`


def plan_rounds(user: Array, partition: Array, window: Array) -> Plan:
    """Windows and rounds of n events in consumption order; a round holds the k-th event of every user in a window.

    The k-th windows of all partitions are one: they have neither users nor items in common.
    """
    ordinal = _ordinal(partition, window)  # [n]
    turn, turns = _turns(user, ordinal)  # [n], [n]
    order = np.lexsort((user, -turns, turn, ordinal))
    ordinal, turn = ordinal[order], turn[order]
    starts = np.flatnonzero(np.diff(ordinal, prepend=-1) | np.diff(turn, prepend=-1))
    bounds = [*starts.tolist(), len(order)]
    firsts = [k for k, start in enumerate(starts) if turn[start] == 0]
    return Plan(order, [bounds[a : b + 1] for a, b in pairwise([*firsts, len(starts)])])


def _ordinal(partition: Array, window: Array) -> Longs:
    """`[n]`: how many windows of its partition come before each event's, counted among the n events."""
    by = np.lexsort((window, partition))
    first = np.diff(partition[by], prepend=-1) != 0
    distinct = np.cumsum(first | (np.diff(window[by], prepend=-1) != 0))
    result = np.empty(len(by), dtype=np.int64)
    result[by] = distinct - np.maximum.accumulate(np.where(first, distinct, 0))
    return result


def _turns(user: Array, ordinal: Longs) -> tuple[Longs, Longs]:
    """`[n]`: how many events of its user come before each event in the same window; `[n]`: how many there are."""
    by = np.lexsort((user, ordinal))  # stable
    starts = np.flatnonzero((np.diff(user[by], prepend=-1) != 0) | (np.diff(ordinal[by], prepend=-1) != 0))
    sizes = np.diff(starts, append=len(by))
    turn, turns = np.empty(len(by), dtype=np.int64), np.empty(len(by), dtype=np.int64)
    turn[by] = np.arange(len(by)) - np.repeat(starts, sizes)
    turns[by] = np.repeat(sizes, sizes)
    return turn, turns


class _Columns(NamedTuple):
    """n events on the device, encoded; rows count among those that were fetched."""

    x: Tensor  # [n, D+1] x̃ without the item's offset
    c: Tensor  # [n]
    w0: Tensor  # [n, D+1]
    frozen: Tensor  # [n] score
    user: Tensor  # [n]
    item: Tensor  # [n]
    window: Tensor  # [n]
    time_ms: Tensor  # [n]
    level: Tensor  # [n]
    event_hash: Tensor  # [n]
    added: Tensor  # [n, H]
    item_mean: Tensor  # [n], or without a calibrator [n, 0]


class _Said(NamedTuple):
    """What was said of n events, before and after they were learned."""

    z: Tensor  # [n]
    v: Tensor  # [n]
    v_item: Tensor  # [n]
    flags: Tensor  # [n]
    new_z: Tensor  # [n]
    new_v: Tensor  # [n]
    count: Tensor  # type: ignore[assignment]  # [n], not tuple's
    taught: Tensor  # [n]
    w: Tensor  # [n, D+1]
    precision: Tensor  # [n]
    pull: Tensor  # [n]
    recent: Tensor  # [n, 3], or without a calibrator [n, 0]


#: Named tuples of tensors that have their first dimension in common.
RowsT = TypeVar("RowsT", Items, Seen, _Columns, _Said)


def _columns(rule: Equations, theta: Theta, events: Events, user_at: Array, item_at: Array) -> _Columns:
    def put(column: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(column)).to(theta.bias.device)

    known, event = put(events.known), np.repeat(np.arange(len(events.user)), np.diff(events.pointers))
    pairs = (put(event), put(events.rows), put(events.weights))
    x, c = encode(theta, known, put(events.content_vectors[events.content]), pairs)
    w0 = put(events.prior_vectors[events.prior]).double()  # [n, D+1]
    return _Columns(
        x=x,
        c=c,
        w0=w0,
        frozen=rule.frozen(theta, x, c, w0, known),
        user=put(user_at),
        item=put(item_at),
        window=put(events.window),
        time_ms=put(events.time_ms),
        level=put(events.level).long(),
        event_hash=put(events.event_hash.astype(np.uint32).view(np.int32)),
        added=theta.implicit_item[known],
        item_mean=theta.item_mean[known] if len(theta.calibrator) else x[:, :0],
    )


def _adapt_window(
    rule: Equations,
    theta: Theta,
    users: Any,
    items: Items,
    events: _Columns,
    bounds: Sequence[int],
    screen: Screen,
) -> _Said:
    """Learns one window round by round; writes into `users` and `items`, which are this batch's own copies."""
    which, at = torch.unique(events.item, return_inverse=True)
    before = _take(items, which)
    settled = settle(before, torch.zeros_like(which).index_put((at,), events.window))
    seen = _seen(theta, events, settled, at)
    present = events.user[: bounds[1] - bounds[0]]  # in every later round the first of these
    rows = _take(users, present)
    rounds = []
    for start, stop in pairwise(b - bounds[0] for b in bounds):
        now = slice(stop - start)
        rounds.append(_round(rule, theta, _take(rows, now), _take(seen, slice(start, stop)), screen))
        _put(rows, now, rounds[-1][0])
    _put(users, present, rows)
    said = _concatenate([said for _, said in rounds])
    _put(items, which, add_pending(before, settled, at, Lesson(said.taught, said.w, said.precision, said.pull)))
    return said


def _round(rule: Equations, theta: Theta, users: Any, seen: Seen, screen: Screen) -> tuple[Any, _Said]:
    reading = rule.read(theta, users, seen, screen)
    after, lesson, z, v = rule.write(theta, users, seen, reading, screen)
    variance = reading.v + reading.v_item  # [m]
    after = take_note(theta, after, seen, read_out(theta, reading.z, variance), lesson.taught)
    asked = recent(theta, users, seen, variance)  # [m, 3]
    return after, _Said(reading.z, reading.v, reading.v_item, reading.flags, z, v, after.count, *lesson, asked)


def _seen(theta: Theta, events: _Columns, settled: Items, at: Tensor) -> Seen:
    delta = torch.cat([settled.delta, torch.zeros_like(settled.delta[:, :1])], 1)  # [m, D+1]
    return Seen(
        x=events.x + delta[at],
        w0=events.w0,
        offset=theta.bias + events.c + settled.c[at],
        c_var=settled.c_var[at].double(),
        delta_var=settled.delta_var[at].double(),
        item_hash=settled.hash[at],
        time_ms=events.time_ms,
        level=events.level,
        event_hash=events.event_hash,
        added=events.added,
    )


def _scores(theta: Theta, said: _Said, item_mean: Tensor) -> tuple[Tensor, ...]:
    """Score, updated score, uncertainty, adaptations, flags that the rows told, and which events taught."""
    variance = said.v + said.v_item
    added = _calibration(theta, said, item_mean, variance)
    score = _calibrated(theta, said.z, variance, added)
    updated = torch.where(said.taught, _calibrated(theta, said.new_z, said.new_v + said.v_item, added), score)
    return score, updated, variance.sqrt(), said.count, said.flags, said.taught


def _calibration(theta: Theta, said: _Said, item_mean: Tensor, variance: Tensor) -> Tensor | None:
    """What a calibrator adds to the logits `[n]` for all but the logits themselves."""
    if not len(theta.calibrator):
        return None
    missed, lately, gap = said.recent.unbind(1)
    a = theta.calibrator
    return a[0] + a[3] * missed + a[4] * lately + a[5] * item_mean + a[6] * variance.sqrt() + a[7] * gap


def _calibrated(theta: Theta, z: Tensor, variance: Tensor, added: Tensor | None) -> Tensor:
    score = read_out(theta, z, variance)  # [n]
    if added is None:
        return score
    alpha, kappa, beta = theta.readout
    logit = alpha * z / torch.sqrt(1.0 + kappa * variance) + beta  # [n]
    return torch.sigmoid(
        logit + added + theta.calibrator[1] * logit + theta.calibrator[2] * logit.clamp(-BEND, BEND) ** 3
    )


def _report(out: Scores, order: Longs, events: Events, frozen_score: Tensor, scores: tuple[Tensor, ...]) -> None:
    score, updated, uncertainty, adaptations, flags, taught = (s.cpu().numpy() for s in scores)
    out.frozen[order] = frozen_score.cpu().numpy()
    out.score[order], out.updated[order], out.uncertainty[order] = score, updated, uncertainty
    out.adaptations[order] = adaptations
    score_only = events.level[order] < 0
    undone = ~(score_only | (flags & events.screen.barred != 0) | taught)
    out.flags[order] = flags + score_only * Flag.SCORE_ONLY + undone * Flag.NAN_UNDONE


def hours_since(users: Any, seen: Seen) -> Tensor:
    """`[m]` float64: hours since the last event that each user learned; 0 for an event that is older."""
    gap_ms: Tensor = (seen.time_ms - users.last_ms).clamp(min=0)  # [m]
    return gap_ms.double() / MS_PER_HOUR  # [m]; int64 by a float would be float32


def remember(users: Any, seen: Seen, z: Tensor, taught: Tensor) -> Any:
    """Counters, implicit state and ring after m events, of which some taught."""
    ring = users.ring_item.shape[1]
    here = torch.arange(ring, device=z.device) == (users.count % ring)[:, None]  # [m, N]
    here = here & taught[:, None]  # [m, N]
    return users._replace(
        last_ms=torch.where(taught, torch.maximum(users.last_ms, seen.time_ms), users.last_ms),
        count=users.count + taught,
        implicit=chosen(taught, users.implicit.double() + seen.added.double(), users.implicit),
        ring_item=chosen(here, seen.item_hash[:, None], users.ring_item),
        ring_time_s=chosen(here, (seen.time_ms // 1000)[:, None], users.ring_time_s),
        ring_event=chosen(here, seen.event_hash[:, None], users.ring_event),
        ring_level=chosen(here, seen.level[:, None], users.ring_level),
        ring_logit=chosen(here, z[:, None], users.ring_logit),
    )


def prior_mean(theta: Theta, users: Any, seen: Seen) -> Tensor:
    """w₀ + B ψ `[m, D+1]`: the prior mean, as the items that the users have learned of move it."""
    state: Tensor = users.implicit.double() * implicit_scale(users.count)[:, None]  # [m, H] ψ
    # No matrix product: the order of its sums may change with where a batch lies in memory, and so may its last bit.
    return seen.w0 + (state[:, :, None] * theta.implicit_map).sum(1)


def implicit_scale(count: Tensor) -> Tensor:
    """What sums over `count` events learned are multiplied with: 1/√((1 + n)(1 + n/HORIZON)), in float64."""
    n = count.double()
    return torch.rsqrt((1.0 + n) * (1.0 + n / HORIZON))


def screened(users: Any, seen: Seen, screen: Screen) -> Tensor:
    """`[m]`: flags that events have for what their users' rows remember: late, duplicate."""
    late: Tensor = (users.count > 0) & (seen.time_ms < users.last_ms - screen.late_after_ms)  # [m]
    flags = late * int(Flag.LATE)  # [m]
    if screen.barred & Flag.DUPLICATE:
        duplicate = (users.ring_event == seen.event_hash[:, None]).any(1)  # [m]
        flags = flags + duplicate * int(Flag.DUPLICATE)
    return flags


def fits(rows: Tensor) -> Tensor:
    """`[m]`: whether all of `[m, …]` fits into a row; NaN does not."""
    return (rows.abs() < LARGEST).all(1)


def item_fits(w: Tensor, q: Tensor, a: Tensor) -> Tensor:
    """`[m]`: whether the pending sums can hold q = 1/R, a = e/R, w² q and w a."""
    reach = w.abs().amax(1).clamp(min=1.0)  # [m]
    return (a.abs() < LARGEST) & (reach * torch.maximum(reach * q, a.abs()) < LARGEST)


def item_variances(theta: Theta, known: Tensor) -> tuple[Tensor, Tensor]:
    """Variances `[m]` of the bias and `[m]` of each offset coordinate that items start with."""
    seen = theta.item_events[known] / theta.noise  # [m]
    return 1.0 / (1.0 / theta.item_variance[0] + seen), 1.0 / (1.0 / theta.item_variance[1] + seen)


def chosen(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the condition holds, in the dtype of `old`; a condition `[m]` chooses whole rows."""
    return torch.where(condition if condition.ndim == old.ndim else condition[:, None], new.to(old.dtype), old)


def _take(rows: RowsT, at: Tensor | slice) -> RowsT:
    return type(rows)._make(t[at] for t in rows)


def _put(rows: RowsT, at: Tensor | slice, values: RowsT) -> None:
    for t, value in zip(rows, values, strict=True):
        t[at] = value


def _concatenate(parts: Sequence[RowsT]) -> RowsT:
    return type(parts[0])._make(torch.cat(columns) for columns in zip(*parts, strict=True))


_SIGNED = {np.dtype("<u8"): np.dtype("<i8"), np.dtype("<u4"): np.dtype("<i4")}


def _load(kind: type[RowsT], rows: Array, where: torch.device) -> RowsT:
    """Records `[m]` as tensors; `[m, 0]` for a field that this model's rows do not have."""
    fields = [rows[name] if name in (rows.dtype.names or ()) else np.zeros((len(rows), 0)) for name in kind._fields]
    return kind._make(
        torch.from_numpy(np.ascontiguousarray(field).view(_SIGNED.get(field.dtype, field.dtype))).to(where)
        for field in fields
    )


def _store(slab: Array, slots: Longs, rows: Any) -> None:
    """Tensors back into the records at `slots` `[m]`."""
    for name, t in zip(rows._fields, rows, strict=True):
        if name in (slab.dtype.names or ()):
            field = slab[name]
            field[slots] = t.cpu().numpy().view(field.dtype)


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r}: torch cannot use it here ({error}); take auto or cpu") from error


def _double(weights: SlowWeights, name: str, where: torch.device) -> Tensor:
    return torch.from_numpy(getattr(weights, name).astype(np.float64)).to(where)


def _with_zeros(table: npt.NDArray[Any], where: torch.device) -> Tensor:
    """A table and one more row, of zeros."""
    return torch.from_numpy(np.concatenate([table, np.zeros_like(table[:1], shape=(1, *table.shape[1:]))])).to(where)
