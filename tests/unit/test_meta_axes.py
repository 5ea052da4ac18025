"""Other axes: the same predictions with full covariance, better ones with a diagonal."""

from __future__ import annotations

import msgspec
import numpy as np
from learner_streams import adapt_all, random_model, random_stream, with_weights

from stream_adapt.adapt import Adapter
from stream_adapt.meta import axes
from stream_adapt.models import Covariance, Model


def correlated(size: int = 6) -> np.ndarray:
    rng = np.random.default_rng(3)
    root = rng.normal(size=(size, 2)) @ rng.normal(size=(2, size)) + 0.2 * rng.normal(size=(size, size))
    return np.asarray(root @ root.T)


def models(covariance: Covariance) -> tuple[Model, Model]:
    """A model whose items do not learn, with vectors of second moment `correlated()`; and the same turned."""
    model = with_weights(random_model(covariance, features=True), item_variance=1e-12)
    vectors = np.random.default_rng(0).multivariate_normal(np.zeros(6), correlated(), 40)
    items = np.concatenate([vectors, model.weights.item_vector[:, -1:]], 1).astype(np.float32)
    weights = msgspec.structs.replace(model.weights, item_vector=items)
    return msgspec.structs.replace(model, weights=weights), msgspec.structs.replace(
        model, weights=axes.turned(weights, vectors.T @ vectors / 40)
    )


def test_with_full_covariance_the_axes_make_no_difference() -> None:
    batch = random_stream(500, features=True)
    before, after = (adapt_all(Adapter(model), [batch]).score for model in models("full"))
    np.testing.assert_allclose(before, after, atol=2e-4)


def test_a_diagonal_covariance_comes_nearer_to_the_full_one() -> None:
    batch = random_stream(2000)
    (full, _), (before, after) = models("full"), models("diagonal")
    target, *others = (adapt_all(Adapter(model), [batch]).score for model in (full, before, after))
    far, near = (float(np.abs(target - other).mean()) for other in others)
    assert near < 0.8 * far


def test_the_prior_is_a_unit_sphere_and_the_moment_diagonal() -> None:
    model, turned = models("diagonal")
    np.testing.assert_array_equal(np.ones(6), turned.weights.prior_variance[:-1])
    assert model.weights.prior_variance[-1] == turned.weights.prior_variance[-1]
    x = turned.weights.item_vector[:, :-1].astype(np.float64)
    moment = x.T @ x / len(x)
    np.testing.assert_allclose(np.diag(np.diag(moment)), moment, atol=1e-5)
    assert (np.diff(np.diag(moment)) <= 0).all(), "most of x comes first"
