"""From the outer loop's terms to those of `learner.rules.batching`: what every rule's adapter here needs.

Items are as θ has them: w₀ is in the prior already, and no item has a variance of its own.
"""

from __future__ import annotations

from torch import Tensor

from stream_adapt.learner.rules import batching
from stream_adapt.meta.objective.contract import Events


def theta_of(
    prior_variance: Tensor, noise: Tensor, leak: Tensor, readout: Tensor, level_scores: Tensor
) -> batching.Theta:
    """θ in float64, of the numbers that rules read; its tables are empty."""
    nothing = prior_variance.new_zeros(0)
    return batching.Theta(
        bias=nothing,
        noise=noise.double(),
        leak=leak.double(),
        readout=readout.double(),
        item_variance=nothing,
        level_scores=level_scores.double(),
        prior_variance=prior_variance.double(),
        item_vector=nothing,
        item_events=nothing,
        feature_vector=nothing,
    )


def seen_of(events: Events) -> batching.Seen:
    """m events as a batched rule reads them."""
    x = events.x.double()  # [m, D+1]
    zeros = x.new_zeros(x.shape)  # [m, D+1]
    return batching.Seen(
        x=x,
        w0=zeros,
        offset=events.prior.double(),
        c_var=zeros[:, 0],
        delta_var=zeros[:, 1:],
        item_hash=events.time_ms,
        time_ms=events.time_ms,
        level=events.level,
        event_hash=events.time_ms.int(),  # nothing is screened in training
    )
