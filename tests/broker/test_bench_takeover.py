"""`bench takeover` with small numbers: a member is killed, and the other one has its rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_takeover_is_timed_and_compared_with_what_it_may_take() -> None:
    options = ["--users", "5000", "--rounds", "2", "--seconds", "2", "--rate", "500"]
    command = [sys.executable, "-m", "stream_adapt", "bench", "takeover", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)
    # The versions of about half of the users, and what the killed member's partitions have beside.
    assert 2 * 5_000 / 2 < told["records"] < 4 * 5_000
    assert told["restored_per_s"] > 0
    assert (2, 2) == (len(told["takeovers_s"]), len(told["p99_ratios"]))
    # No bound on what depends on the machine.
    assert all(0 <= one < 120 for one in told["takeovers_s"])
