"""The brokers under the members: Apache Kafka with timeouts short enough for the pace, restarted in the background.

There are two, because one alone is no fair opponent. Apache Kafka 4.3.0 takes a partition without a leader for one that
was deleted, and ends a transaction without a marker in it (TransactionMarkerChannelManager). Where every partition has
one replica, each restart leaves all of them without a leader for a moment: then aborted records become visible, or a
transaction stays open for ever and whoever reads committed waits behind it. With a replica on the other broker there is
always a leader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from stream_adapt.chaos import segments
from stream_adapt.chaos.members import Troubles
from stream_adapt.chaos.schedule import Timeouts
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients
from stream_adapt.kafka.embedded import HOST, EmbeddedKafka, free_ports
from stream_adapt.record import Source
from stream_adapt.testing.proxy import FaultProxy

#: Members may ask for sessions down to this.
_LEAST_SESSION_MS = 1_000
#: By default the coordinator looks every 10 s for transactions that timed out: too rarely to see what 5 s mean.
_LOOK_FOR_TIMEOUTS_MS = 500
#: So that leaders come back to a broker before it is restarted again (default: 300 s).
_LOOK_FOR_IMBALANCE_S = 10
#: A broker that came back has what it missed within that time, on a machine that is too small for all of it.
_IN_SYNC_S = 180.0
#: Kafka's own default: a broker that gets no processor for a while is not away.
_BROKER_SESSION_MS = 9_000
_LOOK_S = 0.2
#: What Apache Kafka logs when it ends a transaction without a marker in some partition.
_LEFT_OUT = "Couldn't find leader endpoint for partitions"


def properties(timeouts: Timeouts, replicas: int) -> dict[str, str]:
    """Broker settings on top of `kafka.embedded.SINGLE_NODE`."""
    session_ms = str(int(timeouts.session_s * 1000))
    return {
        "group.min.session.timeout.ms": str(_LEAST_SESSION_MS),
        "group.consumer.min.session.timeout.ms": str(_LEAST_SESSION_MS),
        "group.consumer.session.timeout.ms": session_ms,
        "group.consumer.heartbeat.interval.ms": "1000",
        "group.consumer.min.heartbeat.interval.ms": "500",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": str(_LOOK_FOR_TIMEOUTS_MS),
        "offsets.topic.replication.factor": str(replicas),
        "transaction.state.log.replication.factor": str(replicas),
        "leader.imbalance.check.interval.seconds": str(_LOOK_FOR_IMBALANCE_S),
        "broker.session.timeout.ms": str(_BROKER_SESSION_MS),
    }


@dataclass(frozen=True)
class Node:
    """A broker, and the proxy through which members reach it."""

    kafka: EmbeddedKafka
    proxy: FaultProxy


class Brokers:
    """Embedded Kafkas, restarted one at a time while others go on. What goes wrong is raised by `settle`."""

    def __init__(self, timeouts: Timeouts, troubles: Troubles, folder: Path, count: int = 2) -> None:
        self.restarts = 0
        self._troubles = troubles
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.nodes: list[Node] = []
        for number in range(1, count + 1):
            (port,) = free_ports(1)
            proxy = FaultProxy(HOST, port)
            behind = {
                "listeners": f"PROXY://{HOST}:{port}",
                "advertised.listeners": f"PROXY://{proxy.address}",
                "listener.security.protocol.map": "PROXY:PLAINTEXT",
            }
            first = self.nodes[0].kafka if self.nodes else None
            settings = {**properties(timeouts, count), **behind}
            kafka = EmbeddedKafka(folder / str(number), properties=settings, joins=first, node_id=number)
            self.nodes.append(Node(kafka, proxy))

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.kafka.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()
        self._end()

    @property
    def address(self) -> str:
        """For all but the members: past the proxies."""
        return ",".join(node.kafka.bootstrap_servers for node in self.nodes)

    @property
    def member_address(self) -> str:
        """For the members."""
        return ",".join(node.proxy.address for node in self.nodes)

    @property
    def version(self) -> str:
        """Of Apache Kafka, and how many there are."""
        return f"Apache Kafka {self.nodes[0].kafka.version}, {len(self.nodes)} brokers"

    def markers_left_out(self) -> list[str]:
        """Lines of the brokers' logs which say that a transaction was ended without markers in some partitions."""
        found: list[str] = []
        for node in self.nodes:
            with (node.kafka.data_dir / "broker.log").open(encoding="utf-8", errors="replace") as log:
                found += [line.strip() for line in log if _LEFT_OUT in line]
        return found

    def sent_again(self, topic: str, places: Sequence[Source]) -> bool:
        """Whether the records at these places are one that its idempotent producer sent again, with a new epoch.

        That is what librdkafka does with records under way when a broker that takes over misses sequence numbers; if
        the broker has such a record already, it takes it for another one.
        """
        partitions = {partition for partition, _ in places}
        folders = [
            node.kafka.data_dir / "logs" / f"{topic}-{partition}" for node in self.nodes for partition in partitions
        ]
        return len(partitions) == 1 and segments.sent_again(folders, [offset for _, offset in places])

    def restart(self, *, kill: bool) -> bool:
        """Ends the next one in turn, in order or by SIGKILL, and starts it again with its data; False if that is still
        under way with one."""
        if self._thread is not None and self._thread.is_alive():
            return False
        node = self.nodes[self.restarts % len(self.nodes)]
        self.restarts += 1
        self._thread = threading.Thread(target=self._again, args=(node.kafka, kill), name="chaos-broker", daemon=True)
        self._thread.start()
        return True

    def settle(self) -> None:
        """Returns when all are up.

        Raises:
            KafkaRefused: one did not come up again.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise KafkaRefused(f"the broker did not come back: {self._error}") from self._error

    def _again(self, kafka: EmbeddedKafka, kill: bool) -> None:
        began = time.monotonic()
        # Until it is over nobody knows when it ends.
        self._troubles.broker_away.append((began, float("inf")))
        try:
            if kill:
                kafka.kill()
                kafka.start()
            else:
                kafka.restart()
            self._wait_until_in_sync()
        except Exception as error:  # noqa: BLE001 - raised by settle()
            self._error = error
        finally:
            self._troubles.broker_away[-1] = (began, time.monotonic())

    def _wait_until_in_sync(self) -> None:
        """Returns when every replica has everything: then the other broker can do without this one."""
        admin = clients.admin({"bootstrap.servers": self.address, "log_level": 0})
        deadline = time.monotonic() + _IN_SYNC_S
        while behind := _behind(admin):
            if time.monotonic() > deadline:
                raise TimeoutError(f"replicas are still behind after {_IN_SYNC_S:g} s: {', '.join(behind)}")
            time.sleep(_LOOK_S)

    def _end(self) -> None:
        # Brokers without a controller first: they end in order while it is there.
        for node in reversed(self.nodes):
            node.kafka.stop()
            node.proxy.close()


def _behind(admin: AdminClient) -> list[str]:
    """Partitions of which not every replica is in sync."""
    try:
        topics = admin.list_topics(timeout=10).topics
    except KafkaException as error:
        return [f"no answer: {error}"]
    return [
        f"{name}[{number}]"
        for name, topic in topics.items()
        for number, partition in topic.partitions.items()
        if len(partition.isrs) < len(partition.replicas)
    ]
