"""What is done to whom and when: a list of actions, drawn from the seed before anything starts.

The same options give the same schedule. What the machine makes of it (who holds which partition when the kill comes)
is not the same twice; that is why the oracle, and not a recorded run, says whether all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

Kind = Literal[
    "kill", "stop", "join", "leave", "broker_stop", "broker_kill", "fault",
    "refresh", "promote", "controller_kill", "controller_stop", "trainer_kill",
]  # fmt: skip

#: Mean seconds between two actions of a kind. 48 kills and six restarts of the broker in eight minutes: a member
#: lives for half a minute, and the broker for longer than a session, so that groups settle now and then.
KILL_EVERY_S = 10.0
STOP_EVERY_S = 20.0
JOIN_EVERY_S = 40.0
BROKER_EVERY_S = 80.0
FAULT_EVERY_S = 12.0
#: With refreshes: one takes a quarter of a minute where nobody is killed, and half of them are to come to an end.
REFRESH_EVERY_S = 15.0
PROMOTE_EVERY_S = 40.0
CONTROLLER_KILL_EVERY_S = 30.0
CONTROLLER_STOP_EVERY_S = 60.0
TRAINER_KILL_EVERY_S = 45.0
#: How long after a training was first seen it is killed: while it is imported, reads, or trains.
_TRAINED_S = (0.0, 8.0)
#: How long one that joined stays, as shares of the time between two joins.
_STAY = (0.3, 0.7)
#: Nothing begins in the last part: what was begun should be over when the counting starts.
_QUIET_END_S = 3.0


class Action(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is done, `at_s` seconds after the members are all at work."""

    at_s: float
    kind: Kind
    member: str = ""  # none: the broker
    for_s: float = 0.0  # of a stop or a fault
    fault: str = ""  # what the proxy does


@dataclass(frozen=True)
class Timeouts:
    """Seconds that decide how long a stop must be to be noticed."""

    transaction_s: float = 5.0
    session_s: float = 8.0

    def stops(self) -> tuple[tuple[float, float], ...]:
        """Shortest and longest of each sort of stop: unnoticed, past the transaction, past the session."""
        return (
            (0.3, 2.0),
            (self.transaction_s * 1.1, self.session_s * 0.9),
            (self.session_s * 1.2, self.session_s * 1.5),
        )


@dataclass(frozen=True)
class Fault:
    """A sort of fault that the proxy can cause, and for how long."""

    name: str
    shortest_s: float
    longest_s: float


def member_name(number: int) -> str:
    """Name of a member's instance."""
    return f"m{number}"


def draw(
    seed: int,
    seconds: float,
    members: int,
    timeouts: Timeouts = Timeouts(),
    faults: tuple[Fault, ...] = (),
    controllers: Sequence[str] = (),
) -> list[Action]:
    """The actions of a run, in the order of time.

    Kills, stops, restarts of the broker and faults come once in every stretch of their mean time, at a moment drawn
    at random; one member more than `members` joins and leaves. Whoever is killed or stopped is a member at that time.
    With `controllers`, refreshes are asked for, and those who work on them are killed and stopped; what happens to
    members is the same with them and without.
    """
    random = np.random.default_rng(seed)
    end_s = max(seconds - _QUIET_END_S, 0.0)
    away = list(_visits(random, end_s, member_name(members)))
    actions = list(away)

    def someone(at_s: float) -> str:
        present = [member_name(n) for n in range(members)]
        if _present(away, at_s):
            present.append(member_name(members))
        return present[int(random.integers(len(present)))]

    for at_s in _spread(random, end_s, KILL_EVERY_S):
        actions.append(Action(at_s, "kill", someone(at_s)))
    for number, at_s in enumerate(_spread(random, end_s, STOP_EVERY_S)):
        sorts = timeouts.stops()
        low, high = sorts[number % len(sorts)]
        actions.append(Action(at_s, "stop", someone(at_s), round(float(random.uniform(low, high)), 2)))
    for number, at_s in enumerate(_spread(random, end_s, BROKER_EVERY_S)):
        actions.append(Action(at_s, ("broker_stop", "broker_kill")[number % 2]))
    actions += _faults(random, end_s, faults, someone)
    if controllers:
        actions += _refreshes(np.random.default_rng([seed, len(controllers)]), end_s, timeouts, controllers)
    return sorted(actions, key=lambda action: action.at_s)


def _spread(random: np.random.Generator, end_s: float, every_s: float) -> Iterator[float]:
    """One moment in each of the stretches of about `every_s`, at least one in all."""
    count = max(round(end_s / every_s), 1)
    for number in range(count):
        yield round(float((number + random.random()) * end_s / count), 2)


def _visits(random: np.random.Generator, end_s: float, member: str) -> Iterator[Action]:
    """Joins, each followed by a leave before the next."""
    count = int(end_s // JOIN_EVERY_S)
    for number in range(count):
        stretch = end_s / count
        at_s = number * stretch + float(random.uniform(0.0, 0.25)) * stretch
        yield Action(round(at_s, 2), "join", member)
        yield Action(round(at_s + float(random.uniform(*_STAY)) * stretch, 2), "leave", member)


def _refreshes(
    random: np.random.Generator, end_s: float, timeouts: Timeouts, controllers: Sequence[str]
) -> Iterator[Action]:
    """Who asks for them, and what happens to those who work on them."""

    def someone() -> str:
        return controllers[int(random.integers(len(controllers)))]

    for at_s in _spread(random, end_s, REFRESH_EVERY_S):
        yield Action(at_s, "refresh")
    for at_s in _spread(random, end_s, PROMOTE_EVERY_S):
        yield Action(at_s, "promote")
    for at_s in _spread(random, end_s, CONTROLLER_KILL_EVERY_S):
        yield Action(at_s, "controller_kill", someone())
    for at_s in _spread(random, end_s, CONTROLLER_STOP_EVERY_S):
        # Long enough for another one to lead: who is woken up must find that out.
        length_s = float(random.uniform(1.2, 1.5)) * timeouts.session_s
        yield Action(at_s, "controller_stop", someone(), round(length_s, 2))
    for at_s in _spread(random, end_s, TRAINER_KILL_EVERY_S):
        yield Action(at_s, "trainer_kill", "", round(float(random.uniform(*_TRAINED_S)), 2))


def _present(visits: list[Action], at_s: float) -> bool:
    """Whether the visitor is there."""
    before = [v for v in visits if v.at_s <= at_s]
    return bool(before) and before[-1].kind == "join"


def _faults(
    random: np.random.Generator, end_s: float, faults: tuple[Fault, ...], someone: Callable[[float], str]
) -> Iterator[Action]:
    """Every sort of fault in turn, in an order drawn at random."""
    if not faults:
        return
    order = random.permutation(len(faults))
    for number, at_s in enumerate(_spread(random, end_s, FAULT_EVERY_S)):
        fault = faults[order[number % len(faults)]]
        length_s = float(random.uniform(fault.shortest_s, fault.longest_s))
        yield Action(at_s, "fault", someone(at_s), round(length_s, 2), fault.name)
