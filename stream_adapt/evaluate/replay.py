"""`stream-adapt replay`: how well the learner does on a data set, with no broker.

The protocol is prequential (test, then learn; Dawid, "Statistical theory: the prequential approach", JRSS A 1984): the
slow weights are learned from the first half of the events by time, and the second half is scored, then learned, event
by event, by the code that serves. The learner and the baselines see the same events in order, are warmed on the
first half, and go on learning in the second; the learner's users can be told to begin the second half cold.

The learner runs over the first half, too: the threshold of accuracy, precision, recall and F1 is the one that has the
highest F1 there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from stream_adapt.adapt import Adapter
from stream_adapt.datasets import Source, open_source, ties_drawn
from stream_adapt.errors import ConfigError
from stream_adapt.evaluate import baselines, direct, report
from stream_adapt.evaluate import figures as of
from stream_adapt.evaluate.figures import Figures, Outcomes
from stream_adapt.evaluate.halves import Half, Halves, cut, two_levels
from stream_adapt.evaluate.metrics import Floats
from stream_adapt.models import Calibrator, Covariance, LearnerSpec, Model, RuleName, read_model, write_model
from stream_adapt.pretraining import told_objective

if TYPE_CHECKING:  # torch takes seconds to import: only where it is used
    from stream_adapt.meta.trainer import Trained

Levels = Literal["two", "all"]
Ties = Literal["kept", "drawn"]
Clock = Callable[[], float]

_T = TypeVar("_T")

#: Events of a baseline between two movements of its bar: one for each would cost more than the event.
_BAR_STEP = 1000


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, and how."""

    source: str = "movielens-100k"
    mapping: Path | None = None  # of a log of one's own
    model: Path | None = None  # a model or a registry; None: pretrain on the first half
    levels: Levels = "all"  # two: feedback is reduced to the target's yes or no
    rule: RuleName = "kalman"  # of a model that is pretrained here
    covariance: Covariance | None = None  # None: the model's, or diagonal
    normalized: bool = LearnerSpec().normalized  # steps of the gradient rule
    calibrator: Calibrator = "none"  # of a model that is pretrained here
    partitions: int = 1
    ties: Ties = "kept"  # events with the same time: as the source has them, or in an order that is drawn
    objective: str = "prequential"  # of pretraining; direct: without meta-learning, as the baseline
    support: float | None = None  # of maml and fomaml
    seconds: float = 0.0  # for a pretraining; 0: as long as it takes
    seeds: int = 1  # 0, 1, … of pretraining
    warm: bool = True  # users keep what the first half taught, as every baseline does
    device: str = "auto"  # of pretraining
    baselines: str = ""  # names with commas between them, or all
    out: Path | None = None  # folder for the report
    clock: Clock = time.perf_counter  # of pretraining; processor time compares runs on a machine that others use

    def __post_init__(self) -> None:
        if self.partitions < 1 or self.seeds < 1:
            raise ConfigError(f"partitions={self.partitions} and seeds={self.seeds} must be at least 1")
        if self.model is not None and (self.objective, self.support, self.seconds) != ("prequential", None, 0.0):
            raise ConfigError(
                f"objective={self.objective}, support={self.support}, seconds={self.seconds:g}: a model that is there "
                "is trained; leave out these or --model"
            )
        if self.model is not None and self.calibrator != "none":
            raise ConfigError(
                f"calibrator={self.calibrator}: a model that is there has one or has none; leave out --calibrator or "
                "--model"
            )
        if self.model is not None and self.seeds > 1:
            raise ConfigError(
                f"seeds={self.seeds}: a model that is there already has one; leave out --seeds or --model"
            )


class ReplayResult(Figures, frozen=True, kw_only=True):
    """Figures of the adapted scores, the mean over seeds; what they are of; and the same of others."""

    source: str
    events: int  # with feedback, of the second half
    refused: int  # events that the decoder would send to the dead letters
    partitions: int
    levels: Levels
    rule: RuleName
    covariance: Covariance  # of the Kalman rule
    calibrator: Calibrator
    objective: str | None  # None: of the model that was given
    seeds: int
    warm: bool
    ties: Ties
    model_version: str | None  # of the model that was given
    spread: dict[str, float]  # largest less smallest over seeds
    frozen: Figures  # the same model without adapting
    baselines: dict[str, Figures] = msgspec.field(default_factory=dict)
    report: str | None = None  # the HTML file


@dataclass(frozen=True)
class Said:
    """One method's probabilities for the m events with feedback of the second half, and its figures."""

    probabilities: Floats
    figures: Figures


@dataclass
class Replay:
    """Everything that was said, for figures and for the report."""

    options: ReplayOptions
    source: Source
    spec: LearnerSpec
    halves: Halves
    version: str | None = None  # of the model that was given
    row_bytes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    adapted: list[Said] = field(default_factory=list)  # by seed
    frozen: list[Said] = field(default_factory=list)  # by seed
    baselines: dict[str, Said] = field(default_factory=dict)

    @property
    def outcomes(self) -> Outcomes:
        return self.halves.outcomes

    def result(self) -> ReplayResult:
        """The figures as they are printed."""
        adapted = [said.figures for said in self.adapted]
        frozen, others = of.mean([said.figures for said in self.frozen]), self.baselines.items()
        feedback = self.spec.feedback
        return ReplayResult(
            **msgspec.structs.asdict(of.mean(adapted)),
            source=self.source.name,
            events=len(self.outcomes),
            refused=len(self.halves.first.dead_letters) + len(self.halves.second.dead_letters),
            partitions=self.options.partitions,
            levels="two" if len(feedback.levels) == 2 else "all",
            rule=self.spec.rule,
            covariance=self.spec.covariance,
            calibrator=self.spec.calibrator,
            objective=self.options.objective if self.version is None else None,
            seeds=len(adapted),
            warm=self.options.warm,
            ties=self.options.ties,
            model_version=self.version,
            spread=of.spread(adapted),
            frozen=frozen,
            baselines={name: frozen if name == baselines.FROZEN else said.figures for name, said in others},
        )


def run_replay(options: ReplayOptions, console: Console) -> ReplayResult:
    """Replays a source; shows its progress on the console, if that is a terminal.

    Raises:
        ConfigError, DataError, ModelError: each says what is wrong and what to do.
    """
    if options.out is not None:
        report.check()
    for name in baselines.chosen(options.baselines)[1]:
        console.print(f"baseline {name} is left out: its package, {baselines.package_of(name)}, is not installed")
    source = open_source(options.source, mapping=options.mapping)
    with _progress(console) as bar:
        run = replay(source, options, bar)
    result = run.result()
    if options.out is None:
        return result
    return msgspec.structs.replace(result, report=str(report.write(run, options.out)))


def replay(source: Source, options: ReplayOptions, bar: Progress) -> Replay:
    """Replays a source that is open."""
    names, _ = baselines.chosen(options.baselines)
    model = None if options.model is None else _given(options.model, options)
    spec = _spec(source, options) if model is None else model.spec
    source = ties_drawn(source) if options.ties == "drawn" else source
    task = bar.add_task("reading events", total=None)
    run = Replay(options, source, spec, cut(source, spec, options.partitions, warm=options.warm))
    bar.remove_task(task)
    if model is not None:
        run.version = model.version
        serve(run, model, None, bar)
    else:
        for seed in range(options.seeds):
            serve(run, *_pretrained(run, seed, bar), bar)
    for name in names:
        if name == baselines.FROZEN:
            run.baselines[name] = run.frozen[0]
        else:
            run.baselines[name] = _direct(run, bar) if name == baselines.DIRECT else _baseline(run, name, bar)
    return run


def _given(path: Path, options: ReplayOptions) -> Model:
    """A model from disk, with the options' covariance."""
    model = read_model(path)
    spec = model.spec
    if options.levels == "two" and len(spec.feedback.levels) > 2:
        raise ConfigError(
            f"{path}: was trained for levels={list(spec.feedback.levels)}, not for two; leave out --levels or --model"
        )
    if options.covariance is not None:
        spec = msgspec.structs.replace(spec, covariance=options.covariance)
    return Model(msgspec.structs.replace(model.manifest, spec=spec), model.weights)


def _spec(source: Source, options: ReplayOptions) -> LearnerSpec:
    feedback = two_levels(source.feedback) if options.levels == "two" else source.feedback
    covariance = options.covariance or "diagonal"
    return LearnerSpec(
        source.features,
        feedback,
        options.rule,
        covariance=covariance,
        normalized=options.normalized,
        calibrator=options.calibrator,
    )


def _pretrained(run: Replay, seed: int, bar: Progress) -> tuple[Model, float]:
    """A model that learned from the first half, as service would read it, and the seconds that took."""
    from stream_adapt.meta.trainer import TrainSettings, pretrain

    name = f"pretraining, {run.options.objective}"
    if run.options.seeds > 1:
        name += f", seed {seed + 1} of {run.options.seeds}"
    task = bar.add_task(name, total=None)

    def told(_epoch: int, done: int, steps: int, loss: float) -> None:
        bar.update(task, completed=done, total=steps, description=f"{name}, loss {loss:.3f}")

    options = run.options
    started = options.clock()
    aim = told_objective(options.objective, options.support)
    settings = TrainSettings(seed=seed, objective=aim, seconds=options.seconds)
    if options.objective == baselines.DIRECT:
        tuning = partial(_track, bar)
        model, _ = direct.model(run.halves.first, run.spec, settings, options.device, tuning, told, options.clock)
    else:
        trained = pretrain(run.halves.first.events, run.spec, settings, options.device, told, clock=options.clock)
        model = _as_served(trained, run.spec)
    seconds = options.clock() - started
    bar.remove_task(task)
    return model, seconds


def _as_served(trained: Trained, spec: LearnerSpec) -> Model:
    """Written to disk and read back, with all that is checked on the way."""
    with tempfile.TemporaryDirectory(prefix="stream-adapt-") as folder:
        return read_model(write_model(Path(folder), trained.weights, spec, trained.fitted))


def serve(run: Replay, model: Model, train_s: float | None, bar: Progress) -> None:
    """Scores and learns the second half, and adds what was said to the run."""
    adapter = Adapter(model, device="cpu")
    adapter.warm_up()
    halves = run.halves
    earlier, _ = _consume(adapter, halves.first, bar, "the first half, for the threshold")
    if run.options.warm:
        for partition in range(run.options.partitions):
            adapter.items.drop(partition)  # θ holds what the first half said of items; twice would be too sure
    else:
        adapter = Adapter(model, device="cpu")
    later, seconds = _consume(adapter, halves.second, bar, "scoring and learning")
    rate = len(halves.second) / seconds if seconds else None
    for said, column, speed in ((run.adapted, 0, rate), (run.frozen, 1, None)):
        threshold = of.best_threshold(earlier[column], halves.first.targets)
        made = of.figures(later[column], run.outcomes, threshold, train_s, speed)
        said.append(Said(later[column], made))
    for kind, table in (("user", adapter.users), ("item", adapter.items)):
        run.rows[kind], run.row_bytes[kind] = len(table), table.layout.row_bytes


def _baseline(run: Replay, name: str, bar: Progress) -> Said:
    """Warms a baseline on the first half, and measures it on the second."""
    moving = partial(_track, bar, every=_BAR_STEP)
    measured = baselines.measure(name, run.source.features, run.halves, moving)
    threshold = of.best_threshold(measured.earlier, run.halves.first.targets)
    made = of.figures(measured.later, run.outcomes, threshold, measured.train_s, measured.events_per_s)
    return Said(measured.later, made)


def _direct(run: Replay, bar: Progress) -> Said:
    """The same encoder trained without meta-learning, tuned on the first half, and served as the model is."""
    options = replace(run.options, objective=baselines.DIRECT, support=None, model=None, seeds=1)
    other = Replay(options, run.source, run.spec, run.halves)
    serve(other, *_pretrained(other, 0, bar), bar)
    return other.adapted[0]


def _track(bar: Progress, things: Sequence[_T], what: str, every: int = 1) -> Iterator[_T]:
    """The same things, with a bar that moves with each so many of them, and is gone after the last."""
    task = bar.add_task(what, total=len(things))
    for number, thing in enumerate(things):
        if number % every == 0:
            bar.update(task, completed=number)
        yield thing
    bar.remove_task(task)


def _consume(adapter: Adapter, half: Half, bar: Progress, name: str) -> tuple[tuple[Floats, Floats], float]:
    """Adapted and frozen probabilities of the events with feedback, and the seconds that the adapter took."""
    seconds, adapted, frozen = 0.0, [np.zeros(0)], [np.zeros(0)]
    for batch in _track(bar, half.batches, name):
        started = time.perf_counter()
        said = adapter.adapt(batch)
        adapter.commit()
        seconds += time.perf_counter() - started
        adapted.append(said.score)
        frozen.append(said.frozen_score)
    return (np.concatenate(adapted)[half.taught], np.concatenate(frozen)[half.taught]), seconds


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Bars on the console, gone when the block ends; none where it is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
