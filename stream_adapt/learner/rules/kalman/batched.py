"""The Kalman rule for many users at once, in torch: for the GPU, and for training through the updates.

`read` and `write` are the equations of `step`, which is the reference; README.md beside this package says what the two
share. Rounds, windows and items are those of all rules (`batching`).

Capital letters: D dimensions, K floats of P, N events of a ring. m rows or events.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
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
from stream_adapt.learner.rules.kalman.step import LEAST_NOISE


class Users(NamedTuple):
    """m rows of users, `layout.user_layout`; unsigned fields as signed ones of the same bits."""

    last_ms: Tensor  # [m]
    count: Tensor  # type: ignore[assignment]  # [m], not tuple's
    d: Tensor  # [m, D+1]
    implicit: Tensor  # [m, H]
    P: Tensor  # [m, K]
    ring_item: Tensor  # [m, N]
    ring_time_s: Tensor  # [m, N]
    ring_event: Tensor  # [m, N]
    ring_level: Tensor  # [m, N]
    ring_logit: Tensor  # [m, N]
    missed: Tensor  # [m], or without a calibrator [m, 0]


class Reading(NamedTuple):
    """What the rule says of m events before it knows their levels, and the rows after the leak."""

    z: Tensor  # [m] linear predictor
    v: Tensor  # [m] x̃ᵀP x̃
    v_item: Tensor  # [m] V_c + Σ w² V_δ
    flags: Tensor  # [m] bits of Flag that the user's row tells: late, duplicate
    w: Tensor  # [m, D+1] w₀ + B ψ + d
    d: Tensor  # [m, D+1]
    P: Tensor  # [m, K]
    g: Tensor  # [m, D+1] P x̃


def init(theta: Theta, m: int, *, full: bool, ring: int, dtype: torch.dtype = torch.float32) -> Users:
    """Rows of m users before their first event: at their prior, which is d = 0 and P = P₀."""
    where = theta.prior_variance.device
    count, ring_floats = torch.zeros(m, dtype=torch.int32, device=where), torch.zeros(m, ring, device=where).to(dtype)
    return Users(
        last_ms=count.long(),
        count=count,
        d=torch.zeros(m, len(theta.prior_variance), dtype=dtype, device=where),
        implicit=torch.zeros(m, len(theta.implicit_map), dtype=dtype, device=where),
        P=_prior(theta, full).to(dtype).repeat(m, 1),
        ring_item=ring_floats.long(),
        ring_time_s=ring_floats.int(),
        ring_event=ring_floats.int(),
        ring_level=ring_floats.to(torch.int8),
        ring_logit=ring_floats,
        missed=ring_floats[:, :0] if not len(theta.calibrator) else ring_floats.new_zeros(m),
    )


def read(theta: Theta, users: Users, seen: Seen, screen: Screen = LEARN_ALL) -> Reading:
    """Leak to the prior, then z = b + c + ⟨w, x̃⟩ and its variance. The rows stay as they are."""
    decay = torch.exp(-(theta.leak[0] + theta.leak[1] * torch.log1p(hours_since(users, seen))))  # [m]
    gamma = torch.where(users.count > 0, decay, 0.0)[:, None]  # [m, 1]
    square = gamma * gamma  # [m, 1]
    prior = _prior(theta, users.P.shape[1] != users.d.shape[1])  # [K]
    d, P = gamma * users.d, square * users.P + (1.0 - square) * prior  # [m, D+1], [m, K]  # noqa: N806
    w, g = prior_mean(theta, users, seen) + d, _times(P, seen.x)  # [m, D+1]
    return Reading(
        z=seen.offset + (w * seen.x).sum(1),  # [m]
        v=(g * seen.x).sum(1).clamp(min=0.0),  # [m]
        v_item=seen.c_var + (w[:, :-1].square() * seen.delta_var).sum(1),  # [m]
        flags=screened(users, seen, screen),  # [m]
        w=w,
        d=d,
        P=P,
        g=g,
    )


def write(theta: Theta, users: Users, seen: Seen, reading: Reading, screen: Screen = LEARN_ALL) -> Written:
    """Learns from m events: d += P x̃ u, P −= h P x̃ x̃ᵀP.

    A row stays as it was, without the leak, if its event carries no level or a flag that bars it, or if the update is
    not finite.
    """
    level = seen.level.clamp(min=0)  # [m]
    u, h = _weighed(theta, level, reading.z, reading.v + reading.v_item)  # [m], [m]
    rest = 1.0 - h * reading.v_item  # [m]
    q, a = h / rest, u / rest  # [m], [m]
    d = reading.d + reading.g * u[:, None]  # [m, D+1]
    P = reading.P - _outer(reading.g, reading.P.shape[1]) * h[:, None]  # [m, K]  # noqa: N806
    teaches = (seen.level >= 0) & (reading.flags & screen.barred == 0)  # [m]
    taught = teaches & fits(d) & fits(P) & item_fits(reading.w, q, a)  # [m]
    z = reading.z + ((d - reading.d) * seen.x).sum(1)  # [m]
    v = (_times(P, seen.x) * seen.x).sum(1).clamp(min=0.0)  # [m]
    return Written(
        users=remember(users, seen, reading.z, taught)._replace(
            d=chosen(taught, d, users.d), P=chosen(taught, P, users.P)
        ),
        lesson=Lesson(taught, reading.w, q, a),
        z=torch.where(taught, z, reading.z),
        v=torch.where(taught, v, reading.v),
    )


def _weighed(theta: Theta, level: Tensor, z: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """u and h `[m]` of events whose logit z has a variance, both `[m]`."""
    share, noise = theta.outcome_weight, theta.noise * theta.level_noise[level]  # [1], [m]
    p, slope = read_out(theta, z, variance), theta.readout[0] * torch.rsqrt(1.0 + theta.readout[1] * variance)
    precision = (1.0 - share) / (variance + noise)  # [m]
    u = precision * (theta.level_scores[level] - z) + share * slope * ((level >= theta.target).double() - p)  # [m]
    h = precision + share * slope * slope * p * (1.0 - p)  # [m]
    return u, torch.minimum(h, 1.0 / (variance + LEAST_NOISE * noise))


def frozen(theta: Theta, x: Tensor, c: Tensor, w0: Tensor, known: Tensor) -> Tensor:
    """The score `[m]` of the same model without adaptation: d = 0, P = P₀, no offsets, the item's first variances.

    Args:
        theta: slow weights.
        x: `[m, D+1]` x̃ without the item's offset.
        c: `[m]` the item's bias under θ.
        w0: `[m, D+1]` prior mean.
        known: `[m]` rows of the items in θ.
    """
    c_var, delta_var = item_variances(theta, known)  # [m], [m]
    variance = c_var + x.square() @ theta.prior_variance + w0[:, :-1].square().sum(1) * delta_var  # [m]
    return read_out(theta, theta.bias + c + (w0 * x).sum(1), variance)


#: The rule for `batching.adapt_with`.
EQUATIONS = Equations(Users, read, write, frozen)


class _Triangle(NamedTuple):
    """Where the entries of a symmetric matrix of D+1 rows lie when its lower triangle is packed row by row."""

    row: Tensor  # [K]
    column: Tensor  # [K]
    diagonal: Tensor  # [D+1] places in the packed form
    entry: Tensor  # [D+1, D+1] places in the packed form


@cache
def _triangle(width: int, device: torch.device) -> _Triangle:
    at = np.arange(width)
    high, low = np.maximum.outer(at, at), np.minimum.outer(at, at)
    arrays = (*np.tril_indices(width), at * (at + 3) // 2, high * (high + 1) // 2 + low)
    return _Triangle(*(torch.from_numpy(a).to(device) for a in arrays))


def _prior(theta: Theta, full: bool) -> Tensor:
    """P₀ `[K]`, diagonal or packed."""
    diagonal = theta.prior_variance
    if not full:
        return diagonal
    triangle = _triangle(len(diagonal), diagonal.device)
    return diagonal.new_zeros(len(triangle.row)).index_put((triangle.diagonal,), diagonal)


def _times(P: Tensor, x: Tensor) -> Tensor:  # noqa: N803
    """P x `[m, D+1]`, for P `[m, K]` and x `[m, D+1]`."""
    if P.shape[1] == x.shape[1]:
        return P * x
    return (P[:, _triangle(x.shape[1], x.device).entry] @ x[..., None])[..., 0]


def _outer(g: Tensor, floats: int) -> Tensor:
    """g gᵀ `[m, K]` as P is kept, for g `[m, D+1]` and K = `floats`."""
    if floats == g.shape[1]:
        return g * g
    triangle = _triangle(g.shape[1], g.device)
    return g[:, triangle.row] * g[:, triangle.column]
