"""The Kalman rule: Bayesian linear regression of the feedback score, user by user, with a meta-learned prior."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from stream_adapt.learner.rules import AdaptRows, Rule
from stream_adapt.learner.rules.kalman import step
from stream_adapt.learner.rules.kalman.layout import covariance_floats, user_layout
from stream_adapt.learner.rules.layout import item_layout
from stream_adapt.models import Model


def _first_user(model: Model) -> dict[str, npt.NDArray[np.float32]]:
    """P₀, as its diagonal or its packed lower triangle."""
    diagonal = model.weights.prior_variance
    if model.spec.covariance == "diagonal":
        return {"P": diagonal}
    packed = np.zeros(covariance_floats(model.spec), dtype=np.float32)
    at = np.arange(len(diagonal))
    packed[at * (at + 3) // 2] = diagonal
    return {"P": packed}


def _compiled(model: Model) -> AdaptRows:
    return partial(step.adapt, step.theta_of(model))


def _batched(model: Model, device: str) -> AdaptRows:
    from stream_adapt.learner.rules import batching  # imports torch, which service on the CPU does without
    from stream_adapt.learner.rules.kalman.batched import EQUATIONS

    return partial(
        batching.adapt_with, EQUATIONS, batching.Theta.of(model.weights, device, model.spec.feedback.target_level)
    )


RULE = Rule(
    variants={"diagonal": {"covariance": "diagonal"}, "full": {"covariance": "full"}},
    user_layout=user_layout,
    item_layout=item_layout,
    first_user=_first_user,
    compiled=_compiled,
    batched=_batched,
)
