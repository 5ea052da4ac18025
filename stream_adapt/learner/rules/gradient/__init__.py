"""The gradient rule: one step of logistic regression for each event, with meta-learned rates for each coordinate."""

from __future__ import annotations

from functools import partial

from stream_adapt.learner.rules import AdaptRows, Rule
from stream_adapt.learner.rules.gradient import step
from stream_adapt.learner.rules.layout import item_layout, user_layout
from stream_adapt.models import Model


def _compiled(model: Model) -> AdaptRows:
    return partial(step.adapt, step.theta_of(model))


def _batched(model: Model, device: str) -> AdaptRows:
    from stream_adapt.learner.rules import batching  # imports torch, which service on the CPU does without
    from stream_adapt.learner.rules.gradient.batched import equations

    theta = batching.Theta.of(model.weights, device, model.spec.feedback.target_level)
    return partial(batching.adapt_with, equations(normalized=model.spec.normalized), theta)


RULE = Rule(
    variants={"normalized": {"normalized": True}, "plain": {"normalized": False}},
    user_layout=user_layout,
    item_layout=item_layout,
    first_user=lambda _: {},
    compiled=_compiled,
    batched=_batched,
)
