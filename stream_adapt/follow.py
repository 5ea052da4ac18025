"""Follow: a member serves the model that was announced last.

    served ──another one is announced──▶ looked for, by a thread ──it fits──▶ due ──between two batches──▶ served
                                           │  ▲
                                           ▼  └── its files changed
                                         refused: missing | damaged | unfit; the one in service stays

Reading and checking a file, and making θ ready, take seconds and are done beside the loop; the swap itself is a few
assignments. What becomes of rows is the runner's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Protocol

import structlog

from stream_adapt.adapt import Slow
from stream_adapt.announcements import Announcement, row_mode
from stream_adapt.errors import ConfigError, ModelError, ModelMissing, ModelUnfit
from stream_adapt.models import Model, Registry, RowMode, check_successor

log = structlog.get_logger(__name__)

#: Why an announced model is not served.
REFUSALS = {
    "missing": "it, or one of its files, is not in the registry of this member",
    "damaged": "truncated, of another hash, not finite, or otherwise not what its manifest says",
    "unfit": "it cannot take the place of the model in service: another form, or other settings",
}
#: Between two looks at the files of a model that was refused.
_LOOK_S = 0.5


@dataclass(frozen=True)
class Standing:
    """Which model is served, which one is announced and why it is not served."""

    served: str
    announced: str | None = None  # another one than the one served
    refused_for: str = ""  # one of REFUSALS; empty: it is being looked for
    problem: str = ""  # the same in words
    swaps: int = 0
    refusals: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(REFUSALS, 0))


class Announced(Protocol):
    """What is asked of the models topic."""

    def newest(self) -> Announcement | None: ...
    def position(self, version: str | None) -> int: ...
    def since(self, version: str) -> list[Announcement]: ...
    def read_to_end(self) -> None: ...


class Follower:
    """Looks for what is announced, and says when it is due. For the loop's thread."""

    def __init__(
        self,
        announced: Announced,
        registry: Registry,
        served: Model,
        adjusted: Callable[[Model], Model],
        ready: Callable[[Model], Slow],
    ) -> None:
        """Starts with the model that is served.

        Args:
            announced: the models topic.
            registry: where versions are looked for.
            served: the model in service.
            adjusted: a model as the configuration would have it.
            ready: makes a model ready to serve; called in another thread.
        """
        self.standing = Standing(served.version)
        self._announced = announced
        self._registry = registry
        self._served = served
        self._adjusted = adjusted
        self._ready = ready
        self._wanted: Announcement | None = None
        self._outcomes: SimpleQueue[tuple[Announcement, Slow | Exception]] = SimpleQueue()
        self._closed = threading.Event()

    def due(self) -> Slow | None:
        """The model to serve from now on, once, when there is another one. Waits for nothing."""
        newest = self._announced.newest()
        if newest != self._wanted and newest is not None:
            self._want(newest)
        return self._outcome()

    def ahead(self, version: str) -> bool:
        """Whether a model was announced after the one in service, as far as a look at the topic's end tells."""
        if version in ("", self._served.version):
            return False
        if self._announced.position(version) < 0:  # another member may have seen more of the topic
            self._announced.read_to_end()
        return self._announced.position(version) > self._announced.position(self._served.version)

    def row_mode(self, version: str) -> RowMode:
        """What becomes of rows of this version under the one in service."""
        until = self._announced.position(self._served.version)
        return row_mode(
            [one for one in self._announced.since(version) if self._announced.position(one.version) <= until]
        )

    def close(self) -> None:
        """Looks no further."""
        self._closed.set()

    def _want(self, one: Announcement) -> None:
        self._wanted = one
        if one.version == self._served.version:
            self.standing = replace(self.standing, announced=None, refused_for="", problem="")
            return
        self.standing = replace(self.standing, announced=one.version, refused_for="", problem="")
        log.info("another model is announced", model=one.version, served=self._served.version, reason=one.reason)
        threading.Thread(target=self._look_for, args=(one,), name="follow", daemon=True).start()

    def _outcome(self) -> Slow | None:
        """Takes in what threads have found of the model that is wanted now."""
        while True:
            try:
                one, found = self._outcomes.get_nowait()
            except Empty:
                return None
            if one is not self._wanted:
                continue
            if isinstance(found, Slow):
                self._served = found.model
                self.standing = Standing(
                    found.model.version, swaps=self.standing.swaps + 1, refusals=self.standing.refusals
                )
                return found
            self._refuse(one, found)

    def _refuse(self, one: Announcement, problem: Exception) -> None:
        if not isinstance(problem, ConfigError):
            raise problem
        why = _kind_of(problem)
        refusals = {**self.standing.refusals, why: self.standing.refusals[why] + 1}
        self.standing = replace(self.standing, refused_for=why, problem=str(problem), refusals=refusals)
        log.warning(
            "an announced model is not served",
            model=one.version,
            served=self._served.version,
            why=why,
            error=str(problem),
        )

    def _look_for(self, one: Announcement) -> None:
        """Until it is there and sound, or another one is wanted: again whenever its files change."""
        seen: object = ()
        while one is self._wanted and not self._closed.is_set():
            files = self._files(one)
            if files != seen:
                seen = files
                found = self._load(one)
                self._outcomes.put((one, found))
                if isinstance(found, Slow):
                    return
            self._closed.wait(_LOOK_S)

    def _load(self, one: Announcement) -> Slow | Exception:
        try:
            model = self._registry.read(one.version)
            if model.manifest.sha256 != one.sha256:
                raise ModelError(
                    f"{self._registry.folder(one.version)}: its SHA-256 is {model.manifest.sha256}, announced is "
                    f"{one.sha256}: another file under the same name"
                )
            model = self._adjusted(model)
            check_successor(self._served, model)
            return self._ready(model)
        except Exception as problem:  # noqa: BLE001 - handed to the loop's thread, which raises what is none of ours
            return problem

    def _files(self, one: Announcement) -> object:
        """Differs when a file of the version does."""
        try:
            folder = self._registry.folder(one.version)
            stats = [(folder / name).stat() for name in ("manifest.json", "model.safetensors")]
        except (OSError, ModelError):
            return None
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]


def _kind_of(problem: ConfigError) -> str:
    if isinstance(problem, ModelMissing):
        return "missing"
    damaged = isinstance(problem, ModelError) and not isinstance(problem, ModelUnfit)
    return "damaged" if damaged else "unfit"


class Settled:
    """In a follower's place: what is served stays."""

    def __init__(self, served: str) -> None:
        self.standing = Standing(served)

    def due(self) -> Slow | None:
        """Never another one."""
        return None

    def ahead(self, version: str) -> bool:  # noqa: ARG002 - the follower's signature
        """No model comes after the one in service."""
        return False

    def row_mode(self, version: str) -> RowMode:  # noqa: ARG002 - the follower's signature
        """Rows of another model are carried."""
        return "carry"
