"""The Kalman rule as the outer loop sees it.

Event by event it is `learner.rules.kalman.batched`, as service runs it. Training seldom needs that loop: a user's
deviation from the prior is an Ornstein–Uhlenbeck process seen through x̃, so the rule's one-step predictions are the
innovations of a Gaussian process with covariance

    K[t, s] = exp(−Σ rates between s and t) · x̃_tᵀ P₀ x̃_s        L Lᵀ = K + σ²I        r = s_ℓ − (b + c + ⟨w₀, x̃⟩)

    ε = diag(L) ∘ L⁻¹ r        z = s_ℓ − ε        v = diag(L)² − σ²

(Kailath 1968; Rasmussen and Williams 2006, §2.2). One batched Cholesky serves a batch of whole sequences. This is the
full covariance; the diagonal is served from the same θ.

Capital letters: B sequences, T events of the longest, D dimensions, L levels. m events of different sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stream_adapt.learner.rules.batching import Seen, Theta
from stream_adapt.learner.rules.kalman import batched
from stream_adapt.meta.objective.contract import Events, Rows, Sequences


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the rule says of every event before it learns from it."""

    z: Tensor  # [B, T] linear predictor
    v: Tensor  # [B, T] its variance


def predict(sequences: Sequences, prior_variance: Tensor, noise: Tensor, leak: Tensor) -> Predictions:
    """One-step predictions of the Kalman rule with full covariance, differentiable in everything.

    Args:
        sequences: what was seen.
        prior_variance: `[D+1]` diagonal of P₀.
        noise: σ², a scalar.
        leak: `[2]` a, b of γ = exp(−(a + b·log(1 + Δt/1 h))).
    """
    x = sequences.x * prior_variance.sqrt() * sequences.real[..., None]  # [B, T, D+1]
    kernel = _decay(sequences.gaps, leak) * (x @ x.mT)  # [B, T, T]
    kernel = kernel + noise * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)  # [B, T, T]
    lower = torch.linalg.cholesky(kernel)  # [B, T, T]
    scale = lower.diagonal(dim1=1, dim2=2)  # [B, T]
    residual = (sequences.scores - sequences.prior) * sequences.real  # [B, T]
    white = torch.linalg.solve_triangular(lower, residual[..., None], upper=False)[..., 0]  # [B, T]
    return Predictions(z=sequences.scores - scale * white, v=scale.square() - noise)


def posterior(
    sequences: Sequences, learned: Tensor, prior_variance: Tensor, noise: Tensor, leak: Tensor
) -> tuple[Tensor, Tensor]:
    """Fast weights after the first `learned` `[B]` events of each sequence, as of the last of these.

    With X the events' x̃, each times its decay up to the last, and K as above over these events alone:

        d = P₀ Xᵀ (K + σ²I)⁻¹ r        P = P₀ − P₀ Xᵀ (K + σ²I)⁻¹ X P₀

    Returns:
        d `[B, D+1]` and P `[B, D+1, D+1]`.
    """
    first = int(learned.max())
    clock = (leak[0] + leak[1] * torch.log1p(sequences.gaps[:, :first])).cumsum(1)  # [B, s]
    taught = (torch.arange(first, device=learned.device) < learned[:, None]).to(clock.dtype)  # [B, s]
    x = sequences.x[:, :first] * taught[..., None]  # [B, s, D+1]
    spread = x * prior_variance  # [B, s, D+1] X P₀
    kernel = torch.exp(-(clock[:, :, None] - clock[:, None, :]).abs()) * (spread @ x.mT)  # [B, s, s]
    lower = torch.linalg.cholesky(kernel + noise * torch.eye(first, dtype=x.dtype, device=x.device))  # [B, s, s]
    last = clock.gather(1, (learned - 1).clamp_min(0)[:, None]) if first else clock.sum(1, keepdim=True)  # [B, 1]
    decayed = spread * torch.exp((clock - last).clamp_max(0.0))[..., None]  # [B, s, D+1]
    residual = (sequences.scores - sequences.prior)[:, :first] * taught  # [B, s]
    white = torch.linalg.solve_triangular(lower, torch.cat([decayed, residual[..., None]], 2), upper=False)
    known, error = white[..., :-1], white[..., -1:]  # [B, s, D+1], [B, s, 1]
    return (known.mT @ error)[..., 0], torch.diag(prior_variance) - known.mT @ known


def predict_frozen(sequences: Sequences, prior_variance: Tensor) -> Predictions:
    """What the prior alone says: the same model without adaptation."""
    return Predictions(z=sequences.prior, v=sequences.x.square() @ prior_variance)


def _decay(gaps: Tensor, leak: Tensor) -> Tensor:
    """How much of a deviation at event s is left at event t: `[B, T, T]`, symmetric, 1 on the diagonal."""
    rates = leak[0] + leak[1] * torch.log1p(gaps)  # [B, T]
    clock = rates.cumsum(1)  # [B, T]
    return torch.exp(-(clock[:, :, None] - clock[:, None, :]).abs())  # [B, T, T]


def logit(predictions: Predictions, readout: Tensor) -> Tensor:
    """α z/√(1 + κ v) + β `[B, T]` with α, κ, β = `readout` `[3]`: its sigmoid is the probability of the target."""
    return readout[0] * predictions.z * torch.rsqrt(1.0 + readout[1] * predictions.v) + readout[2]


class Kalman:
    """The rule under one θ, with full covariance: see `contract.Rule`."""

    def __init__(
        self, prior_variance: Tensor, noise: Tensor, leak: Tensor, readout: Tensor, level_scores: Tensor
    ) -> None:
        """θ's numbers: P₀ `[D+1]`, σ² scalar, a and b `[2]`, α, κ, β `[3]`, s `[L]`."""
        self.prior_variance, self.noise, self.leak, self.readout = prior_variance, noise, leak, readout
        nothing = prior_variance.new_zeros(0)
        self._theta = Theta(
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

    def init(self, m: int) -> Rows:
        """d = 0, P = P₀."""
        return batched.init(self._theta, m, full=True, ring=1, dtype=torch.float64)

    def read(self, rows: Rows, events: Events) -> Tensor:
        """Logits `[m]`, after the leak since the last event learned."""
        return self._logits(batched.read(self._theta, batched.Users._make(rows), self._seen(events)), events)

    def step(self, rows: Rows, events: Events) -> tuple[Tensor, Rows]:
        """Logits `[m]`, and the rows after a measurement update."""
        users, seen = batched.Users._make(rows), self._seen(events)
        reading = batched.read(self._theta, users, seen)
        return self._logits(reading, events), batched.write(self._theta, users, seen, reading).users

    def frozen(self, seen: Sequences) -> Tensor:
        """Logits `[B, T]` at d = 0, P = P₀."""
        return logit(predict_frozen(seen, self.prior_variance), self.readout)

    def closed_form(self, seen: Sequences) -> Tensor:
        """Logits `[B, T]`, by one Cholesky factorisation."""
        return logit(predict(seen, self.prior_variance, self.noise, self.leak), self.readout)

    def closed_rows(self, seen: Sequences, learned: Tensor, clock_ms: Tensor) -> Rows:
        """Rows `[B]`, by one Cholesky factorisation."""
        d, P = posterior(seen, learned, self.prior_variance, self.noise, self.leak)  # noqa: N806
        last = clock_ms.gather(1, (learned - 1).clamp_min(0)[:, None])[:, 0]  # [B]
        row, column = torch.tril_indices(d.shape[1], d.shape[1], device=d.device)
        rows = batched.init(self._theta, len(learned), full=True, ring=1, dtype=torch.float64)
        return rows._replace(last_ms=last, count=learned.int(), d=d.double(), P=P[:, row, column].double())

    def _logits(self, reading: batched.Reading, events: Events) -> Tensor:
        return logit(Predictions(reading.z, reading.v), self._theta.readout).to(events.prior.dtype)

    def _seen(self, events: Events) -> Seen:
        """Events whose items are as θ has them: w₀ is in the prior already, and no item has a variance."""
        x = events.x.double()  # [m, D+1]
        zeros = torch.zeros_like(x)  # [m, D+1]
        return Seen(
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
