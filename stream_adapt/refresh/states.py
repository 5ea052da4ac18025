"""The state machine of a refresh, as a table.

    stable ──alarm, schedule, …──▶ cooling ──▶ training ──▶ shadow ──▶ promoted ──▶ watching ──▶ stable
                                                     │            │           │            │
                                                     └─▶ rejected ◀┘           └─▶ rolled back ◀┘

In every state a champion serves; nothing but `promoted`, and the way to `rolled back`, changes which one. Whoever runs
the machine may die anywhere: the next one enters the state again, and does what is done there from the beginning.
`stable`, `rejected` and `rolled back` are one state as to what may follow; they differ in how the last refresh ended.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """Where a refresh is."""

    STABLE = "stable"
    COOLING = "cooling"
    TRAINING = "training"
    SHADOW = "shadow"
    PROMOTED = "promoted"
    WATCHING = "watching"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"


class Event(StrEnum):
    """What may happen."""

    ALARM = "alarm"  # a drift detector fired
    SCHEDULE = "schedule"  # `refresh.every_s` have passed
    GROWN = "grown"  # since the last training after drift the new world has `refresh.again` times the events
    ASKED = "asked"  # `stream-adapt refresh`
    COOLED = "cooled"  # nothing forbids a training any more, and there is something to learn
    TRAINED = "trained"  # a sound challenger lies in the registry
    FAILED = "failed"  # what is done in this state cannot be done
    BETTER = "better"  # the challenger is, by more than chance
    NOT_BETTER = "not_better"
    SERVED = "served"  # members serve the challenger
    NOT_SERVED = "not_served"  # none of them does, after a long time
    HELD = "held"  # it is no worse than the former champion
    REGRESSED = "regressed"
    REPLACED = "replaced"  # somebody else announced another version
    REVERTED = "reverted"  # somebody went back to a former version: that is not to be judged


class Action(StrEnum):
    """What a transition does, beside being written down."""

    NONE = "none"
    BEGIN = "begin"  # a refresh, with this trigger
    REMEMBER = "remember"  # the trigger: its refresh begins when this one has ended
    ANNOUNCE = "announce"  # the challenger, to all members, in the same transaction
    RETURN = "return"  # announces the former champion, in the same transaction
    CLOSE = "close"  # the refresh has ended; why is kept
    YIELD = "yield"  # the version that somebody else announced is the champion; a challenger is dropped


class Transition(NamedTuple):
    """Where an event leads, and what is done."""

    state: State
    action: Action = Action.NONE


#: States in which no refresh is under way.
RESTING = frozenset({State.STABLE, State.REJECTED, State.ROLLED_BACK})

_TRIGGERS = (Event.ALARM, Event.SCHEDULE, Event.GROWN, Event.ASKED)
_BY_OTHERS = {
    Event.REPLACED: Transition(State.WATCHING, Action.YIELD),
    Event.REVERTED: Transition(State.STABLE, Action.YIELD),
}


def _busy(state: State, ends: dict[Event, Transition]) -> dict[Event, Transition]:
    """A state in which a refresh is under way: triggers wait, and what others announce goes first."""
    return {**{trigger: Transition(state, Action.REMEMBER) for trigger in _TRIGGERS}, **_BY_OTHERS, **ends}


_RESTING = {**{trigger: Transition(State.COOLING, Action.BEGIN) for trigger in _TRIGGERS}, **_BY_OTHERS}
_REJECTED = Transition(State.REJECTED, Action.CLOSE)
_BACK = Transition(State.ROLLED_BACK, Action.RETURN)

TABLE: dict[State, dict[Event, Transition]] = {
    **dict.fromkeys(RESTING, _RESTING),
    State.COOLING: _busy(State.COOLING, {Event.COOLED: Transition(State.TRAINING)}),
    State.TRAINING: _busy(
        State.TRAINING,
        {Event.TRAINED: Transition(State.SHADOW), Event.NOT_BETTER: _REJECTED, Event.FAILED: _REJECTED},
    ),
    State.SHADOW: _busy(
        State.SHADOW,
        {
            Event.BETTER: Transition(State.PROMOTED, Action.ANNOUNCE),
            Event.NOT_BETTER: _REJECTED,
            Event.FAILED: _REJECTED,
        },
    ),
    State.PROMOTED: _busy(
        State.PROMOTED,
        {Event.SERVED: Transition(State.WATCHING), Event.NOT_SERVED: _BACK},
    ),
    # What cannot be watched is not thereby bad: it went through the shadow.
    State.WATCHING: _busy(
        State.WATCHING,
        {
            Event.HELD: Transition(State.STABLE, Action.CLOSE),
            Event.REGRESSED: _BACK,
            Event.FAILED: Transition(State.STABLE, Action.CLOSE),
        },
    ),
}


class Impossible(RuntimeError):
    """An event in a state in which it cannot happen: a bug."""


def follow(state: State, event: Event) -> Transition:
    """Where an event leads from a state.

    Raises:
        Impossible: the table has no such place.
    """
    try:
        return TABLE[state][event]
    except KeyError:
        raise Impossible(f"{event} cannot happen in state {state}") from None
