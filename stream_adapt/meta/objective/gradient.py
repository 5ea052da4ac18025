"""The gradient rule as the outer loop sees it: `learner.rules.gradient.batched`, as service runs it, event by event.

It has no closed form, so every objective takes it through the updates themselves (`contract.unroll`): back-propagation
through the inner loop, as in MAML (Finn et al. 2017, arXiv 1703.03400), here with a rate for each coordinate (Meta-SGD:
Li et al. 2017, arXiv 1707.09835).

Capital letters: B sequences, T events of the longest, D dimensions, L levels. m events of different sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stream_adapt.learner.rules.gradient import batched
from stream_adapt.meta.objective.bridge import seen_of, theta_of
from stream_adapt.meta.objective.contract import Events, Rows, Sequences


class Gradient:
    """The rule under one θ: see `contract.Rule`. It keeps no variance: a logit is α z + β."""

    def __init__(
        self, rates: Tensor, noise: Tensor, leak: Tensor, readout: Tensor, level_scores: Tensor, *, normalized: bool
    ) -> None:
        """θ's numbers: η `[D+1]`, σ² scalar, a and b `[2, D+1]`, α, κ, β `[3]`, the targets' logits `[L]`."""
        self.readout, self.normalized = readout, normalized
        self._theta = theta_of(rates, noise, leak, readout, level_scores)

    def init(self, m: int) -> Rows:
        """d = 0."""
        return batched.init(self._theta, m, ring=1, dtype=torch.float64)

    def read(self, rows: Rows, events: Events) -> Tensor:
        """Logits `[m]`, after the leak since the last event learned."""
        reading = batched.read(self._theta, batched.Users._make(rows), seen_of(events))
        return self._logits(reading.z).to(events.prior.dtype)

    def step(self, rows: Rows, events: Events) -> tuple[Tensor, Rows]:
        """Logits `[m]`, and the rows after a step of logistic regression."""
        users, seen = batched.Users._make(rows), seen_of(events)
        reading = batched.read(self._theta, users, seen)
        written = batched.write(self._theta, users, seen, reading, normalized=self.normalized)
        return self._logits(reading.z).to(events.prior.dtype), written.users

    def frozen(self, seen: Sequences) -> Tensor:
        """Logits `[B, T]` at d = 0."""
        return self._logits(seen.prior)

    def closed_form(self, seen: Sequences) -> None:
        """There is none."""

    def closed_rows(self, seen: Sequences, learned: Tensor, clock_ms: Tensor) -> None:
        """There are none."""

    def _logits(self, z: Tensor) -> Tensor:
        return self.readout[0] * z + self.readout[2]
