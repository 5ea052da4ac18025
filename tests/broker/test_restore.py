"""State survives: rows come back after a restart, a kill and a rebalance, and only where they belong.

Members run in this process where what they are told from outside does not matter: starting one takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from broker_app import ITEMS, STARS, App, event
from click.testing import CliRunner, Result
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from stream_adapt import service
from stream_adapt.cli import cli
from stream_adapt.config import load
from stream_adapt.errors import KafkaRefused, StateMismatch
from stream_adapt.follow import Standing
from stream_adapt.kafka.topics import CHANGELOG_CONFIG, TopicSpec, create_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.pipeline import Pipeline
from stream_adapt.restore import Slice
from stream_adapt.runner import Observer, Observers, Pace
from stream_adapt.shutdown import Shutdown
from stream_adapt.state.row import ROW_FORMAT, ControlRow
from stream_adapt.testing.broker import read_all
from stream_adapt.testing.model import random_model

pytestmark = pytest.mark.broker

PROTOCOLS = pytest.mark.parametrize("protocol", ["classic", "consumer"])


class Watch(Observers):
    """Keeps what was restored."""

    def __init__(self) -> None:
        super().__init__()
        self.slices: list[Slice] = []
        self.shards: set[int] = set()
        self.standing: Standing | None = None
        self.waiting: Mapping[int, str] = {}

    def tick(self, consumer: Any, shards: dict[int, ControlRow]) -> None:
        self.shards = set(shards)

    def restoring(self, done: Slice) -> None:
        self.slices.append(done)

    def following(self, standing: Standing, waiting: Mapping[int, str]) -> None:
        self.standing, self.waiting = standing, waiting


class Member:
    """A member in this process."""

    def __init__(self, app: App, instance: str = "0", stop_after: int | None = None, **sections: Any) -> None:
        self.config = load(app.config(instance, **sections)).config
        self.shutdown, self.watch = Shutdown(), Watch()
        self.pipeline: Pipeline | None = None
        self.error: Exception | None = None
        self.pace = Pace(self.config.input.max_batch, 0.02, stop_after)

    def serve(self) -> Member:
        service.serve(self.config, self.shutdown, self._observe, self.pace)
        return self

    def _observe(self, pipeline: Pipeline) -> Observer:
        self.pipeline = pipeline
        return self.watch

    @contextlib.contextmanager
    def running(self) -> Iterator[Member]:
        def work() -> None:
            try:
                self.serve()
            except Exception as error:  # noqa: BLE001 - told at the end
                self.error = error

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown.asked = True
            thread.join(60)
        assert not thread.is_alive()

    @property
    def refused(self) -> Counter[str]:
        return sum((Counter(s.refused) for s in self.watch.slices), Counter())


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def scores_of(app: App) -> dict[str, tuple[Any, ...]]:
    """By event id: what a score says that depends on rows. Fails if an event has two."""
    scores = app.scores()
    assert Counter(s["event_id"] for s in scores).most_common(1)[0][1] == 1
    return {s["event_id"]: (s["score"], s["updated_score"], s["uncertainty"], s["adaptations"]) for s in scores}


def rows_of(app: App) -> dict[tuple[int, bytes], bytes]:
    """The changelog as a consumer that knows nothing of us reads it: last value by partition and key."""
    newest = {(m.partition(), m.key()): m.value() for m in read_all(app.broker.bootstrap_servers, changelog(app))}
    return {key: value for key, value in newest.items() if key[1] != b"c:" and value is not None}


def changelog(app: App) -> str:
    return f"{app.name}.changelog"


def admin(app: App) -> AdminClient:
    return AdminClient({"bootstrap.servers": app.broker.bootstrap_servers})


def write(app: App, partition: int, key: bytes, value: bytes | None) -> None:
    """A record in the changelog that no member wrote."""
    producer = Producer({"bootstrap.servers": app.broker.bootstrap_servers})
    producer.produce(changelog(app), value, key, partition)
    assert producer.flush(30) == 0


def move_group(app: App, partition: int, offset: int) -> None:
    """As an operator does it who resets offsets."""
    consumer = Consumer({"bootstrap.servers": app.broker.bootstrap_servers, "group.id": app.name})
    consumer.commit(offsets=[TopicPartition(f"{app.name}.events", partition, offset)], asynchronous=False)
    consumer.close()


def committed(app: App) -> dict[int, int]:
    asked = [TopicPartition(f"{app.name}.events", p) for p in range(app.partitions)]
    consumer = Consumer({"bootstrap.servers": app.broker.bootstrap_servers, "group.id": app.name})
    with contextlib.closing(consumer):
        return {tp.partition: tp.offset for tp in consumer.committed(asked, 30)}


def command(app: App, *words: str) -> Result:
    return CliRunner().invoke(cli, ["state", *words, "-c", str(app.config()), "--json"], catch_exceptions=True)


def uninterrupted(make_app: Callable[..., App], events: list[dict[str, Any]], partitions: int = 4) -> App:
    calm = make_app(partitions)
    calm.produce(events)
    Member(calm, stop_after=len(events)).serve()
    return calm


@pytest.fixture
def learned(make_app: Callable[..., App]) -> App:
    """An application with one partition that has learned from 100 events."""
    app = make_app(1)
    app.produce(event(n) for n in range(100))
    Member(app, stop_after=100).serve()
    return app


@PROTOCOLS
def test_a_restart_goes_on_with_the_same_rows(make_app: Callable[..., App], protocol: str) -> None:
    events = [event(n) for n in range(1_200)]
    calm, app = uninterrupted(make_app, events), make_app()
    for part in (events[:500], events[500:]):
        app.produce(part)
        Member(app, stop_after=len(part), kafka={"group_protocol": protocol}).serve()
    assert scores_of(calm) == scores_of(app)
    assert rows_of(calm) == rows_of(app)


@PROTOCOLS
def test_state_moves_with_its_partition_when_members_join_and_leave(
    make_app: Callable[..., App], protocol: str
) -> None:
    events = [event(n) for n in range(3_000)]
    calm, app = uninterrupted(make_app, events), make_app()
    kafka = {"group_protocol": protocol}
    with Member(app, "a", kafka=kafka).running() as first:
        app.produce(events[:1_000])
        app.wait_for_outputs(1_000)
        with Member(app, "b", kafka=kafka).running() as second:
            until(lambda: len(first.watch.shards) == len(second.watch.shards) == 2)
            assert sum(s.records for s in second.watch.slices) > 0
            app.produce(events[1_000:2_000])
            app.wait_for_outputs(2_000)
        until(lambda: len(first.watch.shards) == 4)
        app.produce(events[2_000:])
        app.wait_for_outputs(3_000)
    assert (first.error, second.error) == (None, None)
    assert scores_of(calm) == scores_of(app)
    assert rows_of(calm) == rows_of(app)


def test_a_kill_in_the_middle_of_transactions_leaves_the_rows_of_the_last_commit(make_app: Callable[..., App]) -> None:
    events = [event(n) for n in range(12_000)]
    calm, app = uninterrupted(make_app, events), make_app()
    app.produce(events)
    killed = app.start(input={"max_batch": 200})
    app.wait_for_outputs(1_500)
    assert app.stop(killed, signal.SIGKILL) == -signal.SIGKILL
    with Member(app).running() as member:
        app.wait_for_outputs(12_000)
    assert member.error is None
    assert scores_of(calm) == scores_of(app)
    assert rows_of(calm) == rows_of(app)


def test_a_restore_waits_for_a_transaction_that_is_open_in_the_changelog(learned: App) -> None:
    newer = next(value for (_, key), value in rows_of(learned).items() if key == b"u:user-1")
    upstream = Producer({"bootstrap.servers": learned.broker.bootstrap_servers, "transactional.id": learned.name})
    upstream.init_transactions(30)
    upstream.begin_transaction()
    upstream.produce(changelog(learned), newer, b"u:late", 0)
    upstream.flush(10)
    with Member(learned).running() as member:
        until(lambda: [(s.records, s.remaining.get(0, 99) <= 2) for s in member.watch.slices[-3:]] == [(0, True)] * 3)
        assert member.watch.shards == set()
        assert member.watch.slices[-1].remaining[0] > 0
        upstream.commit_transaction(30)
        until(lambda: member.watch.shards == {0})
        assert member.pipeline is not None
        assert member.pipeline.adapter.users.find(0, "late") is not None
    assert member.error is None


def test_a_restore_that_does_not_advance_is_given_up_and_says_how_far_it_got(learned: App) -> None:
    upstream = Producer({"bootstrap.servers": learned.broker.bootstrap_servers, "transactional.id": learned.name})
    upstream.init_transactions(30)
    upstream.begin_transaction()
    upstream.produce(changelog(learned), b"", b"u:x", 0)
    upstream.flush(10)
    with pytest.raises(KafkaRefused, match=r"changelog\[0\]: the restore stands at offset \d+ of \d+ since 2 s"):
        Member(learned, state={"restore_stall_s": 2}, kafka={"transaction_timeout_ms": 1_000}).serve()
    upstream.abort_transaction(30)


def test_a_changelog_that_ends_in_aborted_records_and_markers_is_restored(learned: App) -> None:
    before = rows_of(learned)
    upstream = Producer({"bootstrap.servers": learned.broker.bootstrap_servers, "transactional.id": learned.name})
    upstream.init_transactions(30)
    for _ in range(3):
        upstream.begin_transaction()
        upstream.produce(changelog(learned), b"aborted", b"u:x", 0)
        upstream.flush(10)
        upstream.abort_transaction(30)
    learned.produce([event(100)])
    member = Member(learned, stop_after=1).serve()
    assert member.refused == {}
    assert before.keys() <= rows_of(learned).keys()


def test_offsets_that_were_moved_are_refused_and_both_ways_to_accept_them_heal(learned: App) -> None:
    move_group(learned, 0, 40)
    with pytest.raises(StateMismatch) as raised:
        Member(learned).serve()
    assert "as of offset 100" in str(raised.value)
    assert "committed offset 40" in str(raised.value)
    assert "60 offsets would be learned twice" in str(raised.value)
    assert "state accept-offset" in str(raised.value)
    assert "state reset -c FILE --partition 0" in str(raised.value)

    assert command(learned, "accept-offset", "--use", "rows", "--yes").exit_code == 0
    assert committed(learned) == {0: 100}
    move_group(learned, 0, 40)
    result = command(learned, "accept-offset", "--use", "group", "--yes")
    assert json.loads(result.stdout)["changes"] == [
        {"partition": 0, "rows_dropped": 0, "rows_at": [100, 40], "group_at": [40, 40]}
    ]
    Member(learned, stop_after=60).serve()
    assert len(learned.scores()) == 160


def test_a_run_with_rows_and_offsets_apart_exits_with_5(learned: App) -> None:
    move_group(learned, 0, 40)
    member = learned.start()
    assert member.wait(60) == 5
    assert "as of offset 100" in learned.log()


def test_a_reset_forgets_rows_and_keeps_offsets(learned: App) -> None:
    move_group(learned, 0, 40)
    result = command(learned, "reset", "--partition", "0", "--yes")
    (change,) = json.loads(result.stdout)["changes"]
    assert (change["rows_at"], change["group_at"]) == ([100, 40], [40, 40])
    assert change["rows_dropped"] > 37
    assert rows_of(learned) == {}
    Member(learned, stop_after=60).serve()
    again = [s for s in learned.scores()[100:] if s["event_id"] == "e40"]
    assert [s["adaptations"] for s in again] == [1]


def test_nothing_is_changed_while_the_group_has_members_or_nobody_says_yes(learned: App) -> None:
    before = rows_of(learned)
    assert CliRunner().invoke(cli, ["state", "reset", "-c", str(learned.config())], input="n\n").exit_code != 0
    with Member(learned).running() as member:
        until(lambda: member.watch.shards)
        result = command(learned, "reset", "--yes")
        assert isinstance(result.exception, KafkaRefused)
        assert "1 members" in str(result.exception)
    assert before == rows_of(learned)


def test_offsets_that_expired_are_refused_and_the_rows_know_them(learned: App) -> None:
    client = admin(learned)
    client.delete_consumer_groups([learned.name])[learned.name].result(30)
    with pytest.raises(StateMismatch, match=r"as of offset 100, but group .* has committed nothing"):
        Member(learned).serve()
    assert command(learned, "accept-offset", "--use", "rows", "--yes").exit_code == 0
    assert committed(learned) == {0: 100}
    learned.produce([event(100)])
    Member(learned, stop_after=1).serve()


def test_a_changelog_that_was_deleted_is_refused(learned: App) -> None:
    client = admin(learned)
    client.delete_topics([changelog(learned)], operation_timeout=30)[changelog(learned)].result()
    until(lambda: changelog(learned) not in client.list_topics(timeout=10).topics)
    create_topics(
        {"bootstrap.servers": learned.broker.bootstrap_servers},
        [TopicSpec(changelog(learned), 1, config=CHANGELOG_CONFIG)],
    )
    with pytest.raises(StateMismatch, match=r"committed offset 100 .* there is no control row \(0 rows\)"):
        Member(learned).serve()
    assert command(learned, "accept-offset", "--use", "group", "--yes").exit_code == 0
    learned.produce([event(100)])
    Member(learned, stop_after=1).serve()


def test_an_input_topic_that_was_made_anew_is_refused(learned: App) -> None:
    client, name = admin(learned), f"{learned.name}.events"
    client.delete_topics([name], operation_timeout=30)[name].result()
    until(lambda: name not in client.list_topics(timeout=10).topics)
    create_topics({"bootstrap.servers": learned.broker.bootstrap_servers}, [TopicSpec(name, 1)])
    with pytest.raises(StateMismatch, match="it was deleted and made anew"):
        Member(learned).serve()
    assert isinstance(command(learned, "accept-offset", "--use", "rows", "--yes").exception, StateMismatch)
    assert command(learned, "reset", "--yes").exit_code == 0
    learned.produce(event(n) for n in range(10))
    Member(learned, stop_after=10).serve()


def test_a_committed_offset_before_the_log_start_is_refused(learned: App) -> None:
    move_group(learned, 0, 40)
    at = [TopicPartition(f"{learned.name}.events", 0, 70)]
    client = admin(learned)
    for deleted in client.delete_records(at).values():
        deleted.result(30)
    with pytest.raises(KafkaRefused, match=r"committed offset 40, but the log begins at 70: 30 offsets are gone"):
        Member(learned).serve()


@pytest.mark.parametrize(
    ("partitions", "config", "message"),
    [(2, CHANGELOG_CONFIG, "has 1 partitions and .* has 2"), (1, {}, "cleanup.policy=delete")],
)
def test_a_changelog_of_another_form_is_refused(
    learned: App, partitions: int, config: dict[str, str], message: str
) -> None:
    other = TopicSpec(f"{learned.name}.other", partitions, config=config)
    create_topics({"bootstrap.servers": learned.broker.bootstrap_servers}, [other])
    with pytest.raises(KafkaRefused, match=message):
        Member(learned, topics={"changelog": other.name}).serve()


def test_damaged_records_are_counted_and_the_last_good_version_stands(learned: App) -> None:
    before = rows_of(learned)
    good = before[0, b"u:user-1"]
    flipped = bytearray(good)
    flipped[30] ^= 1
    write(learned, 0, b"u:user-1", bytes(flipped))
    write(learned, 0, b"u:user-2", good[:-5])
    write(learned, 0, b"i:user-1", good)
    write(learned, 0, b"nothing", b"of ours")
    with Member(learned).running() as member:
        until(lambda: member.watch.shards == {0})
        assert {"checksum": 2, "kind": 1, "key": 1} == dict(member.refused)
        assert member.pipeline is not None
        users = member.pipeline.adapter.users
        slot = users.find(0, "user-1")
        assert slot is not None
        assert good == users.layout.to_bytes(users.rows[slot])


def test_rows_of_a_newer_release_are_refused_until_a_later_record_replaces_them(learned: App) -> None:
    good = rows_of(learned)[0, b"u:user-1"]
    newer = (ROW_FORMAT + 1).to_bytes(2, "little") + good[2:-4]
    write(learned, 0, b"u:user-1", newer + zlib.crc32(newer).to_bytes(4, "little"))
    with pytest.raises(
        StateMismatch, match=f"row format {ROW_FORMAT + 1}, this release reads up to {ROW_FORMAT}: upgrade"
    ):
        Member(learned).serve()
    write(learned, 0, b"u:user-1", good)
    learned.produce([event(100)])
    Member(learned, stop_after=1).serve()


def test_rows_of_another_model_are_refused_and_those_of_the_same_form_are_carried(learned: App, tmp_path: Path) -> None:
    random_model(tmp_path / "wide", LearnerSpec(feedback=STARS, dimension=8), ITEMS)
    with pytest.raises(StateMismatch, match="is of another model: layout"):
        Member(learned, model={"path": str(tmp_path / "wide")}).serve()
    random_model(tmp_path / "same", LearnerSpec(feedback=STARS), ITEMS, seed=7)
    learned.produce([event(100, "user-1")])
    Member(learned, stop_after=1, model={"path": str(tmp_path / "same")}).serve()
    assert learned.scores()[-1]["adaptations"] > 1
    assert command(learned, "reset", "--yes").exit_code == 0
    learned.produce([event(101)])
    Member(learned, stop_after=1, model={"path": str(tmp_path / "wide")}).serve()


def test_at_least_once_keeps_rows_and_goes_on_from_the_offsets_when_the_rows_are_ahead(learned: App) -> None:
    move_group(learned, 0, 90)
    Member(learned, stop_after=10, delivery="at_least_once").serve()
    assert committed(learned) == {0: 100}
    again = learned.scores()[-1]
    assert (again["event_id"], again["adaptations"]) == ("e99", 4)
    write(learned, 0, b"c:", ControlRow(0, 99, "", "").to_bytes())
    with pytest.raises(StateMismatch, match="1 offsets would be learned not at all"):
        Member(learned, delivery="at_least_once").serve()


def test_a_rebalance_during_a_restore_cancels_it_and_every_event_has_one_score(make_app: Callable[..., App]) -> None:
    """The changelog of partition 0 is held open, so that its restore is under way while the second member comes."""
    events = [event(n) for n in range(1_000)]
    calm, app = uninterrupted(make_app, events, 2), make_app(2)
    app.produce(events[:500])
    Member(app, stop_after=500).serve()
    upstream = Producer({"bootstrap.servers": app.broker.bootstrap_servers, "transactional.id": app.name})
    upstream.init_transactions(30)
    upstream.begin_transaction()
    for partition in (0, 1):
        upstream.produce(changelog(app), b"aborted", b"u:x", partition)
    upstream.flush(10)
    with Member(app, "a").running() as first:
        until(lambda: any(len(s.remaining) == 2 and s.records for s in first.watch.slices))
        with Member(app, "b").running() as second:
            until(lambda: any(len(s.remaining) == 1 and s.records for s in second.watch.slices))
            assert (first.watch.shards, second.watch.shards) == (set(), set())
            upstream.abort_transaction(30)
            app.produce(events[500:])
            app.wait_for_outputs(1_000)
    assert (first.error, second.error) == (None, None)
    assert scores_of(calm) == scores_of(app)
    assert rows_of(calm) == rows_of(app)
