"""Model-agnostic meta-learning: adapt on the first events of a user, judge on the rest.

Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017,
arXiv 1703.03400. The inner loop is the update rule itself: w_s are the fast weights after the s support events, and the
query events are judged with w_s as it is, after the leak of the time since. A query event's loss is the service's for
an event that comes after exactly s others; what a user teaches later on counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stream_adapt.meta.objective.contract import Judged, Problem, Rows, taken, unroll


@dataclass(frozen=True, slots=True)
class Maml:
    """Second order: the gradient of the query events' loss, through the updates on the support events.

    `first_order` is FOMAML: w_s is detached from the updates that made it. With w_s = w₀ + d_s, where d_s and the
    covariance P_s are then constants and w₀ is not, ∂w_s/∂w₀ = I, as Finn et al. §5.2 have it; θ gets the gradient of
    the query events' loss at the adapted weights. So the prior mean, the encoder at the query events, the biases and
    the readout are learned; what only acts through the updates is not: the noise σ² and the level scores s stay where
    training starts, and the prior variance P₀ and the leak learn only from the time between the last support event
    and a query.
    """

    support: float = 8.0  # events adapted on: their number, or, below 1, their share of a sequence
    first_order: bool = False

    def judge(self, problem: Problem) -> Judged:
        support = self.support_of(problem.seen.lengths)  # [B]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.first_order):
            rows = adapted(problem, support)
        places = torch.arange(problem.seen.real.shape[1], device=support.device)  # [T]
        query = problem.seen.real & (places >= support[:, None])  # [B, T]
        at = query.nonzero(as_tuple=True)  # [m], [m]
        said = problem.rule.read(taken(rows, at[0]), problem.events(at, torch.zeros_like(at[0]).bool()))  # [m]
        logits = torch.zeros_like(problem.seen.prior).index_put(at, said)  # [B, T]
        return Judged(problem.losses(logits), query)

    def support_of(self, lengths: Tensor) -> Tensor:
        """Support events `[B]` of sequences of these lengths: at least one event is left to judge."""
        asked = lengths * self.support if self.support < 1 else torch.full_like(lengths, self.support)
        return torch.minimum(asked.round().long(), lengths - 1)


def adapted(problem: Problem, support: Tensor) -> Rows:
    """Rows after the first `support` `[B]` events of each sequence: in closed form, or through the updates."""
    rows = problem.rule.closed_rows(problem.seen, support, problem.clock_ms)
    if rows is not None:
        return rows
    learn = torch.arange(int(support.max()), device=support.device) < support[:, None]  # [B, s]
    return unroll(problem, learn)[1]
