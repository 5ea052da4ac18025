"""What a member says of itself when the way to the broker is gone, and when it is back."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from broker_app import App, event
from prometheus_client.parser import text_string_to_metric_families

from stream_adapt.kafka.embedded import free_ports
from stream_adapt.testing.proxy import Cut, FaultProxy, Refuse

pytestmark = pytest.mark.broker

WAIT_S = 60.0


def asked(port: int, path: str) -> tuple[int, str]:
    """Status and body; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()
    except OSError:
        return 0, ""


def becomes(port: int, state: str) -> tuple[int, dict[str, Any]]:
    """Waits until /readyz says this state; its status and answer."""
    deadline = time.monotonic() + WAIT_S
    while True:
        status, body = asked(port, "/readyz")
        report = json.loads(body) if body else {}
        if report.get("state") == state:
            return status, report
        assert time.monotonic() < deadline, (state, status, report)
        time.sleep(0.1)


def values(port: int, family: str) -> dict[tuple[str, ...], float]:
    """Samples of one metric by their label values."""
    families = text_string_to_metric_families(asked(port, "/metrics")[1])
    return {tuple(s.labels.values()): s.value for f in families for s in f.samples if s.name == family}


def test_a_broker_that_cannot_be_reached_makes_a_member_unready_but_alive(
    make_app: Callable[..., App], fault_proxy: FaultProxy
) -> None:
    app, (port,) = make_app(partitions=1), free_ports(1)
    kafka = {"bootstrap_servers": fault_proxy.address, "session_timeout_ms": 30_000,
             "properties": {"reconnect.backoff.max.ms": 500}}  # fmt: skip
    app.start(kafka=kafka, metrics={"port": port})
    app.produce(event(n) for n in range(20))
    status, _ = becomes(port, "idle")
    assert 200 == status
    app.wait_for_outputs(20)

    closed = fault_proxy.inject(Refuse())
    fault_proxy.inject(Cut())
    status, report = becomes(port, "unreachable")

    assert 503 == status
    assert "no broker has been connected for" in report["reason"]
    assert [0] == [shard["partition"] for shard in report["partitions"]]
    assert 200 == asked(port, "/healthz")[0]
    assert values(port, "stream_adapt_unreachable_seconds")[()] >= 5
    assert values(port, "stream_adapt_client_errors_total")["connection",] > 0
    assert values(port, "process_resident_memory_bytes")[()] > 10_000_000

    closed.lift()
    status, _ = becomes(port, "idle")

    assert 200 == status
    assert 0 == values(port, "stream_adapt_unreachable_seconds")[()]
