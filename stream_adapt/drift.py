"""Drift: whether the world has moved away from what the model knows, seen in the learning summaries.

    summaries ─▶ groups ─▶ signals ─▶ in deviations of a frozen reference ─▶ a detector of River ─▶ alarms

Users act in bursts, so losses of neighbouring events hang together, and a detector that is fed event by event takes
bursts for drift. So detectors get means of groups of events, in standard deviations of such means within a frozen
reference: the first groups since the start, which stay what they are when a detector resets itself, and when somebody
else goes on watching (`Watched`). Only rises count.

Detectors are River's, by name (Montiel et al., "River: machine learning for streaming data in Python", JMLR 2021).
Since when a signal has moved is the last zero of the sum max(0, S + z − 1/2), Page's test ("Continuous inspection
schemes", Biometrika 1954). What was measured: benchmarks/drift.md.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import msgspec
import structlog

from stream_adapt.config import DriftSettings
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.learning import Summary

log = structlog.get_logger(__name__)

#: Raised by one when the meaning of an alarm's record changes.
ALARM_FORMAT = 1

#: Groups whose mean is a signal's current value, and those that a new detector is told of when it goes on.
_RECENT, _REMEMBERED = 8, 32
#: A group's deviation from the reference is taken to be at most so large: one odd group is no drift.
_LARGEST = 5.0
#: Offsets in what one monitor leaves to another: a record with so many has less than half of what a broker takes.
_MOST_OFFSETS = 20_000
#: What a binary detector is told of a group: whether it lies so many deviations above the reference.
_HIGH = 1.0
#: Page's sum grows no further, so that a signal that comes back soon counts as back.
_HIGHEST = 20.0
#: The slack of the sum that says since when a signal has moved, in deviations.
_SLACK = 0.5


class Alarm(msgspec.Struct, frozen=True):
    """Something moved: the value of a record of the alarms topic."""

    signal: str
    domain: str | None  # None: over all
    detector: str
    value: float  # the signal's mean since it moved
    reference: float  # its mean in the reference
    since: dict[int, int]  # partition → offset from which on it moved, as far as known
    since_ms: int  # event time there; 0 if not known
    events: int  # labelled events from there to the alarm
    model_version: str
    detected_ms: int
    format: int = ALARM_FORMAT

    def to_bytes(self) -> bytes:
        """The record's value: JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, value: bytes) -> Alarm:
        """Reads a record's value.

        Raises:
            DataError: it is none, or of a format that this release does not read.
        """
        try:
            alarm = msgspec.json.decode(value, type=cls)
        except msgspec.DecodeError as error:
            raise DataError(f"not an alarm: {error}: {value[:80]!r}") from error
        if alarm.format != ALARM_FORMAT:
            raise DataError(f"alarm: format={alarm.format}, this release reads {ALARM_FORMAT}; run a newer one")
        return alarm


class Statistic(msgspec.Struct, frozen=True):
    """Where a signal stands."""

    signal: str
    domain: str | None  # None: over all
    value: float | None  # mean of the last groups; None before the first
    reference: float | None  # None while it is being gathered


class Place(msgspec.Struct):
    """How far the stream was read."""

    offsets: dict[int, int] = {}  # partition → next offset
    time_ms: int = 0  # event time
    labelled: int = 0  # events so far

    def pass_by(self, summary: Summary) -> None:
        """This was read, too."""
        self.offsets[summary.partition] = summary.last_offset + 1
        self.time_ms = summary.last_ms
        self.labelled += summary.labelled

    def here(self) -> Place:
        """A copy that stays here."""
        return Place(dict(self.offsets), self.time_ms, self.labelled)


class Mean(msgspec.Struct):
    """Of so many numbers, and how much they vary (Welford, Technometrics 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # Σ (x − mean)²

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        off = value - self.mean
        self.mean += off / self.count
        self.squares += off * (value - self.mean)

    @property
    def deviation(self) -> float:
        """Standard deviation, of a sample."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


class Standing(msgspec.Struct, kw_only=True):
    """Where a signal stands, over all or in a domain."""

    signal: str
    domain: str | None  # None: over all
    group_events: int  # of a group that is one number in these means
    reference: Mean = msgspec.field(default_factory=Mean)  # so far, until it is complete
    last: list[float] = []  # means of the last groups
    fired: bool = False  # the detector saw a change, and Page's sum has not been 0 since
    rise: float = 0.0  # Page's sum
    risen: Mean = msgspec.field(default_factory=Mean)  # since it was 0
    since: Place = msgspec.field(default_factory=Place)  # where it was 0 last


class Watched(msgspec.Struct, frozen=True):
    """What a monitor knows, but for the group that is not full yet: what another one goes on with."""

    place: Place = msgspec.field(default_factory=Place)
    quiet_until: int = 0  # labelled events
    standings: tuple[Standing, ...] = ()

    def copy(self) -> Watched:
        """One that stays as it is."""
        return msgspec.convert(msgspec.to_builtins(self), Watched)


@dataclass
class Sums:
    """What a group of summaries adds up to."""

    events: int = 0
    labelled: int = 0
    loss: float = 0.0
    loss_frozen: float = 0.0
    entropy: float = 0.0
    target: float = 0.0
    score: float = 0.0
    unseen: int = 0

    def add(self, summary: Summary) -> None:
        """One more."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(summary, name))


class Signal(msgspec.Struct, frozen=True):
    """What is watched: a mean over a group that rises when the model fits less."""

    of: Callable[[Sums], float]
    #: Groups are taken to vary by at least so much: a rise of a fraction of it is not worth a refresh.
    least_deviation: float


SIGNALS: Mapping[str, Signal] = {
    "loss": Signal(lambda s: s.loss / s.labelled, 0.01),
    "excess_loss": Signal(lambda s: (s.loss - s.entropy) / s.labelled, 0.01),
    "loss_over_frozen": Signal(lambda s: (s.loss - s.loss_frozen) / s.labelled, 0.01),
    "calibration": Signal(lambda s: abs(s.score - s.target) / s.labelled, 0.01),
    "unseen": Signal(lambda s: s.unseen / s.events, 0.02),
}


class Detector(Protocol):
    """What there is of a detector of River."""

    @property
    def drift_detected(self) -> bool: ...
    def update(self, x: Any) -> None: ...


@cache
def detectors() -> dict[str, type]:
    """River's detectors by name; those for binary data as `binary.…`."""
    from river import base, drift

    found = {}
    for prefix, module in (("", drift), ("binary.", drift.binary)):
        for name, kind in sorted(vars(module).items()):
            if isinstance(kind, type) and issubclass(kind, base.DriftDetector | base.BinaryDriftDetector):
                found[prefix + name] = kind
    return found


def make_detector(name: str, parameters: Mapping[str, Any]) -> Detector:
    """A new detector. One that draws numbers gets a seed, if it is not given one, so that it can be done again.

    Raises:
        ConfigError: there is none of this name, or it takes no such parameters; says what there is.
    """
    kind = detectors().get(name)
    if kind is None:
        raise ConfigError(f"drift.detector={name!r}: River has {', '.join(detectors())}")
    takes = inspect.signature(kind)
    seed = {"seed": 0} if "seed" in takes.parameters else {}
    try:
        made: Detector = kind(**{**seed, **parameters})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"drift.parameters={dict(parameters)!r}: {error}. {name} takes {takes}") from error
    return made


class DriftMonitor:
    """Watches signals over all events and in each domain, in the order in which summaries come.

    Which events make a group depends on that order, and so may the moment of an alarm, by a group or two.
    """

    def __init__(
        self,
        settings: DriftSettings,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        watched: Watched | None = None,
    ) -> None:
        """Begins to watch.

        Args:
            settings: what is watched, and how.
            now_ms: the time.
            watched: by the one before. What it knows of groups of another size is left out.

        Raises:
            ConfigError: the settings name a detector, parameters or signals that there are not.
        """
        for name in settings.signals:
            if name not in SIGNALS:
                raise ConfigError(f"drift.signals: {name!r} is none; there are {', '.join(SIGNALS)}")
        self._settings = settings
        self._now_ms = now_ms
        self._begin(watched or Watched())

    def add(self, summaries: Sequence[Summary]) -> list[Alarm]:
        """Takes in what transactions told; returns what moved.

        What is detected during the cooldown after an alarm is told at its end, if it still holds then; and what holds
        on is told again after each cooldown.
        """
        alarms: list[Alarm] = []
        for summary in summaries:
            if not _is_finite(summary):
                log.warning("learning summary with numbers that are not finite is left out", summary=summary)
                continue
            self._place.pass_by(summary)
            for group in self._groups(summary.domain):
                group.sums.add(summary)
                self._tell_if_full(group)
            if self._place.labelled >= self._quiet_until:
                alarms += self._raised(summary.model_version)
        return alarms

    def restart(self, reason: str) -> None:
        """Forgets everything, references too: another model is in service, and what it is like has to be seen."""
        log.info("drift monitor starts anew", reason=reason)
        self._begin(Watched())

    def watched(self) -> Watched:
        """What it knows, for another one to go on from here; not of domains where that is too much for a record."""
        standings = tuple(channel.standing for channel in self._channels())
        if len(standings) * len(self._place.offsets) > _MOST_OFFSETS:
            standings = tuple(channel.standing for channel in self._all.channels)
        return Watched(self._place, self._quiet_until, standings).copy()

    def statistics(self) -> list[Statistic]:
        """Current value and reference of each signal, over all and by domain."""
        return [channel.statistic() for channel in self._channels()]

    def _begin(self, before: Watched) -> None:
        before = before.copy()
        fitting = [one for one in before.standings if one.group_events == self._settings.group_events]
        self._known = {(one.domain, one.signal): one for one in fitting}
        self._place, self._quiet_until = before.place, before.quiet_until
        self._all = self._group(None)
        self._domains: dict[str, _Group] = {}
        for one in fitting:
            self._watch_domain(one.domain or "")

    def _groups(self, domain: str) -> Iterator[_Group]:
        yield self._all
        self._watch_domain(domain)
        if domain in self._domains:
            yield self._domains[domain]

    def _watch_domain(self, domain: str) -> None:
        """If it has a name and is not watched yet, and no more are than may be."""
        if domain and domain not in self._domains and len(self._domains) < self._settings.domains:
            self._domains[domain] = self._group(domain)

    def _group(self, domain: str | None) -> _Group:
        known, settings = self._known, self._settings
        return _Group([_Channel(name, domain, settings, known.get((domain, name))) for name in settings.signals])

    def _channels(self) -> Iterator[_Channel]:
        for group in (self._all, *self._domains.values()):
            yield from group.channels

    def _tell_if_full(self, group: _Group) -> None:
        if group.sums.labelled >= self._settings.group_events:
            sums, group.sums = group.sums, Sums()
            for channel in group.channels:
                channel.feed(sums, self._place)

    def _raised(self, model_version: str) -> list[Alarm]:
        alarms = [
            channel.alarm(self._place, model_version, self._now_ms())
            for channel in self._channels()
            if channel.is_raised
        ]
        if alarms:
            self._quiet_until = self._place.labelled + self._settings.cooldown_events
        return alarms


@dataclass
class _Group:
    """Events of one domain, or of all, until there are enough of them; and who is told then."""

    channels: list[_Channel]
    sums: Sums = field(default_factory=Sums)


class _Channel:
    """One signal of one domain, or over all: its reference, its detector, and since when it is above the reference."""

    def __init__(self, signal: str, domain: str | None, settings: DriftSettings, known: Standing | None) -> None:
        self._signal = SIGNALS[signal]
        self._detector_name = settings.detector
        self._detector = make_detector(settings.detector, settings.detector_parameters)
        self._binary = settings.detector.startswith("binary.")
        self._groups_of_reference = settings.reference_events // settings.group_events
        self.standing = known or Standing(signal=signal, domain=domain, group_events=settings.group_events)
        if self._is_complete:  # what a detector knows cannot be handed on: it is told again
            for value in self.standing.last:
                self._detect(value)

    def feed(self, sums: Sums, place: Place) -> None:
        """One more group."""
        value, at = self._signal.of(sums), self.standing
        at.last = [*at.last, value][-_REMEMBERED:]
        if not self._is_complete:
            at.reference.add(value)
            at.since = place.here()
            return
        z = self._detect(value)
        at.rise = min(max(0.0, at.rise + z - _SLACK), _HIGHEST)
        if at.rise == 0.0:
            at.fired, at.risen, at.since = False, Mean(), place.here()
        else:
            at.risen.add(value)
        at.fired = at.fired or (self._detector.drift_detected and at.rise > 0.0)

    def _detect(self, value: float) -> float:
        """Tells the detector of a group; returns how many deviations it lies above the reference."""
        z = min((value - self.standing.reference.mean) / self._deviation, _LARGEST)
        self._detector.update(z > _HIGH if self._binary else max(z, -_LARGEST))
        return z

    @property
    def is_raised(self) -> bool:
        """Whether the detector saw a change for the worse that still holds."""
        at = self.standing
        if not (at.fired and self._is_complete):
            return False
        return statistics.fmean(at.last[-_RECENT:]) > at.reference.mean + _SLACK * self._deviation

    def alarm(self, place: Place, model_version: str, now_ms: int) -> Alarm:
        """What there is to say of it."""
        at = self.standing
        return Alarm(
            signal=at.signal,
            domain=at.domain,
            detector=self._detector_name,
            value=at.risen.mean,
            reference=at.reference.mean,
            since=dict(at.since.offsets),
            since_ms=at.since.time_ms,
            events=place.labelled - at.since.labelled,
            model_version=model_version,
            detected_ms=now_ms,
        )

    def statistic(self) -> Statistic:
        """What is told of it."""
        at = self.standing
        value = statistics.fmean(at.last[-_RECENT:]) if at.last else None
        return Statistic(at.signal, at.domain, value, at.reference.mean if self._is_complete else None)

    @property
    def _is_complete(self) -> bool:
        """Whether there is a reference: from then on it stays."""
        return self.standing.reference.count >= self._groups_of_reference

    @property
    def _deviation(self) -> float:
        return max(self.standing.reference.deviation, self._signal.least_deviation)


def _is_finite(summary: Summary) -> bool:
    sums = (summary.loss, summary.loss_frozen, summary.entropy, summary.target, summary.score)
    return all(map(math.isfinite, sums))
