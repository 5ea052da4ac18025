"""What production pays: the loss of every event, predicted from the user's earlier events alone.

The Kalman rule needs no unrolled loop. A user's deviation from the prior is an Ornstein–Uhlenbeck process seen through
x̃, so the rule's one-step predictions are the innovations of a Gaussian process with covariance

    K[t, s] = exp(−Σ rates between s and t) · x̃_tᵀ P₀ x̃_s        L Lᵀ = K + σ²I        r = s_ℓ − (b + c + ⟨w₀, x̃⟩)

    ε = diag(L) ∘ L⁻¹ r        z = s_ℓ − ε        v = diag(L)² − σ²

(Kailath 1968; Rasmussen and Williams 2006, §2.2). One batched Cholesky serves a batch of whole sequences. This is the
full covariance; the diagonal is served from the same θ.

Capital letters: B sequences, T events of the longest, D dimensions, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

#: Weight of the other thresholds' losses beside the target's: what the target alone says of the levels is coarse.
ORDINAL_WEIGHT = 0.5


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
    kernel = _decay(sequences.gaps, leak) * (x @ x.mT)  # [B, T, T]
    kernel = kernel + noise * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)  # [B, T, T]
    lower = torch.linalg.cholesky(kernel)  # [B, T, T]
    scale = lower.diagonal(dim1=1, dim2=2)  # [B, T]
    residual = (sequences.scores - sequences.prior) * sequences.real  # [B, T]
    white = torch.linalg.solve_triangular(lower, residual[..., None], upper=False)[..., 0]  # [B, T]
    return Predictions(z=sequences.scores - scale * white, v=scale.square() - noise)


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
