"""The broker under the members: Apache Kafka with timeouts short enough for the pace, restarted in the background."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_adapt.chaos.members import Troubles
from stream_adapt.chaos.schedule import Timeouts
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.embedded import HOST, EmbeddedKafka, free_ports
from stream_adapt.testing.proxy import FaultProxy

#: Members may ask for sessions down to this.
_LEAST_SESSION_MS = 1_000
#: By default the coordinator looks every 10 s for transactions that timed out: too rarely to see what 5 s mean.
_LOOK_FOR_TIMEOUTS_MS = 500
_STARTUP_TIMEOUT_S = 180.0


def properties(timeouts: Timeouts) -> dict[str, str]:
    """Broker settings on top of `kafka.embedded.SINGLE_NODE`."""
    session_ms = str(int(timeouts.session_s * 1000))
    return {
        "group.min.session.timeout.ms": str(_LEAST_SESSION_MS),
        "group.consumer.min.session.timeout.ms": str(_LEAST_SESSION_MS),
        "group.consumer.session.timeout.ms": session_ms,
        "group.consumer.heartbeat.interval.ms": "1000",
        "group.consumer.min.heartbeat.interval.ms": "500",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": str(_LOOK_FOR_TIMEOUTS_MS),
    }


#: What Apache Kafka logs when it ends a transaction without a marker in some partition. It takes a partition whose
#: leader is not known for deleted (TransactionMarkerChannelManager), and after a restart, without replicas, there are
#: such partitions for a moment. Their records stay open until the next transaction of the same transactional.id ends:
#: then they share its fate. Aborted records become visible: an output comes twice, and no client can do anything.
_LEFT_OUT = "Couldn't find leader endpoint for partitions"


class Broker:
    """An embedded Kafka that can be restarted while others go on. What goes wrong with it is raised by `settle`."""

    def __init__(self, timeouts: Timeouts, troubles: Troubles, data_dir: Path) -> None:
        self.restarts = 0
        self._troubles = troubles
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        (port,) = free_ports(1)
        self.proxy = FaultProxy(HOST, port)
        behind = {
            "listeners": f"PROXY://{HOST}:{port}",
            "advertised.listeners": f"PROXY://{self.proxy.address}",
            "listener.security.protocol.map": "PROXY:PLAINTEXT",
        }
        # Members and controllers start at the same time: on a busy machine a broker takes long.
        self.kafka = EmbeddedKafka(
            data_dir, properties={**properties(timeouts), **behind}, startup_timeout_s=_STARTUP_TIMEOUT_S
        )

    def __enter__(self) -> Self:
        try:
            self.kafka.start()
        except BaseException:
            self.proxy.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()
        self.kafka.stop()
        self.proxy.close()

    @property
    def address(self) -> str:
        """For all but the members: past the proxy."""
        return self.kafka.bootstrap_servers

    def markers_left_out(self) -> list[str]:
        """Lines of the broker's log which say that a transaction was ended without markers in some partitions."""
        with (self.kafka.data_dir / "broker.log").open(encoding="utf-8", errors="replace") as log:
            return [line.strip() for line in log if _LEFT_OUT in line]

    def restart(self, *, kill: bool) -> bool:
        """Ends it, in order or by SIGKILL, and starts it again with its data; False if that is still under way."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.restarts += 1
        self._thread = threading.Thread(target=self._again, args=(kill,), name="chaos-broker", daemon=True)
        self._thread.start()
        return True

    def settle(self) -> None:
        """Returns when the broker is up.

        Raises:
            KafkaRefused: it did not come up again.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise KafkaRefused(f"the broker did not come back: {self._error}") from self._error

    def _again(self, kill: bool) -> None:
        began = time.monotonic()
        # Until it is over nobody knows when it ends.
        self._troubles.broker_away.append((began, float("inf")))
        try:
            if kill:
                self.kafka.kill()
                self.kafka.start()
            else:
                self.kafka.restart()
        except Exception as error:  # noqa: BLE001 - raised by settle()
            self._error = error
        finally:
            self._troubles.broker_away[-1] = (began, time.monotonic())
