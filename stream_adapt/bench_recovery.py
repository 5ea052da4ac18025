"""The second part of `bench drift`: what a refresh is worth once the world has moved, and that it does no harm.

Every stream goes through a member twice: alone, and with the leader of a refresh beside it (`bench_world`).

| stream | refreshes | what is asked |
|---|---|---|
| a drift | at alarms, and as the new world grows | how soon log-loss is what it was, and AUC at the end |
| as it is; a harmless drift | at four places, on a schedule | AUC, which they must not cost |
| as it is | at four places, on labels that were turned round | that what was trained is refused |

The last that was refused is then put into service by hand, and has to be taken back.

What was measured is kept in the folder, run by run, and not measured again.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from stream_adapt.announcements import Announcement
from stream_adapt.bench_streams import Member, Streams, Transaction, write
from stream_adapt.bench_world import World
from stream_adapt.config import Config, DriftSettings
from stream_adapt.datasets.drifts import HARMLESS, KINDS, DriftKind
from stream_adapt.evaluate.metrics import CLIP, auc
from stream_adapt.models import Model, Registry, read_model
from stream_adapt.record import Adapted
from stream_adapt.refresh.record import Request
from stream_adapt.refresh.states import RESTING
from stream_adapt.refresh.window import Window

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Scenario = DriftKind | Literal["stationary", "planted"]

#: What is simulated, and in this order: first what the bars are about.
SCENARIOS: tuple[Scenario, ...] = ("permute", "stationary", "planted", *(k for k in KINDS if k != "permute"))
#: Settings of refreshes that are not the defaults. The streams last from a quarter of an hour to an hour and a half at
#: the usual rate: what is asked of days has to fit into that.
_SETTINGS = {"device": "cpu", "training_s": 120.0, "cooldown_s": 60.0, "per_day": 100}
#: Of a planted challenger: it need not be good, so it need not take long.
_PLANTED = {"window_events": 50_000, "training_s": 30.0}
#: The level before is of so many events before the drift; a moving window of so many says where log-loss is.
_BEFORE, _MOVING = 20_000, 5_000
#: Log-loss is back when it is within this of what it was.
_WITHIN = 0.01
#: Places of scheduled and planted refreshes, as shares of the stream.
_PARTS = 5
#: Share of the stream after which a refused challenger is put into service by hand.
_BY_HAND = 0.85
#: `gradual` is complete after so many events.
_GRADUAL = 20_000
#: What does not come back by itself, or need not.
_LASTING: tuple[Scenario, ...] = tuple(kind for kind in KINDS if kind not in ("recurring", *HARMLESS))
#: Raised by one when what is measured changes: what was kept does not count then.
_FORMAT = 2


class RefreshRun(msgspec.Struct, frozen=True, kw_only=True):
    """One stream with and without refreshes. Counts of events are from the drift, or else from the stream's begin."""

    name: str
    scenario: str
    seed: int
    events: int
    auc: float
    auc_without: float
    auc_last_quarter: float
    auc_last_quarter_without: float
    level_before: float | None = None  # log-loss before the drift
    recovered: int | None = None  # events until log-loss was back; None: it never was
    recovered_without: int | None = None
    same_level: int | None = None  # events until log-loss was where it ended without refresh
    level_new_world: float | None = None  # log-loss of a model that was pretrained on the new world
    as_pretrained: int | None = None  # events until log-loss was that, or what it was before, if that is higher
    as_pretrained_without: int | None = None
    left: int = 0  # events after the drift
    alarms: list[int] = []
    promotions: list[int] = []
    outcomes: list[str] = []
    training_s: list[float] = []
    curve: list[float] = []  # log-loss of each `_MOVING` events from the drift on
    curve_without: list[float] = []
    refused: int = 0  # planted challengers
    planted: int = 0
    rolled_back: int = 0  # of those put into service by hand
    by_hand: int = 0


class RefreshCase(msgspec.Struct):
    """One data set and one kind of stream."""

    runs: int
    recovery_ratio: float | None  # median
    recovery_ratios: list[float | None]  # by seed; None: log-loss never was back
    recovery_ratio_is_bound: list[bool]  # by seed: without refresh it never was, so the true ratio is smaller
    as_pretrained_ratios: list[float | None]  # the same of log-loss as of a model pretrained on the new world
    as_pretrained_ratio_is_bound: list[bool]
    same_level_ratios: list[float | None]  # events until log-loss is where it ends without refresh ÷ events there were
    auc_gain_last_quarter: float
    auc_gains_last_quarter: list[float]
    auc_gain: float
    auc_gains: list[float]
    healed_alone: int  # runs in which fast weights alone brought log-loss back
    promotions: list[int]
    training_s: float | None  # median, processor time


class RefreshFigures(msgspec.Struct):
    """What refreshes are worth."""

    rate: float  # events/s of the simulated clock
    recovery_ratio: float | None  # of permute: median over all runs
    recovery_ratio_is_bound: bool
    auc_gain_last_quarter: float | None  # of permute: mean over all runs
    stationary_auc_change: dict[str, list[float]]  # with scheduled refreshes, by data set and seed
    harmless_auc_change: dict[str, list[float]]
    bad_challengers: int
    bad_challengers_refused: int
    bad_by_hand: int
    bad_rolled_back: int
    cases: dict[str, RefreshCase]  # by data set and kind


@dataclass(frozen=True)
class Course:
    """What a member said of n events: all have feedback."""

    score: Floats  # [n]
    target: Bools  # [n]

    @property
    def loss(self) -> Floats:
        """Log-losses `[n]`."""
        happened: Floats = np.where(self.target, self.score, 1.0 - self.score)
        return -np.log(np.clip(happened, CLIP, 1.0))

    def auc(self, start: int = 0) -> float:
        """From an event on."""
        return auc(self.score[start:], self.target[start:])


def refresh_run(streams: Streams, scenario: Scenario, drift: DriftSettings, rate: float) -> RefreshRun:
    """What was kept of a stream, or measured and kept."""
    settings = _settings(streams, scenario, rate)
    told = msgspec.json.encode([_FORMAT, rate, settings, drift.model_dump(mode="json")])
    path = streams.folder / f"refresh-{scenario}-{hashlib.sha256(told).hexdigest()[:8]}.json"
    if not path.exists():
        write(path, msgspec.json.format(msgspec.json.encode(_measured(streams, scenario, drift, rate)), indent=1))
    return msgspec.json.decode(path.read_bytes(), type=RefreshRun)


def summed(runs: Sequence[RefreshRun], rate: float) -> RefreshFigures:
    """Figures of all runs."""
    cases: dict[str, list[RefreshRun]] = {}
    for run in runs:
        cases.setdefault(f"{run.name} {run.scenario}", []).append(run)
    permuted = [run for run in runs if run.scenario == "permute"]
    ratios = [ratio for ratio, _ in map(recovery_ratio, permuted) if ratio is not None]
    planted = [run for run in runs if run.scenario == "planted"]
    return RefreshFigures(
        rate=rate,
        recovery_ratio=statistics.median(ratios) if ratios else None,
        recovery_ratio_is_bound=any(bound for _, bound in map(recovery_ratio, permuted)),
        auc_gain_last_quarter=_mean([_last_quarter_gain(run) for run in permuted]),
        stationary_auc_change=_changes(runs, ("stationary",)),
        harmless_auc_change=_changes(runs, HARMLESS),
        bad_challengers=sum(run.planted for run in planted),
        bad_challengers_refused=sum(run.refused for run in planted),
        bad_by_hand=sum(run.by_hand for run in planted),
        bad_rolled_back=sum(run.rolled_back for run in planted),
        cases={name: _case(of) for name, of in cases.items() if of[0].scenario != "planted"},
    )


def recovery_ratio(run: RefreshRun) -> tuple[float | None, bool]:
    """Events until log-loss is back, with refresh ÷ without; and whether the true ratio is smaller still.

    Where log-loss never comes back without refresh, the events that there were take their place.
    """
    return _ratio(run, run.recovered, run.recovered_without)


def as_pretrained_ratio(run: RefreshRun) -> tuple[float | None, bool]:
    """The same of the events until log-loss is that of a model which was pretrained on the new world."""
    return _ratio(run, run.as_pretrained, run.as_pretrained_without)


def _ratio(run: RefreshRun, events: int | None, without: int | None) -> tuple[float | None, bool]:
    return (None, False) if events is None else (events / (without or run.left), without is None)


def _case(runs: list[RefreshRun]) -> RefreshCase:
    ratios, as_pretrained = ([of(run) for run in runs] for of in (recovery_ratio, as_pretrained_ratio))
    known = [ratio for ratio, _ in ratios if ratio is not None]
    gains, quarters = [run.auc - run.auc_without for run in runs], list(map(_last_quarter_gain, runs))
    seconds = [one for run in runs for one in run.training_s]
    return RefreshCase(
        runs=len(runs),
        recovery_ratio=statistics.median(known) if known else None,
        recovery_ratios=[ratio for ratio, _ in ratios],
        recovery_ratio_is_bound=[bound for _, bound in ratios],
        as_pretrained_ratios=[ratio for ratio, _ in as_pretrained],
        as_pretrained_ratio_is_bound=[bound for _, bound in as_pretrained],
        same_level_ratios=[run.same_level / run.left if run.same_level else None for run in runs],
        auc_gain_last_quarter=statistics.fmean(quarters),
        auc_gains_last_quarter=quarters,
        auc_gain=statistics.fmean(gains),
        auc_gains=gains,
        healed_alone=sum(run.recovered_without is not None for run in runs),
        promotions=[len(run.promotions) for run in runs],
        training_s=statistics.median(seconds) if seconds else None,
    )


def _last_quarter_gain(run: RefreshRun) -> float:
    return run.auc_last_quarter - run.auc_last_quarter_without


def _changes(runs: Sequence[RefreshRun], scenarios: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.scenario in scenarios:
            found.setdefault(run.name, []).append(run.auc - run.auc_without)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# Measuring one run.


def _settings(streams: Streams, scenario: Scenario, rate: float) -> dict[str, object]:
    """Of refreshes: drifts are seen, and otherwise a schedule, or somebody who asks, begins them."""
    if scenario == "planted":
        return {**_SETTINGS, **_PLANTED}
    if scenario == "stationary" or scenario in HARMLESS:
        return {**_SETTINGS, "every_s": streams.count / _PARTS / rate}
    return _SETTINGS


def _measured(streams: Streams, scenario: Scenario, drift: DriftSettings, rate: float) -> RefreshRun:
    kind = None if scenario in ("stationary", "planted") else scenario
    stream = list(Member(streams.model).read(streams.events(kind)))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="stream-adapt-bench-") as folder:
        registry = Path(folder) / "models"
        shutil.copytree(streams.model_folder, registry / streams.model.version)
        config = Config.model_validate({
            "model": {"path": registry},
            "state": {"dir": Path(folder) / "state"},
            "drift": drift.model_dump(),
            "refresh": _settings(streams, scenario, rate),
        })  # fmt: skip
        world = World(streams.model, config, rate, flipped(streams.model) if scenario == "planted" else None)
        within = _Watched(world, _Planting(world, streams.count) if scenario == "planted" else None)
        course = _course(stream, streams.model, within.take)
    member = Member(streams.model)
    alone = course if scenario == "planted" else _course(stream, streams.model, lambda one: member.take(one)[0])
    return _told(streams, scenario, course, alone, within)


def new_world_level(streams: Streams, kind: DriftKind) -> float:
    """What could be reached: the first half of what comes after the drift pretrains and warms up, the other judges."""
    events = list(islice(streams.events(kind), _complete(streams, kind), None))
    half = len(events) // 2
    with tempfile.TemporaryDirectory(prefix="stream-adapt-bench-") as folder:
        streams.pretrain(events[:half], Path(folder))
        model = read_model(Path(folder))
    member = Member(model)
    return float(_course(list(member.read(events)), model, lambda one: member.take(one)[0]).loss[half:].mean())


def _complete(streams: Streams, kind: DriftKind) -> int:
    """The first event of the new world."""
    return streams.place + (_GRADUAL if kind == "gradual" else 0)


def _course(stream: Sequence[Transaction], model: Model, take: Callable[[Transaction], Adapted]) -> Course:
    target = model.spec.feedback.target_level
    scores = np.concatenate([take(one).score for one in stream])
    return Course(scores, np.concatenate([one.batch.levels >= target for one in stream]))


def flipped(model: Model) -> Callable[[Window], Window]:
    """Labels of a window turned round."""
    highest = len(model.spec.feedback.levels) - 1
    return lambda window: replace(window, log=replace(window.log, levels=highest - window.log.levels))


class _Planting:
    """Asks for refreshes, and puts what was refused into service by hand."""

    def __init__(self, world: World, events: int) -> None:
        self._world = world
        self._places = [events * part // _PARTS for part in range(1, _PARTS)]
        self._by_hand = int(events * _BY_HAND)
        self.by_hand: str | None = None

    def turn(self) -> None:
        """After each transaction."""
        world, journal = self._world, self._world.journal
        resting = world.leader.state.state in RESTING
        if self._places and world.events >= self._places[0] and resting:
            journal.request = Request(str(self._places.pop(0)), 0, "planted")
        elif not self._places and resting and self.by_hand is None and world.events >= self._by_hand:
            self._serve(world.leader.state.last.challenger if world.leader.state.last else None)

    def _serve(self, version: str | None) -> None:
        if version is not None:
            self.by_hand, champion = version, self._world.leader.state.champion
            manifest = Registry(self._world.config.model.path).manifest(version)
            told = Announcement(version, manifest.sha256, champion, "carry", "planted by hand", 0)
            self._world.journal.announced.append(told)


class _Watched:
    """Takes a stream through a world, and notes what happens."""

    def __init__(self, world: World, planting: _Planting | None) -> None:
        self._world, self.planting = world, planting
        self.alarms: list[int] = []
        self.promotions: list[int] = []
        self.outcomes: list[str] = []
        self.training_s: list[float] = []
        self._decided_ms = 0

    def take(self, one: Transaction) -> Adapted:
        """One transaction."""
        world, journal = self._world, self._world.journal
        alarms, announced = len(journal.alarms), len(journal.announced)
        said = world.take(one)
        if len(journal.alarms) > alarms:
            self.alarms.append(world.events)
        if len(journal.announced) > announced:
            self.promotions.append(world.events)
        last = world.leader.state.last
        if last is not None and last.at_ms != self._decided_ms:
            self._decided_ms = last.at_ms
            self.outcomes.append(last.outcome)
            if "training_s" in last.figures:
                self.training_s.append(last.figures["training_s"])
        if self.planting is not None:
            self.planting.turn()
        return said


def _told(streams: Streams, scenario: Scenario, course: Course, alone: Course, seen: _Watched) -> RefreshRun:
    n, last = len(course.score), len(course.score) * 3 // 4
    at = streams.place if scenario in KINDS else 0
    fields: dict[str, object] = {}
    if scenario in KINDS:
        before = float(alone.loss[max(0, at - _BEFORE) : at].mean())
        fields |= {"level_before": before, "left": n - at}
        if scenario in _LASTING:
            start, new = _complete(streams, scenario), new_world_level(streams, scenario)
            end = float(alone.loss[-_MOVING:].mean())
            fields["level_new_world"] = new
            for name, level in (("recovered", before), ("as_pretrained", max(before, new))):
                fields[name] = reached(course.loss, start, level + _WITHIN, at)
                fields[f"{name}_without"] = reached(alone.loss, start, level + _WITHIN, at)
            fields["same_level"] = reached(course.loss, start, end, at)
    if seen.planting is not None:
        fields |= _of_planted(seen, seen.planting)
    return RefreshRun(
        name=streams.name,
        scenario=scenario,
        seed=streams.seed,
        events=n,
        auc=course.auc(),
        auc_without=alone.auc(),
        auc_last_quarter=course.auc(last),
        auc_last_quarter_without=alone.auc(last),
        alarms=[one - at for one in seen.alarms],
        promotions=[one - at for one in seen.promotions],
        outcomes=seen.outcomes,
        training_s=seen.training_s,
        curve=_curve(course.loss[at:]),
        curve_without=_curve(alone.loss[at:]),
        **fields,  # type: ignore[arg-type]
    )


def _of_planted(seen: _Watched, planting: _Planting) -> dict[str, object]:
    asked = seen.outcomes[: _PARTS - 1]
    return {
        "planted": len(asked),
        "refused": asked.count("rejected"),
        "by_hand": int(planting.by_hand is not None),
        "rolled_back": seen.outcomes[_PARTS - 1 :].count("rolled_back"),
    }


def reached(loss: Floats, start: int, level: float, counted_from: int) -> int | None:
    """Events from `counted_from` to the end of the first moving window, all of it after `start`, at or below a level.

    None if there is none.
    """
    sums = np.concatenate([[0.0], np.cumsum(loss[start:])])
    means = (sums[_MOVING:] - sums[:-_MOVING]) / _MOVING
    found = np.flatnonzero(means <= level)
    return int(found[0]) + _MOVING + start - counted_from if len(found) else None


def _curve(loss: Floats) -> list[float]:
    whole = loss[: len(loss) // _MOVING * _MOVING].reshape(-1, _MOVING)
    return [round(float(one), 4) for one in whole.mean(axis=1)]
