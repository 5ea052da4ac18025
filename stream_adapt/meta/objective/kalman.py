"""The Kalman rule as the outer loop sees it.

Event by event it is `learner.rules.kalman.batched`, as service runs it. Training seldom needs that loop: a user's
deviation from the prior is an Ornstein–Uhlenbeck process seen through x̃, so the rule's one-step predictions are the
innovations of a Gaussian process with covariance

    K[t, s] = exp(−Σ rates between s and t) · x̃_tᵀ P₀ x̃_s        L Lᵀ = K + σ²I        r = s_ℓ − (b + c + ⟨w₀, x̃⟩)

    ε = diag(L) ∘ L⁻¹ r        z = s_ℓ − ε        v = diag(L)² − σ²

(Kailath 1968; Rasmussen and Williams 2006, §2.2). One batched Cholesky serves a chunk of many sequences; what a chunk
taught is handed on as a mean and a covariance, as between the events of the rule, so that the cost grows with a
sequence's length and not with its square. This is the full covariance; the diagonal is served from the same θ.

Capital letters: B sequences, T events of the longest, C of a chunk, D dimensions, L levels. m events of different
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stream_adapt.learner.rules.batching import Seen, Theta
from stream_adapt.learner.rules.kalman import batched
from stream_adapt.meta.objective.contract import Events, Rows, Sequences

#: Events of a sequence that are predicted at once: a Cholesky's cost is the square of it for each event, and every
#: chunk waits for the one before.
CHUNK = 64


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
    rates = leak[0] + leak[1] * torch.log1p(sequences.gaps)  # [B, T]
    residual = (sequences.scores - sequences.prior) * sequences.real  # [B, T]
    state, errors, variances = None, [], []
    parts = (torch.split(column, CHUNK, 1) for column in (x, rates, residual))
    for x_part, rates_part, residual_part in zip(*parts, strict=True):
        error, variance, state = _chunk(x_part, rates_part, residual_part, noise, state)
        errors.append(error)
        variances.append(variance)
    return Predictions(z=sequences.scores - torch.cat(errors, 1), v=torch.cat(variances, 1))


#: Mean `[B, D+1, 1]` of the deviation and its covariance less the prior's `[B, D+1, D+1]`, after an event and in units
#: of the prior's deviations.
State = tuple[Tensor, Tensor]


def _chunk(
    x: Tensor, rates: Tensor, residual: Tensor, noise: Tensor, state: State | None
) -> tuple[Tensor, Tensor, State]:
    """Innovations ε `[B, C]` and variances v `[B, C]` of C events after a state, and the state after them.

    With g what the leak leaves of the state at an event, Q its covariance less the prior's (here the identity) and C
    the covariance of the state after the last event with the observations:

        K = decay ∘ x xᵀ + (g x) Q (g x)ᵀ        m ← g m + C (K + σ²I)⁻¹ (r − g x m)        Q ← g² Q − C (K + σ²I)⁻¹ Cᵀ
    """
    clock = rates.cumsum(1)  # [B, C]
    decay = torch.exp(-(clock[:, :, None] - clock[:, None, :]).abs())  # [B, C, C]
    kernel = decay * (x @ x.mT) + noise * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)  # [B, C, C]
    residual, cross = residual[..., None], decay[:, -1, :, None] * x  # [B, C, 1], [B, C, D+1]
    left = torch.exp(-clock)[..., None]  # [B, C, 1]
    if state is not None:
        mean, excess = state
        faded = left * x  # [B, C, D+1]
        carried = faded @ excess  # [B, C, D+1]
        kernel = kernel + carried @ faded.mT  # [B, C, C]
        residual, cross = residual - faded @ mean, cross + left[:, -1:] * carried  # [B, C, 1], [B, C, D+1]
    lower = torch.linalg.cholesky(kernel)  # [B, C, C]
    white = torch.linalg.solve_triangular(lower, torch.cat([residual, cross], 2), upper=False)  # [B, C, D+2]
    error, gain = white[..., :1], white[..., 1:]  # [B, C, 1], [B, C, D+1]
    after, less = gain.mT @ error, -(gain.mT @ gain)  # [B, D+1, 1], [B, D+1, D+1]
    if state is not None:
        after, less = after + left[:, -1:] * mean, less + left[:, -1:].square() * excess
    scale = lower.diagonal(dim1=1, dim2=2)  # [B, C]
    return scale * error[..., 0], scale.square() - noise, (after, less)


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
    return Predictions(z=sequences.frozen, v=sequences.x.square() @ prior_variance)


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
        scores_alone = prior_variance.new_zeros(1, dtype=torch.float64)  # λ = 0, by which no target level is read
        self._theta = Theta(
            bias=nothing,
            noise=noise.double(),
            leak=leak.double(),
            readout=readout.double(),
            item_variance=nothing,
            level_scores=level_scores.double(),
            level_noise=torch.ones_like(level_scores, dtype=torch.float64),
            outcome_weight=scores_alone,
            prior_variance=prior_variance.double(),
            item_vector=nothing,
            item_events=nothing,
            feature_vector=nothing,
            implicit_item=nothing,
            calibrator=nothing,
            item_mean=nothing,
            target=torch.zeros_like(scores_alone),
            implicit_map=prior_variance.new_zeros(0, len(prior_variance), dtype=torch.float64),
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
        """Logits `[B, T]`, by a Cholesky factorisation for every chunk."""
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
            added=x[:, :0],  # the implicit state is in the prior already
        )
