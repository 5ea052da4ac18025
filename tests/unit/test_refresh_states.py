"""The table of a refresh: every state, every event."""

from __future__ import annotations

import itertools

import pytest

from stream_adapt.refresh.states import RESTING, TABLE, Action, Event, Impossible, State, follow

TRIGGERS = (Event.ALARM, Event.SCHEDULE, Event.GROWN, Event.ASKED)
BY_OTHERS = {Event.REPLACED, Event.REVERTED}
#: What may happen in a state, beside triggers and what others announce, and where it leads.
LEADS = {
    (State.COOLING, Event.COOLED): (State.TRAINING, Action.NONE),
    (State.TRAINING, Event.TRAINED): (State.SHADOW, Action.NONE),
    (State.TRAINING, Event.NOT_BETTER): (State.REJECTED, Action.CLOSE),
    (State.TRAINING, Event.FAILED): (State.REJECTED, Action.CLOSE),
    (State.SHADOW, Event.BETTER): (State.PROMOTED, Action.ANNOUNCE),
    (State.SHADOW, Event.NOT_BETTER): (State.REJECTED, Action.CLOSE),
    (State.SHADOW, Event.FAILED): (State.REJECTED, Action.CLOSE),
    (State.PROMOTED, Event.SERVED): (State.WATCHING, Action.NONE),
    (State.PROMOTED, Event.NOT_SERVED): (State.ROLLED_BACK, Action.RETURN),
    (State.WATCHING, Event.HELD): (State.STABLE, Action.CLOSE),
    (State.WATCHING, Event.FAILED): (State.STABLE, Action.CLOSE),
    (State.WATCHING, Event.REGRESSED): (State.ROLLED_BACK, Action.RETURN),
}


@pytest.mark.parametrize(("state", "event"), [*itertools.product(State, Event)])
def test_every_event_in_every_state_leads_where_it_should_or_is_a_bug(state: State, event: Event) -> None:
    if event in TRIGGERS:
        expected = (State.COOLING, Action.BEGIN) if state in RESTING else (state, Action.REMEMBER)
        assert expected == follow(state, event)
    elif event in BY_OTHERS:
        expected = (State.WATCHING if event is Event.REPLACED else State.STABLE, Action.YIELD)
        assert expected == follow(state, event)
    elif (state, event) in LEADS:
        assert LEADS[state, event] == follow(state, event)
    else:
        with pytest.raises(Impossible, match=f"{event} cannot happen in state {state}"):
            follow(state, event)


def test_a_version_goes_live_only_from_the_shadow_and_a_former_one_only_after_that() -> None:
    announcing = {(state, action) for state, ends in TABLE.items() for _, action in ends.values()}
    assert {(State.SHADOW, Action.ANNOUNCE)} == {pair for pair in announcing if pair[1] is Action.ANNOUNCE}
    returning = {state for state, action in announcing if action is Action.RETURN}
    assert {State.PROMOTED, State.WATCHING} == returning


def test_from_every_state_there_is_a_way_to_rest() -> None:
    reached = set(RESTING)
    for _ in State:
        reached |= {state for state, ends in TABLE.items() if any(end.state in reached for end in ends.values())}
    assert set(State) == reached
