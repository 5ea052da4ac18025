"""An application behind the fault proxy, and what must hold whatever happens to it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_app import RUN, App, event

from stream_adapt.testing.proxy import (
    Api,
    Fault,
    FaultProxy,
    Injected,
    Match,
)

SESSION_S, TRANSACTION_S, SOCKET_S = 4.0, 3.0, 2.0
SLOW = (sys.executable, str(Path(__file__).parent / "broker" / "slow_member.py"), "run")
#: For whatever should happen soon; a machine that does much else at the same time takes long.
WAIT_S = 120.0
#: Events before and while something goes wrong.
COUNT = 600


def ids(scores: list[dict[str, Any]]) -> Counter[str]:
    return Counter(score["event_id"] for score in scores)


def once(count: int) -> Counter[str]:
    return Counter(f"e{n}" for n in range(count))


def taught_once(scores: list[dict[str, Any]]) -> bool:
    """Whether every user's row has learned from each of the user's events, and from each once."""
    by_user: dict[str, list[int]] = {}
    for score in scores:
        by_user.setdefault(score["user_id"], []).append(score["adaptations"])
    return all(sorted(found) == list(range(1, len(found) + 1)) for found in by_user.values())


def _has_partitions(log: str) -> bool:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    return re.search(r"partitions assigned +partitions=\[\d", plain) is not None


@dataclass
class Stream:
    """An application whose members reach the broker through the proxy, and what has been sent to it."""

    app: App
    proxy: FaultProxy
    sent: int = 0

    def config(self, instance: str = "0", **kafka: Any) -> Any:
        """A member's configuration: every time-out short."""
        settings = {
            "bootstrap_servers": self.proxy.address,
            "session_timeout_ms": int(1000 * SESSION_S),
            "transaction_timeout_ms": int(1000 * TRANSACTION_S),
            "properties": {
                "socket.timeout.ms": int(1000 * SOCKET_S),
                "reconnect.backoff.max.ms": 500,
            },
            "consumer": {"heartbeat.interval.ms": 500},
            **kafka,
        }
        return self.app.config(instance, kafka=settings, input={"max_batch": 200, "latency_ms": 20})

    def start(self, instance: str = "0", command: Sequence[str] = RUN, **kafka: Any) -> subprocess.Popen[bytes]:
        return self.app.start(config=self.config(instance, **kafka), command=command)

    def running(self, members: int) -> None:
        """Waits until so many members have partitions."""
        deadline = time.monotonic() + WAIT_S
        while sum(_has_partitions(path.read_text()) for path in self.app.folder.glob("*.log")) < members:
            assert time.monotonic() < deadline, self.app.log()[-3000:]
            time.sleep(0.1)

    def send(self, count: int = COUNT) -> None:
        self.app.produce(event(n) for n in range(self.sent, self.sent + count))
        self.sent += count

    def inject(self, fault: type[Fault] | Any, api: Api, instance: str = "*", **options: Any) -> Injected:
        """A fault for the next request of one kind that a member of this application sends."""
        return self.proxy.inject(fault(Match(api, f"{self.app.name}.{instance}", count=1), **options))

    def arrived(self, timeout_s: float = WAIT_S) -> None:
        """Every event that was sent has exactly one score, and has taught its user's row exactly once."""
        scores = self.app.wait_for_outputs(self.sent, timeout_s)
        assert ids(scores) == once(self.sent)
        assert taught_once(scores)

    def logged(self, words: str, instance: str) -> None:
        """Waits until a member has logged this."""
        deadline = time.monotonic() + WAIT_S
        while not any(words in path.read_text() for path in self.app.folder.glob(f"{instance}-*.log")):
            assert time.monotonic() < deadline, self.app.log()[-3000:]
            time.sleep(0.1)
