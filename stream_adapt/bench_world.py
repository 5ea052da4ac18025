"""A member and the leader of a refresh beside it, in a world of their own: `bench drift` watches what they do.

A stream goes through a member with one partition; beside it works the leader of a refresh, the very one that a
controller runs: its detectors, its states, its training, its shadow, its decision, its watch. Only what it stands on
is simulated: the topics are lists, and the clock goes with the events, at a stated rate. A training is done for real;
as many events pass meanwhile as it takes seconds of processor time, times the rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stream_adapt.announcements import Announcement
from stream_adapt.bench_streams import Member, Transaction
from stream_adapt.config import Config
from stream_adapt.errors import DataError
from stream_adapt.models import Model, Registry, RowMode
from stream_adapt.record import Adapted
from stream_adapt.refresh import training
from stream_adapt.refresh.leader import Leader
from stream_adapt.refresh.pair import SideBySide
from stream_adapt.refresh.parts import Parts
from stream_adapt.refresh.record import RefreshState, Request
from stream_adapt.refresh.training import Job, Outcome, Progress
from stream_adapt.refresh.window import Window, ranges_of, window_of

_TOPIC = "events"
#: When the first event comes: any time will do.
_BEGIN_S = 1_700_000_000.0


class Journal:
    """The journal and the models topic of a leader, as lists."""

    def __init__(self) -> None:
        self.state: RefreshState | None = None
        self.announced: list[Announcement] = []
        self.alarms: list[bytes] = []
        self.request: Request | None = None

    @property
    def tail(self) -> Journal:
        """What was found: nothing, at the beginning."""
        return self

    def write(
        self, state: RefreshState, announcement: Announcement | None = None, alarms: Sequence[bytes] = ()
    ) -> None:
        """As `refresh.journal.Journal` does."""
        self.state = state
        self.announced += [announcement] if announcement is not None else []
        self.alarms += alarms

    def poll(self) -> Request | None:
        """The newest request."""
        return self.request

    def newest(self) -> Announcement | None:
        """The champion's announcement."""
        return self.announced[-1] if self.announced else None

    def read_to_end(self) -> None:
        """It is read."""

    def close(self) -> None:
        """There is nothing to let go of."""


class World:
    """A member that takes in a stream, and a leader beside it."""

    def __init__(
        self,
        model: Model,
        config: Config,
        rate: float,
        change: Callable[[Window], Window] | None = None,
    ) -> None:
        """Starts with the first event.

        Args:
            model: the champion, which is in the registry of the configuration.
            config: how drift is detected, and refreshes are done.
            rate: events per second.
            change: what becomes of a training's window, if anything.
        """
        self.config, self.rate, self.change = config, rate, change
        self.member = Member(model)
        self.taken: list[Transaction] = []
        self.events = 0
        self.journal = Journal()
        parts = Parts(lambda _config: self.journal, lambda _config: self.journal, self._side_by_side)
        self.leader = Leader(config, Registry(config.model.path), self._train, self.now_s, parts)

    def now_s(self) -> float:
        """The time: events so far by the rate."""
        return _BEGIN_S + self.events / self.rate

    def take(self, one: Transaction) -> Adapted:
        """A transaction, and what the leader makes of it; what it announces is served from the next one on."""
        said, told = self.member.take(one)
        self.taken.append(one)
        self.events += len(one.raw.offsets)
        self.leader.turn(told, self.events)
        newest = self.journal.newest()
        if newest is not None and newest.version != self.member.adapter.model.version:
            self.member.serve(Registry(self.config.model.path).read(newest.version), newest.rows)
        return said

    def window(self, job: Job) -> Window:
        """What `refresh.window.read_window` would read."""
        settings = self.config.refresh
        first = max(0, self.events - int(settings.window_s * self.rate))
        ranges = ranges_of({0: first}, {0: (0, self.events)}, settings.window_events)
        start = ranges[0][0]
        batches = [one.batch for one in self.taken if one.raw.offsets[-1] >= start]
        batches[0] = batches[0].between(int((batches[0].offsets < start).sum()), len(batches[0]))
        offsets = np.concatenate([batch.offsets for batch in batches])
        times = ((_BEGIN_S + offsets / self.rate) * 1000).astype(np.int64)
        return window_of(batches, times, ranges, _TOPIC, job.newer)

    def _train(self, config: Config, job: Job) -> Training:
        return Training(self, config, job)

    def _side_by_side(
        self, config: Config, champion: Model, other: Model, rows: RowMode, judged_from: Mapping[int, int]
    ) -> Pair:
        return Pair(self, SideBySide(config, champion, other, rows), judged_from)


class Training:
    """A training that is done at once, and whose outcome comes when it would have come."""

    def __init__(self, world: World, config: Config, job: Job) -> None:
        self._world = world
        started = time.process_time()
        self._outcome = _trained(world, config, job)
        self.seconds = time.process_time() - started
        self._over_s = world.now_s() + self.seconds
        self._outcome.figures["training_s"] = self.seconds

    def poll(self) -> Outcome | None:
        """What came of it, once its time has passed."""
        return self._outcome if self._world.now_s() >= self._over_s else None

    def progress(self) -> Progress | None:
        """It does not say."""
        return None

    def close(self) -> None:
        """It has ended."""


def _trained(world: World, config: Config, job: Job) -> Outcome:
    champion = Registry(config.model.path).read(job.champion)
    try:
        window = world.window(job) if world.change is None else world.change(world.window(job))
        return training.challenge(config, champion, window, moved=bool(job.newer), clock=time.process_time)
    except DataError as problem:  # as `training.main` does
        return Outcome(reason=f"{type(problem).__name__}: {problem}")


class Pair:
    """Two models side by side, with the rows of the member."""

    def __init__(self, world: World, models: SideBySide, judged_from: Mapping[int, int]) -> None:
        self.models, self._world = models, world
        adapter = world.member.adapter
        for mine, theirs in zip((adapter.users, adapter.items), models.tables.values(), strict=True):
            ids, slots = zip(*mine.items(0), strict=True)
            theirs.load(0, ids, mine.rows[np.array(slots)])
        models.begin({0: world.events}, {0: max(world.events, judged_from.get(0, 0))})
        self._at = len(world.taken)

    def step(self) -> None:
        """Takes in what the member has taken in."""
        for one in self._world.taken[self._at :]:
            self.models.follow(one.raw)
        self._at = len(self._world.taken)

    def close(self) -> None:
        """There is nothing to let go of."""
