"""What a leader works with, as it sees it: Kafka in service, a simulation in `bench drift`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from stream_adapt.announcements import Announcement
from stream_adapt.config import Config
from stream_adapt.models import Model, RowMode
from stream_adapt.refresh.pair import SideBySide
from stream_adapt.refresh.record import RefreshState, Request
from stream_adapt.refresh.training import Outcome, Progress


class Found(Protocol):
    """What there was in the journal when it was opened."""

    @property
    def state(self) -> RefreshState | None: ...


class Journal(Protocol):
    """Keeps the state, and tells what people ask for; see `journal.Journal`."""

    @property
    def tail(self) -> Found: ...
    def write(
        self, state: RefreshState, announcement: Announcement | None = None, alarms: Sequence[bytes] = ()
    ) -> None: ...
    def poll(self) -> Request | None: ...
    def close(self) -> None: ...


class Announcements(Protocol):
    """Which model is served; see `announcements.Announcements`."""

    def newest(self) -> Announcement | None: ...
    def read_to_end(self) -> None: ...
    def close(self) -> None: ...


class Training(Protocol):
    """A training that was started; see `worker.Worker`."""

    def poll(self) -> Outcome | None: ...
    def progress(self) -> Progress | None: ...
    def close(self) -> None: ...


class Pair(Protocol):
    """Two models side by side on what service reads; see `pair.LivePair`."""

    @property
    def models(self) -> SideBySide: ...
    def step(self) -> None: ...
    def close(self) -> None: ...


class Parts(NamedTuple):
    """How a leader comes by them, but for the training."""

    journal: Callable[[Config], Journal]
    announcements: Callable[[Config], Announcements]
    pair: Callable[[Config, Model, Model, RowMode, Mapping[int, int]], Pair]
