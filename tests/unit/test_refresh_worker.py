"""The training process: what it says is believed as far as it can be checked; a crash or a hang is told as such."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil
import pytest

from stream_adapt.config import Config
from stream_adapt.refresh.training import Job, Outcome
from stream_adapt.refresh.worker import Worker

JOB = Job({}, "champion", 0)


@contextmanager
def worker(script: str, limit_s: float = 60.0) -> Iterator[Worker]:
    """A training that is a script; `folder` is where it has its job."""
    code = f"import sys, os, time, pathlib; folder = pathlib.Path(sys.argv[1]); {script}"
    with closing(Worker(Config(), JOB, command=[sys.executable, "-c", code], limit_s=limit_s)) as made:
        yield made


def outcome_of(made: Worker) -> Outcome:
    deadline = time.monotonic() + 30
    while (found := made.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_an_outcome_that_is_left_is_taken() -> None:
    with worker("""(folder / 'outcome.json').write_text('{"challenger": "v2", "figures": {"a": 1.5}}')""") as made:
        assert Outcome("v2", figures={"a": 1.5}) == outcome_of(made)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sys.exit(3)", "ended with exit code 3 and left no outcome"),
        ("os.kill(os.getpid(), 9)", "ended by signal SIGKILL and left no outcome"),
        ("pass", "ended with exit code 0 and left no outcome"),
        ("(folder / 'outcome.json').write_text('{')", "its outcome is none"),
        ("""(folder / 'outcome.json').write_text('{"challenger": 7}')""", "its outcome is none"),
        ("""(folder / 'outcome.json').write_text('{"challenger": "v"}'); sys.exit(1)""", "ended with exit code 1"),
    ],
)
def test_what_ends_otherwise_has_no_challenger_and_a_reason(script: str, reason: str) -> None:
    with worker(script) as made:
        found = outcome_of(made)
    assert found.challenger is None
    assert reason in found.reason


def test_one_that_hangs_is_killed_when_its_time_is_up() -> None:
    with worker("time.sleep(600)", limit_s=0.2) as made:
        assert "killed after 0 s" in outcome_of(made).reason
        assert not psutil.pid_exists(made.pid) or psutil.Process(made.pid).status() == psutil.STATUS_ZOMBIE


def test_closing_ends_it() -> None:
    with worker("time.sleep(600)") as made:
        assert made.poll() is None
        process = psutil.Process(made.pid)
    assert not process.is_running()


def test_nothing_of_the_job_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "canary")
    config = Config.model_validate({"kafka": {"properties": {"sasl.password": {"env": "KAFKA_PASSWORD"}}}})
    assert "canary" not in config.model_dump_json()
