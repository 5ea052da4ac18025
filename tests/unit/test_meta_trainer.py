"""Pretraining: what θ is made from, that it is what was trained, and that nothing after its slice reaches it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from stream_adapt.adapt import Adapter
from stream_adapt.errors import ConfigError, DataError, ModelError
from stream_adapt.learner.encoder import Bag, Categorical, FeatureReader, Numeric, features_struct
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.meta import objective, readout, sequences, trainer
from stream_adapt.meta.objective.prequential import predict
from stream_adapt.meta.pace import Pace, Watch, held_out
from stream_adapt.meta.settling import settled
from stream_adapt.meta.trainer import Trained, TrainSettings, pretrain
from stream_adapt.models import LearnerSpec, Manifest, Model, RuleName, SlowWeights, read_model, write_model
from stream_adapt.record import Batch, ItemId, UserEvent, UserId

STARS = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1.0, 5.0), (2.0, 3.0, 4.0, 5.0)))
SPEC = LearnerSpec(
    features={"genres": Bag(), "year": Numeric(hats=4), "age": Numeric(of="event"), "country": Categorical(of="user")},
    feedback=STARS,
    dimension=4,
)
QUICK = TrainSettings(epochs=2, batch_events=64, longest=16, cooccurrence=3, validation_share=0.0)


@pytest.fixture(scope="module", autouse=True)
def few_items() -> Iterator[None]:
    """So few items get co-occurrence features here only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "ITEMS_PER_COOCCURRENCE", 2)
        yield


def tastes(n: int = 400, seed: int = 0) -> list[UserEvent]:
    """Users who like war films or do not, and say so in stars."""
    rng = np.random.default_rng(seed)
    events = []
    for k in range(n):
        user, item = int(rng.integers(20)), int(rng.integers(15))
        stars = 3 + (1 if user % 2 == item % 2 else -1) + rng.integers(-1, 2)
        features = {"genres": [["war"], ["love"]][item % 2], "year": 1950.0 + item, "age": float(k % 7)}
        features |= {"country": ["fi", "se"][user % 2]}
        name, film = UserId(f"u{user}"), ItemId(f"i{item}")
        events.append(UserEvent(str(k), name, film, "rating", k * 60_000, float(stars), features))  # type: ignore[arg-type]
    return events


@pytest.fixture(scope="module")
def trained() -> Trained:
    return pretrain(tastes(), SPEC, QUICK, device="cpu")


def arrays(weights: SlowWeights) -> dict[str, np.ndarray[Any, Any]]:
    return msgspec.structs.asdict(weights)


def assert_same(expected: Trained, actual: Trained) -> None:
    for name, array in arrays(expected.weights).items():
        np.testing.assert_array_equal(array, getattr(actual.weights, name), err_msg=name)
    assert actual.fitted == expected.fitted


def test_what_was_trained_can_be_written_and_read(trained: Trained, tmp_path: Any) -> None:
    write_model(tmp_path, trained.weights, SPEC, trained.fitted)
    assert read_model(tmp_path).spec == SPEC


def test_a_seed_fixes_the_weights(trained: Trained) -> None:
    assert_same(trained, pretrain(tastes(), SPEC, QUICK, device="cpu"))
    other = pretrain(tastes(), SPEC, msgspec.structs.replace(QUICK, seed=1), device="cpu")
    assert not np.array_equal(trained.weights.item_vector, other.weights.item_vector)


@pytest.mark.parametrize("name", [n for n in objective.NAMES if n not in ("prequential", "direct")])
def test_every_objective_trains_and_a_seed_fixes_its_weights(trained: Trained, name: objective.Name) -> None:
    settings = msgspec.structs.replace(QUICK, epochs=1, objective=objective.Settings(name, inner_rate=1.0))
    made = pretrain(tastes(200), SPEC, settings, device="cpu")
    assert_same(made, pretrain(tastes(200), SPEC, settings, device="cpu"))
    assert all(np.isfinite(array).all() for array in arrays(made.weights).values())
    usual = pretrain(tastes(200), SPEC, msgspec.structs.replace(QUICK, epochs=1), device="cpu")
    assert not np.array_equal(made.weights.item_vector, usual.weights.item_vector)
    assert made.about["objective"]["name"] == name


def test_accumulated_batches_make_one_step() -> None:
    told: list[tuple[int, int, int, float]] = []
    every = msgspec.structs.replace(QUICK, epochs=1)
    pretrain(tastes(), SPEC, every, "cpu", lambda *step: told.append(step))
    batches, losses = len(told), [step[3] for step in told]
    together: list[tuple[int, int, int, float]] = []
    all_at_once = msgspec.structs.replace(every, accumulate=batches)
    pretrain(tastes(), SPEC, all_at_once, "cpu", lambda *step: together.append(step))
    assert len(together) == 1
    assert together[0][:3] == (0, 1, 1)
    assert losses[0] != together[0][3]


def test_gradients_of_accumulated_batches_are_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch twice, two to a step, is each batch once: but for the order of additions."""
    settings = msgspec.structs.replace(QUICK, epochs=1, id_dropout=0.0, batch_events=100_000)
    once = pretrain(tastes(), SPEC, settings, device="cpu")
    batches = trainer._batches
    monkeypatch.setattr(trainer, "_batches", lambda *given: batches(*given) * 2)
    twice = pretrain(tastes(), SPEC, msgspec.structs.replace(settings, accumulate=2), device="cpu")
    assert_same(once, twice)


def seconds_of(clock: Iterator[float], seconds: float, **more: Any) -> tuple[Trained, list[int]]:
    told: list[tuple[int, int, int, float]] = []
    settings = msgspec.structs.replace(QUICK, epochs=50, seconds=seconds, **more)
    made = pretrain(tastes(), SPEC, settings, "cpu", lambda *s: told.append(s), clock=lambda: next(clock))
    return made, [done for _, done, _, _ in told]


def test_a_time_budget_ends_training_and_brings_its_rate_down_in_time() -> None:
    made, done = seconds_of(iter(range(10_000)), 9.0)
    assert len(done) == 8, "one second goes to what a process does once"
    assert done[-1] > 50, "the bar goes by the clock"
    assert made.about["budget_s"] == 9.0
    assert 0 < made.about["epochs"] < 50, "as many as there was time for"
    both, twice = seconds_of(iter(range(10_000)), 9.0, validation_share=0.1)
    assert both.figures
    assert len(twice) == 8, "four seconds for each of two trainings"


def test_a_training_goes_no_further_than_the_one_that_the_readout_was_fitted_to() -> None:
    """The first is slow, and ended by the clock; time then stands still."""
    slow = chain(range(7), repeat(7))
    made, done = seconds_of(map(float, slow), 11.0, validation_share=0.5)
    assert len(done) == 4 + 7, "of 200 steps on half of the events, and of 350 on all: an epoch each"
    whole, _ = seconds_of(repeat(0.0), 11.0, validation_share=0.5)
    assert whole.about["epochs"] == 50
    assert made.about["epochs"] == 1


def test_the_rate_follows_the_clock() -> None:
    clock = iter([0.0, 1.0, 5.0, 10.0])
    pace = Pace(steps=100, seconds=10.0, clock=lambda: next(clock))
    log = sequences.read_log(tastes(50), SPEC)
    vocabulary, levels = sequences.fit(log, SPEC, 100), torch.from_numpy(log.levels)
    parameters = trainer.Parameters(vocabulary, torch.zeros(16, 0), levels, SPEC, torch.Generator())
    settings = msgspec.structs.replace(QUICK, warm_up=0.1)
    optimiser, schedule = trainer._optimiser(parameters, settings, 1.0, pace)
    rates = []
    for _ in range(3):
        optimiser.step()
        pace.advance()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates[0] == pytest.approx(1.0)
    assert 0.5 < rates[1] < 0.7
    assert rates[2] == pytest.approx(0.0)
    assert pace.over


def test_the_vectors_of_rare_items_decay_faster() -> None:
    log = sequences.read_log([*tastes(300), *[e for e in tastes(4_000) if e.item_id == "i3"]], SPEC)
    vocabulary, levels = sequences.fit(log, SPEC, 100), torch.from_numpy(log.levels)
    parameters = trainer.Parameters(vocabulary, torch.zeros(16, 0), levels, SPEC, torch.Generator())
    before = parameters.id_vector.detach().clone()
    for parameter in parameters.parameters():
        parameter.grad = torch.zeros_like(parameter)  # nothing but decay moves it
    settings = msgspec.structs.replace(QUICK, warm_up=0.0, item_decay=3.0)
    optimiser, _ = trainer._optimiser(parameters, settings, 0.01, Pace(steps=10, seconds=0.0, clock=lambda: 0.0))
    optimiser.step()
    shrunk = (parameters.id_vector.detach() / before).mean(1).numpy()  # [I]
    np.testing.assert_allclose(shrunk, 1.0 - 0.01 * 3.0 * np.sqrt(50.0 / vocabulary.item_events), rtol=1e-5)
    assert shrunk.max() - shrunk.min() > 0.03


def test_training_stops_when_what_was_set_aside_gets_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, seen = iter([0.6, 0.5, 0.55, 0.56, 0.1]), []
    figures = trainer.figures_of
    monkeypatch.setattr(trainer, "figures_of", lambda *given: {**figures(*given), "log_loss": next(losses)})
    settings = msgspec.structs.replace(QUICK, epochs=9, validation_share=0.2, patience=2)
    epochs: list[int] = []
    made = pretrain(tastes(), SPEC, settings, "cpu", lambda e, *_: epochs.append(e), lambda *v: seen.append(v))
    assert seen == [(0, 0.6), (1, 0.5), (2, 0.55), (3, 0.56)]
    assert made.about["epochs"] == pytest.approx(2, abs=0.2), (
        "the second training is as long as the best epoch of the first"
    )
    assert epochs.count(8) == 0
    assert max(epochs[len(epochs) // 2 :]) <= 3


def test_the_best_epochs_weights_are_kept() -> None:
    model, losses = torch.nn.Linear(1, 1), iter([2.0, 1.0, 3.0])
    watch = Watch(lambda *_: next(losses), patience=2)
    for epoch in range(3):
        torch.nn.init.constant_(model.weight, epoch)
        watch.enough(epoch, model, None)
    watch.restore(model)
    assert (2, 1.0) == (watch.epochs, model.weight.item())


def test_users_set_aside_are_set_aside_whole() -> None:
    log = sequences.read_log(tastes(), SPEC)
    held = held_out(log, "users", 0.3, seed=1)
    assert not set(log.users[held]) & set(log.users[~held])
    assert 0.25 < held.mean() < 0.4
    assert not np.array_equal(held, held_out(log, "users", 0.3, seed=2))
    settings = msgspec.structs.replace(QUICK, validation_share=0.3, validate="users", seed=1, longest=64)
    assert pretrain(tastes(), SPEC, settings, device="cpu").figures["events"] == held.sum()


def test_what_cannot_be_set_aside_is_refused() -> None:
    log = sequences.read_log(tastes(), SPEC)
    with pytest.raises(ConfigError, match="validation_share=1"):
        held_out(log, "later", 1.0, 0)
    with pytest.raises(ConfigError, match="validate='items' must be later or users"):
        held_out(log, "items", 0.1, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 users are too few"):
        held_out(log.where(log.users == 0), "users", 0.1, 0)


def test_training_leaves_torchs_own_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pretrain(tastes(100), SPEC, QUICK, device="cpu")
    torch.testing.assert_close(torch.rand(3), expected)


def test_positive_numbers_are_positive(trained: Trained) -> None:
    for name in ("prior_variance", "noise", "leak", "item_variance"):
        assert (getattr(trained.weights, name) > 0).all(), name
    assert (trained.weights.readout[:2] > 0).all()


@pytest.mark.parametrize(("rule", "expected"), [("kalman", 0.125), ("gradient", 0.0)])
def test_the_kalman_rule_is_given_the_share_that_outcomes_have(rule: RuleName, expected: float) -> None:
    """Where nothing was set aside it has none: the rest of θ was not fitted to it."""
    spec = msgspec.structs.replace(SPEC, rule=rule)
    for share, found in ((0.2, expected), (0.0, 0.0)):
        settings = msgspec.structs.replace(QUICK, outcome_weight=0.125, epochs=1, validation_share=share)
        assert [found] == pretrain(tastes(200), spec, settings, device="cpu").weights.outcome_weight.tolist()


def test_the_rule_goes_over_the_whole_log_in_the_end_with_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = msgspec.structs.replace(QUICK, epochs=1, validation_share=0.2)
    with_it = pretrain(tastes(200), SPEC, settings, device="cpu")
    seen: list[tuple[LearnerSpec, Any, int, float]] = []

    def watched(weights: SlowWeights, spec: LearnerSpec, fitted: Any, log: sequences.Log, share: float) -> SlowWeights:
        seen.append((spec, fitted, len(log), share))
        return settled(weights, spec, fitted, log, share)

    monkeypatch.setattr(trainer, "settled", watched)
    assert_same(with_it, pretrain(tastes(200), SPEC, settings, device="cpu"))
    assert [(SPEC, with_it.fitted, 200, 0.5)] == seen
    monkeypatch.setattr(trainer, "settled", lambda weights, *_: weights)
    without = pretrain(tastes(200), SPEC, settings, device="cpu")
    assert not np.array_equal(with_it.weights.item_vector, without.weights.item_vector)
    for name in ("readout", "noise", "level_noise", "item_events"):
        np.testing.assert_array_equal(getattr(with_it.weights, name), getattr(without.weights, name), err_msg=name)


def test_a_small_log_sets_more_aside() -> None:
    assert (0.3, 0.1) == tuple(trainer.set_aside(TrainSettings(), n) for n in (100_000, 100_001))
    assert 0.25 == trainer.set_aside(msgspec.structs.replace(QUICK, validation_share=0.25), 10)


def unfolded(parameters: trainer.Parameters, log: sequences.Log, columns: sequences.Columns) -> tuple[Any, Any]:
    numbers = torch.arange(len(log))[:, None]
    with torch.no_grad():
        said = parameters(columns, numbers, torch.ones_like(numbers, dtype=torch.bool), None)
    return said.x[:, 0].numpy(), said.prior[:, 0].numpy()


def served(weights: SlowWeights, fitted: Any, event: UserEvent) -> tuple[Any, float]:
    """x̃ and b + c + ⟨w₀, x̃⟩ as service computes them, from θ alone."""
    features = msgspec.convert(event.features, features_struct(SPEC.features))
    known = np.flatnonzero(weights.item_hash == sequences.item_hashes([event.item_id])[0])
    vector = weights.item_vector[known].sum(0)
    mean = weights.prior_mean.copy()
    for role, table, total in (
        ("item", weights.feature_vector, vector),
        ("event", weights.feature_vector, vector),
        ("user", weights.user_vector, mean),
    ):
        reader = FeatureReader(fitted, role)  # type: ignore[arg-type]
        for row, weight in zip(*reader.pairs(reader.key(features)), strict=True):
            total += np.float32(weight) * table[row]
    x = np.append(vector[:-1], np.float32(1.0))
    return x, float(weights.bias[0] + vector[-1] + mean @ x)


def test_training_says_what_service_will_say_of_a_whole_history() -> None:
    """With items that cannot move; the implicit state is made large enough to be seen."""
    spec, events = msgspec.structs.replace(SPEC, covariance="full"), tastes(60)
    events = [msgspec.structs.replace(e, user_id=UserId("u")) for e in events]
    log = sequences.read_log(events, spec)
    parameters, vocabulary = trainer.train(log.head(40), spec, QUICK, torch.device("cpu"), trainer.Steps(None, 1))
    torch.nn.init.normal_(parameters.implicit_id, generator=torch.Generator().manual_seed(0))
    problem = parameters.problem(sequences.encode(log, vocabulary), torch.arange(60)[None], torch.ones(1, 60) > 0, None)
    with torch.no_grad():
        adapted, frozen = (torch.sigmoid(t)[0] for t in (predict(problem), problem.rule.frozen(problem.seen)))
    assert problem.seen.lean is not None
    assert problem.seen.lean[0, 0] == 0.0
    assert problem.seen.lean.abs().max() > 0.1
    weights = trainer.fold(parameters, vocabulary, QUICK)
    still = msgspec.structs.replace(weights, item_variance=np.full(2, 1e-12, np.float32))
    batch = Batch(
        event_ids=[str(k) for k in range(60)],
        user_ids=["u"] * 60,  # type: ignore[list-item]
        item_ids=[e.item_id for e in events],
        features=log.features,
        timestamps_ms=log.times_ms,
        levels=log.levels.astype(np.int8),
        partitions=np.zeros(60, np.int32),
        offsets=np.arange(60),
    )
    said = Adapter(Model(Manifest(1, "v", 0, "", spec, vocabulary.fitted), still)).adapt(batch)
    np.testing.assert_allclose(said.score, adapted.numpy(), atol=1e-5)
    np.testing.assert_allclose(said.frozen_score, frozen.numpy(), atol=1e-5)


def test_folded_weights_say_what_the_trained_parameters_say() -> None:
    events = tastes()
    events[7] = msgspec.structs.replace(events[7], item_id=ItemId("never seen"))
    log = sequences.read_log(tastes(), SPEC)
    parameters, vocabulary = trainer.train(log, SPEC, QUICK, torch.device("cpu"), trainer.Steps(None, 1))
    weights = trainer.fold(parameters, vocabulary, QUICK)
    judged = sequences.read_log(events, SPEC)
    x, prior = unfolded(parameters, judged, sequences.encode(judged, vocabulary))
    for k in (0, 7, 11, 399):
        expected_x, expected_prior = served(weights, vocabulary.fitted, events[k])
        np.testing.assert_allclose(x[k], expected_x, atol=1e-5)
        np.testing.assert_allclose(prior[k], expected_prior, atol=1e-5)


def test_small_logs_get_small_batches_and_few_cooccurrence_features() -> None:
    assert [trainer._usual(n) for n in (100, 50_000, 10**9)] == [512, 1000, 8192]
    log = sequences.read_log(tastes(), SPEC)
    columns = sequences.encode(log, sequences.fit(log, SPEC, 100))
    assert trainer._cooccurrence(columns, 15, TrainSettings()).shape == (16, 7)


def test_batches_keep_to_their_size_and_change_from_epoch_to_epoch() -> None:
    windows = [torch.arange(1 + k % 9) for k in range(60)]
    generator = torch.Generator().manual_seed(0)
    epochs: list[list[list[int]]] = []
    for _ in range(2):
        steps = trainer._epoch(windows, 30, 3, generator)
        assert all(len(together) == 3 for together in steps[:-1])
        batches = [batch for together in steps for batch in together]
        assert all(len(batch) * max(map(len, batch)) <= 30 for batch in batches)
        epochs.append([sorted(map(id, batch)) for batch in batches])
        assert sorted(map(id, windows)) == sorted(id(window) for batch in batches for window in batch)
    assert sorted(epochs[0]) != sorted(epochs[1])


@pytest.mark.parametrize("averaged", [0.0, 0.5, 1.0])
def test_what_is_served_is_the_average_of_the_last_steps(averaged: float) -> None:
    log, made, seen = sequences.read_log(tastes(), SPEC), [], []

    def kind(*given: Any) -> trainer.Parameters:
        made.append(trainer.Parameters(*given))
        return made[0]

    steps = trainer.Steps(lambda *_: seen.append(made[0].id_vector.detach().clone()), 1)
    settings = msgspec.structs.replace(QUICK, averaged=averaged)
    parameters, _ = trainer.train(log, SPEC, settings, torch.device("cpu"), steps, kind=kind)
    counted = seen[int((1 - averaged) * len(seen)) :] if averaged else seen[-1:]
    assert len(seen) > 10
    torch.testing.assert_close(parameters.id_vector.detach(), torch.stack(counted).mean(0))


def test_the_readout_is_fitted_to_the_last_events_and_to_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[sequences.Log] = []

    def fit(_weights: Any, _spec: Any, _fitted: Any, log: sequences.Log) -> readout.Correction:
        given.append(log)
        return readout.Correction(noise=2.0, alpha=0.5)

    as_trained = msgspec.structs.replace(QUICK, settled=0.0)
    plain = pretrain(tastes(), SPEC, as_trained, device="cpu").weights
    monkeypatch.setattr(readout, "fit", fit)
    weights = pretrain(tastes(), SPEC, msgspec.structs.replace(as_trained, validation_share=0.1), device="cpu").weights
    assert [e.timestamp for e in tastes()[360:]] == given[0].times_ms.tolist()
    assert weights.noise == 2 * plain.noise
    assert weights.readout[0] == pytest.approx(0.5 * plain.readout[0])
    np.testing.assert_array_equal(plain.item_vector, weights.item_vector)


def test_specs_that_differ_in_the_covariance_share_a_training() -> None:
    specs = [msgspec.structs.replace(SPEC, covariance=covariance) for covariance in ("full", "diagonal")]
    settings, told = msgspec.structs.replace(QUICK, validation_share=0.1), []
    both = trainer.pretrain_each(tastes(), specs, settings, "cpu", lambda *step: told.append(step))
    steps = len(told)
    for spec, trained in zip(specs, both, strict=True):
        assert_same(pretrain(tastes(), spec, settings, "cpu", lambda *step: told.append(step)), trained)
    assert 3 * steps == len(told)
    as_trained = msgspec.structs.replace(settings, settled=0.0)  # the pass over items is each covariance's own
    full, diagonal = (one.weights for one in trainer.pretrain_each(tastes(), specs, as_trained, "cpu"))
    assert (diagonal.prior_variance[:-1] == 1.0).all()
    np.testing.assert_allclose(
        full.item_vector[:, :-1] @ full.prior_mean[:-1],
        diagonal.item_vector[:, :-1] @ diagonal.prior_mean[:-1],
        atol=1e-5,
    )


def test_an_unknown_item_is_its_features_alone() -> None:
    log = sequences.read_log(tastes(), SPEC)
    parameters, _ = trainer.train(log, SPEC, QUICK, torch.device("cpu"), trainer.Steps(None, 1))
    with torch.no_grad():
        assert parameters.item_id()[-1].abs().sum() == 0.0
        assert parameters.item_content()[-1].abs().sum() == 0.0


def relabelled(events: list[UserEvent], start: int) -> list[UserEvent]:
    return [*events[:start], *(msgspec.structs.replace(e, label=6.0 - e.label) for e in events[start:] if e.label)]


def test_labels_after_the_training_slice_change_figures_but_not_the_rehearsed_weights() -> None:
    """The training that is judged sees the first nine tenths alone."""

    def rehearse(events: list[UserEvent]) -> tuple[SlowWeights, dict[str, float]]:
        log, device = sequences.read_log(events, SPEC), torch.device("cpu")
        parameters, vocabulary = trainer.train(log.head(360), SPEC, QUICK, device, trainer.Steps(None, 1))
        figures = trainer.figures_of(parameters, sequences.encode(log, vocabulary), np.arange(400) >= 360, QUICK)
        return trainer.fold(parameters, vocabulary, QUICK), figures

    (before, figures), (after, others) = rehearse(tastes()), rehearse(relabelled(tastes(), 360))
    for name, array in arrays(before).items():
        np.testing.assert_array_equal(array, getattr(after, name), err_msg=name)
    assert figures["auc"] != others["auc"]


def test_events_after_the_log_given_do_not_exist_for_training(trained: Trained) -> None:
    stream = iter(relabelled(tastes(800), 400))
    assert_same(trained, pretrain((next(stream) for _ in range(400)), SPEC, QUICK, device="cpu"))


def test_figures_are_of_the_last_events_and_adapting_helps() -> None:
    settings = msgspec.structs.replace(QUICK, epochs=8, rate=0.03, validation_share=0.25, longest=64)
    anonymous = msgspec.structs.replace(SPEC, features={"genres": Bag()})
    figures = pretrain(tastes(1200), anonymous, settings, device="cpu").figures
    assert figures["events"] == 300
    assert figures["auc"] > figures["frozen_auc"] + 0.1
    assert figures["log_loss"] < figures["frozen_log_loss"]


def test_progress_counts_every_step_of_both_trainings() -> None:
    told: list[tuple[int, int, int, float]] = []
    settings = msgspec.structs.replace(QUICK, validation_share=0.1)
    pretrain(tastes(), SPEC, settings, "cpu", lambda *step: told.append(step))
    assert [step for _, step, _, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][2] == len(told)
    assert {epoch for epoch, _, _, _ in told} == {0, 1}
    assert all(math.isfinite(loss) for _, _, _, loss in told)


def test_yes_and_no_without_any_features_can_be_learned() -> None:
    yes_no = LearnerSpec(feedback=Feedback(label=LabelCuts((1.0, 5.0), (4.0,))), dimension=2)
    weights = pretrain(tastes(), yes_no, QUICK, device="cpu").weights
    assert weights.feature_vector.shape == (0, 3)
    assert weights.level_scores[0] < weights.level_scores[1]


def test_levels_never_seen_still_get_finite_scores() -> None:
    events = [e for e in tastes() if e.label in (2.0, 5.0)]
    assert np.isfinite(pretrain(events, SPEC, QUICK, device="cpu").weights.level_scores).all()


@pytest.mark.parametrize("events", [[], tastes(1), [e for e in tastes() if e.label == 5.0]])
def test_too_little_to_learn_from_is_refused(events: list[UserEvent]) -> None:
    with pytest.raises(DataError, match="training needs both kinds"):
        pretrain(events, SPEC, QUICK, device="cpu")


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(ModelError, match="training diverged"):
        pretrain(tastes(), SPEC, msgspec.structs.replace(QUICK, rate=1e20, epochs=9), device="cpu")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be auto, cpu or cuda"):
        trainer.torch_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_an_absent_device_is_refused_and_auto_takes_the_cpu() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        trainer.torch_device("cuda")
    assert trainer.torch_device("auto") == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_trains_what_the_cpu_trains(trained: Trained) -> None:
    other = pretrain(tastes(), SPEC, QUICK, device="cuda")
    np.testing.assert_allclose(other.weights.item_vector, trained.weights.item_vector, atol=1e-2)
