"""The gradient rule for many users at once, in torch: for the GPU, and for training through the updates.

`read` and `write` are the equations of `step`, which is the reference, for m users side by side; rounds, windows and
items are those of the Kalman rule (`kalman.batched`). `unroll` is the same recursion over whole sequences, with items
that stay as they are: the outer loop differentiates it.

In `Theta` the rates η stand as `prior_variance`, the logits of the targets as `level_scores`, and `leak` is [2, D+1].

Capital letters: B sequences, T events of the longest, D dimensions. m rows or events.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stream_adapt.learner.rules.kalman.batched import (
    Equations,
    Lesson,
    Seen,
    Theta,
    fits,
    item_fits,
    item_variances,
    read_out,
    remember,
)
from stream_adapt.learner.rules.kalman.step import MS_PER_HOUR


class Users(NamedTuple):
    """m rows of users, `layout.user_layout`; unsigned fields as signed ones of the same bits."""

    last_ms: Tensor  # [m]
    count: Tensor  # type: ignore[assignment]  # [m], not tuple's
    d: Tensor  # [m, D+1]
    ring_item: Tensor  # [m, N]
    ring_time_s: Tensor  # [m, N]
    ring_level: Tensor  # [m, N]
    ring_logit: Tensor  # [m, N]


class Reading(NamedTuple):
    """What the rule says of m events before it knows their levels, and the rows after the leak."""

    z: Tensor  # [m] linear predictor
    v: Tensor  # [m] zeros: the rule keeps no uncertainty of its users
    v_item: Tensor  # [m] V_c + Σ w² V_δ
    late: Tensor  # [m] bool: older than the last event learned
    w: Tensor  # [m, D+1] w₀ + d
    d: Tensor  # [m, D+1]


class Written(NamedTuple):
    """m rows after their events, and what the rule would say of these events now."""

    users: Users
    lesson: Lesson
    z: Tensor  # [m]
    v: Tensor  # [m] zeros


def init(theta: Theta, m: int, *, ring: int, dtype: torch.dtype = torch.float32) -> Users:
    """Rows of m users before their first event: at their prior, which is d = 0."""
    where = theta.prior_variance.device
    count, ring_floats = torch.zeros(m, dtype=torch.int32, device=where), torch.zeros(m, ring, device=where).to(dtype)
    return Users(
        last_ms=count.long(),
        count=count,
        d=torch.zeros(m, len(theta.prior_variance), dtype=dtype, device=where),
        ring_item=ring_floats.long(),
        ring_time_s=ring_floats.int(),
        ring_level=ring_floats,
        ring_logit=ring_floats,
    )


def read(theta: Theta, users: Users, seen: Seen) -> Reading:
    """Leak to the prior, then z = b + c + ⟨w, x̃⟩. The rows stay as they are."""
    hours = (seen.time_ms - users.last_ms).clamp(min=0) / MS_PER_HOUR  # [m]
    d = torch.where((users.count > 0)[:, None], decay(hours.double(), theta.leak) * users.d, 0.0)  # [m, D+1]
    w = seen.w0 + d  # [m, D+1]
    z = seen.offset + (w * seen.x).sum(1)  # [m]
    return Reading(
        z=z,
        v=torch.zeros_like(z),
        v_item=seen.c_var + (w[:, :-1].square() * seen.delta_var).sum(1),  # [m]
        late=(users.count > 0) & (seen.time_ms < users.last_ms),  # [m]
        w=w,
        d=d,
    )


def write(theta: Theta, users: Users, seen: Seen, reading: Reading, *, normalized: bool) -> Written:
    """Learns from m events: e = y − σ(z), d += η x̃ e/N.

    A row stays as it was, without the leak, if its event carries no level or if the update is not finite.
    """
    q = torch.sigmoid(reading.z)  # [m]
    e, h = torch.sigmoid(theta.level_scores[seen.level.clamp(min=0)]) - q, q * (1.0 - q)  # [m], [m]
    g = theta.prior_variance * seen.x  # [m, D+1]
    gain = e / (1.0 + h * (g * seen.x).sum(1)) if normalized else e  # [m]
    d = reading.d + gain[:, None] * g  # [m, D+1]
    taught = (seen.level >= 0) & fits(d) & item_fits(reading.w, e, torch.ones_like(e))  # [m]
    kept = remember(users, seen, reading.z, taught)
    z = reading.z + ((seen.w0 + d - reading.w) * seen.x).sum(1)  # [m]
    return Written(
        users=kept._replace(d=torch.where(taught[:, None], d.to(users.d.dtype), users.d)),
        lesson=Lesson(taught, reading.w, h, e),
        z=torch.where(taught, z, reading.z),
        v=reading.v,
    )


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
    """The rule's equations for `kalman.batched.adapt_with`."""
    return Equations(Users, read, partial(write, normalized=normalized), frozen)


def decay(hours: Tensor, leak: Tensor) -> Tensor:
    """γ `[…, D+1]` after `hours` `[…]`, for `leak` `[2, D+1]`."""
    return torch.exp(-(leak[0] + leak[1] * torch.log1p(hours)[..., None]))


def unroll(
    rates: Tensor,
    leak: Tensor,
    x: Tensor,
    prior: Tensor,
    targets: Tensor,
    hours: Tensor,
    real: Tensor,
    *,
    normalized: bool,
    truncation: int | None = None,
) -> Tensor:
    """z `[B, T]` of every event before it is learned, for padded sequences; differentiable in everything.

    Args:
        rates: `[D+1]` η.
        leak: `[2, D+1]` a, b of γ.
        x: `[B, T, D+1]` x̃.
        prior: `[B, T]` b + c + ⟨w₀, x̃⟩.
        targets: `[B, T]` y of the level that was said, in (0, 1).
        hours: `[B, T]` since the sequence's event before.
        real: `[B, T]` bool; an event that is not real teaches nothing.
        normalized: whether steps are divided by 1 + q(1 − q) x̃ᵀ(η⊙x̃).
        truncation: gradients flow through at most so many updates; None: through all.
    """
    gains = rates * x  # [B, T, D+1]
    power = (gains * x).sum(-1) if normalized else torch.zeros_like(prior)  # [B, T]
    columns = (x, gains, decay(hours, leak).to(x.dtype), prior, targets, power, real.to(x.dtype))
    d = torch.zeros_like(x[:, 0])  # [B, D+1]
    said = []
    # unbind: the gradient of a slice would be as large as what it was cut from, for each of T events.
    for t, (x_t, g, gamma, prior_t, y, u, r) in enumerate(zip(*(c.unbind(1) for c in columns), strict=True)):
        if truncation and t % truncation == 0:
            d = d.detach()
        d = gamma * d  # [B, D+1]
        z = prior_t + (d * x_t).sum(1)  # [B]
        q = torch.sigmoid(z)  # [B]
        d = d + g * (r * (y - q) / (1.0 + q * (1.0 - q) * u))[:, None]  # [B, D+1]
        said.append(z)
    return torch.stack(said, 1)  # [B, T]
