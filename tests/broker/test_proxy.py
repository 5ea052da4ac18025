"""The fault proxy between real clients and a real Apache Kafka: each fault does what it says, and nothing else."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from stream_adapt.testing.broker import RunningBroker, TopicFactory, read_all
from stream_adapt.testing.proxy import (
    Api,
    Close,
    Cut,
    Delay,
    Drop,
    Fail,
    FaultProxy,
    HalfOpen,
    Hold,
    Match,
    Refuse,
    Trickle,
)

pytestmark = pytest.mark.broker

#: After this a client gives a request up.
SOCKET_TIMEOUT_S = 1.0
NOT_LEADER = KafkaError.NOT_LEADER_FOR_PARTITION
Reports = list[tuple[KafkaError | None, bytes | None]]


class Client:
    """A producer through the proxy, and the reports on what it sent."""

    def __init__(self, address: str, topic: str, **settings: object) -> None:
        self.topic, self.reports = topic, Reports()
        self.producer = Producer(
            {
                "bootstrap.servers": address,
                "client.id": f"test-{uuid.uuid4().hex[:6]}",
                "socket.timeout.ms": int(1000 * SOCKET_TIMEOUT_S),
                "reconnect.backoff.ms": 10,
                "reconnect.backoff.max.ms": 100,
                "retry.backoff.ms": 20,
                "log_level": 0,
                "on_delivery": self._report,
                **settings,
            }
        )

    def _report(self, error: KafkaError | None, message: Message) -> None:
        self.reports.append((error, message.value()))

    def send(self, value: bytes, timeout_s: float = 20.0) -> float:
        """Sends one record and waits for its report; the seconds it took."""
        started = time.monotonic()
        self.producer.produce(self.topic, value)
        assert self.producer.flush(timeout_s) == 0
        return time.monotonic() - started


@pytest.fixture
def client(fault_proxy: FaultProxy, topic_factory: TopicFactory) -> Iterator[Callable[..., Client]]:
    """A function that makes clients whose connections are warm: the faults hit what the test does, not what it says."""
    made: list[Client] = []

    def make(**settings: object) -> Client:
        one = Client(fault_proxy.address, topic_factory(), **settings)
        if "transactional.id" not in settings:
            one.send(b"first")
            one.reports.clear()
        made.append(one)
        return one

    yield make
    fault_proxy.clear()


def _values(broker: RunningBroker, client: Client, isolation: str = "read_committed") -> list[object]:
    return [m.value() for m in read_all(broker.bootstrap_servers, client.topic, isolation)]  # type: ignore[arg-type]


def test_without_faults_everything_passes_and_is_counted(
    client: Callable[..., Client], fault_proxy: FaultProxy, kafka_broker: RunningBroker
) -> None:
    one = client()
    large = bytes(900_000)
    one.send(large)
    assert [b"first", large] == _values(kafka_broker, one)
    (node,) = AdminClient({"bootstrap.servers": fault_proxy.address}).list_topics(timeout=10).brokers.values()
    assert fault_proxy.address == f"{node.host}:{node.port}"
    counts = fault_proxy.counts
    assert counts.requests[Api.PRODUCE] == counts.responses[Api.PRODUCE] == 2
    assert counts.connections >= 1
    assert counts.faults == {}


def test_delay_takes_as_long_as_it_says_and_only_the_matched_request(
    client: Callable[..., Client], fault_proxy: FaultProxy
) -> None:
    one = client()
    injected = fault_proxy.inject(Delay(Match(Api.PRODUCE, first=2, count=1), 0.5))
    assert one.send(b"a") < 0.4
    assert one.send(b"b") >= 0.5
    assert one.send(b"c") < 0.4
    assert injected.hits == 1


def test_a_held_request_reaches_the_broker_although_its_client_has_gone(
    client: Callable[..., Client], fault_proxy: FaultProxy, kafka_broker: RunningBroker
) -> None:
    one = client(**{"message.timeout.ms": 1_500, "enable.idempotence": False, "retries": 0})
    held = fault_proxy.inject(Hold(Match(Api.PRODUCE, count=1)))
    one.send(b"late")
    held.wait()
    ((error, _),) = one.reports
    assert error is not None
    del one.producer
    assert [b"first"] == _values(kafka_broker, one)
    held.lift()
    _until(lambda: _values(kafka_broker, one) == [b"first", b"late"])


@pytest.mark.parametrize("fault", [Drop, Close], ids=lambda f: f.__name__)
@pytest.mark.parametrize("at", ["request", "response"])
def test_a_request_or_its_answer_is_lost_and_sent_again(
    client: Callable[..., Client], fault_proxy: FaultProxy, kafka_broker: RunningBroker, fault: type, at: str
) -> None:
    """An idempotent producer's second try is not written twice, whether or not the first had arrived."""
    one = client(**{"enable.idempotence": True})
    lost = fault_proxy.inject(fault(Match(Api.PRODUCE, count=1), at=at))
    one.send(b"once")
    assert lost.hits == 1
    assert one.reports == [(None, b"once")]
    assert [b"first", b"once"] == _values(kafka_broker, one)
    assert fault_proxy.counts.requests[Api.PRODUCE] == (2 if at == "request" else 3)


@pytest.mark.parametrize("at", ["request", "response"])
def test_an_error_is_told_for_an_answer(
    client: Callable[..., Client], fault_proxy: FaultProxy, kafka_broker: RunningBroker, at: str
) -> None:
    """At the request the broker has never heard of the record; at the response it is written all the same."""
    one = client(**{"enable.idempotence": False})
    fault_proxy.inject(Fail(Match(Api.PRODUCE, count=1), KafkaError.MSG_SIZE_TOO_LARGE, at=at))  # type: ignore[arg-type]
    one.send(b"refused")
    ((error, _),) = one.reports
    assert error is not None
    assert KafkaError.MSG_SIZE_TOO_LARGE == error.code()
    assert (b"refused" in _values(kafka_broker, one)) is (at == "response")


@pytest.mark.parametrize("at", ["request", "response"])
@pytest.mark.parametrize(
    ("api", "call"),
    [
        (Api.INIT_PRODUCER_ID, "init_transactions"),
        (Api.ADD_PARTITIONS_TO_TXN, "flush"),
        (Api.ADD_OFFSETS_TO_TXN, "send_offsets"),
        (Api.TXN_OFFSET_COMMIT, "send_offsets"),
        (Api.END_TXN, "commit"),
    ],
    ids=lambda value: value.name if isinstance(value, Api) else "",
)
def test_an_error_can_be_told_for_every_transactional_request(
    client: Callable[..., Client], fault_proxy: FaultProxy, api: Api, call: str, at: str
) -> None:
    one = client(**{"transactional.id": f"test-{uuid.uuid4()}", "transaction.timeout.ms": 5_000})
    match = Match(api, count=1)
    fault_proxy.inject(Fail(match, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, at=at))  # type: ignore[arg-type]
    with pytest.raises((KafkaException, SystemError)) as raised:
        _transaction(one)
    root = raised.value.__cause__ or raised.value
    assert KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED == root.args[0].code()
    assert fault_proxy.counts.faults == {"Fail": 1}


def test_only_the_clients_that_are_meant_suffer(client: Callable[..., Client], fault_proxy: FaultProxy) -> None:
    one, other = client(**{"client.id": "app.0"}), client(**{"client.id": "app.1"})
    fault_proxy.inject(Delay(Match(Api.PRODUCE, client_id="*.0"), 0.5))
    assert other.send(b"a") < 0.4
    assert one.send(b"a") >= 0.5


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connections_are_made_again(client: Callable[..., Client], fault_proxy: FaultProxy, reset: bool) -> None:
    one = client(**{"client.id": "cut-me"})
    before = fault_proxy.counts.connections
    cut = fault_proxy.inject(Cut("cut-me", reset=reset))
    assert cut.hits >= 1
    one.send(b"again")
    assert [(None, b"again")] == one.reports
    assert fault_proxy.counts.connections > before


def test_a_half_open_connection_swallows_everything_until_the_client_gives_it_up(
    client: Callable[..., Client], fault_proxy: FaultProxy
) -> None:
    one = client()
    fault_proxy.inject(HalfOpen())
    assert one.send(b"a") >= SOCKET_TIMEOUT_S  # then a new connection
    assert [(None, b"a")] == one.reports
    gone = fault_proxy.inject(HalfOpen(new_too=True))
    one.producer.produce(one.topic, b"b")
    assert one.producer.flush(2 * SOCKET_TIMEOUT_S) == 1
    gone.lift()
    assert one.producer.flush(20) == 0


def test_a_trickle_carries_so_many_bytes_a_second(client: Callable[..., Client], fault_proxy: FaultProxy) -> None:
    one = client(**{"socket.timeout.ms": 30_000})
    slow = fault_proxy.inject(Trickle(bytes_per_s=100))
    assert one.send(b"x" * 20) > 1  # a batch of one record takes more than 100 bytes, and so does its answer
    slow.lift()
    assert one.send(b"x" * 100_000) < 1


def test_refused_connections_do_not_come_about(client: Callable[..., Client], fault_proxy: FaultProxy) -> None:
    one = client()
    refused = fault_proxy.inject(Refuse())
    fault_proxy.inject(Cut())
    one.producer.produce(one.topic, b"a")
    refused.wait(3)
    assert one.producer.flush(0.1) == 1
    refused.lift()
    assert one.producer.flush(20) == 0


def test_a_frame_that_is_not_kafkas_is_told_to_whoever_clears_or_closes(kafka_broker: RunningBroker) -> None:
    host, port = kafka_broker.bootstrap_servers.split(":")
    proxy = FaultProxy(host, int(port))
    with socket.create_connection(("127.0.0.1", proxy.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
    with pytest.raises(RuntimeError, match="plain-text listener"):
        proxy.close()
    proxy.close()


def test_a_client_sees_a_reset_while_there_is_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with FaultProxy("127.0.0.1", port) as proxy, pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", proxy.port)).recv(1)


def test_the_readmes_example_holds(
    kafka_broker: RunningBroker, topic_factory: TopicFactory, fault_proxy: FaultProxy
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = [
        b for b in re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE) if "fault_proxy" in b
    ]
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    test(kafka_broker, topic_factory, fault_proxy)


def test_errors_of_other_requests_cannot_be_set(fault_proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="END_TXN"):
        fault_proxy.inject(Fail(Match(Api.FETCH), 1))


def _transaction(client: Client) -> None:
    """One transaction with a record and an offset, by hand."""
    producer = client.producer
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(client.topic, b"a")
    producer.flush(10)
    with contextlib.closing(Consumer({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0})) as group:
        offsets = [TopicPartition(client.topic, 0, 1)]
        producer.send_offsets_to_transaction(offsets, group.consumer_group_metadata(), 10)
    producer.commit_transaction(10)


def _until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
