"""Members of a consumer group as real processes, and what they read and write."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from confluent_kafka import Message, Producer

from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.learning import LearningRecord, decode
from stream_adapt.local import dying_with_parent
from stream_adapt.testing.broker import RunningBroker, read_all

STARS = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1, 5), (2, 3, 4, 5)))
ITEMS = [f"item-{i}" for i in range(200)]
EXIT_TIMEOUT_S = 60.0
#: What is started as a member.
RUN = (sys.executable, "-m", "stream_adapt", "run")


def event(number: int, user: str | None = None, **changes: Any) -> dict[str, Any]:
    """A valid event; its label and ids follow from its number."""
    return {
        "event_id": f"e{number}",
        "user_id": user or f"user-{number % 37}",
        "item_id": ITEMS[(number * 7) % len(ITEMS)],
        "event_type": "rating",
        "timestamp": 1_700_000_000_000 + number * 1000,
        "label": 1 + (number * 3) % 5,
        **changes,
    }


@dataclass
class App:
    """One application on the broker: its topics, its model, and its members."""

    name: str
    broker: RunningBroker
    folder: Path
    partitions: int
    members: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def scores_topic(self) -> str:
        return f"{self.name}.scores"

    def config(self, instance: str = "0", **sections: dict[str, Any] | str) -> Path:
        """Writes a configuration file for one member."""
        tree: dict[str, Any] = {
            "app": {"name": self.name, "instance": instance},
            "kafka": {"bootstrap_servers": self.broker.bootstrap_servers, "session_timeout_ms": 6_000,
                      "transaction_timeout_ms": 5_000},
            "input": {"latency_ms": 20},
            "model": {"path": str(self.folder / "models")},
            "metrics": {"port": 0},
            "state": {"dir": str(self.folder / f"state-{instance}")},
        }  # fmt: skip
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
        path = self.folder / f"{instance}-{uuid.uuid4().hex[:6]}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(
        self, *arguments: str, config: Path | None = None, command: Sequence[str] = RUN, **sections: Any
    ) -> subprocess.Popen[bytes]:
        """Starts `stream-adapt run`, or what stands for it, as its own process."""
        path = config or self.config(**sections)
        log = path.with_suffix(".log").open("ab")
        member = subprocess.Popen(
            dying_with_parent([*command, "-c", str(path), *arguments]),
            stderr=log,
            stdout=log,
        )
        log.close()
        self.members.append(member)
        return member

    def log(self) -> str:
        """What all members have logged."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def produce(self, events: Iterable[dict[str, Any]]) -> int:
        """Produces events, keyed by user; returns how many."""
        return self.produce_raw((e["user_id"].encode(), json.dumps(e).encode()) for e in events)

    def produce_raw(self, records: Iterable[tuple[bytes | None, bytes | None]], partition: int | None = None) -> int:
        """Produces keys and values as they are."""
        producer = Producer(
            {"bootstrap.servers": self.broker.bootstrap_servers, "linger.ms": 5, "enable.idempotence": True}
        )
        to = {} if partition is None else {"partition": partition}
        count = 0
        for count, (key, value) in enumerate(records, 1):
            producer.produce(f"{self.name}.events", value, key, **to)
            if count % 10_000 == 0:
                producer.poll(0.1)
        assert producer.flush(30) == 0
        return count

    def scores(self) -> list[dict[str, Any]]:
        """Every committed score."""
        return [json.loads(m.value()) for m in read_all(self.broker.bootstrap_servers, self.scores_topic)]

    def dead_letters(self) -> list[Message]:
        """Every committed dead letter."""
        return read_all(self.broker.bootstrap_servers, f"{self.name}.dead-letters")

    def learning(self) -> list[LearningRecord]:
        """Every committed learning record."""
        return [decode(m.value() or b"") for m in read_all(self.broker.bootstrap_servers, f"{self.name}.learning")]

    def wait_for_outputs(self, count: int, timeout_s: float = 60.0) -> list[dict[str, Any]]:
        """Scores, once scores and dead letters are at least `count`."""
        deadline = time.monotonic() + timeout_s
        while True:
            scores = self.scores()
            if len(scores) + len(self.dead_letters()) >= count:
                return scores
            assert time.monotonic() < deadline, f"{len(scores)} scores of {count} outputs; log:\n{self.log()[-3000:]}"
            assert not self.members or any(m.poll() is None for m in self.members), (
                f"no member lives; log:\n{self.log()[-3000:]}"
            )

    def stop(self, member: subprocess.Popen[bytes], sent: int = signal.SIGTERM) -> int:
        """Signals a member and waits for its end; returns its exit code. Nobody waits for its outputs any more."""
        member.send_signal(sent)
        code = member.wait(EXIT_TIMEOUT_S)
        self.members.remove(member)
        return code

    def end(self) -> None:
        """Kills what still runs."""
        for member in self.members:
            if member.poll() is None:
                member.kill()
                member.wait(EXIT_TIMEOUT_S)
