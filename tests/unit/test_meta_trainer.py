"""Pretraining: what θ is made from, that it is what was trained, and that nothing after its slice reaches it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from stream_adapt.errors import ConfigError, DataError, ModelError
from stream_adapt.learner.encoder import Bag, Categorical, FeatureReader, Numeric, features_struct
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.meta import readout, sequences, trainer
from stream_adapt.meta.trainer import Trained, TrainSettings, pretrain
from stream_adapt.models import LearnerSpec, SlowWeights, read_model, write_model
from stream_adapt.record import ItemId, UserEvent, UserId

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


def test_folded_weights_say_what_the_trained_parameters_say() -> None:
    events = tastes()
    events[7] = msgspec.structs.replace(events[7], item_id=ItemId("never seen"))
    log = sequences.read_log(tastes(), SPEC)
    parameters, vocabulary = trainer._train(log, SPEC, QUICK, torch.device("cpu"), trainer._Steps(None, 1))
    weights = trainer._fold(parameters, vocabulary, QUICK)
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
    epochs: dict[int, list[list[int]]] = {0: [], 1: []}
    for epoch, batch in trainer._epochs(windows, 30, 2, generator):
        assert len(batch) * max(map(len, batch)) <= 30
        epochs[epoch].append(sorted(map(id, batch)))
    for batches in epochs.values():
        assert sorted(map(id, windows)) == sorted(window for batch in batches for window in batch)
    assert sorted(epochs[0]) != sorted(epochs[1])


def test_what_is_served_is_the_average_of_the_last_steps() -> None:
    log, device = sequences.read_log(tastes(), SPEC), torch.device("cpu")

    def train(averaged: float) -> torch.Tensor:
        settings = msgspec.structs.replace(QUICK, averaged=averaged)
        return trainer._train(log, SPEC, settings, device, trainer._Steps(None, 1))[0].id_vector.detach()

    last, whole = train(0.0), train(1.0)
    assert whole.square().sum() > last.square().sum(), "vectors of ids decay from the start on"


def test_the_readout_is_fitted_to_the_last_events_and_to_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[sequences.Log] = []

    def fit(_weights: Any, _spec: Any, _fitted: Any, log: sequences.Log) -> readout.Correction:
        given.append(log)
        return readout.Correction(noise=2.0, alpha=0.5)

    plain = pretrain(tastes(), SPEC, QUICK, device="cpu").weights
    monkeypatch.setattr(readout, "fit", fit)
    weights = pretrain(tastes(), SPEC, msgspec.structs.replace(QUICK, validation_share=0.1), device="cpu").weights
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
    full, diagonal = (one.weights for one in both)
    assert (diagonal.prior_variance[:-1] == 1.0).all()
    np.testing.assert_allclose(
        full.item_vector[:, :-1] @ full.prior_mean[:-1],
        diagonal.item_vector[:, :-1] @ diagonal.prior_mean[:-1],
        atol=1e-5,
    )


def test_an_unknown_item_is_its_features_alone() -> None:
    log = sequences.read_log(tastes(), SPEC)
    parameters, _ = trainer._train(log, SPEC, QUICK, torch.device("cpu"), trainer._Steps(None, 1))
    with torch.no_grad():
        assert parameters.item_id()[-1].abs().sum() == 0.0
        assert parameters.item_content()[-1].abs().sum() == 0.0


def relabelled(events: list[UserEvent], start: int) -> list[UserEvent]:
    return [*events[:start], *(msgspec.structs.replace(e, label=6.0 - e.label) for e in events[start:] if e.label)]


def test_labels_after_the_training_slice_change_figures_but_not_the_rehearsed_weights() -> None:
    """The training that is judged sees the first nine tenths alone."""

    def rehearse(events: list[UserEvent]) -> tuple[SlowWeights, dict[str, float]]:
        log, device = sequences.read_log(events, SPEC), torch.device("cpu")
        parameters, vocabulary = trainer._train(log.head(360), SPEC, QUICK, device, trainer._Steps(None, 1))
        figures = trainer._figures(parameters, sequences.encode(log, vocabulary), 360, QUICK)
        return trainer._fold(parameters, vocabulary, QUICK), figures

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
