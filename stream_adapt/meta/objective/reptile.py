"""Reptile: θ moves towards the weights that an inner optimisation on each task arrives at.

Nichol, Achiam and Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stream_adapt.meta.objective.contract import Judged, Problem
from stream_adapt.meta.objective.prequential import predict


@dataclass(frozen=True, slots=True)
class Reptile:
    """k steps of gradient descent on each task's own prior mean; the outer step is along (m₀ − m_k)/(rate·k).

    A task is a sequence. Its inner loop starts at m = m₀; step j goes down the gradient of the mean prequential loss of
    the j-th of the k parts that the sequence is cut into by time: k different minibatches, as the paper asks for. The
    rule adapts all the while, from the sequence's first event on, with m in place of m₀.

    (m₀ − m_k)/rate is the sum of the inner gradients, each taken where the inner loop then stood (the paper, §4): so
    the direction is the gradient of the losses below, with the tasks' offsets m − m₀ held constant. All else in θ
    stays during the inner loop, and gets the sum of its gradients at the same places. Tasks weigh as many events as
    they have. Everything is batched over tasks.
    """

    steps: int = 3  # k
    rate: float = 0.1
    truncate: int = 0  # as in `Prequential`

    def judge(self, problem: Problem) -> Judged:
        seen = problem.seen
        places = torch.arange(seen.real.shape[1], device=seen.real.device)  # [T]
        part = (places * self.steps).div(seen.lengths[:, None], rounding_mode="floor")  # [B, T]
        offsets = torch.zeros_like(seen.x[:, 0])  # [B, D+1]
        total = torch.zeros_like(seen.prior)  # [B, T]
        for j in range(self.steps):
            mine = seen.real & (part == j)  # [B, T]
            offsets = offsets.detach().requires_grad_()
            losses = problem.losses(predict(problem.moved(offsets), self.truncate)) * mine  # [B, T]
            total = total + losses
            if j + 1 < self.steps and torch.is_grad_enabled():
                means = losses.sum(1) / mine.sum(1).clamp_min(1)  # [B]
                (down,) = torch.autograd.grad(means.sum(), offsets, retain_graph=True)  # [B, D+1]
                offsets = offsets - self.rate * down
        return Judged(total, seen.real)
