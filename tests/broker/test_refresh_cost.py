"""`bench refresh` with small numbers: every phase comes about, on a real broker, with a real refresh and a group."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"rounds": 1, "rate": 500, "seconds": 2, "burst": 5_000, "window": 8_000, "training": 10, "swaps": 2}


def test_every_phase_is_measured_and_every_event_has_its_score() -> None:
    options = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "stream_adapt", "bench", "refresh", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)
    assert [] == told["notes"]
    for name in ("p99_ratios", "throughput_ratios", "throughput_after_swap_ratios"):
        (ratio,) = told[name]
        assert ratio > 0
    assert {"calm", "training", "after_swap"} == told["events_per_s"].keys()
    assert {"calm", "training"} == told["p99_ms"].keys()
    # No bound on what depends on the machine; but a group that never gets there is a failure anywhere.
    assert 0 < told["swap_s"] < 60
    assert 0 < told["max_poll_gap_s"] < told["max_poll_interval_s"]
    assert told["events"] > SMALL["window"] + 3 * SMALL["burst"]
    assert 3 == told["members"]
