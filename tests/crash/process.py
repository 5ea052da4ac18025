"""The real loop over the scripted broker: processes that die and are started again, and what must hold at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import msgspec
from learner_streams import random_model

from stream_adapt.adapt import Adapter
from stream_adapt.commit import ExactlyOnce
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.errors import Fenced, KafkaRefused
from stream_adapt.kafka.consumer import RebalanceListener
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.learning import Summary, decode, total
from stream_adapt.pipeline import Pipeline
from stream_adapt.record import ERASE, TopicNames
from stream_adapt.restore import Expected, Restorer
from stream_adapt.runner import Observers, Pace, Runner
from stream_adapt.state.row import CONTROL_KEY, Kind
from stream_adapt.testing.clocks import SettableClock
from stream_adapt.testing.scripted import (
    Crash,
    Effect,
    Killed,
    Point,
    Record,
    ScriptedBroker,
    ScriptedConsumer,
    ScriptedReader,
)

TOPICS = TopicNames.of("app")
MODEL = random_model("diagonal")
EXPECTED = Expected(TOPICS, "group", "topic-1", exactly_once=True)
FENCE_WINDOW_S = 15.0
#: Records of a batch, at most: more than any poll gives, so that nothing is read ahead.
MOST = 1_000
#: Offsets per read of the changelog: restores are cut, too.
CHANGELOG_CUTS = (7, 3)
#: No script is so long that a member would have to be started more often.
MOST_STARTS = 40
#: Nor does a member need more turns than this without getting on: then it is stuck.
MOST_TURNS = 400

NOT_JSON: Record = (b"u", b"nope")


def record(number: int, user: str) -> Record:
    """A valid event."""
    event = {"event_id": f"e{number}", "user_id": user, "item_id": f"i{number % 5}", "event_type": "rating"}
    return user.encode(), msgspec.json.encode({**event, "timestamp": 1000 * number, "label": 1 + number % 5})


def erasure(number: int, user: str) -> Record:
    """Has a user's row erased."""
    event = {"event_id": f"e{number}", "user_id": user, "event_type": ERASE, "timestamp": 1000 * number}
    return user.encode(), msgspec.json.encode(event)


def records(count: int, partitions: int = 2) -> dict[int, list[Record]]:
    """Events and, here and there, an erasure or something that is none; by partition, every user in one of them."""
    inputs: dict[int, list[Record]] = {p: [] for p in range(partitions)}
    for number in range(count):
        user = f"u{number % 6}"
        one = NOT_JSON if number % 11 == 10 else erasure(number, user) if number % 9 == 8 else record(number, user)
        inputs[number % partitions].append(one)
    return inputs


class Process:
    """One start of `stream-adapt run`, as far as the loop goes."""

    def __init__(
        self, broker: ScriptedBroker, cuts: Sequence[int], instance: str, clock: SettableClock, most: int = MOST
    ) -> None:
        self.adapter = Adapter(MODEL)
        decoder = Decoder(MODEL.spec.features, MODEL.spec.feedback, now_ms=clock.now_ms)
        emitter = Emitter(TOPICS, "v1", MODEL.spec.feedback.target_level, now_ms=clock.now_ms)
        listener = RebalanceListener(lambda p: self.runner.assigned(p), lambda p: self.runner.revoked(p))
        consumer = self.consumer = ScriptedConsumer(broker, TOPICS.events, cuts, listener)

        def make_producer() -> OutputProducer:
            return OutputProducer(
                {}, transactional_id=instance, socket_timeout_s=60, deadline_s=0.02, client=broker.client
            )

        delivery = ExactlyOnce(make_producer, consumer, transactional_id=instance, fence_window_s=FENCE_WINDOW_S)
        pipeline = Pipeline(decoder, self.adapter, emitter)
        tables = {Kind.USER: self.adapter.users, Kind.ITEM: self.adapter.items}
        reader = ScriptedReader(broker, TOPICS.changelog, CHANGELOG_CUTS)
        restorer = Restorer(reader, tables, EXPECTED, committed=consumer.committed)
        self.runner = Runner(
            consumer,  # type: ignore[arg-type]
            pipeline,
            delivery,
            restorer,
            Observers(),
            Pace(most),
            topic_id=EXPECTED.topic_id,
            clock=clock,
            sleep=lambda _s: None,
        )


@dataclass
class Deployment:
    """Members that take turns, until the input is consumed; one that dies is started again.

    There is one member, `app.0`. While it stands still `app.1` takes over and does `meanwhile_turns` turns of its own;
    after that both live, and each takes over while the other stands still. Where the cuts are as large as a batch may
    be (`most`), the next batch is read, and decoded, ahead.
    """

    broker: ScriptedBroker
    cuts: Sequence[int] = (5,)
    meanwhile_turns: int = 3
    most: int = MOST
    clock: SettableClock = field(default_factory=SettableClock)
    members: dict[str, Process] = field(default_factory=dict)
    starts: int = 0
    exits: list[int] = field(default_factory=list)
    _turning: str = "app.0"

    def run(self) -> None:
        """Until every record is committed."""
        self.broker.meanwhile = self._meanwhile
        self._start("app.0")
        for _ in range(MOST_TURNS):
            for instance in list(self.members):
                self._turn(instance)
                if self.broker.finished:
                    return
        raise AssertionError(f"no end after {MOST_TURNS} turns: {self.broker.offsets}, {self.broker.happened}")

    @property
    def owner(self) -> Process:
        """The member that has the partitions."""
        return next(m for m in self.members.values() if m.consumer is self.broker.member)

    def _turn(self, instance: str) -> None:
        self._turning = instance
        with self._dying(instance):
            self.members[instance].runner.turn()

    def _start(self, instance: str) -> None:
        self.starts += 1
        assert self.starts < MOST_STARTS, f"started {self.starts} times, and no end: {self.broker.happened}"
        with self._dying(instance):
            self.members[instance] = Process(self.broker, self.cuts, instance, self.clock, self.most)

    @contextmanager
    def _dying(self, instance: str) -> Iterator[None]:
        try:
            yield
        except Killed:
            self.exits.append(-9)
            self._start(instance)
        except (Fenced, KafkaRefused) as error:
            self.exits.append(error.exit_code)
            self._start(instance)

    def _meanwhile(self) -> None:
        """The other instance takes over while this one stands still."""
        self.broker.meanwhile = lambda: None
        still = self._turning
        other = "app.1" if still == "app.0" else "app.0"
        if other in self.members:
            self.broker.join(self.members[other].consumer)
        else:
            self._start(other)
        for _ in range(self.meanwhile_turns):
            self._turn(other)
        self._turning = still
        self.broker.meanwhile = self._meanwhile


def outputs(broker: ScriptedBroker) -> Counter[tuple[int, int]]:
    """Sources of all visible outputs, and how many each has."""
    scores = (json.loads(written.value or b"") for written in broker.committed(TOPICS.scores))
    found = Counter((score["source_partition"], score["source_offset"]) for score in scores)
    for written in broker.committed(TOPICS.dead_letters):
        headers = dict(written.headers or [])
        found[int(headers["stream-adapt.source.partition"]), int(headers["stream-adapt.source.offset"])] += 1
    return found


def once_each(broker: ScriptedBroker) -> Counter[tuple[int, int]]:
    """What `outputs` should be: one for every input record."""
    return Counter((p, offset) for p, records in broker.inputs.items() for offset in range(len(records)))


Rows = dict[tuple[int, bytes], bytes]


def rows(process: Process) -> Rows:
    """Every row of a member, and the control row of every live shard: its bytes, by partition and key."""
    found = {
        (partition, prefix + name.encode()): table.layout.to_bytes(table.rows[slot])
        for prefix, table in ((b"u:", process.adapter.users), (b"i:", process.adapter.items))
        for partition in (0, 1)
        for name, slot in table.items(partition)
    }
    return found | {(p, CONTROL_KEY): control.to_bytes() for p, control in process.runner.shards.items()}


def changelog(broker: ScriptedBroker) -> Rows:
    """The newest version of every row and control row, as a plain reader under read_committed sees them."""
    newest = {(w.partition, w.key): w.value for w in broker.committed(TOPICS.changelog)}
    return {(p, key or b""): value for (p, key), value in newest.items() if value is not None}


def restored(deployment: Deployment) -> Rows:
    """The rows of one more member, who takes everything over when all is over."""
    successor = Process(deployment.broker, (0,), "successor", deployment.clock)
    for _ in range(MOST_TURNS):
        successor.runner.turn()
        if len(successor.runner.shards) == len(deployment.broker.inputs):
            return rows(successor)
    raise AssertionError(f"not restored after {MOST_TURNS} turns")


Learning = dict[tuple[int, int, str, str], Summary]


def learning(broker: ScriptedBroker) -> Learning:
    """What the learning topic says of each window, its parts added up, as a reader under read_committed sees it."""
    read = (decode(written.value or b"") for written in broker.committed(TOPICS.learning))
    return {one.key: one for one in total(summary for record in read for summary in record.summaries)}


@cache
def calm_run(count: int) -> tuple[Rows, Learning]:
    """What a member to whom nothing happens has, and has told, at the end."""
    calm = Deployment(ScriptedBroker(records(count)))
    calm.run()
    assert rows(calm.members["app.0"]) == changelog(calm.broker)
    return changelog(calm.broker), learning(calm.broker)


def survived(
    crashes: Sequence[Crash],
    count: int = 40,
    cuts: Sequence[int] = (5,),
    meanwhile_turns: int = 3,
    most: int = MOST,
) -> Deployment:
    """Runs a script to its end; every input has one visible output, and every row, and what was learned of every
    window, is a calm run's, to the last bit.

    The rows are looked at three times: in the changelog, in the member that has them at the end, if it is done with
    restoring, and in a successor that restores all of them. A member that has no partitions has no rows.

    Raises:
        AssertionError: something was lost, came twice, or is not as in a calm run.
        StateMismatch: rows and offsets came apart.
    """
    deployment = Deployment(ScriptedBroker(records(count), crashes), cuts, meanwhile_turns, most)
    deployment.run()
    happened = deployment.broker.happened
    assert once_each(deployment.broker) == outputs(deployment.broker), happened
    # Only a producer that cannot be had ends a member in order.
    assert 3 not in deployment.exits or any(crash.point is Point.INIT for crash in happened), happened
    calm, calm_learning = calm_run(count)
    assert calm == changelog(deployment.broker), happened
    assert calm_learning == learning(deployment.broker), happened
    owner = deployment.owner
    if len(owner.runner.shards) == len(deployment.broker.inputs):
        assert calm == rows(owner), happened
    deployment.broker.calm_down()
    for member in deployment.members.values():
        member.runner.turn()
        assert member is owner or rows(member) == {}, happened
    assert calm == restored(deployment), happened
    return deployment


__all__ = [
    "MOST",
    "Crash",
    "Deployment",
    "Effect",
    "Point",
    "changelog",
    "learning",
    "once_each",
    "outputs",
    "records",
    "survived",
]
