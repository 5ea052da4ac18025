"""Rows of the Kalman rule: a user's covariance beside the weights."""

from __future__ import annotations

from stream_adapt.learner.rules import layout
from stream_adapt.models import LearnerSpec
from stream_adapt.state.row import Field, Layout


def covariance_floats(spec: LearnerSpec) -> int:
    """Floats of P: its diagonal, or its lower triangle packed row by row."""
    width = spec.dimension + 1
    return width if spec.covariance == "diagonal" else width * (width + 1) // 2


def user_layout(spec: LearnerSpec) -> Layout:
    """Row of a user."""
    return layout.user_layout(
        spec, Field("P", "<f4", (covariance_floats(spec),), "covariance of w: diagonal, or packed lower triangle")
    )
