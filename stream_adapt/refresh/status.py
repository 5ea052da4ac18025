"""Where the refresh is, for people and metrics: the file `refresh.json` in `state.dir`.

The controller writes it; the member beside it reads it for its metrics. Whichever of the two dies, the other goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from stream_adapt.drift import Statistic
from stream_adapt.refresh.record import Decision, Trigger

log = structlog.get_logger(__name__)

_FILE = "refresh.json"
#: The leader writes every two seconds; what is older was left by one that died.
_LEFT_S = 60.0

#: Family → label values → value, as metrics.py has them.
Samples = dict[str, dict[tuple[str, ...], float]]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader tells. Times are in ms since the epoch."""

    leader: bool  # whether this controller leads; the rest is as the leader last wrote it
    state: str
    since_ms: int
    champion: str
    challenger: str | None
    trigger: Trigger | None
    last: Decision | None
    progress: dict[str, float]  # of what is done in the state
    drift: list[Statistic] = []
    alarms_ms: dict[str, int] = {}  # by signal, when it last gave an alarm to this leader
    written_ms: int


def write(folder: Path, status: Status) -> None:
    """Writes the file, whole; that it cannot be written is said and changes nothing."""
    path = folder / _FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(status))
        partial.replace(path)
    except OSError as error:
        log.warning("the status is not written", file=str(path), error=error.strerror)


def read(folder: Path) -> Status | None:
    """What the file says; None if there is none, or it is of another release."""
    try:
        return msgspec.json.decode((folder / _FILE).read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return None


def samples(status: Status | None, now_s: float) -> Samples:
    """Of the metric families about drift and refresh. Who does not lead has nothing to tell but that."""
    told: Samples = {
        "stream_adapt_refresh_leader": {(): 0.0},
        "stream_adapt_refresh_state_timestamp_seconds": {},
        "stream_adapt_refresh_decision_timestamp_seconds": {},
        "stream_adapt_drift_statistic": {},
        "stream_adapt_drift_reference": {},
        "stream_adapt_drift_alarm_timestamp_seconds": {},
    }
    if status is None or not status.leader:
        return told
    told["stream_adapt_refresh_told_timestamp_seconds"] = {(): status.written_ms / 1000}
    if now_s - status.written_ms / 1000 > _LEFT_S:
        return told
    told["stream_adapt_refresh_leader"] = {(): 1.0}
    told["stream_adapt_refresh_state_timestamp_seconds"] = {(status.state,): status.since_ms / 1000}
    if status.last is not None:
        outcome = "failed" if status.last.failed else status.last.outcome
        told["stream_adapt_refresh_decision_timestamp_seconds"] = {(outcome,): status.last.at_ms / 1000}
    told["stream_adapt_drift_alarm_timestamp_seconds"] = _seconds(status.alarms_ms)
    for one in status.drift:
        labels = (one.signal, one.domain or "")
        if one.value is not None:
            told["stream_adapt_drift_statistic"][labels] = one.value
        if one.reference is not None:
            told["stream_adapt_drift_reference"][labels] = one.reference
    return told


def _seconds(times_ms: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(name,): at / 1000 for name, at in times_ms.items()}
