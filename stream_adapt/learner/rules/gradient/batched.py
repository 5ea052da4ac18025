"""The gradient rule for many users at once, in torch: for the GPU, and for training through the updates.

`read` and `write` are the equations of `step`, which is the reference, for m users side by side. Rounds, windows and
items are those of all rules (`batching`).

In `Theta` the rates η stand as `prior_variance`, the logits of the targets as `level_scores`, and `leak` is [2, D+1].

Capital letters: D dimensions, N events of a ring. m rows or events.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stream_adapt.learner.rules.batching import (
    Equations,
    Lesson,
    Seen,
    Theta,
    Written,
    chosen,
    fits,
    hours_since,
    item_fits,
    item_variances,
    prior_mean,
    read_out,
    remember,
    screened,
)
from stream_adapt.learner.rules.events import LEARN_ALL, Screen


class Users(NamedTuple):
    """m rows of users, `layout.user_layout`; unsigned fields as signed ones of the same bits."""

    last_ms: Tensor  # [m]
    count: Tensor  # type: ignore[assignment]  # [m], not tuple's
    d: Tensor  # [m, D+1]
    implicit: Tensor  # [m, H]
    ring_item: Tensor  # [m, N]
    ring_time_s: Tensor  # [m, N]
    ring_event: Tensor  # [m, N]
    ring_level: Tensor  # [m, N]
    ring_logit: Tensor  # [m, N]
    missed: Tensor  # [m], or without a calibrator [m, 0]


class Reading(NamedTuple):
    """What the rule says of m events before it knows their levels, and the rows after the leak."""

    z: Tensor  # [m] linear predictor
    v: Tensor  # [m] zeros: the rule keeps no uncertainty of its users
    v_item: Tensor  # [m] V_c + Σ w² V_δ
    flags: Tensor  # [m] bits of Flag that the user's row tells: late, duplicate
    w: Tensor  # [m, D+1] w₀ + B ψ + d
    d: Tensor  # [m, D+1]


def init(theta: Theta, m: int, *, ring: int, dtype: torch.dtype = torch.float32) -> Users:
    """Rows of m users before their first event: at their prior, which is d = 0."""
    where = theta.prior_variance.device
    count, ring_floats = torch.zeros(m, dtype=torch.int32, device=where), torch.zeros(m, ring, device=where).to(dtype)
    return Users(
        last_ms=count.long(),
        count=count,
        d=torch.zeros(m, len(theta.prior_variance), dtype=dtype, device=where),
        implicit=torch.zeros(m, len(theta.implicit_map), dtype=dtype, device=where),
        ring_item=ring_floats.long(),
        ring_time_s=ring_floats.int(),
        ring_event=ring_floats.int(),
        ring_level=ring_floats.to(torch.int8),
        ring_logit=ring_floats,
        missed=ring_floats[:, :0] if not len(theta.calibrator) else ring_floats.new_zeros(m),
    )


def read(theta: Theta, users: Users, seen: Seen, screen: Screen = LEARN_ALL) -> Reading:
    """Leak to the prior, then z = b + c + ⟨w, x̃⟩. The rows stay as they are."""
    kept = leaked(users.d, hours_since(users, seen), theta.leak)  # [m, D+1]
    d = torch.where((users.count > 0)[:, None], kept, 0.0)  # [m, D+1]
    w = prior_mean(theta, users, seen) + d  # [m, D+1]
    z = seen.offset + (w * seen.x).sum(1)  # [m]
    return Reading(
        z=z,
        v=torch.zeros_like(z),
        v_item=seen.c_var + (w[:, :-1].square() * seen.delta_var).sum(1),  # [m]
        flags=screened(users, seen, screen),  # [m]
        w=w,
        d=d,
    )


def write(
    theta: Theta, users: Users, seen: Seen, reading: Reading, screen: Screen = LEARN_ALL, *, normalized: bool
) -> Written:
    """Learns from m events: e = y − σ(z), d += η x̃ e/N.

    A row stays as it was, without the leak, if its event carries no level or a flag that bars it, or if the update is
    not finite.
    """
    q = torch.sigmoid(reading.z)  # [m]
    e, h = torch.sigmoid(theta.level_scores[seen.level.clamp(min=0)]) - q, q * (1.0 - q)  # [m], [m]
    d = stepped(reading.d, seen.x, e, h, theta.prior_variance, normalized=normalized)  # [m, D+1]
    teaches = (seen.level >= 0) & (reading.flags & screen.barred == 0)  # [m]
    taught = teaches & fits(d) & item_fits(reading.w, torch.ones_like(e), e)  # [m]
    z = reading.z + ((d - reading.d) * seen.x).sum(1)  # [m]
    return Written(
        users=remember(users, seen, reading.z, taught)._replace(d=chosen(taught, d, users.d)),
        lesson=Lesson(taught, reading.w, h, e),
        z=torch.where(taught, z, reading.z),
        v=reading.v,
    )


def leaked(d: Tensor, hours: Tensor, leak: Tensor) -> Tensor:
    """d `[m, D+1]` after `hours` `[m]`: γ d with γ of a, b = `leak` `[2, D+1]`."""
    return torch.exp(-(leak[0] + leak[1] * torch.log1p(hours)[:, None])) * d  # [m, D+1]


def stepped(d: Tensor, x: Tensor, e: Tensor, h: Tensor, rates: Tensor, *, normalized: bool) -> Tensor:
    """d `[m, D+1]` after a step: d + η x̃ e/N, for errors `[m]`, curvatures `[m]` and η = `rates` `[D+1]`."""
    g = rates * x  # [m, D+1]
    gain = e / (1.0 + h * (g * x).sum(1)) if normalized else e  # [m]
    return d + gain[:, None] * g  # [m, D+1]


def frozen(theta: Theta, x: Tensor, c: Tensor, w0: Tensor, known: Tensor) -> Tensor:
    """The score `[m]` of the same model without adaptation: d = 0, no offsets, the item's first variances.

    Args:
        theta: slow weights.
        x: `[m, D+1]` x̃ without the item's offset.
        c: `[m]` the item's bias under θ.
        w0: `[m, D+1]` prior mean.
        known: `[m]` rows of the items in θ.
    """
    c_var, delta_var = item_variances(theta, known)  # [m], [m]
    variance = c_var + w0[:, :-1].square().sum(1) * delta_var  # [m]
    return read_out(theta, theta.bias + c + (w0 * x).sum(1), variance)


def equations(*, normalized: bool) -> Equations:
    """The rule for `batching.adapt_with`."""
    return Equations(Users, read, partial(write, normalized=normalized), frozen)
