"""The rules of exactly-once are needed: with one of them switched off, a script ends in what it is there to prevent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock
from unittest.mock import PropertyMock

import pytest
from process import TOPICS, Crash, Deployment, Effect, Point, once_each, outputs, records, survived

from stream_adapt.adapt import Adapter
from stream_adapt.commit import ExactlyOnce, Outcome
from stream_adapt.errors import StateMismatch
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.runner import Runner
from stream_adapt.testing.scripted import ScriptedBroker, ScriptedConsumer, ScriptedReader


def _newest_generation(consumer: ScriptedConsumer) -> bytes:
    """The group's generation, and not the one in which the records were polled."""
    return b"CGMDv2:" + consumer._broker.generation.to_bytes(4, "little", signed=True) + b"group\0"


def _everything_reached(_delivery: ExactlyOnce, error: Exception, _next_offsets: Mapping[int, int]) -> Outcome:
    _delivery._replace()
    return Outcome.RECOVERED


def _nothing_reached(_delivery: ExactlyOnce, error: Exception, _next_offsets: Mapping[int, int]) -> Outcome:
    _delivery._replace()
    return Outcome.ABORTED


def _only_what_can_be_read(reader: ScriptedReader, partition: int) -> int:
    """Where a changelog partition ends for a reader under read_committed."""
    written = reader._broker.partition(reader.topic, partition)
    return next((offset for offset, record in enumerate(written) if record.open), len(written))


_assigned = ScriptedConsumer._assigned


def _read_at_once(consumer: ScriptedConsumer) -> None:
    """Partitions are read as soon as they are assigned, whether their rows are there or not."""
    _assigned(consumer)
    consumer.resume(list(consumer.paused))


def _without(target: object, name: str, put: object = None) -> AbstractContextManager[object]:
    return mock.patch.object(target, name, put or (lambda *_args, **_options: None))


#: A member stands still, another takes over; later that one stands still, and the first takes over again.
THERE_AND_BACK = [Crash(Point.BEGIN, 3, Effect.STOPPED), Crash(Point.BEGIN, 7, Effect.STOPPED)]

#: Which rule, how it is switched off, and what must not happen then.
SWITCHED_OFF = {
    "3: the generation at the time of the poll is the fence": (
        _without(ScriptedConsumer, "group_metadata", _newest_generation),
        [Crash(Point.PRODUCE, 2, Effect.STOPPED)],
    ),
    "5: an abort puts the rows back": (
        _without(Adapter, "abort"),
        [Crash(Point.SEND_OFFSETS, 2, Effect.ABORTABLE)],
    ),
    "5: an abort rewinds": (
        _without(ScriptedConsumer, "rewind"),
        [Crash(Point.SEND_OFFSETS, 2, Effect.ABORTABLE)],
    ),
    "6: a lost commit is looked up, not taken for done": (
        _without(ExactlyOnce, "_recover", _everything_reached),
        [Crash(Point.COMMIT, 2, Effect.FATAL)],
    ),
    "6: a lost commit is looked up, not taken for undone": (
        _without(ExactlyOnce, "_recover", _nothing_reached),
        [Crash(Point.COMMIT, 2, Effect.FATAL_AFTER)],
    ),
    "8: no transaction begins while an EndTxn is under way": (
        mock.patch.object(OutputProducer, "needs_replacement", PropertyMock(return_value=False)),
        [Crash(Point.COMMIT, 2, Effect.DELAYED)],
    ),
    "10: partitions that are taken away take their rows along": (_without(Adapter, "drop"), THERE_AND_BACK),
    "10: nothing is read before the rows are there": (
        _without(ScriptedConsumer, "_assigned", _read_at_once),
        [Crash(Point.COMMIT, 3, Effect.KILL_AFTER)],
    ),
    "11: what is under way in the changelog is waited for": (
        _without(ScriptedReader, "end", _only_what_can_be_read),
        [Crash(Point.COMMIT, 3, Effect.OVERTAKEN)],
    ),
}


@pytest.mark.parametrize("rule", SWITCHED_OFF)
def test_without_a_rule_a_script_ends_badly(rule: str) -> None:
    off, crashes = SWITCHED_OFF[rule]
    survived(crashes)
    with off, pytest.raises((AssertionError, StateMismatch)) as badly:
        survived(crashes)
    assert "started" not in str(badly.value), "it must be what the rule prevents"


def test_an_output_that_is_too_large_becomes_a_dead_letter_and_the_stream_goes_on() -> None:
    """Rule 9: the source is found, its dead letter replaces it, and nothing else is lost or doubled."""
    inputs = records(20)
    user = b"u" * 700
    inputs[1][4] = (user, inputs[1][4][1].replace(b'"user_id":"u3"', b'"user_id":"' + user + b'"'))  # type: ignore[union-attr]
    deployment = Deployment(ScriptedBroker(inputs, max_message_bytes=800))
    deployment.run()
    assert once_each(deployment.broker) == outputs(deployment.broker)
    reasons = [dict(w.headers or [])["stream-adapt.reason"] for w in deployment.broker.committed(TOPICS.dead_letters)]
    assert b"not_delivered" in reasons


@pytest.mark.parametrize("jump_s", [-86_400.0, -0.001, 86_400.0])
def test_a_clock_that_jumps_changes_nothing_but_the_time_of_scoring(jump_s: float) -> None:
    deployment = Deployment(ScriptedBroker(records(40)))
    turns = mock.Mock(side_effect=lambda: deployment.clock.jump(jump_s))
    poll = ScriptedConsumer.poll

    def jumping(*arguments: Any) -> object:
        turns()
        return poll(*arguments)

    with mock.patch.object(ScriptedConsumer, "poll", jumping):
        deployment.run()
    assert turns.call_count > 3
    assert once_each(deployment.broker) == outputs(deployment.broker)


def test_a_member_that_is_fenced_twice_steps_back() -> None:
    """Rule 6: two live instances with one transactional.id do not fence each other for ever."""
    fenced = [Crash(Point.COMMIT, call, Effect.FENCED) for call in (2, 3)]
    deployment = survived(fenced)
    assert [4] == deployment.exits


def _another_joins_while_records_are_held() -> Deployment:
    deployment = Deployment(ScriptedBroker(records(40)), most=5)
    deployment._start("app.0")
    for _ in range(4):
        deployment._turn("app.0")
    assert deployment.members["app.0"].runner._ahead.next_offsets
    deployment._start("app.1")
    for _ in range(60):
        for instance in ("app.0", "app.1"):
            deployment._turn(instance)
    return deployment


def test_records_that_are_held_when_their_partitions_are_taken_away_are_the_next_owners() -> None:
    broker = _another_joins_while_records_are_held().broker
    assert once_each(broker) == outputs(broker)


def test_records_that_are_held_when_their_partitions_are_taken_away_must_be_dropped() -> None:
    """Else a member that has neither their rows nor their partitions would handle them."""
    kept = mock.patch.object(Runner, "_taken_away", PropertyMock(return_value=False), create=True)
    with kept, pytest.raises((AssertionError, KeyError)):
        broker = _another_joins_while_records_are_held().broker
        assert once_each(broker) == outputs(broker)
