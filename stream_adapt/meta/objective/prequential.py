"""What production pays: the loss of every event, predicted from the user's earlier events alone.

The Kalman rule needs no unrolled loop. A user's deviation from the prior is an Ornstein–Uhlenbeck process seen through
x̃, so the rule's one-step predictions are the innovations of a Gaussian process with covariance

    K[t, s] = exp(−Σ rates between s and t) · x̃_tᵀ P₀ x̃_s        L Lᵀ = K + σ²I        r = s_ℓ − (b + c + ⟨w₀, x̃⟩)

    ε = diag(L) ∘ L⁻¹ r        z = s_ℓ − ε        v = diag(L)² − σ²

(Kailath 1968; Rasmussen and Williams 2006, §2.2). One batched Cholesky serves a chunk of many sequences; what a chunk
taught is handed on as a mean and a covariance, as between the events of the rule, so that the cost grows with a
sequence's length and not with its square. This is the full covariance; the diagonal is served from the same θ.

Capital letters: B sequences, T events of the longest, C of a chunk, D dimensions, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

#: Weight of the other thresholds' losses beside the target's: what the target alone says of the levels is coarse.
ORDINAL_WEIGHT = 0.5
#: Events of a sequence that are predicted at once: a Cholesky's cost is the square of it for each event, and every
#: chunk waits for the one before.
CHUNK = 64


@dataclass(frozen=True, slots=True)
class Sequences:
    """B users' sequences, padded at their ends; a padded event has x = 0 and counts for nothing."""

    x: Tensor  # [B, T, D+1] x̃
    prior: Tensor  # [B, T] b + c + ⟨w₀, x̃⟩
    scores: Tensor  # [B, T] s_ℓ
    gaps: Tensor  # [B, T] hours since the sequence's event before; 0 at the first
    real: Tensor  # [B, T] bool


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


def predict_frozen(sequences: Sequences, prior_variance: Tensor) -> Predictions:
    """What the prior alone says: the same model without adaptation."""
    return Predictions(z=sequences.prior, v=sequences.x.square() @ prior_variance)


def logit(predictions: Predictions, readout: Tensor) -> Tensor:
    """α z/√(1 + κ v) + β `[B, T]` with α, κ, β = `readout` `[3]`: its sigmoid is the probability of the target."""
    return readout[0] * predictions.z * torch.rsqrt(1.0 + readout[1] * predictions.v) + readout[2]


def loss(logits: Tensor, levels: Tensor, thresholds: Tensor, target: int) -> Tensor:
    """Cross-entropy `[…]` of the target, plus ORDINAL_WEIGHT times that of the other thresholds.

    Args:
        logits: `[…]` of the target, `level >= target`.
        levels: `[…]` what was said.
        thresholds: `[L−1]` what to add to the logit for `level >= 1`, …, `level >= L−1`; 0 at the target.
        target: the first level whose target is 1.
    """
    cuts = torch.arange(1, len(thresholds) + 1, device=levels.device)  # [L-1]
    said = (levels[..., None] >= cuts).to(logits.dtype)  # [..., L-1]
    each = binary_cross_entropy_with_logits(logits[..., None] + thresholds, said, reduction="none")  # [..., L-1]
    weights = torch.where(cuts == target, 1.0, ORDINAL_WEIGHT)  # [L-1]
    return each @ weights.to(each.dtype)  # [...]
