"""Replay: no label reaches a score that was said before it, and figures are of what was said."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from stream_adapt.datasets import Source, synthetic
from stream_adapt.errors import ConfigError
from stream_adapt.evaluate import figures as of
from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.figures import Outcomes, best_threshold
from stream_adapt.evaluate.replay import Replay, ReplayOptions, replay, run_replay
from stream_adapt.meta import trainer
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.model import random_model

EVENTS, HALF = 1200, 600


@pytest.fixture(scope="module", autouse=True)
def short_training() -> Iterator[None]:
    """One pass over the first half is enough for what is asked here."""
    with pytest.MonkeyPatch.context() as patch:
        defaults = trainer.TrainSettings
        patch.setattr(trainer, "TrainSettings", lambda **given: defaults(epochs=1, **given))
        yield


@pytest.fixture(scope="module")
def source() -> Source:
    return synthetic.source(synthetic.Synthetic(events=EVENTS, users=60, items=40))


@pytest.fixture(scope="module")
def model(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    events = list(source.events())
    columns = {name: [event.features.get(name) for event in events] for name in source.features}
    spec = LearnerSpec(source.features, source.feedback, dimension=4)
    return random_model(tmp_path_factory.mktemp("models"), spec, [f"item-{k}" for k in range(40)], columns)


def quiet() -> Progress:
    return Progress(disable=True)


def turned_after(source: Source, number: int) -> Source:
    """The same events, with every label after event `number` turned round."""
    events = [
        event if i <= number or event.label is None else msgspec.structs.replace(event, label=6.0 - event.label)
        for i, event in enumerate(source.events())
    ]
    return replace(source, events=lambda: iter(events))


def said(run: Replay) -> np.ndarray:
    return np.stack([run.adapted[0].probabilities, run.frozen[0].probabilities])


def test_labels_of_the_second_half_do_not_reach_training(source: Source) -> None:
    """All of them are other ones, and the frozen scores, which say what training made, are the same bytes."""
    options = ReplayOptions(device="cpu")
    run, turned = replay(source, options, quiet()), replay(turned_after(source, HALF - 1), options, quiet())
    assert run.frozen[0].probabilities.tobytes() == turned.frozen[0].probabilities.tobytes()
    assert run.adapted[0].probabilities[:1].tobytes() == turned.adapted[0].probabilities[:1].tobytes()
    assert run.adapted[0].figures.threshold == turned.adapted[0].figures.threshold
    assert run.halves.second.targets.tolist() != turned.halves.second.targets.tolist()


@pytest.mark.parametrize("partitions", [1, 4])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [0, 1, 200, 256, 500])
def test_labels_after_an_event_change_no_score_up_to_it(
    source: Source, model: Path, partitions: int, warm: bool, k: int
) -> None:
    """Event k of the second half has its own label still; so the score after it may be another, at the earliest."""
    options = ReplayOptions(model=model, partitions=partitions, warm=warm)
    run, turned = replay(source, options, quiet()), replay(turned_after(source, HALF + k), options, quiet())
    assert said(run)[:, : k + 2].tobytes() == said(turned)[:, : k + 2].tobytes()
    assert run.adapted[0].probabilities.tobytes() != turned.adapted[0].probabilities.tobytes()


def test_the_cut_into_batches_changes_no_score(source: Source, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replay(source, ReplayOptions(model=model, partitions=4), quiet())
    monkeypatch.setattr("stream_adapt.evaluate.halves.BATCH", 97)
    cut = replay(source, ReplayOptions(model=model, partitions=4), quiet())
    assert said(whole).tobytes() == said(cut).tobytes()


def test_users_are_warm_at_the_half_unless_told_otherwise(source: Source, model: Path) -> None:
    cold = replay(source, ReplayOptions(model=model, warm=False), quiet())
    warm = replay(source, ReplayOptions(model=model), quiet())
    assert cold.adapted[0].probabilities[0] == pytest.approx(cold.frozen[0].probabilities[0], abs=1e-7)
    assert warm.adapted[0].probabilities[0] != pytest.approx(warm.frozen[0].probabilities[0], abs=1e-3)
    assert cold.frozen[0].probabilities.tobytes() == warm.frozen[0].probabilities.tobytes()


def test_ties_are_drawn_if_that_is_asked_for(source: Source, model: Path) -> None:
    given = list(source.events())
    eights = [msgspec.structs.replace(event, timestamp=given[k - k % 8].timestamp) for k, event in enumerate(given)]
    coarse = replace(source, events=lambda: iter(eights))
    kept, drawn = (replay(coarse, ReplayOptions(model=model, ties=ties), quiet()) for ties in ("kept", "drawn"))
    assert ("kept", "drawn") == (kept.result().ties, drawn.result().ties)
    before, after = ([event.event_id for event in run.halves.second.events] for run in (kept, drawn))
    assert before != after
    assert [set(before[k : k + 8]) for k in range(0, HALF, 8)] == [set(after[k : k + 8]) for k in range(0, HALF, 8)]
    assert said(kept).tobytes() != said(drawn).tobytes()


def test_figures_are_those_of_what_was_said(source: Source, model: Path) -> None:
    run = replay(source, ReplayOptions(model=model, partitions=4, covariance="full"), quiet())
    result = run.result()
    probabilities, targets = run.adapted[0].probabilities, run.outcomes.targets
    assert metrics.auc(probabilities, targets) == result.auc
    assert metrics.log_loss(probabilities, targets) == result.logloss
    assert metrics.calibration_error(probabilities, targets, 20) == result.ece
    assert HALF == result.events == sum(bucket.events for bucket in result.cold_start)
    assert (4, "full", "all", 1, 0) == (
        result.partitions,
        result.covariance,
        result.levels,
        result.seeds,
        result.refused,
    )
    assert result.events_per_s is not None
    assert result.train_s is None, "the model came ready"
    assert result.model_version == model.name


def test_seeds_give_means_and_spread(source: Source) -> None:
    run = replay(source, ReplayOptions(seeds=2, levels="two", device="cpu"), quiet())
    result, single = run.result(), [said.figures.auc for said in run.adapted]
    assert single[0] != single[1]
    assert sum(single) / 2 == pytest.approx(result.auc)
    assert max(single) - min(single) == pytest.approx(result.spread["auc"])
    assert ("two", 2) == (result.levels, result.seeds)
    assert result.train_s is not None


def test_the_json_has_the_fields_that_it_promises(model: Path, tmp_path: Path, source: Source) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(msgspec.json.encode(event) for event in source.events()))
    mapping = tmp_path / "mapping.yaml"
    features = {name: msgspec.to_builtins(feature) for name, feature in source.features.items()}
    columns = {name: name for name in ("event_id", "user_id", "item_id", "event_type", "timestamp", "label")}
    feedback = msgspec.to_builtins(source.feedback)
    # What is declared lies below `features` in event v1, and beside the ids in a log.
    flat = [{**msgspec.structs.asdict(event), **event.features} for event in source.events()]
    log.write_bytes(b"\n".join(map(msgspec.json.encode, flat)))
    mapping.write_text(json.dumps({"columns": columns, "features": features, "feedback": feedback}))
    shown = io.StringIO()
    result = run_replay(ReplayOptions(str(log), mapping, model), Console(file=shown))
    printed = json.loads(msgspec.json.encode(result))
    promised = "auc logloss ece gauc accuracy precision recall f1 train_s events_per_s cold_start partitions levels"
    assert {*promised.split(), "covariance", "seeds", "spread", "baselines"} <= set(printed)
    assert {"n_from", "n_to", "events", "logloss", "auc"} == set(printed["cold_start"][0])
    assert [1, 2, 5, 10, 20, 40, 50, 100] == [bucket["n_from"] for bucket in printed["cold_start"]]
    assert {} == printed["baselines"]
    assert shown.getvalue() == "", "no bar where there is no terminal"


def test_the_threshold_has_the_highest_f1() -> None:
    random = np.random.default_rng(0)
    probabilities = random.integers(0, 8, 200) / 8
    targets = (random.random(200) < probabilities).astype(np.int64)
    outcomes = Outcomes(targets, np.zeros(200, np.int64), np.arange(1, 201))
    chosen = of.figures(probabilities, outcomes, best_threshold(probabilities, targets))
    every = [of.figures(probabilities, outcomes, threshold).f1 for threshold in np.unique(probabilities)]
    assert max(every) == chosen.f1


def test_precision_recall_and_accuracy_by_hand() -> None:
    outcomes = Outcomes(np.array([1, 1, 0, 0, 1]), np.zeros(5, np.int64), np.arange(1, 6))
    figures = of.figures(np.array([0.9, 0.2, 0.8, 0.1, 0.7]), outcomes, 0.7)
    assert (2 / 3, 2 / 3, 3 / 5, 2 / 3) == (figures.precision, figures.recall, figures.accuracy, figures.f1)


def test_without_any_yes_nothing_is_made_up() -> None:
    outcomes = Outcomes(np.zeros(3, np.int64), np.zeros(3, np.int64), np.arange(1, 4))
    figures = of.figures(np.array([0.1, 0.2, 0.3]), outcomes, best_threshold(np.array([0.1]), np.zeros(1, np.int64)))
    assert all(map(math.isnan, (figures.auc, figures.precision, figures.recall, figures.f1)))
    assert figures.accuracy == 1.0


def test_the_objective_of_training_can_be_chosen(source: Source) -> None:
    usual, other = (
        replay(source, ReplayOptions(device="cpu", objective=name, support=support), quiet())
        for name, support in (("prequential", None), ("maml", 4.0))
    )
    assert ("prequential", "maml") == (usual.result().objective, other.result().objective)
    assert usual.frozen[0].probabilities.tobytes() != other.frozen[0].probabilities.tobytes()


def test_a_model_can_be_pretrained_with_a_calibrator(source: Source) -> None:
    plain, calibrated = (
        replay(source, ReplayOptions(device="cpu", calibrator=calibrator), quiet()) for calibrator in ("none", "linear")
    )
    assert ("none", "linear") == (plain.result().calibrator, calibrated.result().calibrator)
    np.testing.assert_array_equal(plain.frozen[0].probabilities, calibrated.frozen[0].probabilities)
    assert np.all(plain.adapted[0].probabilities != calibrated.adapted[0].probabilities)


def test_options_that_contradict_each_other_are_refused(source: Source, model: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        ReplayOptions(partitions=0)
    with pytest.raises(ConfigError, match="leave out --seeds or --model"):
        ReplayOptions(model=model, seeds=3)
    with pytest.raises(ConfigError, match="a model that is there is trained"):
        ReplayOptions(model=model, objective="maml")
    with pytest.raises(ConfigError, match="calibrator=linear"):
        ReplayOptions(model=model, calibrator="linear")
    with pytest.raises(ConfigError, match="only maml and fomaml have support events"):
        replay(source, ReplayOptions(objective="reptile", support=4.0), quiet())
    with pytest.raises(ConfigError, match="not for two"):
        replay(source, ReplayOptions(model=model, levels="two"), quiet())
