"""What flows in while things go wrong: events of a synthetic stream, bad records among them, upstream transactions.

Every record carries its id in a header, and a bad one the reason for which it must be refused, so that the oracle
needs nothing of ours to know what must come out. A few users get a large share of the events.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream_adapt.datasets import synthetic
from stream_adapt.datasets.synthetic import Synthetic
from stream_adapt.learner.encoder import Feature
from stream_adapt.learner.feedback import Feedback
from stream_adapt.record import FeatureValue

ID_HEADER = "chaos-id"
#: Of a bad record: the dead letter's reason.
REASON_HEADER = "chaos-reason"

#: So many users get that share of the events.
_HOT_USERS = 3
_HOT_SHARE = 0.3
_BAD_SHARE = 0.03
#: An upstream transaction: records, seconds that it stays open, seconds to the next, share that is aborted. While one
#: is open nobody with read_committed sees what lies behind it in its partitions, so they are short.
_UPSTREAM_RECORDS = 20
_UPSTREAM_OPEN_S = (0.1, 1.0)
_UPSTREAM_EVERY_S = (2.0, 6.0)
_UPSTREAM_ABORTED = 0.35
_UPSTREAM_TIMEOUT_MS = 10_000
_UPSTREAM_CALL_S = 30.0
#: More than a run has; the stream is drawn in pieces as it is asked for.
_ENDLESS = 50_000_000
_TURN_S = 0.02
_FLUSH_S = 120.0

Headers = list[tuple[str, bytes]]
#: A good event's fields → key and value of the record.
Spoil = Callable[[dict[str, Any]], tuple[bytes | None, bytes | None]]


class Record(NamedTuple):
    """One input record as it is produced."""

    record_id: str
    key: bytes | None
    value: bytes | None
    headers: Headers


def parameters(seed: int) -> Synthetic:
    """The stream that a seed stands for."""
    return Synthetic(seed=seed, events=_ENDLESS, drift="none", users=300, items=200)


def declared(seed: int) -> tuple[dict[str, Feature], Feedback]:
    """Features and feedback of the stream: what a model for it is made of."""
    source = synthetic.source(parameters(seed))
    return source.features, source.feedback


def examples(seed: int, count: int = 2_000) -> tuple[list[str], dict[str, list[FeatureValue]]]:
    """Items, and values of every feature, of the stream's beginning: enough to fit a random model's encoder."""
    features, _ = declared(seed)
    events = list(islice(synthetic.events(parameters(seed)), count))
    columns = {name: [event.features.get(name) for event in events] for name in features}
    return sorted({event.item_id for event in events}), columns


def records(seed: int, prefix: str) -> Iterator[Record]:
    """The stream: ids are the prefix and a number; the same arguments give the same records."""
    random = np.random.default_rng([seed, *prefix.encode()])
    spoiled = list(BAD.items())
    for number, event in enumerate(synthetic.events(parameters(seed))):
        record_id = f"{prefix}{number}"
        fields = {**msgspec.structs.asdict(event), "event_id": record_id}
        del fields["domain"]
        if random.random() < _HOT_SHARE:
            fields["user_id"] = f"hot-{random.integers(_HOT_USERS)}"
        headers = [(ID_HEADER, record_id.encode())]
        if random.random() < _BAD_SHARE:
            reason, spoil = spoiled[int(random.integers(len(spoiled)))]
            key, value = spoil(fields)
            yield Record(record_id, key, value, [*headers, (REASON_HEADER, reason.encode())])
        else:
            yield Record(record_id, _key(fields), _json(fields), headers)


def _key(fields: dict[str, Any]) -> bytes:
    return str(fields["user_id"]).encode()


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def _without_user(fields: dict[str, Any]) -> tuple[bytes | None, bytes | None]:
    return _key(fields), _json({name: value for name, value in fields.items() if name != "user_id"})


#: Reason of the dead letter → what makes a record that is refused for it.
BAD: dict[str, Spoil] = {
    "not_json": lambda fields: (_key(fields), _json(fields)[:-5]),
    "null_value": lambda fields: (_key(fields), None),
    "null_key": lambda fields: (None, _json(fields)),
    "key_mismatch": lambda fields: (b"somebody-else", _json(fields)),
    "missing_field": _without_user,
    "wrong_type": lambda fields: (_key(fields), _json({**fields, "item_id": 7})),
    "label_out_of_range": lambda fields: (_key(fields), _json({**fields, "label": 99.0})),
    "not_utf8": lambda fields: (_key(fields), b"\xff\xfe" + _json(fields)),
}


class Load:
    """Produces the stream at a pace, in threads of its own, until told to stop.

    `acked` are the ids that the broker took for good; `unknown` those of upstream transactions whose commit got no
    answer. The input topic, read back, must hold all of the first, may hold the second, and nothing else. It may hold
    a record twice (`Brokers.sent_again`).
    """

    def __init__(self, bootstrap_servers: str, topic: str, seed: int, per_second: float) -> None:
        self.acked: set[str] = set()
        self.unknown: set[str] = set()
        self.aborted_transactions = 0
        self.error: BaseException | None = None
        self._bootstrap_servers = bootstrap_servers
        self._topic = topic
        self._seed = seed
        self._per_second = per_second
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(turn,), name=f"chaos-{turn.__name__}", daemon=True)
            for turn in (self._events, self._transactions)
        ]

    def start(self) -> None:
        """Begins to produce."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when all that was begun is in the topic, aborted, or unknown.

        Raises:
            KafkaException: the broker refused a record for good.
        """
        self._done.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if self.error is not None:
            raise self.error

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - handed to whoever calls stop()
            self.error = error

    def _events(self) -> None:
        producer = Producer(self._settings(**{"message.timeout.ms": int(_FLUSH_S * 1000)}))
        source, began, produced = records(self._seed, "e"), time.monotonic(), 0
        while not self._done.wait(_TURN_S):
            due = int((time.monotonic() - began) * self._per_second)
            for record in islice(source, max(due - produced, 0)):
                self._produce(producer, record, self.acked)
            produced = max(due, produced)
            producer.poll(0)
            if self.error is not None:
                return
        if left := producer.flush(_FLUSH_S):
            raise TimeoutError(f"{self._topic}: {left} events were not taken within {_FLUSH_S:g} s")

    def _transactions(self) -> None:
        random, source = np.random.default_rng(self._seed), records(self._seed + 1, "t")
        producer = None
        while not self._done.wait(float(random.uniform(*_UPSTREAM_EVERY_S))):
            batch = list(islice(source, _UPSTREAM_RECORDS))
            open_s, commits = float(random.uniform(*_UPSTREAM_OPEN_S)), random.random() >= _UPSTREAM_ABORTED
            try:
                producer = producer or self._transactional()
                self._transaction(producer, batch, open_s, commits)
            except KafkaException:  # the broker went away: what it made of this transaction, the topic will tell
                self.unknown |= {record.record_id for record in batch}
                producer = None
        # The transaction that was lost last is ended here, and not by its timeout.
        producer = producer or self._transactional()

    def _transactional(self) -> Producer:
        producer = Producer(
            self._settings(
                **{"transactional.id": f"{self._topic}.upstream", "transaction.timeout.ms": _UPSTREAM_TIMEOUT_MS}
            )
        )
        producer.init_transactions(_FLUSH_S)
        return producer

    def _transaction(self, producer: Producer, batch: list[Record], open_s: float, commits: bool) -> None:
        taken: set[str] = set()
        producer.begin_transaction()
        for record in batch:
            self._produce(producer, record, taken)
        producer.flush(_UPSTREAM_CALL_S)
        time.sleep(open_s)
        if not commits:
            producer.abort_transaction(_UPSTREAM_CALL_S)
            self.aborted_transactions += 1
            return
        producer.commit_transaction(_UPSTREAM_CALL_S)
        self.acked |= taken

    def _produce(self, producer: Producer, record: Record, into: set[str]) -> None:
        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is None:
                into.add(record.record_id)
            elif into is self.acked:
                self.error = KafkaException(error)

        while True:
            try:
                producer.produce(
                    self._topic, record.value, record.key, headers=list(record.headers), on_delivery=delivered
                )
            except BufferError:
                producer.poll(0.1)
            else:
                return

    def _settings(self, **more: Any) -> dict[str, Any]:
        return {
            "bootstrap.servers": self._bootstrap_servers,
            "enable.idempotence": True,
            "linger.ms": 5,
            "partitioner": "murmur2_random",
            "log_level": 0,  # of a broker that goes away there is nothing new to tell
            **more,
        }
