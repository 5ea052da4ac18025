"""The demo from end to end on a real broker, and that it leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import psutil
import pytest
from confluent_kafka.admin import AdminClient

from stream_adapt.datasets import open_source
from stream_adapt.datasets.synthetic import Synthetic, source
from stream_adapt.kafka.embedded import cache_dir
from stream_adapt.testing.broker import RunningBroker

pytestmark = pytest.mark.broker

EVENTS, LATE, PARTITIONS = 4000, 3, 2
DAY_MS = 86_400_000

MAPPING = """
columns: {event_id: event_id, user_id: user_id, item_id: item_id, timestamp: timestamp, label: label}
event_type: rating
feedback:
  levels: ["1", "2", "3", "4", "5"]
  target: "4"
  label: {range: [1, 5], cuts: [2, 3, 4, 5]}
"""

DEMO = """
import sys, msgspec
from pathlib import Path
from stream_adapt.demo import DemoOptions, run_demo
try:
    result = run_demo(msgspec.convert(msgspec.json.decode(sys.argv[1]), DemoOptions, dec_hook=lambda t, v: t(v)))
except KeyboardInterrupt:
    sys.exit(130)
print(msgspec.json.encode(result).decode())
"""


@dataclass(frozen=True)
class Desk:
    """A log of our own, and folders of our own for all that the demo writes."""

    folder: Path

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def start(self, **options: object) -> subprocess.Popen[str]:
        """The demo in a process of its own, as a shell starts it."""
        chosen = {
            "source": str(self.folder / "log.jsonl"),
            "mapping": str(self.folder / "mapping.yaml"),
            "output": str(self.folder / "reports"),
            "partitions": PARTITIONS,
            **options,
        }
        return subprocess.Popen(
            [sys.executable, "-c", DEMO, json.dumps(chosen)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TMPDIR": str(self.temporary),
                "STREAM_ADAPT_CACHE_DIR": str(self.folder / "cache"),
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1",  # for so few events more would only wait for one another
            },
        )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("demo")
    for name in ("tmp", "cache"):
        (folder / name).mkdir()
    # Models are kept apart from the user's; the broker's jars need not be fetched again.
    cache_dir().mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "kafka").symlink_to(cache_dir())
    (folder / "mapping.yaml").write_text(MAPPING)
    events = [msgspec.structs.asdict(event) for event in islice(open_source("synthetic").events(), EVENTS)]
    for number, event in enumerate(events[-LATE:]):
        event["timestamp"] = time.time_ns() // 1_000_000 + 10 * DAY_MS + number
    (folder / "log.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, events)))
    return Desk(folder)


@pytest.fixture
def own_broker(kafka_broker: RunningBroker) -> Iterator[str]:
    """The address of a broker, whose topics that the demo made are deleted at the end."""
    yield kafka_broker.bootstrap_servers
    admin = AdminClient({"bootstrap.servers": kafka_broker.bootstrap_servers})
    made = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith("stream-adapt-demo-")]
    for deleted in admin.delete_topics(made, operation_timeout=30).values() if made else ():
        deleted.result()


def test_every_event_has_one_output_and_the_result_says_so(desk: Desk, own_broker: str) -> None:
    demo = desk.start(as_json=True, bootstrap_servers=own_broker)
    out, said = demo.communicate(timeout=120)
    assert demo.returncode == 0, said
    result = json.loads(out)
    assert result["events"] == EVENTS // 2
    assert (result["scores"], result["dead_letters"]) == (EVENTS // 2 - LATE, LATE)
    assert f"{LATE} future_timestamp" in said
    assert result["delivery"] == "exactly_once"
    assert own_broker in result["broker"]
    assert result["partitions"] == PARTITIONS
    assert result["events_per_s"] > 0
    assert result["model_version"] in said
    assert 0 < result["logloss_adapted"] < 1
    assert 0.5 < result["auc_adapted"] < 1
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    assert list(desk.temporary.iterdir()) == []


def test_ctrl_c_in_the_middle_leaves_no_process_and_no_folder(desk: Desk, kafka_broker: RunningBroker) -> None:
    if kafka_broker.kind != "embedded":
        pytest.skip(f"the embedded broker is not what this run tests with, but {kafka_broker.kind}")
    demo = desk.start(seconds=600.0)
    try:
        said = _read_until(demo, " of 2,000 events")
        children = psutil.Process(demo.pid).children(recursive=True)
        assert {"java", "python"} <= {child.name().rstrip("0123456789.") for child in children}
        assert "pretrained" in said
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 130
        assert psutil.wait_procs(children, timeout=0)[1] == []
        assert list(desk.temporary.iterdir()) == []
    finally:
        demo.kill()
        demo.communicate()


def _read_until(demo: subprocess.Popen[str], what: str) -> str:
    """Lines of stderr up to one that has `what` in it."""
    assert demo.stderr is not None
    lines = []
    for line in demo.stderr:
        lines.append(line)
        if what in line:
            return "".join(lines)
    pytest.fail(f"the demo ended before it said {what!r}:\n{''.join(lines)}")


#: The world may change whenever it likes: the log is small, and that an alarm is right is not the question here.
QUICK = {
    "drift": {
        "group_events": 64,
        "reference_events": 2_048,
        "parameters": {"min_instances": 1, "delta": 0.2, "threshold": 5.0, "mode": "up"},
    },
    "refresh": {
        "mode": "child",
        "settle_events": 3_000,  # of fewer the challenger is too little better
        "training_s": 10,
        "shadow_events": 500,
        "error": 0.1,
    },
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_drift_on_the_way_is_scored_once_more_without_a_refresh_and_agrees(desk: Desk, own_broker: str) -> None:
    demo = desk.start(as_json=True, bootstrap_servers=own_broker, drift=True, seconds=8.0)
    out, said = demo.communicate(timeout=360)
    assert demo.returncode == 0, said
    result = json.loads(out)
    assert EVENTS // 10 == result["drift_at"]
    assert (None, None) == (result["alarm_at"], result["promoted_at"])  # too few events for a reference
    assert "the world changes after 400 events" in said
    assert f"{EVENTS // 2 - LATE:,} events before a refreshed model, scored again" in said
    assert result["auc_last_quarter_without_refresh"] == pytest.approx(result["auc_last_quarter"], abs=1e-6)
    assert Path(result["plot"]).name == "demo-drift-log.jsonl.png"
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    assert list(desk.temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_drift_on_the_way_is_detected_and_a_refreshed_model_does_better(desk: Desk, own_broker: str) -> None:
    events = source(Synthetic(seed=3, events=32_000, drift="none", users=500, items=150)).events()
    # Without features an id is all there is to know an item by.
    records = (msgspec.structs.asdict(event) | {"features": {}} for event in events)
    (desk.folder / "longer.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, records)))
    demo = desk.start(
        source=str(desk.folder / "longer.jsonl"),
        as_json=True,
        bootstrap_servers=own_broker,
        drift=True,
        seconds=180.0,
        settings=QUICK,
    )
    out, said = demo.communicate(timeout=660)
    assert demo.returncode == 0, said
    result = json.loads(out)
    assert 3_200 == result["drift_at"]
    assert 3_200 < result["alarm_at"] < result["promoted_at"] < 16_000, said
    assert result["auc_last_quarter"] > result["auc_last_quarter_without_refresh"] + 0.02
    assert result["model_version"] in said
    assert list(desk.temporary.iterdir()) == []
