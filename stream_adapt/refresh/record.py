"""The state of the controller as a record: whoever leads next reads it, and goes on.

JSON, so that an operator can read it with any consumer. Its key is "state" in the compacted topic `<app>.refresh`;
beside it lies "request", what `stream-adapt refresh` asks for.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from stream_adapt.drift import Watched
from stream_adapt.errors import StateMismatch
from stream_adapt.refresh.states import State

#: Raised by one when the meaning of a field changes; fields may be added within one format.
FORMAT = 1

STATE_KEY, REQUEST_KEY = b"state", b"request"


class Trigger(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a refresh began."""

    kind: Literal["alarm", "schedule", "grown", "asked"]
    at_ms: int
    detail: str = ""  # in words
    since: dict[int, int] = {}  # of an alarm, by partition: offset from which on the world is another one


Outcomes = Literal["promoted", "rejected", "rolled_back"]


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a refresh ended, and all figures it was decided by."""

    outcome: Outcomes
    at_ms: int
    reason: str
    trigger: Trigger | None = None
    champion: str = ""
    challenger: str | None = None
    figures: dict[str, float] = {}
    failed: bool = False  # rejected because something did not work, and not because it was no better


class RefreshState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the refresh is. Times are in ms since the epoch."""

    format: int = FORMAT
    state: State = State.STABLE
    since_ms: int = 0  # that it is in this state
    champion: str = ""  # version in service
    challenger: str | None = None  # of the refresh that is under way
    former: str | None = None  # while promoted or watching: what a rollback goes back to
    trigger: Trigger | None = None  # of the refresh that is under way
    pending: Trigger | None = None  # came while one was under way
    attempts: int = 0  # how often this state was entered; a leader that dies of it enters it again
    started_ms: tuple[int, ...] = ()  # trainings of the last day
    ended_ms: int = 0  # of the last refresh
    trained_until: dict[int, int] = {}  # by partition: offset behind the last event that the challenger was trained on
    moved: dict[int, int] = {}  # by partition: offset from which on the world is another one, by the last alarm
    learned: dict[int, int] = {}  # by partition: offset at which the last training since then began
    figures: dict[str, float] = {}  # of this refresh, so far
    last: Decision | None = None
    request: str = ""  # id of the last request that was taken up
    learning_offset: int = 0  # of the learning topic: summaries before it led to no alarm, or to one that was seen
    watched: Watched = Watched()  # what drift is told by, as of that offset

    def encode(self) -> bytes:
        """As it is written."""
        return msgspec.json.encode(self)

    def changed(self, **fields: Any) -> RefreshState:
        """The same with other values."""
        return msgspec.structs.replace(self, **fields)

    @classmethod
    def decode(cls, content: bytes, where: str) -> RefreshState:
        """Reads what `encode` wrote; fields that a later release added are skipped.

        Raises:
            StateMismatch: it is not a state, or one of a newer format.
        """
        try:
            state = msgspec.json.decode(content, type=cls)
        except msgspec.MsgspecError as error:
            raise StateMismatch(
                f"{where}: not the state of a refresh: {error}. To do: write a tombstone for the key {STATE_KEY!r} "
                "there; the controller then begins at stable, with the champion that is served"
            ) from error
        if state.format > FORMAT:
            raise StateMismatch(f"{where}: format {state.format}, this release reads up to {FORMAT}: upgrade")
        return state


class Request(msgspec.Struct, frozen=True):
    """Somebody asks for a refresh now."""

    id: str
    at_ms: int
    detail: str = ""
