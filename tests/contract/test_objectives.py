"""What every objective promises, for every objective and every rule found; and what each one's gradient is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stream_adapt.errors import ConfigError
from stream_adapt.learner import rules
from stream_adapt.meta import objective
from stream_adapt.meta.objective import contract
from stream_adapt.meta.objective.contract import Judged, Problem, Sequences, taken, unroll
from stream_adapt.meta.objective.kalman import Kalman
from stream_adapt.meta.objective.maml import Maml
from stream_adapt.meta.objective.prequential import Prequential
from stream_adapt.meta.objective.reptile import Reptile

D, LEVELS, TARGET, ITEMS = 3, 5, 3, 12
#: Every objective, and what can be told of it that goes another way through the code.
SETTINGS = {
    **{name: objective.Settings(name) for name in objective.NAMES},
    "prequential, unrolled": objective.Settings("prequential", truncate=4),
    "maml, two events": objective.Settings("maml", support=2),
    "reptile, unrolled": objective.Settings("reptile", truncate=3),
}


def found(member: str) -> dict[str, Any]:
    """Classes of the objectives' package that have a method of this name, by module."""
    modules = [m.name for m in pkgutil.iter_modules(objective.__path__) if m.name != "contract"]
    classes = {
        name: inspect.getmembers(importlib.import_module(f"{objective.__name__}.{name}"), inspect.isclass)
        for name in modules
    }
    return {name: kind for name in modules for _, kind in classes[name] if member in vars(kind)}


#: Every rule, as objectives see it: θ's numbers → the rule.
RULES: dict[str, Callable[..., contract.Rule]] = {
    name: partial(kind, normalized=True) if "normalized" in inspect.signature(kind).parameters else kind
    for name, kind in found("closed_form").items()
}
every_aim = pytest.mark.parametrize("aim", [objective.make(s) for s in SETTINGS.values()], ids=list(SETTINGS))
every_rule = pytest.mark.parametrize("rule", list(RULES))


def every(test: Callable[..., None]) -> Callable[..., None]:
    return every_rule(every_aim(test))


class Theta(NamedTuple):
    """A small θ: all that is learned, positive numbers as logarithms."""

    items: Tensor  # [items, D+1] x and c
    prior_mean: Tensor  # [D+1]
    log_prior_variance: Tensor  # [D+1]
    log_noise: Tensor
    log_leak: Tensor  # [2]
    log_readout: Tensor  # [2]
    readout_bias: Tensor  # [1]
    level_scores: Tensor  # [L]
    thresholds: Tensor  # [L-1]


@dataclass(frozen=True)
class Batch:
    """B users' events."""

    items: Tensor  # [B, T]
    levels: Tensor  # [B, T]
    gaps: Tensor  # [B, T] whole milliseconds, in hours
    real: Tensor  # [B, T]

    def part(self, at: slice, events: slice = slice(None)) -> Batch:
        return Batch(*(t[at, events] for t in (self.items, self.levels, self.gaps, self.real)))


def theta(seed: int = 0) -> Theta:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Theta(
        items=0.7 * normal(ITEMS, D + 1),
        prior_mean=0.3 * normal(D + 1),
        log_prior_variance=0.3 * normal(D + 1) - 0.7,
        log_noise=torch.tensor(0.3).double(),
        log_leak=torch.tensor([-3.0, -2.0]).double(),
        log_readout=torch.tensor([0.1, -1.0]).double(),
        readout_bias=torch.tensor([0.1]).double(),
        level_scores=torch.tensor([-2.9, -1.6, -0.6, 0.9, 2.2]).double(),
        thresholds=torch.tensor([3.0, 1.5, 0.0, -1.2]).double(),
    )


def batch(lengths: list[int], seed: int = 0) -> Batch:
    """Users whose tastes differ say so in levels; times from the same second to months apart; rubbish as padding."""
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    taste = torch.randn(len(lengths), D, generator=g, dtype=torch.float64)
    items = torch.randint(ITEMS, shape, generator=g)
    liked = (theta(99).items[items][..., :D] * taste[:, None]).sum(-1)  # [B, T]
    levels = torch.bucketize(
        2 * liked + 0.5 * torch.randn(shape, generator=g).double(), torch.tensor([-2.0, -0.5, 0.5, 2.0]).double()
    )
    waits = torch.exp(3 * torch.randn(shape, generator=g).double() - 2) * (torch.rand(shape, generator=g) > 0.3)
    gaps = (waits * contract.MS_PER_HOUR).round() / contract.MS_PER_HOUR
    gaps[:, 0] = 0.0
    return Batch(items, levels, gaps, torch.arange(shape[1]) < torch.tensor(lengths)[:, None])


def problem(given: Theta, seen: Batch, rule: str = "kalman") -> Problem:
    vectors = given.items[seen.items]  # [B, T, D+1]
    x = torch.cat([vectors[..., :D], torch.ones_like(vectors[..., :1])], -1)
    prior = vectors[..., D] + x @ given.prior_mean
    readout = torch.cat([given.log_readout.exp(), given.readout_bias])
    noise, leak = given.log_noise.exp(), given.log_leak.exp()
    if rule == "gradient":
        leak = leak[:, None].expand(2, D + 1)
    made = RULES[rule](given.log_prior_variance.exp(), noise, leak, readout, given.level_scores)
    said = Sequences(x, prior, given.level_scores[seen.levels], seen.gaps, seen.real)
    return Problem(made, said, seen.levels, given.thresholds * (torch.arange(LEVELS - 1) != TARGET - 1), TARGET)


def leaves(given: Theta) -> Theta:
    return Theta(*(t.clone().requires_grad_() for t in given))


def gradients(aim: objective.Objective, seen: Batch, rule: str = "kalman") -> Theta:
    """A step's gradient; zeros where there is none."""
    given = leaves(theta())
    aim.judge(problem(given, seen, rule)).mean().backward()
    return Theta(*(torch.zeros_like(t) if t.grad is None else t.grad for t in given))


def assert_close(expected: Theta, actual: Theta, **tolerance: float) -> None:
    for name, one, other in zip(Theta._fields, expected, actual, strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


RAGGED = [9, 1, 2, 5, 12]


def test_every_objective_can_be_named_and_nothing_else() -> None:
    assert {type(objective.make(s)) for s in SETTINGS.values()} == set(found("judge").values())
    with pytest.raises(ConfigError, match="objective='sgd' is not one of prequential, maml"):
        objective.make(objective.Settings("sgd"))  # type: ignore[arg-type]


def test_every_rule_can_be_trained() -> None:
    assert set(rules.names()) == set(RULES)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("maml", {"support": -1.0}),
        ("maml", {"support": float("nan")}),
        ("reptile", {"inner_steps": 0}),
        ("reptile", {"inner_rate": -0.1}),
        ("prequential", {"truncate": -1}),
    ],
)
def test_what_cannot_work_is_refused(name: objective.Name, told: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"objective.{next(iter(told))}="):
        objective.make(objective.Settings(name, **told))  # type: ignore[arg-type]


@every
def test_losses_and_gradients_are_finite_on_ragged_sequences(aim: objective.Objective, rule: str) -> None:
    judged = aim.judge(problem(theta(), batch(RAGGED), rule))
    assert judged.losses.shape == judged.judged.shape == (len(RAGGED), max(RAGGED))
    assert judged.judged.any(1).all(), "every sequence is judged on something"
    assert torch.isfinite(judged.losses[judged.judged]).all()
    made = gradients(aim, batch(RAGGED), rule)
    assert all(torch.isfinite(g).all() for g in made)
    assert made.items.abs().max() > 0


@every
def test_padding_does_not_matter(aim: objective.Objective, rule: str) -> None:
    seen = batch(RAGGED)
    together = aim.judge(problem(theta(), seen, rule))
    for b, length in enumerate(RAGGED):
        alone = aim.judge(problem(theta(), seen.part(slice(b, b + 1), slice(length)), rule))
        torch.testing.assert_close(alone.judged[0], together.judged[b, :length])
        mine = alone.judged[0]
        torch.testing.assert_close(alone.losses[0, mine], together.losses[b, :length][mine])
    rubbish = [t.clone() for t in (seen.items, seen.levels, seen.gaps)]
    for column, value in zip(rubbish, (3, 4, 1e5), strict=True):
        column[~seen.real] = value
    assert_close(gradients(aim, seen, rule), gradients(aim, Batch(*rubbish, real=seen.real), rule))


@every
def test_what_a_user_says_later_changes_no_earlier_loss(aim: objective.Objective, rule: str) -> None:
    seen = batch([12, 12, 7])
    before = aim.judge(problem(theta(), seen, rule))
    for t in (1, 4, 7, 11):
        other = seen.levels.clone()
        other[:, t:] = (other[:, t:] + 2) % LEVELS
        after = aim.judge(problem(theta(), replace(seen, levels=other), rule))
        torch.testing.assert_close(before.judged, after.judged)
        early = before.judged & (torch.arange(12) < t)
        torch.testing.assert_close(before.losses[early], after.losses[early])


@every_rule
@pytest.mark.parametrize("name", [n for n in objective.NAMES if n != "direct"])
def test_what_a_user_said_first_changes_later_losses(name: objective.Name, rule: str) -> None:
    seen, aim = batch([12, 12, 7]), objective.make(objective.Settings(name))
    other = seen.levels.clone()
    other[:, 0] = (other[:, 0] + 2) % LEVELS
    before, after = (aim.judge(problem(theta(), replace(seen, levels=said), rule)) for said in (seen.levels, other))
    last = before.judged & (torch.arange(12) == torch.tensor([12, 12, 7])[:, None] - 1)
    assert (before.losses[last] - after.losses[last]).abs().min() > 1e-4


@every
def test_the_same_batch_gives_the_same_bits(aim: objective.Objective, rule: str) -> None:
    first, second = (gradients(aim, batch(RAGGED), rule) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every
def test_a_step_lowers_the_prequential_loss_of_other_users(aim: objective.Objective, rule: str) -> None:
    others = batch([20] * 60, seed=5)

    def held_out(given: Theta) -> float:
        with torch.no_grad():
            return float(Prequential().judge(problem(given, others, rule)).mean())

    down = gradients(aim, batch([20] * 60, seed=4), rule)
    moved = Theta(*(t - 0.1 * g for t, g in zip(theta(), down, strict=True)))
    assert held_out(moved) < held_out(theta()) - 1e-3


def loss_of(aim: objective.Objective, seen: Batch, rule: str) -> Callable[..., Tensor]:
    return lambda *numbers: aim.judge(problem(Theta(*numbers), seen, rule)).mean()


@pytest.mark.parametrize(
    "aim",
    [Prequential(), Prequential(truncate=99), Maml(support=0.5), Maml(support=2), objective.Direct()],
    ids=["prequential", "unrolled", "maml", "maml, two events", "direct"],
)
@every_rule
def test_gradients_equal_finite_differences(aim: objective.Objective, rule: str) -> None:
    assert torch.autograd.gradcheck(loss_of(aim, batch([6, 4, 1]), rule), tuple(leaves(theta())))


# ---- prequential


def test_unrolled_and_by_cholesky_are_the_same_loss_and_the_same_gradient() -> None:
    seen = batch([40, 1, 17, 33])
    closed, unrolled = (Prequential(truncate).judge(problem(theta(), seen)) for truncate in (0, 40))
    torch.testing.assert_close(closed.losses[seen.real], unrolled.losses[seen.real], rtol=1e-7, atol=1e-7)
    assert_close(gradients(Prequential(), seen), gradients(Prequential(40), seen), rtol=1e-6, atol=1e-7)


def test_truncation_changes_gradients_and_no_loss() -> None:
    seen = batch([20, 11])
    whole, short = (Prequential(truncate).judge(problem(theta(), seen)) for truncate in (40, 3))
    torch.testing.assert_close(whole.losses, short.losses, rtol=0, atol=0)
    assert not torch.allclose(gradients(Prequential(40), seen).items, gradients(Prequential(3), seen).items)


def test_a_rule_without_a_closed_form_is_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(Prequential(), batch(RAGGED))
    monkeypatch.setattr(Kalman, "closed_form", lambda rule, seen: None)
    assert_close(expected, gradients(Prequential(), batch(RAGGED)), rtol=1e-6, atol=1e-7)


# ---- maml and fomaml


def test_support_is_a_number_or_a_share_and_leaves_something_to_judge() -> None:
    lengths = torch.tensor([1, 2, 5, 100])
    assert [0, 1, 2, 50] == Maml(support=0.5).support_of(lengths).tolist()
    assert [0, 1, 4, 8] == Maml(support=8).support_of(lengths).tolist()
    assert [0, 0, 0, 0] == Maml(support=0).support_of(lengths).tolist()


def test_adapting_on_all_but_the_last_event_judges_it_as_prequential_does() -> None:
    seen = batch([9, 9])
    said = [aim.judge(problem(theta(), seen)).losses[:, -1] for aim in (Maml(support=8), Prequential())]
    torch.testing.assert_close(said[0], said[1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("aim", [Maml(0.5), Maml(0), Maml(0.5, first_order=True)], ids=["share", "none", "first order"])
def test_closed_rows_are_those_of_the_updates(aim: Maml, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batch([40, 1, 17, 33])
    losses, expected = aim.judge(problem(theta(), seen)).losses, gradients(aim, seen)
    monkeypatch.setattr(Kalman, "closed_rows", lambda *_: None)
    torch.testing.assert_close(losses, aim.judge(problem(theta(), seen)).losses, rtol=1e-7, atol=1e-7)
    assert_close(expected, gradients(aim, seen), rtol=1e-6, atol=1e-7)


def test_queries_teach_nothing() -> None:
    seen = batch([9, 9])
    other = seen.levels.clone()
    other[:, 5] = (other[:, 5] + 2) % LEVELS
    said = [Maml(support=4).judge(problem(theta(), replace(seen, levels=one))).losses for one in (seen.levels, other)]
    torch.testing.assert_close(said[0][:, 6:], said[1][:, 6:], rtol=0, atol=0)


def test_second_order_sees_what_only_acts_through_the_updates() -> None:
    seen = batch([8, 8, 6])
    second, first = gradients(Maml(0.5), seen), gradients(Maml(0.5, first_order=True), seen)
    for name in ("log_noise", "level_scores"):
        assert getattr(second, name).abs().max() > 1e-3, name
        assert getattr(first, name).abs().max() == 0.0, name
    assert not torch.allclose(second.items, first.items, rtol=0.1)


def test_first_order_is_the_gradient_at_adapted_weights_held_fixed() -> None:
    """w_s = w₀ + d_s with d_s and P_s as constants: ∂w_s/∂w₀ = I."""
    seen, aim = batch([8, 8, 6]), Maml(support=4)
    learn = torch.ones(3, 4, dtype=torch.bool)
    with torch.no_grad():
        _, rows = unroll(problem(theta(), seen), learn)

    def query(*numbers: Tensor) -> Tensor:
        given = problem(Theta(*numbers), seen)
        at = (seen.real & (torch.arange(8) >= 4)).nonzero(as_tuple=True)
        said = given.rule.read(taken(rows, at[0]), given.events(at, torch.zeros_like(at[0]).bool()))
        losses = given.losses(torch.zeros_like(given.seen.prior).index_put(at, said))
        return Judged(losses, seen.real & (torch.arange(8) >= 4)).mean()

    given = leaves(theta())
    assert torch.autograd.gradcheck(query, tuple(given))
    expected = torch.autograd.grad(query(*given), given, allow_unused=True)
    made = Theta(*(torch.zeros_like(t) if g is None else g for g, t in zip(expected, given, strict=True)))
    assert_close(made, gradients(replace(aim, first_order=True), seen))


# ---- reptile


def test_reptile_moves_the_prior_mean_to_where_inner_descent_on_each_task_arrives() -> None:
    """Task by task, with plain gradient descent on m alone: (m₀ − m_k)/rate, tasks weighed by their events."""
    seen, steps, rate = batch([9, 6, 12]), 3, 0.2
    total = torch.zeros(D + 1, dtype=torch.float64)
    for b, length in enumerate([9, 6, 12]):
        mine, mean = seen.part(slice(b, b + 1), slice(length)), theta().prior_mean.clone()
        for j in range(steps):
            mean = mean.detach().requires_grad_()
            losses = Prequential().judge(problem(theta()._replace(prior_mean=mean), mine)).losses[0]
            part = losses[j * length // steps : (j + 1) * length // steps]
            (down,) = torch.autograd.grad(part.mean(), mean)
            mean = mean - rate * down
        total += (theta().prior_mean - mean.detach()) / (rate * steps) * length
    made = gradients(Reptile(steps, rate), seen).prior_mean
    torch.testing.assert_close(total / 27, made, rtol=1e-9, atol=1e-12)


def test_one_inner_step_is_the_prequential_gradient() -> None:
    assert_close(gradients(Prequential(), batch(RAGGED)), gradients(Reptile(steps=1), batch(RAGGED)))


def test_the_inner_rate_matters_from_the_second_inner_step_on() -> None:
    slow, fast = (gradients(Reptile(2, rate), batch(RAGGED)).items for rate in (0.0, 1.0))
    torch.testing.assert_close(gradients(Prequential(), batch(RAGGED)).items, slow)
    assert not torch.allclose(slow, fast)
