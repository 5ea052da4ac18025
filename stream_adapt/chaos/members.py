"""Members as processes: started, killed, stopped, told to leave, restarted at once when they end, and how each ended.

What an end says:

| exit code | is as it should be when                                                                        |
|-----------|------------------------------------------------------------------------------------------------|
| -9        | we killed it                                                                                   |
| 0         | we told it to leave                                                                            |
| -15       | we told it to leave before it could listen: it was still being imported                        |
| 3         | the broker was away, or the connection cut, shortly before: nothing was lost, try again        |
| 4         | it may have been fenced more than once in a short time: stopped past the transaction's timeout |
|           | or with commits held up, it loses its transactional.id to the coordinator, and cannot tell     |
|           | this from a second instance                                                                    |

Everything else, and a traceback in a log, is a failure.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from stream_adapt.errors import Fenced, KafkaRefused
from stream_adapt.local import dying_with_parent

#: A member that ends is started again after so long: a supervisor's pause, and no loop of failing starts.
RESTART_AFTER_S = 0.1
#: A member younger than this may not have installed its signal handlers yet.
_YOUNG_S = 20.0
#: Told to leave, a member finishes its batch and commits; a broker that is away meanwhile makes this longer.
LEAVE_TIMEOUT_S = 90.0
TRACEBACK = "Traceback (most recent call last)"
_LINES_AROUND = 40


class Exit(msgspec.Struct, frozen=True):
    """How a process ended."""

    member: str
    code: int
    at_s: float
    expected: bool
    why: str


@dataclass
class Troubles:
    """When the world was such that a member may end by itself; times are those of `time.monotonic`."""

    broker_away: list[tuple[float, float]] = field(default_factory=list)
    cut: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by member: the proxy was in the way
    frozen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by member: past the transaction

    def away(self, member: str, since: float) -> bool:
        """Whether the broker could not be reached, by this member, some time since."""
        return any(end >= since for _, end in [*self.broker_away, *self.cut.get(member, [])])

    def fencings(self, member: str, since: float) -> int:
        """How often the coordinator had reason to take the member's transactional id, since."""
        spans = [*self.frozen.get(member, []), *self.cut.get(member, []), *self.broker_away]
        return sum(end >= since for _, end in spans)


def judge(code: int, *, told: int | None, age_s: float, away: bool, fencings: int) -> tuple[bool, str]:
    """Whether a process was right to end so, and the reason.

    Args:
        code: its exit code.
        told: the signal that we sent to end it.
        age_s: how long it ran.
        away: whether it could not reach the broker shortly before.
        fencings: how often it may have been fenced shortly before.
    """
    if told == signal.SIGKILL and code == -signal.SIGKILL:
        return True, "killed"
    if told == signal.SIGTERM and code == 0:
        return True, "left"
    if told == signal.SIGTERM and code == -signal.SIGTERM and age_s < _YOUNG_S:
        return True, "left while it was starting"
    if code == KafkaRefused.exit_code and away:
        return True, "the broker was away"
    if code == Fenced.exit_code and fencings > 1:
        return True, "fenced"
    return False, f"ended by itself with exit code {code}" if told is None else f"{signal.Signals(told).name} → {code}"


@dataclass
class Member:
    """One instance, over all its lives."""

    name: str
    command: Sequence[str]
    config: Path
    log: Path
    process: subprocess.Popen[bytes]
    started_at: float
    told: int | None = None  # the signal that was to end this life
    resume_at: float | None = None  # stopped until then
    restart_at: float | None = None  # ended; to be started again then
    leave_by: float | None = None


class Team:
    """The members and their supervisor. All methods are for the one thread that starts the processes: on Linux they
    die with it.

    Args:
        folder: for logs.
        environment: of the processes.
        windows_s: how long before an end a trouble still explains it: exit 3, exit 4.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], windows_s: tuple[float, float]) -> None:
        self.members: dict[str, Member] = {}
        self.exits: list[Exit] = []
        self.troubles = Troubles()
        self.starts = 0
        self._folder = folder
        self._environment = dict(environment)
        self._away_s, self._fenced_s = windows_s
        self._began = time.monotonic()

    def start(self, name: str, config: Path, command: Sequence[str] = ("run",)) -> None:
        """A member joins; or whoever else is to be kept running."""
        log = self._folder / f"{name}.log"
        self.members[name] = Member(name, command, config, log, self._spawn(command, config, log), time.monotonic())

    def kill(self, name: str) -> bool:
        """SIGKILL, stopped or not; False if it is not running just now."""
        return self._end(name, signal.SIGKILL)

    def leave(self, name: str) -> bool:
        """SIGTERM; it is not started again. False if it is not running just now."""
        member = self.members.get(name)
        if member is None:
            return False
        self._resume(member)
        member.leave_by = time.monotonic() + LEAVE_TIMEOUT_S
        if self._end(name, signal.SIGTERM):
            return True
        member.restart_at = None
        return False

    def stop(self, name: str, seconds: float, *, notable: bool) -> bool:
        """SIGSTOP, and SIGCONT after so long; False if it is not running, or stopped already.

        Args:
            name: of the member.
            seconds: how long.
            notable: long enough for its transaction to be taken away.
        """
        member = self.members.get(name)
        if member is None or member.told is not None or member.resume_at is not None or not self._runs(member):
            return False
        now = time.monotonic()
        member.process.send_signal(signal.SIGSTOP)
        member.resume_at = now + seconds
        if notable:
            self.troubles.frozen.setdefault(name, []).append((now, now + seconds))
        return True

    def age_s(self, name: str) -> float:
        """How long somebody has been running; 0 if it is not just now."""
        member = self.members.get(name)
        return time.monotonic() - member.started_at if member is not None and self._runs(member) else 0.0

    def tend(self) -> None:
        """What a supervisor does: notices ends, restarts, resumes the stopped, loses patience with who will not go."""
        now = time.monotonic()
        for member in list(self.members.values()):
            if member.resume_at is not None and now >= member.resume_at:
                self._resume(member)
            if member.restart_at is not None:
                if now >= member.restart_at:
                    self._restart(member)
            elif member.process.poll() is not None:
                self._ended(member, now)
            elif member.leave_by is not None and now > member.leave_by:
                self._too_slow(member, now)

    def settle(self) -> None:
        """Nobody is stopped any more."""
        for member in self.members.values():
            self._resume(member)

    def wait_gone(self) -> None:
        """Returns when everybody has left or lost the chance to."""
        for name in list(self.members):
            self.leave(name)
        while any(self._runs(member) for member in self.members.values()):
            self.tend()
            time.sleep(0.05)
        self.tend()

    def end(self) -> None:
        """Kills what still runs."""
        for member in self.members.values():
            if self._runs(member):
                member.process.kill()
                member.process.wait()

    @property
    def present(self) -> list[str]:
        """Members that are not leaving."""
        return [m.name for m in self.members.values() if m.leave_by is None]

    def faults(self) -> list[str]:
        """Ends that should not have been, and tracebacks, in words."""
        ends = [f"{e.member} after {e.at_s:.0f} s: {e.why}" for e in self.exits if not e.expected]
        return ends + [found for log in sorted(self._folder.glob("*.log")) for found in tracebacks(log)]

    def _spawn(self, command: Sequence[str], config: Path, log: Path) -> subprocess.Popen[bytes]:
        self.starts += 1
        whole = [sys.executable, "-m", "stream_adapt", *command, "-c", str(config)]
        with log.open("ab") as out:
            out.write(f"--- start {self.starts} after {time.monotonic() - self._began:.2f} s\n".encode())
            out.flush()
            # A session of its own: Ctrl-C goes to us, and we end the members before the broker.
            return subprocess.Popen(
                dying_with_parent(whole),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment,
                start_new_session=True,
            )

    def _runs(self, member: Member) -> bool:
        return member.restart_at is None and member.process.returncode is None

    def _end(self, name: str, number: int) -> bool:
        member = self.members.get(name)
        if member is None or member.told is not None or not self._runs(member) or member.process.poll() is not None:
            return False
        member.told = number
        member.process.send_signal(number)
        if number == signal.SIGKILL:
            member.resume_at = None
        return True

    def _resume(self, member: Member) -> None:
        if member.resume_at is not None:
            member.resume_at = None
            if self._runs(member):
                member.process.send_signal(signal.SIGCONT)

    def _ended(self, member: Member, now: float) -> None:
        code = member.process.wait()
        expected, why = judge(
            code,
            told=member.told,
            age_s=now - member.started_at,
            away=self.troubles.away(member.name, now - self._away_s),
            fencings=self.troubles.fencings(member.name, now - self._fenced_s),
        )
        self.exits.append(Exit(member.name, code, round(now - self._began, 2), expected, why))
        member.resume_at = None
        if member.leave_by is not None:
            del self.members[member.name]
        else:
            member.restart_at = now + RESTART_AFTER_S

    def _restart(self, member: Member) -> None:
        member.process = self._spawn(member.command, member.config, member.log)
        member.started_at, member.told, member.restart_at = time.monotonic(), None, None

    def _too_slow(self, member: Member, now: float) -> None:
        member.process.kill()
        member.process.wait()
        why = f"told to leave, it had not ended after {LEAVE_TIMEOUT_S:g} s"
        self.exits.append(Exit(member.name, -signal.SIGKILL, round(now - self._began, 2), False, why))
        del self.members[member.name]


def tracebacks(log: Path) -> list[str]:
    """Where a log has a traceback, and what it ends with."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines):
        if TRACEBACK in line:
            after = lines[number + 1 : number + _LINES_AROUND]
            ending = next((one for one in after if one and not one.startswith((" ", "\t"))), "")
            found.append(f"{log.name}:{number + 1}: traceback, {ending.strip()[:300]}")
    return found
