"""The embedded Apache Kafka: it starts, it keeps what it should keep, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.kafka import embedded
from stream_adapt.kafka.embedded import Announcement, Distribution, EmbeddedKafka, fetch, free_ports, node_properties
from stream_adapt.kafka.topics import TopicSpec, create_topics
from stream_adapt.testing.broker import RunningBroker, TopicFactory, read_all

SERVE = "from stream_adapt.kafka.embedded import serve; serve(as_json=True)"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for temporary files, also those of processes that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[bytes], Announcement]]:
    """`stream-adapt broker --json` as a process of its own, in its own group, as a terminal would start it."""
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as process:
        try:
            assert process.stdout is not None
            yield process, msgspec.json.decode(process.stdout.readline(), type=Announcement)
        finally:
            process.kill()


def gone(pid: int | None) -> bool:
    """Whether a process has ended, or does so within 10 s."""
    assert pid is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(10)
    return not psutil.pid_exists(pid)


def produce(bootstrap_servers: str, topic: str, *values: bytes) -> None:
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    for value in values:
        producer.produce(topic, value)
    assert producer.flush(20) == 0


def values(bootstrap_servers: str, topic: str) -> list[bytes | str | None]:
    return [message.value() for message in read_all(bootstrap_servers, topic)]


@pytest.mark.broker
def test_a_stopped_broker_leaves_no_process_and_no_folder(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), EmbeddedKafka() as kafka:
        assert kafka.version == embedded.KAFKA_VERSION
        assert AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=10).brokers
        pid = kafka.pid
        assert list(temporary.iterdir()) == [kafka.data_dir]
        raise KeyboardInterrupt
    assert gone(pid)
    assert list(temporary.iterdir()) == []
    kafka.stop()


@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_in_order_when_its_process_group_gets_a_signal(temporary: Path, number: signal.Signals) -> None:
    with serving() as (process, told):
        os.killpg(process.pid, number)
        assert process.wait(20) == 0
    assert gone(told.pid)
    assert list(temporary.iterdir()) == []


@pytest.mark.broker
def test_serve_says_so_and_fails_when_the_broker_dies_by_itself(temporary: Path) -> None:
    with serving() as (process, told):
        assert told.pid is not None
        os.kill(told.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode != 0
        assert b"ended by itself" in stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.broker
@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel ends a process with its parent")
def test_the_broker_of_a_killed_owner_dies_and_its_folder_is_swept_at_the_next_start(temporary: Path) -> None:
    with serving() as (process, told):
        process.kill()
        process.wait(20)
    assert gone(told.pid)
    assert list(temporary.iterdir()) == [Path(told.data_dir)]
    with EmbeddedKafka() as kafka:
        assert list(temporary.iterdir()) == [kafka.data_dir]


@pytest.mark.broker
def test_the_broker_outlives_the_thread_that_started_it() -> None:
    kafka = EmbeddedKafka()
    starter = threading.Thread(target=kafka.start)
    starter.start()
    starter.join()
    with kafka:
        assert not kafka.wait(timeout_s=1)


@pytest.mark.broker
def test_data_in_a_given_folder_survive_a_stop_with_other_ports_and_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with EmbeddedKafka(folder) as kafka:
        create_topics({"bootstrap.servers": kafka.bootstrap_servers}, [TopicSpec("kept", 2)])
        produce(kafka.bootstrap_servers, "kept", b"one")
        with pytest.raises(ConfigError, match="in use"):
            EmbeddedKafka(folder).start()
    with EmbeddedKafka(folder) as again:
        assert again.bootstrap_servers != kafka.bootstrap_servers
        assert values(again.bootstrap_servers, "kept") == [b"one"]
        produce(again.bootstrap_servers, "kept", b"two")
        address = again.bootstrap_servers
        again.kill()
        assert again.pid is None
        again.start()
        assert again.bootstrap_servers == address
        assert sorted(map(str, values(address, "kept"))) == ["b'one'", "b'two'"]
    assert folder.is_dir()


@pytest.mark.broker
def test_two_brokers_run_side_by_side_and_know_nothing_of_each_other(
    kafka_broker: RunningBroker, topic_factory: TopicFactory
) -> None:
    topic = topic_factory()
    with EmbeddedKafka() as other:
        assert other.bootstrap_servers != kafka_broker.bootstrap_servers
        assert topic not in AdminClient({"bootstrap.servers": other.bootstrap_servers}).list_topics(timeout=10).topics


@pytest.mark.broker
def test_another_listener_answers_with_its_own_address(temporary: Path) -> None:
    (port,) = free_ports(1)
    properties = {"listeners": f"TAPPED://127.0.0.1:{port}", "listener.security.protocol.map": "TAPPED:PLAINTEXT"}
    with EmbeddedKafka(properties=properties) as kafka:
        for address in (kafka.bootstrap_servers, f"127.0.0.1:{port}"):
            (node,) = AdminClient({"bootstrap.servers": address}).list_topics(timeout=10).brokers.values()
            assert f"{node.host}:{node.port}" == address


@pytest.mark.broker
def test_a_broker_that_cannot_start_tells_the_end_of_its_log(temporary: Path) -> None:
    with pytest.raises(KafkaRefused, match=r"num\.partitions"):
        EmbeddedKafka(properties={"num.partitions": "-7"}).start()
    assert list(temporary.iterdir()) == []


@pytest.mark.broker
def test_read_committed_shows_a_committed_transaction_and_hides_an_aborted_one(
    kafka_broker: RunningBroker, topic_factory: TopicFactory
) -> None:
    topic = topic_factory()
    address = kafka_broker.bootstrap_servers
    producer = Producer({"bootstrap.servers": address, "transactional.id": f"test-{uuid.uuid4()}"})
    producer.init_transactions(30)
    for value, end in ((b"kept", producer.commit_transaction), (b"dropped", producer.abort_transaction)):
        producer.begin_transaction()
        producer.produce(topic, value)
        assert producer.flush(20) == 0
        end(30)
    assert values(address, topic) == [b"kept"]
    assert [m.value() for m in read_all(address, topic, "read_uncommitted")] == [b"kept", b"dropped"]


def test_a_port_that_is_taken_is_refused_before_anything_starts(temporary: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            free_ports(2, port)


def test_a_folder_with_other_files_is_refused(tmp_path: Path, some_jars: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        EmbeddedKafka(tmp_path, kafka_home=some_jars).start()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def some_jars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an unpacked Apache Kafka."""
    home = tmp_path_factory.mktemp("kafka")
    fill(home)
    return home


def fill(home: Path, version: str = embedded.KAFKA_VERSION) -> int:
    (home / "libs").mkdir(parents=True, exist_ok=True)
    for name in (f"kafka-clients-{version}.jar", f"kafka-clients-{version}-test.jar.asc"):
        (home / "libs" / name).touch()
    return 1


def test_a_distribution_is_known_by_its_clients_jar(some_jars: Path) -> None:
    assert Distribution.at(some_jars) == Distribution(some_jars, embedded.KAFKA_VERSION)


@pytest.mark.parametrize("versions", [(), ("3.9.1", "4.3.0")])
def test_a_folder_without_exactly_one_kafka_is_no_distribution(tmp_path: Path, versions: tuple[str, ...]) -> None:
    for version in versions:
        fill(tmp_path, version)
    with pytest.raises(ConfigError, match="not an unpacked Apache Kafka"):
        Distribution.at(tmp_path)


@pytest.fixture
def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], int]], None]:
    """Puts a function in the place of the download, and an empty folder in the place of the cache."""
    monkeypatch.setenv("STREAM_ADAPT_CACHE_DIR", str(tmp_path))

    def replace(download: Callable[[Path], int]) -> None:
        monkeypatch.setattr(embedded, "_resolve", lambda _version, into, _console: download(into))

    return replace


def test_processes_that_need_the_jars_at_once_fetch_them_once(resolver: Callable[..., None]) -> None:
    downloads: list[Path] = []
    both = threading.Barrier(2)

    def download(into: Path) -> int:
        downloads.append(into)
        return fill(into)

    def need() -> str:
        both.wait()
        return fetch().version

    resolver(download)
    with ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in (pool.submit(need), pool.submit(need))] == [embedded.KAFKA_VERSION] * 2
    assert len(downloads) == 1


def test_a_download_that_breaks_off_leaves_nothing_that_is_taken_for_whole(resolver: Callable[..., None]) -> None:
    def break_off(into: Path) -> int:
        fill(into)
        raise ConnectionError("the cable was pulled")

    resolver(break_off)
    with pytest.raises(KafkaRefused, match=r"cable was pulled.*HTTPS_PROXY.*--bootstrap-servers"):
        fetch()
    assert [path.name for path in embedded.cache_dir().iterdir()] == ["download.lock"]


def test_jars_of_another_version_than_asked_for_are_refused(resolver: Callable[..., None]) -> None:
    resolver(lambda into: fill(into, "3.9.1"))
    with pytest.raises(ConfigError, match=r"3\.9\.1, not 4"):
        fetch()


def test_given_listeners_are_added_and_other_properties_win() -> None:
    extra = {
        "listeners": "SASL_SSL://127.0.0.1:7,PROXIED://127.0.0.1:8",
        "advertised.listeners": "PROXIED://127.0.0.1:80",
        "num.partitions": "3",
        "node.id": "9",
    }
    settings = node_properties(1, 2, Path("logs"), extra)
    assert settings["listeners"] == f"PLAINTEXT://127.0.0.1:1,CONTROLLER://127.0.0.1:2,{extra['listeners']}"
    assert settings["advertised.listeners"] == ("PLAINTEXT://127.0.0.1:1,PROXIED://127.0.0.1:80,SASL_SSL://127.0.0.1:7")
    assert (settings["num.partitions"], settings["node.id"]) == ("3", "9")


def _leaders(kafka: EmbeddedKafka, topic: str) -> tuple[set[int], set[int]]:
    """Nodes that lead a partition, and nodes that are in sync in all of them."""
    found = AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(topic, timeout=15).topics[topic]
    partitions = found.partitions.values()
    return {p.leader for p in partitions}, set.intersection(*(set(p.isrs) for p in partitions))


def test_a_node_that_joins_another_one_leads_what_that_one_led_while_it_is_away(tmp_path: Path) -> None:
    with EmbeddedKafka() as first, EmbeddedKafka(tmp_path, joins=first, node_id=2) as second:
        create_topics({"bootstrap.servers": first.bootstrap_servers}, [TopicSpec("replicated", 4, 2)])
        assert ({1, 2}, {1, 2}) == _leaders(first, "replicated")
        producer = Producer({"bootstrap.servers": first.bootstrap_servers, "acks": "all"})
        second.restart()
        for number in range(4):
            producer.produce("replicated", b"%d" % number, partition=number)
        assert 0 == producer.flush(30)
        assert 4 == len(read_all(f"{second.bootstrap_servers}", "replicated"))
        second.kill()
        # Its session has to be over before the other one leads.
        assert 4 == len(read_all(first.bootstrap_servers, "replicated"))
