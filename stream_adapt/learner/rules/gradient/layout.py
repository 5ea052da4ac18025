"""Rows of the gradient rule: a user's weights without a covariance, and an item as the Kalman rule keeps it."""

from __future__ import annotations

from dataclasses import replace

from stream_adapt.learner.rules.kalman import layout as kalman
from stream_adapt.learner.rules.kalman.layout import item_layout
from stream_adapt.models import LearnerSpec
from stream_adapt.state.row import Layout

__all__ = ["item_layout", "user_layout"]


def user_layout(spec: LearnerSpec) -> Layout:
    """Row of a user: that of the Kalman rule without P."""
    whole = kalman.user_layout(spec)
    return replace(whole, fields=tuple(f for f in whole.fields if f.name != "P"))
