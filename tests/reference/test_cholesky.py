"""The Cholesky read-out is the Kalman recursion: same predictions, and gradients that finite differences confirm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stream_adapt.meta.objective import contract, kalman
from stream_adapt.meta.objective.contract import Sequences

D = 5


def recursion(sequence: Sequences, b: int, p0: Tensor, noise: float, leak: Tensor) -> tuple[list[float], list[float]]:
    """z and v of sequence b, one event at a time, items fixed: the equations as they are written."""
    prior = np.diag(p0.numpy())
    d, p = np.zeros(D + 1), prior
    zs, vs = [], []
    for t in range(int(sequence.real[b].sum())):
        x = sequence.x[b, t].numpy()
        gamma = np.exp(-float(leak[0] + leak[1] * torch.log1p(sequence.gaps[b, t]))) if t else 1.0
        d, p = gamma * d, gamma**2 * p + (1 - gamma**2) * prior
        z, v = float(sequence.prior[b, t]) + d @ x, x @ p @ x
        zs.append(z)
        vs.append(v)
        gain = p @ x / (v + noise)
        d, p = d + gain * (float(sequence.scores[b, t]) - z), p - np.outer(gain, p @ x)
    return zs, vs


def random_sequences(rng: np.random.Generator, lengths: list[int], dtype: torch.dtype) -> Sequences:
    """Sequences with irregular times, from the same second to years apart, padded with rubbish."""
    shape = (len(lengths), max(lengths))
    x = np.concatenate([rng.normal(size=(*shape, D)), np.ones((*shape, 1))], 2)
    gaps = np.where(rng.random(shape) < 0.3, 0.0, np.exp(rng.normal(-1, 4, size=shape)))
    real = np.arange(shape[1]) < np.array(lengths)[:, None]
    columns = (x, rng.normal(size=shape), rng.normal(0, 2, size=shape), gaps)
    return Sequences(*(torch.from_numpy(c).to(dtype) for c in columns), real=torch.from_numpy(real))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_recursion_over_whole_sequences(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(7)
    lengths = [256, 1, 2, 97, 200]
    seen = random_sequences(rng, lengths, dtype)
    p0, leak = torch.from_numpy(rng.uniform(0.05, 1.5, D + 1)).to(dtype), torch.tensor([0.004, 0.02], dtype=dtype)
    said = kalman.predict(seen, p0, torch.tensor(1.35, dtype=dtype), leak)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for b, length in enumerate(lengths):
        z, v = recursion(seen, b, p0, 1.35, leak)
        np.testing.assert_allclose(said.z[b, :length].numpy(), z, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(said.v[b, :length].numpy(), v, atol=tolerance, rtol=tolerance)


def test_the_first_event_is_predicted_by_the_prior_alone() -> None:
    seen = random_sequences(np.random.default_rng(1), [4, 3], torch.float64)
    p0 = torch.rand(D + 1, dtype=torch.float64)
    adapted = kalman.predict(seen, p0, torch.tensor(1.0), torch.tensor([0.1, 0.1]))
    frozen = kalman.predict_frozen(seen, p0)
    torch.testing.assert_close(frozen.z[:, 0], adapted.z[:, 0])
    torch.testing.assert_close(frozen.v[:, 0], adapted.v[:, 0])


def test_a_prediction_knows_neither_its_own_feedback_nor_later_feedback() -> None:
    seen = random_sequences(np.random.default_rng(2), [9], torch.float64)
    settings = (torch.rand(D + 1, dtype=torch.float64), torch.tensor(1.0), torch.tensor([0.01, 0.1]))
    before = kalman.predict(seen, *settings)
    seen.scores[:, 5:] += 3.0
    after = kalman.predict(seen, *settings)
    torch.testing.assert_close(before.z[:, :6], after.z[:, :6])
    assert not torch.allclose(before.z[:, 6:], after.z[:, 6:])


def test_padding_changes_nothing() -> None:
    seen = random_sequences(np.random.default_rng(3), [12, 5], torch.float64)
    alone = Sequences(*(c[1:, :5] for c in (seen.x, seen.prior, seen.scores, seen.gaps, seen.real)))
    settings = (torch.rand(D + 1, dtype=torch.float64), torch.tensor(1.0), torch.tensor([0.01, 0.1]))
    torch.testing.assert_close(kalman.predict(alone, *settings).z[0], kalman.predict(seen, *settings).z[1, :5])


def objective(seen: Sequences) -> Callable[..., Tensor]:
    levels = torch.tensor([[0, 3, 1, 2, 4, 0], [4, 0, 2, 1, 0, 0]])

    def loss(
        x: Tensor, scores: Tensor, p0: Tensor, noise: Tensor, leak: Tensor, readout: Tensor, cuts: Tensor
    ) -> Tensor:
        given = Sequences(x, seen.prior, scores[levels], seen.gaps, seen.real)
        logits = kalman.logit(kalman.predict(given, p0, noise, leak), readout)
        return contract.loss(logits, levels, cuts, target=3)[seen.real].mean()

    return loss


@pytest.mark.parametrize("chunk", [2, 64])
def test_gradients_equal_finite_differences(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kalman, "CHUNK", chunk)
    seen = random_sequences(np.random.default_rng(4), [6, 4], torch.float64)
    given = (
        seen.x,
        torch.tensor([-2.9, -1.6, -0.6, 0.9, 2.2]),
        torch.rand(D + 1) + 0.1,
        torch.tensor(1.3),
        torch.tensor([0.01, 0.05]),
        torch.tensor([1.1, 0.4, 0.1]),
        torch.tensor([3.0, 1.5, 0.0, -1.2]),
    )
    leaves = tuple(g.double().clone().requires_grad_() for g in given)
    assert torch.autograd.gradcheck(objective(seen), leaves)
