"""`stream-adapt bench drift`: how surely and how soon drift is detected, and how often where there is none.

For each data set and seed a model is pretrained on the first half of the events by time. The second half, in its real
order, is scored and learned by the code that serves; its learning summaries go to the drift monitor. Once as it is:
every alarm there is false. And once for each kind of drift (`datasets/drifts.py`), put in at a place that follows from
the seed: the first alarm after it counts, if it comes in time.

Models, and what the streams told, are kept in a folder: to try another detector takes seconds. What is in the folder
is taken as it is; another release has one of its own, and after a change of the learner it has to be deleted.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from stream_adapt import __version__
from stream_adapt.adapt import Adapter
from stream_adapt.config import DriftSettings
from stream_adapt.datasets import NAMES, Source, open_source
from stream_adapt.datasets.drifts import ABRUPT, HARMLESS, KINDS, Drift, DriftKind, splice
from stream_adapt.datasets.synthetic import Synthetic
from stream_adapt.datasets.synthetic import source as synthetic_source
from stream_adapt.decode import Decoder
from stream_adapt.drift import DriftMonitor
from stream_adapt.errors import ConfigError
from stream_adapt.learning import Summary, decode, encode, summarize
from stream_adapt.local import cache_folder
from stream_adapt.models import MODEL_FORMAT, LearnerSpec, Model, read_model, write_model
from stream_adapt.record import RawBatch, UserEvent

#: Events of a transaction: as many as a busy member takes in its latency bound.
_BATCH = 1_024
#: Events after a drift within which it has to be seen, where there are so many.
_IN_TIME = 40_000
#: A drift comes so many events, at least and at most, after the model went into service.
_EARLIEST, _LATEST = 40_000, 200_000
#: Of the synthetic stream.
_SYNTHETIC_EVENTS = 200_000


@dataclass(frozen=True)
class DriftBench:
    """What to measure."""

    sets: str = "movielens-1m,synthetic"
    seeds: int = 5
    detectors: str = ""  # names with commas between them; "": as the settings say
    folder: Path | None = None  # for models


class CaseFigures(msgspec.Struct):
    """One data set and one kind of drift."""

    runs: int
    detected: int
    median_delay_events: float | None
    delays: list[int | None]  # by seed; None: not seen in time


class StationaryFigures(msgspec.Struct):
    """One data set without drift."""

    events: int
    false_alarms: int
    by_seed: list[int]


class DetectorFigures(msgspec.Struct):
    """What one detector did."""

    detection_rate: float  # of the drifts that are not harmless
    median_delay_events: float | None  # of the abrupt drifts that were seen
    false_alarms_per_million: float
    false_alarms: int
    harmless_alarms: int  # harmless drifts that raised an alarm
    cases: dict[str, CaseFigures]  # by data set and kind
    stationary: dict[str, StationaryFigures]  # by data set


class DriftFigures(DetectorFigures):
    """What the first detector did, and then each."""

    detector: str
    seeds: int
    detectors: dict[str, DetectorFigures]


@dataclass(frozen=True)
class Run:
    """What one stream told, and where its drift is: the index of an event, or None."""

    name: str
    kind: DriftKind | None
    drift_at: int | None
    summaries: Sequence[Summary]


def run_drift(options: DriftBench, console: Console, settings: DriftSettings | None = None) -> DriftFigures:
    """Measures each detector on every stream.

    Raises:
        ConfigError, DataError: an option is wrong, or a data set cannot be had.
    """
    settings = settings or DriftSettings()
    names = [name for name in options.detectors.split(",") if name] or [settings.detector]
    candidates = [_with_detector(settings, name) for name in names]
    for candidate in candidates:
        DriftMonitor(candidate)
    runs = list(told(options, console))
    found = {one.detector: judge(one, runs) for one in candidates}
    first = found[names[0]]
    return DriftFigures(**msgspec.structs.asdict(first), detector=names[0], seeds=options.seeds, detectors=found)


def show(result: DriftFigures, console: Console) -> None:
    """Tables of the figures."""
    summary = Table(Column("detector", no_wrap=True), *(Column(name, justify="right") for name in _SHOWN))
    for name, found in result.detectors.items():
        summary.add_row(name, *(_told_number(getattr(found, field)) for field in _SHOWN.values()))
    cases = Table(
        Column("drift", no_wrap=True),
        *(Column(name, justify="right") for name in ("seen", "median delay", "delays by seed")),
    )
    for name, case in result.cases.items():
        delays = " ".join(_told_number(one) for one in case.delays)
        cases.add_row(name, f"{case.detected} of {case.runs}", _told_number(case.median_delay_events), delays)
    for name, calm in result.stationary.items():
        cases.add_row(f"{name}, none", f"{calm.false_alarms} false", "", f"{calm.events:,} events")
    console.print(summary, cases)


#: Columns of the table, and the fields behind them.
_SHOWN = {
    "detection rate": "detection_rate",
    "median delay": "median_delay_events",
    "false alarms": "false_alarms",
    "per million": "false_alarms_per_million",
    "harmless": "harmless_alarms",
}


def _told_number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def told(options: DriftBench, console: Console) -> Iterator[Run]:
    """The learning summaries of every stream."""
    folder = (options.folder or cache_folder() / "bench-drift") / f"{__version__}-{MODEL_FORMAT}"
    with _progress(console) as bar:
        for name in options.sets.split(","):
            task = bar.add_task(name, total=options.seeds * (1 + len(KINDS)))
            for seed in range(options.seeds):
                bar.update(task, description=f"{name}, seed {seed}")
                for run in _Streams(name, seed, folder).runs():
                    yield run
                    bar.advance(task)


def judge(settings: DriftSettings, runs: Sequence[Run]) -> DetectorFigures:
    """What a monitor with these settings makes of the streams."""
    cases: dict[str, list[int | None]] = {}
    calm: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        alarms = alarms_at(settings, run.summaries)
        if run.drift_at is None:
            calm.setdefault(run.name, []).append((run.summaries[-1].last_offset + 1, len(alarms)))
            continue
        delays = [at - run.drift_at for at in alarms if at > run.drift_at]
        cases.setdefault(f"{run.name} {run.kind}", []).append(delays[0] if delays else None)
    return _figures(cases, calm)


def alarms_at(settings: DriftSettings, summaries: Sequence[Summary]) -> list[int]:
    """Events after which there was an alarm; several at once are one."""
    monitor = DriftMonitor(settings)
    return [summary.last_offset + 1 for summary in summaries if monitor.add([summary])]


def _figures(cases: dict[str, list[int | None]], calm: dict[str, list[tuple[int, int]]]) -> DetectorFigures:
    def delays(kinds: Sequence[str]) -> list[int | None]:
        return [one for name, of in cases.items() if name.rsplit(" ", 1)[1] in kinds for one in of]

    drifts = delays([kind for kind in KINDS if kind not in HARMLESS])
    events = sum(n for of in calm.values() for n, _ in of)
    false = sum(alarms for of in calm.values() for _, alarms in of)
    return DetectorFigures(
        detection_rate=sum(one is not None for one in drifts) / len(drifts),
        median_delay_events=_median(delays(ABRUPT)),
        false_alarms_per_million=false * 1e6 / events,
        false_alarms=false,
        harmless_alarms=sum(one is not None for one in delays(HARMLESS)),
        cases={
            name: CaseFigures(len(of), sum(one is not None for one in of), _median(of), of)
            for name, of in cases.items()
        },
        stationary={
            name: StationaryFigures(sum(n for n, _ in of), sum(a for _, a in of), [a for _, a in of])
            for name, of in calm.items()
        },
    )


def _median(delays: Sequence[int | None]) -> float | None:
    seen = [one for one in delays if one is not None]
    return statistics.median(seen) if seen else None


def _with_detector(settings: DriftSettings, name: str) -> DriftSettings:
    if name == settings.detector:
        return settings
    return settings.model_copy(update={"detector": name, "parameters": None})


class _Streams:
    """The second half of a data set as it is, and with each kind of drift."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self._name, self._seed = name, seed
        self._source = _source(name, seed)
        self._folder = folder / name / f"seed-{seed}"
        self._half = (self._source.count or 0) // 2

    def runs(self) -> Iterator[Run]:
        """Each stream: what was kept of it, or measured and kept."""
        kinds: tuple[DriftKind | None, ...] = (None, *KINDS)
        if not all(self._kept(kind).exists() for kind in kinds):
            for kind, told in self._measured().items():
                partial = self._kept(kind).with_suffix(f".{os.getpid()}")
                partial.write_bytes(b"".join(value + b"\n" for value in encode(told, 0)))
                partial.rename(self._kept(kind))
        for kind in kinds:
            lines = self._kept(kind).read_bytes().splitlines()
            read = [summary for line in lines for summary in decode(line).summaries]
            yield Run(self._name, kind, None if kind is None else self._place, read)

    def _kept(self, kind: DriftKind | None) -> Path:
        return self._folder / f"{kind or 'stationary'}.jsonl"

    def _measured(self) -> dict[DriftKind | None, list[Summary]]:
        """Every stream up to the drift is the same one; what comes after it is put back before the next kind's turn."""
        member = _Member(self._model)
        before = member.learn(self._later[: self._place])
        found: dict[DriftKind | None, list[Summary]] = {}
        held = replace(self._source, events=lambda: iter(self._later), count=self._half)
        for kind in KINDS:
            drifted = splice(held, Drift(kind, self._place, seed=self._seed)).events()
            found[kind] = before + member.try_out(islice(drifted, self._place, self._place + self._in_time))
        found[None] = before + member.learn(self._later[self._place :])
        return found

    @cached_property
    def _later(self) -> list[UserEvent]:
        return list(islice(self._source.events(), self._half, None))

    @cached_property
    def _model(self) -> Model:
        """Of the first half: the one in the folder, or pretrained and put there."""
        if not any(self._folder.glob("*/manifest.json")):
            from stream_adapt.meta.trainer import TrainSettings, pretrain

            spec = LearnerSpec(self._source.features, self._source.feedback)
            events = islice(self._source.events(), self._half)
            trained = pretrain(events, spec, TrainSettings(seed=self._seed), "cpu")
            write_model(self._folder, trained.weights, spec, trained.fitted, figures=trained.figures)
        return read_model(self._folder)

    @cached_property
    def _place(self) -> int:
        """Where the drift is: an event of the second half that follows from the seed."""
        earliest, latest = min(_EARLIEST, round(0.45 * self._half)), min(_LATEST, self._half - self._in_time)
        return int(np.random.default_rng(self._seed).integers(earliest, latest + 1))

    @property
    def _in_time(self) -> int:
        return min(_IN_TIME, round(0.4 * self._half))


def _source(name: str, seed: int) -> Source:
    """A data set; the synthetic one is another for each seed."""
    if name == "synthetic":
        return synthetic_source(Synthetic(seed=seed, events=_SYNTHETIC_EVENTS, drift="none"))
    if name not in NAMES:
        raise ConfigError(f"sets: {name!r} is none of {', '.join(NAMES)}")
    return open_source(name)


class _Member:
    """What a member with one partition says of events, and tells of its learning."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._decoder = Decoder(model.spec.features, model.spec.feedback)
        self._adapter = Adapter(model, device="cpu")
        self._offset = 0

    def learn(self, events: Iterable[UserEvent]) -> list[Summary]:
        """Scores and learns events, in transactions; returns what they tell."""
        told = []
        for chunk in _chunks(events):
            told += self._transaction(chunk)
            self._adapter.commit()
        return told

    def try_out(self, events: Iterable[UserEvent]) -> list[Summary]:
        """The same, and then all of it is undone."""
        offset = self._offset
        told = [summary for chunk in _chunks(events) for summary in self._transaction(chunk)]
        self._adapter.abort()
        self._offset = offset
        return told

    def _transaction(self, events: list[UserEvent]) -> list[Summary]:
        n, spec = len(events), self._model.spec
        keys: list[bytes | None] = [event.user_id.encode() for event in events]
        offsets = np.arange(self._offset, self._offset + n)
        batch, _ = self._decoder(RawBatch(keys, list(map(_to_json, events)), np.zeros(n, np.int32), offsets))
        self._offset += n
        return summarize(
            [(batch, self._adapter.adapt(batch))],
            window=spec.window,
            target_level=spec.feedback.target_level,
            model_version=self._model.version,
        )


_to_json = msgspec.json.Encoder().encode


def _chunks(events: Iterable[UserEvent]) -> Iterator[list[UserEvent]]:
    rest = iter(events)
    while chunk := list(islice(rest, _BATCH)):
        yield chunk


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
