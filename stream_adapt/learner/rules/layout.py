"""Rows: what every rule remembers of a user beside its own fields, and what all of them remember of an item.

Fast weights are kept as deviations from what θ says, d = w − w₀ and Δc, δ for items: a row that nobody has touched
is all zeros but for its variances, and a new θ carries a row by keeping its deviation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.models import LearnerSpec
from stream_adapt.state.row import Field, Kind, Layout

Floats = npt.NDArray[np.float64]


def user_layout(spec: LearnerSpec, *own: Field) -> Layout:
    """Row of a user, with a rule's `own` fields before the ring; D+1 = spec.dimension + 1, N = spec.ring."""
    width, ring = spec.dimension + 1, spec.ring
    missed = Field(
        "missed", "<f4", (), "sum of what the model's scores fell short of the targets, of the events learned"
    )
    calibrated = (missed,) if spec.calibrator == "linear" else ()
    return Layout(
        Kind.USER,
        (
            Field("last_ms", "<i8", (), "time of the last event learned, ms since the epoch"),
            Field("count", "<i4", (), "events learned"),
            Field("d", "<f4", (width,), "fast weights less their prior mean, w − w₀; the last is the user's bias"),
            Field("implicit", "<f4", (spec.implicit,), "sum of f(item) over the events learned"),
            *own,
            *calibrated,
            Field("ring_item", "<u8", (ring,), "the last N events, the k-th at k mod N: xxh3-64 of the item id"),
            Field("ring_time_s", "<u4", (ring,), "their times, s since the epoch"),
            Field("ring_event", "<u4", (ring,), "low half of xxh3-64 of their ids; 0: not kept"),
            Field("ring_level", "<i1", (ring,), "their levels"),
            Field("ring_logit", "<f4", (ring,), "their logits z, before each was learned"),
        ),
    )


def item_layout(spec: LearnerSpec) -> Layout:
    """Row of an item, in information form: `pending` sums are applied at the first touch in a later window."""
    size = spec.dimension
    return Layout(
        Kind.ITEM,
        (
            Field("hash", "<u8", (), "xxh3-64 of the item id: its key in θ"),
            Field("window", "<i8", (), "window that the pending sums belong to"),
            Field("count", "<i4", (), "events learned"),
            Field("pending_count", "<i4", (), "events in the pending sums"),
            Field("c", "<f4", (), "bias less what θ says, Δc"),
            Field("c_var", "<f4", (), "variance of the bias"),
            Field("delta", "<f4", (size,), "offset δ of the item's vector"),
            Field("delta_var", "<f4", (size,), "variance of each coordinate of δ"),
            Field("c_info", "<f8", (), "pending Σ 1/R"),
            Field("c_sum", "<f8", (), "pending Σ e/R"),
            Field("delta_info", "<f4", (size,), "pending Σ w²/R"),
            Field("delta_sum", "<f4", (size,), "pending Σ w e/R"),
        ),
    )


def applied(items: npt.NDArray[Any]) -> tuple[Floats, Floats, Floats, Floats]:
    """Δc, its variance, δ and its variances `[m]`, `[m, D]`, pending sums applied as the next window does."""
    due = items["pending_count"] > 0
    c, c_var = items["c"].astype(np.float64), items["c_var"].astype(np.float64)
    delta, delta_var = items["delta"].astype(np.float64), items["delta_var"].astype(np.float64)
    new_c_var = 1.0 / (1.0 / c_var + items["c_info"])
    new_delta_var = 1.0 / (1.0 / delta_var + items["delta_info"])
    return (
        np.where(due, c + new_c_var * items["c_sum"], c),
        np.where(due, new_c_var, c_var),
        np.where(due[:, None], delta + new_delta_var * items["delta_sum"], delta),
        np.where(due[:, None], new_delta_var, delta_var),
    )
