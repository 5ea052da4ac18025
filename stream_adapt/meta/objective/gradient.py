"""The gradient rule as the outer loop sees it.

It has no closed form, so every objective takes it through the updates themselves (`contract.unroll`): back-propagation
through the inner loop, as in MAML (Finn et al. 2017, arXiv 1703.03400), here with a rate for each coordinate (Meta-SGD:
Li et al. 2017, arXiv 1707.09835). The equations are those of `learner.rules.gradient.batched`; rows are without what a
logit does not depend on, as thousands of steps are taken for each of the optimiser's.

Capital letters: B sequences, T events of the longest, D dimensions, L levels. m events of different sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stream_adapt.learner.rules.gradient.batched import leaked, stepped
from stream_adapt.meta.objective import contract
from stream_adapt.meta.objective.contract import MS_PER_HOUR, Events, Sequences


class Rows(NamedTuple):
    """m users between two events."""

    last_ms: Tensor  # [m] int64, of the last event learned
    d: Tensor  # [m, D+1] w − w₀


class Gradient:
    """The rule under one θ: see `contract.Rule`. It keeps no variance: a logit is α z + β."""

    def __init__(
        self, rates: Tensor, noise: Tensor, leak: Tensor, readout: Tensor, level_scores: Tensor, *, normalized: bool
    ) -> None:
        """θ's numbers: η `[D+1]`, σ², a and b `[2, D+1]`, α, κ, β `[3]`, the targets' logits `[L]`.

        σ² and κ say how sure the rule is of an item, and items stay as they are in training: neither is read.
        """
        del noise
        self.rates, self.leak, self.readout, self.normalized = rates, leak, readout, normalized
        self.targets = level_scores.sigmoid()  # [L]

    def init(self, m: int) -> contract.Rows:
        """d = 0."""
        return Rows(self.rates.new_zeros(m, dtype=torch.int64), self.rates.new_zeros(m, len(self.rates)))

    def read(self, rows: contract.Rows, events: Events) -> Tensor:
        """Logits `[m]`, after the leak since the last event learned."""
        return self._logits(self._read(Rows._make(rows), events)[1])

    def step(self, rows: contract.Rows, events: Events) -> tuple[Tensor, contract.Rows]:
        """Logits `[m]`, and the rows after a step of logistic regression."""
        before = Rows._make(rows)
        d, z = self._read(before, events)  # [m, D+1], [m]
        q, taught = z.sigmoid(), events.level >= 0  # [m], [m]
        e = self.targets[events.level.clamp(min=0)] - q  # [m]
        d = stepped(d, events.x, e, q * (1.0 - q), self.rates, normalized=self.normalized)  # [m, D+1]
        last_ms = torch.where(taught, torch.maximum(before.last_ms, events.time_ms), before.last_ms)  # [m]
        return self._logits(z), Rows(last_ms, torch.where(taught[:, None], d, before.d))

    def frozen(self, seen: Sequences) -> Tensor:
        """Logits `[B, T]` at d = 0."""
        return self._logits(seen.prior)

    def closed_form(self, seen: Sequences) -> None:
        """There is none."""

    def closed_rows(self, seen: Sequences, learned: Tensor, clock_ms: Tensor) -> None:
        """There are none."""

    def _read(self, rows: Rows, events: Events) -> tuple[Tensor, Tensor]:
        """d `[m, D+1]` after the leak, and z `[m]`."""
        hours = (events.time_ms - rows.last_ms).clamp(min=0).double() / MS_PER_HOUR  # [m]
        d = leaked(rows.d, hours.to(rows.d.dtype), self.leak)  # [m, D+1]
        return d, events.prior + (d * events.x).sum(1)

    def _logits(self, z: Tensor) -> Tensor:
        return self.readout[0] * z + self.readout[2]
