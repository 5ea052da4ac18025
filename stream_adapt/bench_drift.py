"""`stream-adapt bench drift`: how surely and how soon drift is detected, and what a refresh is worth then.

For each data set and seed a model is pretrained on the first half of the events by time. The second half, in its real
order, is scored and learned by the code that serves; its learning summaries go to the drift monitor. Once as it is:
every alarm there is false. And once for each kind of drift (`datasets/drifts.py`), put in at a place that follows from
the seed: the first alarm after it counts, if it comes in time. What a refresh makes of it: `bench_recovery`.

Models, and what the streams told, are kept in a folder: to try another detector takes seconds. What is in the folder
is taken as it is; another release has one of its own, and after a change of the learner it has to be deleted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from stream_adapt.bench_recovery import SCENARIOS, RefreshFigures, RefreshRun, Scenario, refresh_run, summed
from stream_adapt.bench_streams import Run, Streams, kept_in
from stream_adapt.config import DriftSettings
from stream_adapt.datasets.drifts import ABRUPT, HARMLESS, KINDS
from stream_adapt.drift import DriftMonitor
from stream_adapt.errors import ConfigError
from stream_adapt.learning import Summary


@dataclass(frozen=True)
class DriftBench:
    """What to measure."""

    sets: str = "movielens-1m,synthetic"
    seeds: int = 5
    detectors: str = ""  # names with commas between them; "": as the settings say
    folder: Path | None = None  # for models
    recovery: bool = True  # whether refreshes are simulated, too
    scenarios: str = ""  # of them, names with commas between them; "": all
    rate: float = 100.0  # events/s, by which it is known how many pass while a challenger is trained


class CaseFigures(msgspec.Struct):
    """One data set and one kind of drift."""

    runs: int
    detected: int
    median_delay_events: float | None
    delays: list[int | None]  # by seed; None: not seen in time
    recovery_ratio: float | None = None  # median; None: not measured, or log-loss never was back
    auc_gain_last_quarter: float | None = None  # by refreshes, mean


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
    recovery_ratio: float | None = None  # of permute; of the first detector
    auc_gain_last_quarter: float | None = None  # the same
    refresh: RefreshFigures | None = None  # the same, in full


def run_drift(options: DriftBench, console: Console, settings: DriftSettings | None = None) -> DriftFigures:
    """Measures each detector on every stream.

    Raises:
        ConfigError, DataError: an option is wrong, or a data set cannot be had.
    """
    settings = settings or DriftSettings()
    _scenarios(options)
    names = [name for name in options.detectors.split(",") if name] or [settings.detector]
    candidates = [_with_detector(settings, name) for name in names]
    for candidate in candidates:
        DriftMonitor(candidate)
    runs = list(told(options, console))
    found = {one.detector: judge(one, runs) for one in candidates}
    first = found[names[0]]
    result = DriftFigures(**msgspec.structs.asdict(first), detector=names[0], seeds=options.seeds, detectors=found)
    return _with_refresh(result, options, candidates[0], console) if options.recovery else result


def _with_refresh(result: DriftFigures, options: DriftBench, settings: DriftSettings, console: Console) -> DriftFigures:
    """The figures, and what refreshes are worth at alarms of the first detector."""
    runs = list(refreshed(options, settings, console))
    found = summed(runs, options.rate)
    cases = dict(result.cases)
    for name in cases.keys() & found.cases.keys():
        of = found.cases[name]
        cases[name] = msgspec.structs.replace(
            cases[name], recovery_ratio=of.recovery_ratio, auc_gain_last_quarter=of.auc_gain_last_quarter
        )
    return msgspec.structs.replace(
        result,
        cases=cases,
        recovery_ratio=found.recovery_ratio,
        auc_gain_last_quarter=found.auc_gain_last_quarter,
        refresh=found,
    )


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
    if result.refresh is not None:
        _show_refresh(result.refresh, console)


def _show_refresh(result: RefreshFigures, console: Console) -> None:
    columns = ["recovery ratio", "as pretrained", "healed alone", "AUC, last quarter", "AUC, all", "promotions"]
    columns += ["training s"]
    named = [Column("with refreshes", no_wrap=True), *(Column(name, justify="right") for name in columns)]
    table = Table(*named, padding=0)  # for 80 columns
    for name, case in result.cases.items():
        table.add_row(
            name,
            _told_ratios(case.recovery_ratios, case.recovery_ratio_is_bound),
            _told_ratios(case.as_pretrained_ratios, case.as_pretrained_ratio_is_bound),
            f"{case.healed_alone} of {case.runs}",
            f"{case.auc_gain_last_quarter:+.4f}",
            f"{case.auc_gain:+.4f}",
            " ".join(map(str, case.promotions)),
            _told_number(case.training_s),
        )
    console.print(table)
    console.print(
        f"planted challengers refused: {result.bad_challengers_refused} of {result.bad_challengers}; put into service "
        f"by hand and taken back: {result.bad_rolled_back} of {result.bad_by_hand}; {result.rate:g} events/s"
    )


def _told_ratios(ratios: Sequence[float | None], bounds: Sequence[bool]) -> str:
    """The median of those that there are."""
    known = [ratio for ratio in ratios if ratio is not None]
    return ("≤ " if known and any(bounds) else "") + _told_number(statistics.median(known) if known else None)


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
    folder = kept_in(options.folder)
    with _progress(console) as bar:
        for name in options.sets.split(","):
            task = bar.add_task(name, total=options.seeds * (1 + len(KINDS)))
            for seed in range(options.seeds):
                bar.update(task, description=f"{name}, seed {seed}")
                for run in Streams(name, seed, folder).runs():
                    yield run
                    bar.advance(task)


def refreshed(options: DriftBench, settings: DriftSettings, console: Console) -> Iterator[RefreshRun]:
    """Every stream with and without refreshes."""
    with _progress(console) as bar:
        for scenario in _scenarios(options):
            for name in options.sets.split(","):
                task = bar.add_task(f"{name}, {scenario}", total=options.seeds)
                for seed in range(options.seeds):
                    yield refresh_run(Streams(name, seed, kept_in(options.folder)), scenario, settings, options.rate)
                    bar.advance(task)


def _scenarios(options: DriftBench) -> tuple[Scenario, ...]:
    wanted = [name for name in options.scenarios.split(",") if name]
    for name in wanted:
        if name not in SCENARIOS:
            raise ConfigError(f"scenarios: {name!r} is none of {', '.join(SCENARIOS)}")
    return tuple(name for name in SCENARIOS if not wanted or name in wanted)


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


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
