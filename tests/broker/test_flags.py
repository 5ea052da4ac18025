"""What librdkafka says of each error of a transaction: `tests/flags.py`, measured again on Apache Kafka."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from flags import ABORT_FATAL, COMMITS, FLAGS, NEW_PRODUCER, NEXT_ABORTS, NEXT_COMMITS, NEXT_UNFLAGGED, Flag

from stream_adapt.kafka.topics import TopicSpec, create_topics
from stream_adapt.testing.broker import RunningBroker, read_all
from stream_adapt.testing.proxy import Close, Fail, FaultProxy, Match

pytestmark = pytest.mark.broker

NAMES = {code: name for name, code in vars(KafkaError).items() if name.isupper() and isinstance(code, int)}


class Refused(Exception):
    """A call of the client failed; the first argument says how."""

    def __init__(self, call: str, error: KafkaError) -> None:
        flags = {"abortable": error.txn_requires_abort(), "fatal": error.fatal()}
        self.flag = next((name for name, is_set in flags.items() if is_set), "unflagged")
        self.code = NAMES[error.code()]
        super().__init__(f"{call}: {self.code}, {self.flag}")


class Client:
    """One transactional producer behind the proxy."""

    def __init__(self, bootstrap_servers: str, topics: tuple[str, str], metadata: object) -> None:
        self.out, self.source = topics
        self.metadata = metadata
        self.name = f"flags-{uuid.uuid4()}"
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "client.id": self.name,
                "transactional.id": self.name,
                "transaction.timeout.ms": 10_000,
                "socket.timeout.ms": 10_000,
                "reconnect.backoff.max.ms": 200,
                "on_delivery": lambda _error, _message: None,  # without it fatal errors surface elsewhere
                "log_level": 0,
            }
        )
        self._call("init", self.producer.init_transactions, 20)

    def transact(self, value: bytes) -> None:
        """One transaction with a record and an offset; raises Refused where a call fails."""
        self._call("begin", self.producer.begin_transaction)
        self._call("produce", self.producer.produce, self.out, value)
        self._call("flush", self.producer.flush, 20)
        offsets = [TopicPartition(self.source, 0, 1)]
        self._call("send_offsets", self.producer.send_offsets_to_transaction, offsets, self.metadata, 20)
        self._call("commit", self.producer.commit_transaction, 20)

    def after(self, refused: Refused) -> str:
        """What can be done then."""
        if refused.flag == "fatal":
            return NEW_PRODUCER
        try:
            self._call("abort", self.producer.abort_transaction, 20)
        except Refused as failed:
            assert (failed.flag, failed.code) == ("fatal", "INVALID_TXN_STATE")
            return ABORT_FATAL
        try:
            self.transact(b"next")
        except Refused as again:
            if again.flag == "unflagged":
                return NEXT_UNFLAGGED
            assert again.code == "OUT_OF_ORDER_SEQUENCE_NUMBER"
            self._call("abort", self.producer.abort_transaction, 20)
            self.transact(b"after next")
            return NEXT_ABORTS
        return NEXT_COMMITS

    def _call(self, name: str, call: Callable[..., Any], *arguments: object) -> None:
        try:
            call(*arguments)
        except (KafkaException, SystemError) as raised:
            cause = raised.__cause__ if isinstance(raised, SystemError) else raised
            assert isinstance(cause, KafkaException)
            raise Refused(name, cause.args[0]) from raised


@pytest.fixture(scope="module")
def metadata() -> Iterator[object]:
    """Of a group that nobody has joined: offsets are taken from whoever sends them."""
    with contextlib.closing(Consumer({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0})) as group:
        yield group.consumer_group_metadata()


@pytest.fixture(scope="module")
def topics(kafka_broker: RunningBroker) -> tuple[str, str]:
    names = (f"flags-out-{uuid.uuid4()}", f"flags-source-{uuid.uuid4()}")
    create_topics({"bootstrap.servers": kafka_broker.bootstrap_servers}, [TopicSpec(name) for name in names])
    return names


def _name(flag: Flag) -> str:
    return f"{flag.api.name}-{flag.error}{'-applied' if flag.applied else ''}"


@pytest.mark.parametrize("flag", FLAGS, ids=_name)
def test_an_error_at_a_request_is_told_as_it_is_written(
    flag: Flag, kafka_broker: RunningBroker, fault_proxy: FaultProxy, topics: tuple[str, str], metadata: object
) -> None:
    client = Client(fault_proxy.address, topics, metadata)
    first = uuid.uuid4().hex.encode()
    match, at = Match(flag.api, client.name, count=1), "response" if flag.applied else "request"
    fault = Close(match, at) if flag.error == "connection closed" else Fail(match, getattr(KafkaError, flag.error), at)  # type: ignore[arg-type]
    injected = fault_proxy.inject(fault)
    seen, then = COMMITS, ""
    try:
        client.transact(first)
    except Refused as refused:
        seen, then = str(refused), client.after(refused)
    assert injected.hits == 1
    assert (flag.seen, flag.then) == (seen, then)
    # Only what the broker says counts. What is still open is ended by a new producer of the same id.
    settings = {"bootstrap.servers": kafka_broker.bootstrap_servers, "transactional.id": client.name}
    Producer(settings).init_transactions(20)
    values = [message.value() for message in read_all(kafka_broker.bootstrap_servers, topics[0])]
    assert (first in values) is (not flag.then or flag.committed)
