"""Axes in which a diagonal covariance loses least.

Service with `diagonal` keeps the diagonal of P alone, so it matters in which axes x̃ is written. After many events P is
the inverse of the sum of x̃ x̃ᵀ: in the axes in which the second moment of x is diagonal and the prior a unit sphere,
what is thrown away averages to zero. θ turned into them says the same as before with full covariance, but for the
variance of item offsets, which becomes the same along every new axis.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from stream_adapt.models import Floats32, SlowWeights

Floats = npt.NDArray[np.float64]


def turned(weights: SlowWeights, moment: Floats) -> SlowWeights:
    """θ in the axes that suit a diagonal covariance.

    With S = √P₀ of x and R the eigenvectors of S·moment·S, x becomes x S R and w becomes w S⁻¹ R: their product stays.

    Args:
        weights: θ.
        moment: `[D, D]` mean of x xᵀ over events.
    """
    scale = np.sqrt(weights.prior_variance[:-1].astype(np.float64))  # [D]
    _, axes = np.linalg.eigh(scale[:, None] * moment * scale)  # [D, D]
    axes = axes[:, ::-1] * np.where(axes.sum(0) < 0, -1.0, 1.0)[::-1]  # most of x first; a sign for each
    of_x, of_w = scale[:, None] * axes, axes / scale[:, None]  # [D, D]
    prior_variance = np.ones_like(weights.prior_variance)
    prior_variance[-1] = weights.prior_variance[-1]
    item_variance = weights.item_variance * np.array([1.0, np.square(scale).mean()], np.float32)
    return msgspec.structs.replace(
        weights,
        item_vector=_times(weights.item_vector, of_x),
        feature_vector=_times(weights.feature_vector, of_x),
        user_vector=_times(weights.user_vector, of_w),
        prior_mean=_times(weights.prior_mean, of_w),
        prior_variance=prior_variance,
        item_variance=item_variance,
    )


def _times(table: Floats32, matrix: Floats) -> Floats32:
    """Rows `[…, D+1]` with their first D numbers times a matrix `[D, D]`."""
    product = table.astype(np.float64)
    product[..., :-1] = product[..., :-1] @ matrix
    return product.astype(np.float32)
