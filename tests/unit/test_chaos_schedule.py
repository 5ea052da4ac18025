"""The schedule: a function of its seed, dense enough, and only ever about members that are there."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from stream_adapt.chaos.network import _faults, kinds
from stream_adapt.chaos.schedule import Action, Timeouts, draw, member_name

TIMEOUTS = Timeouts(transaction_s=5.0, session_s=8.0)
FAULTS = kinds(TIMEOUTS)
EIGHT_MINUTES_S = 480.0


def _drawn(seed: int = 0, seconds: float = EIGHT_MINUTES_S) -> list[Action]:
    return draw(seed, seconds, 3, TIMEOUTS, FAULTS)


def test_equal_seeds_give_equal_schedules_and_others_differ() -> None:
    assert _drawn(7) == _drawn(7)
    assert _drawn(7) != _drawn(8)


@pytest.mark.parametrize("seed", range(20))
def test_eight_minutes_hold_forty_kills_three_restarts_and_every_sort_of_stop_and_fault(seed: int) -> None:
    schedule = _drawn(seed)
    counts = Counter(action.kind for action in schedule)
    assert counts["kill"] >= 40
    assert counts["broker_stop"] + counts["broker_kill"] >= 3
    assert min(counts["broker_stop"], counts["broker_kill"]) >= 1
    assert counts["join"] == counts["leave"] >= 3
    stops = [action.for_s for action in schedule if action.kind == "stop"]
    assert min(stops) < TIMEOUTS.transaction_s
    assert any(TIMEOUTS.transaction_s < s < TIMEOUTS.session_s for s in stops)
    assert max(stops) > TIMEOUTS.session_s
    assert {fault.name for fault in FAULTS} == {action.fault for action in schedule if action.kind == "fault"}


@pytest.mark.parametrize("seed", range(20))
def test_actions_come_in_order_within_the_time_and_hit_members_that_are_there(seed: int) -> None:
    schedule = _drawn(seed)
    assert all(one.at_s <= following.at_s for one, following in pairwise(schedule))
    assert 0 <= schedule[0].at_s
    assert schedule[-1].at_s < EIGHT_MINUTES_S
    present = {member_name(n) for n in range(3)}
    for action in schedule:
        if action.kind == "join":
            present.add(action.member)
        elif action.kind == "leave":
            present.remove(action.member)
        elif action.member:
            assert action.member in present, action


@pytest.mark.parametrize("seconds", [6.0, 25.0, 60.0])
def test_a_short_run_has_a_kill_a_stop_and_a_restart_too(seconds: float) -> None:
    kinds_drawn = {action.kind for action in _drawn(3, seconds)}
    assert {"kill", "stop", "fault"} <= kinds_drawn
    assert kinds_drawn & {"broker_stop", "broker_kill"}


def test_every_fault_that_can_be_drawn_can_be_made() -> None:
    assert {fault.name for fault in FAULTS} == set(_faults("client"))


def test_refreshes_come_on_top_of_what_happens_to_members() -> None:
    with_them = draw(7, EIGHT_MINUTES_S, 3, TIMEOUTS, FAULTS, ["c0", "c1"])
    theirs = {"refresh", "promote", "controller_kill", "controller_stop", "trainer_kill"}
    assert _drawn(7) == [action for action in with_them if action.kind not in theirs]
    counts = Counter(action.kind for action in with_them)
    assert counts["refresh"] >= 2 * counts["promote"] >= 20
    assert min(counts["controller_kill"], counts["controller_stop"], counts["trainer_kill"]) >= 5
    hit = {action.member for action in with_them if action.kind in ("controller_kill", "controller_stop")}
    assert {"c0", "c1"} == hit
    assert all(a.for_s > TIMEOUTS.session_s for a in with_them if a.kind == "controller_stop")


def test_a_short_run_with_refreshes_has_one_of_each() -> None:
    kinds_drawn = {action.kind for action in draw(3, 25.0, 3, TIMEOUTS, FAULTS, ["c0"])}
    assert {"refresh", "promote", "controller_kill", "controller_stop", "trainer_kill"} <= kinds_drawn
