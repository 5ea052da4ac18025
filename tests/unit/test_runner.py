"""The loop without Kafka: what is kept, what is put back, and when it stops."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from learner_streams import random_model

from stream_adapt.adapt import Adapter
from stream_adapt.commit import Outcome
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.errors import RegistryUnreachable
from stream_adapt.kafka.consumer import Positions
from stream_adapt.pipeline import Pipeline
from stream_adapt.quarantine import FILE, Marker, Quarantine
from stream_adapt.record import Outputs, RawBatch, TopicNames, Work
from stream_adapt.runner import CHUNK, Observers, Pace, Runner
from stream_adapt.shutdown import Shutdown, StopAtOnce
from stream_adapt.state.row import ControlRow


def record(number: int, user: str = "ann") -> tuple[bytes, bytes]:
    event = {"event_id": f"e{number}", "user_id": user, "item_id": f"i{number % 5}", "event_type": "rating"}
    return user.encode(), msgspec.json.encode({**event, "timestamp": 1000 * number, "label": 1 + number % 5})


@dataclass
class Log:
    """One partition with records; hands out what lies behind its position."""

    records: list[tuple[bytes, bytes]]
    positions: Positions = field(default_factory=lambda: Positions({0: 0}))
    rewinds: int = 0
    resumed: list[int] = field(default_factory=list)

    def poll(self, max_records: int, _timeout_s: float, held: Mapping[int, int]) -> RawBatch:
        start = held.get(0, self.positions.next_offsets[0])
        found = self.records[start : start + max_records]
        offsets = np.arange(start, start + len(found))
        return RawBatch([k for k, _ in found], [v for _, v in found], np.zeros(len(found), np.int32), offsets)

    def advance(self, next_offsets: Mapping[int, int]) -> None:
        self.positions.next_offsets.update(next_offsets)
        self.positions.uncommitted_start.clear()

    def rewind(self) -> None:
        self.rewinds += 1

    def resume(self, partitions: Collection[int]) -> None:
        self.resumed += partitions


@dataclass
class Broker:
    """Follows a script of outcomes, then commits; keeps what was committed."""

    script: list[Outcome | BaseException] = field(default_factory=list)
    outputs: list[bytes | None] = field(default_factory=list)
    rows: list[dict[bytes | None, bytes | None]] = field(default_factory=list)  # by transaction
    commits: list[dict[int, int]] = field(default_factory=list)
    undeliverable: dict[tuple[int, int], int] = field(default_factory=dict)
    idles: int = 0

    def commit(self, outputs: Iterable[Outputs], next_offsets: Mapping[int, int]) -> Outcome:
        blocks = list(outputs)
        sent = [
            value for block in blocks if block.topic not in ("app.changelog", "app.learning") for value in block.values
        ]
        rows = [item for b in blocks if b.topic == "app.changelog" for item in zip(b.keys, b.values, strict=True)]
        outcome = self.script.pop(0) if self.script else Outcome.COMMITTED
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not Outcome.ABORTED:
            self.outputs += sent
            self.rows.append(dict(rows))
            self.commits.append(dict(next_offsets))
        return outcome

    def idle(self) -> None:
        self.idles += 1


@dataclass
class Restorer:
    """Has nothing to bring back; a shard is live after so many steps."""

    steps: int = 1
    committed: dict[int, int | None] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    controls: dict[int, ControlRow] = field(default_factory=dict)

    @property
    def unfinished(self) -> Collection[int]:
        return self.committed.keys()

    def begin(self, committed: Mapping[int, int | None]) -> None:
        self.committed |= committed

    def cancel(self, partitions: Collection[int]) -> None:
        self.cancelled += [p for p in partitions if self.committed.pop(p, "none") != "none"]

    def step(self, _budget_s: float) -> dict[int, ControlRow | None]:
        self.steps -= 1
        done = [] if self.steps else list(self.committed)
        for partition in done:
            del self.committed[partition]
        return {partition: self.controls.get(partition) for partition in done}


class Seen(Observers):
    """Writes down what was committed."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self.aborts = 0

    def committed(self, work: Work, outcome: Outcome) -> None:
        self.works.append(work)

    def aborted(self) -> None:
        self.aborts += 1


def build(log: Log, broker: Broker, restorer: Restorer | None = None, **pace: Any) -> tuple[Runner, Adapter, Seen]:
    model = random_model("diagonal")
    adapter, seen = Adapter(model), Seen()
    topics = TopicNames.of("app")
    decoder = Decoder(model.spec.features, model.spec.feedback)
    pipeline = Pipeline(decoder, adapter, Emitter(topics, "v1", model.spec.feedback.target_level, now_ms=lambda: 0))
    runner = Runner(
        log, pipeline, broker, restorer or Restorer(), seen, Pace(**pace), clock=lambda: 0.0, sleep=lambda _s: None
    )  # type: ignore[arg-type]
    return runner, adapter, seen


def rows(adapter: Adapter) -> dict[str, bytes]:
    return {user: adapter.users.rows[slot].tobytes() for user, slot in adapter.users.items(0)}


def test_an_aborted_batch_is_done_again_and_ends_as_if_nothing_had_happened() -> None:
    records = [record(n, f"u{n % 7}") for n in range(200)] + [(b"x", b"nope")]
    calm, stormy = Broker(), Broker([Outcome.ABORTED, Outcome.COMMITTED, Outcome.ABORTED, Outcome.RECOVERED])
    logs, ends = [Log(records), Log(records)], []
    for log, broker in zip(logs, (calm, stormy), strict=True):
        runner, adapter, seen = build(log, broker, max_batch=50, stop_after_events=201)
        runner.run(Shutdown())
        ends.append(rows(adapter))
        assert sum(len(w.batch) + len(w.dead_letters) for w in seen.works) == 201
    assert (calm.outputs, calm.rows) == (stormy.outputs, stormy.rows)
    assert ends[0] == ends[1]
    assert [log.rewinds for log in logs] == [0, 2]


def test_who_watches_is_told_the_changelog_records_of_each_commit_and_of_no_abort() -> None:
    log, broker = Log([record(n, f"u{n % 7}") for n in range(40)]), Broker([Outcome.ABORTED, Outcome.COMMITTED])
    runner, _, seen = build(log, broker, max_batch=20, stop_after_events=40)
    runner.run(Shutdown())

    told = [dict(zip(block.keys, block.values, strict=True)) for work in seen.works for block in work.rows]

    assert {key for rows in broker.rows for key in rows} == {key for rows in told for key in rows}
    assert sum(map(len, broker.rows)) == sum(map(len, told))


def test_a_registry_that_is_away_is_waited_for_before_a_transaction_begins() -> None:
    log, broker, pauses = Log([record(n) for n in range(20)]), Broker(), []
    runner, _, seen = build(log, broker)
    runner._sleep = pauses.append
    prepare, away = runner._pipeline.prepare, iter([True, True, False])

    def prepared(raw: RawBatch) -> None:
        if next(away):
            raise RegistryUnreachable("nobody answers")
        prepare(raw)

    runner._pipeline.prepare = prepared  # type: ignore[method-assign]
    runner.turn()
    runner.turn()
    assert ([], 2, 0) == (broker.commits, log.rewinds, seen.aborts)
    assert pauses[0] < pauses[1]
    runner.turn()
    assert ([{0: 20}], 20) == (broker.commits, len(broker.outputs))


def test_an_error_in_a_commit_leaves_the_rows_of_the_last_one() -> None:
    log = Log([record(n) for n in range(20)])
    runner, adapter, _ = build(log, Broker([Outcome.COMMITTED, RuntimeError("broker gone")]), max_batch=10)
    runner.turn()
    before = rows(adapter)
    with pytest.raises(RuntimeError, match="broker gone"):
        runner.turn()
    assert before == rows(adapter)


def test_a_batch_longer_than_a_chunk_is_one_commit() -> None:
    log, broker = Log([record(n, f"u{n % 50}") for n in range(2 * CHUNK + 1)]), Broker()
    runner, _, seen = build(log, broker)
    runner.turn()
    assert broker.commits == [{0: 2 * CHUNK + 1}]
    assert [len(w.batch) for w in seen.works] == [2 * CHUNK + 1]
    assert len(broker.outputs) == 2 * CHUNK + 1


def test_where_a_new_group_starts_is_committed_before_the_first_record() -> None:
    log, broker = Log([]), Broker()
    log.positions.uncommitted_start.add(0)
    runner, _, _ = build(log, broker)
    runner.assigned([0])
    runner.turn()
    assert broker.commits == []  # its rows are not there yet
    runner.turn()
    runner.turn()
    assert (broker.commits, broker.idles) == ([{0: 0}], 2)


def test_shards_say_where_they_stand() -> None:
    log = Log([record(n) for n in range(7)])
    runner, adapter, _ = build(log, Broker())
    runner.assigned([0])
    assert runner.shards == {}
    runner._restore()
    assert (runner.shards[0].next_offset, log.resumed) == (0, [0])
    runner.turn()
    assert (runner.shards[0].next_offset, runner.shards[0].model_version) == (7, adapter.model.version)
    runner.revoked([0])
    assert (runner.shards, len(adapter.users), len(adapter.items)) == ({}, 0, 0)


def test_the_first_signal_asks_and_the_second_stops_at_once() -> None:
    with Shutdown().installed() as shutdown:
        signal.raise_signal(signal.SIGTERM)
        assert shutdown.asked
        with pytest.raises(StopAtOnce):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.SIGTERM, signal.SIGTERM] == shutdown.signals


def held(runner: Runner) -> dict[int, int]:
    return runner._ahead.next_offsets


def test_a_full_batch_has_the_next_one_read_before_it_is_handled_and_decoded_while_it_is_committed() -> None:
    records = [record(n, f"u{n % 7}") for n in range(3 * CHUNK)] + [(b"x", b"nope")]
    log, broker = Log(records), Broker()
    runner, _, _ = build(log, broker, max_batch=CHUNK + 500)
    by_the_loop = mock.Mock(side_effect=runner._pipeline.decoder)
    runner._pipeline.decoder = by_the_loop
    runner.turn()
    assert ([{0: CHUNK + 500}], {0: 2 * CHUNK + 1_000}) == (broker.commits, held(runner))
    assert 2 == by_the_loop.call_count
    runner.turn()
    assert 2 == by_the_loop.call_count  # both of its chunks were decoded ahead
    runner.turn()
    assert [CHUNK + 500, 2 * CHUNK + 1_000, 3 * CHUNK + 1] == [ends[0] for ends in broker.commits]
    assert len(broker.outputs) == len(records)


def test_what_is_held_is_filled_up_before_it_becomes_a_batch() -> None:
    log, broker = Log([record(n) for n in range(15)]), Broker()
    runner, _, seen = build(log, broker, max_batch=10)
    runner.turn()
    assert {0: 15} == held(runner)
    log.records += [record(n) for n in range(15, 30)]
    runner.turn()
    assert ([{0: 10}, {0: 20}], {0: 30}) == (broker.commits, held(runner))
    runner.turn()
    assert [10, 10, 10] == [len(w.batch) for w in seen.works]


def test_partitions_that_are_taken_away_while_something_is_held_have_all_of_it_read_again() -> None:
    log, broker = Log([record(n) for n in range(40)]), Broker()
    runner, _, _ = build(log, broker, max_batch=10)
    runner.assigned([0])
    runner._restore()
    runner.turn()
    polls, poll = [], log.poll

    def revoking(*arguments: Any) -> RawBatch:
        polls.append(arguments)
        runner.revoked([1])
        return poll(*arguments)

    log.poll = revoking  # type: ignore[method-assign]
    runner.turn()
    log.poll = poll  # type: ignore[method-assign]
    assert ([{0: 10}], 1, {}) == (broker.commits, log.rewinds, held(runner))
    runner.turn()
    assert [{0: 10}, {0: 20}] == broker.commits


def test_an_abort_has_what_is_held_read_again() -> None:
    log, broker = Log([record(n) for n in range(30)]), Broker([Outcome.COMMITTED, Outcome.ABORTED])
    runner, _, _ = build(log, broker, max_batch=10)
    runner.turn()
    runner.turn()
    assert ([{0: 10}], 1, {}) == (broker.commits, log.rewinds, held(runner))
    runner.turn()
    assert {0: 20} == broker.commits[-1]


def test_records_that_are_held_are_named_in_the_marker(tmp_path: Path) -> None:
    """They are decoded ahead: one that kills the process must be found."""
    log, broker = Log([record(n) for n in range(30)]), Broker()
    runner, _, _ = build(log, broker, max_batch=10)
    with Quarantine(tmp_path, "t") as quarantine:
        runner._quarantine = quarantine
        runner.turn()
        assert {0: 20} == msgspec.json.decode((tmp_path / FILE).read_bytes(), type=Marker).ends
