"""Load, takeovers and how members end: what can be said without a broker."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from stream_adapt.chaos import load, refreshing
from stream_adapt.chaos.load import ID_HEADER, REASON_HEADER, Record, records
from stream_adapt.chaos.members import Member, Team, Troubles, judge, tracebacks
from stream_adapt.chaos.refreshing import Operator, Reaper, trainings_of
from stream_adapt.chaos.watch import Sample, percentile, takeovers_s
from stream_adapt.config import Config
from stream_adapt.decode import REASONS, Decoder
from stream_adapt.errors import KafkaRefused
from stream_adapt.record import RawBatch

SEED = 5


def _first(count: int, prefix: str = "e") -> list[Record]:
    return list(islice(records(SEED, prefix), count))


def test_equal_seeds_give_equal_records_and_prefixes_keep_streams_apart() -> None:
    assert _first(500) == _first(500)
    ids = [record.record_id for record in _first(500) + _first(500, "t")]
    assert len(ids) == len(set(ids))


def test_bad_records_are_refused_for_the_reason_in_their_header_and_good_ones_are_not() -> None:
    drawn = _first(4_000)
    features, feedback = load.declared(SEED)
    raw = RawBatch(
        [r.key for r in drawn],
        [r.value for r in drawn],
        np.zeros(len(drawn), dtype=np.int32),
        np.arange(len(drawn), dtype=np.int64),
    )
    batch, dead = Decoder(features, feedback)(raw)
    said = {letter.offset: letter.reason for letter in dead}
    headers = [dict(record.headers) for record in drawn]
    assert {n: h[REASON_HEADER].decode() for n, h in enumerate(headers) if REASON_HEADER in h} == said
    assert set(said.values()) == set(load.BAD) <= set(REASONS)
    scored = [h[ID_HEADER].decode() for h in headers if REASON_HEADER not in h]
    assert scored == batch.event_ids


def test_a_few_users_get_a_large_share() -> None:
    hot = sum((record.key or b"").startswith(b"hot-") for record in _first(2_000))
    assert 0.2 < hot / 2_000 < 0.4


def _samples(*offsets: dict[int, int]) -> list[Sample]:
    return [Sample(float(n), n + 0.1, found) for n, found in enumerate(offsets)]


def test_a_takeover_lasts_until_the_last_partition_has_a_commit_again() -> None:
    samples = _samples({0: 5, 1: 5}, {0: 6, 1: 5}, {0: 7, 1: 5}, {0: 8, 1: 5}, {0: 9, 1: 6})
    assert [pytest.approx(4.1 - 0.5)] == takeovers_s([0.5], samples)


def test_a_takeover_that_never_came_is_infinite() -> None:
    assert [math.inf, math.inf] == takeovers_s([0.5, 99.0], _samples({0: 5, 1: 5}, {0: 6, 1: 5}, {0: 7, 1: 5}))


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.99) == 0.0


@pytest.mark.parametrize(
    ("code", "told", "age_s", "away", "fencings", "expected"),
    [
        (-9, signal.SIGKILL, 30, False, 0, True),
        (-9, None, 30, False, 0, False),  # somebody else killed it: out of memory?
        (0, signal.SIGTERM, 30, False, 0, True),
        (0, None, 30, False, 0, False),
        (-15, signal.SIGTERM, 1, False, 0, True),
        (-15, signal.SIGTERM, 60, False, 0, False),
        (3, None, 30, True, 0, True),
        (3, None, 30, False, 0, False),
        (3, signal.SIGTERM, 30, True, 0, True),
        (4, None, 30, False, 2, True),
        (4, None, 30, False, 1, False),  # once is no reason to go
        (1, None, 30, True, 2, False),
        (-11, None, 30, True, 2, False),
        (5, None, 30, True, 2, False),
    ],
)
def test_an_end_is_expected_only_with_its_cause(
    code: int, told: int | None, age_s: float, away: bool, fencings: int, expected: bool
) -> None:
    assert expected == judge(code, told=told, age_s=age_s, away=away, fencings=fencings)[0]


def test_troubles_explain_what_follows_them_closely() -> None:
    troubles = Troubles([(10.0, 20.0)], {"m1": [(30.0, 31.0)]}, {"m1": [(32.0, 40.0)]})
    assert troubles.away("m0", 15.0)
    assert not troubles.away("m0", 21.0)
    assert troubles.away("m1", 31.0)
    assert 2 == troubles.fencings("m1", 25.0)
    assert 0 == troubles.fencings("m0", 25.0)


def test_tracebacks_are_found_with_what_they_say(tmp_path: Path) -> None:
    log = tmp_path / "m0.log"
    log.write_text('fine\nTraceback (most recent call last):\n  File "x.py", line 1\n    f()\nValueError: no\nfine\n')
    assert ["m0.log:2: traceback, ValueError: no"] == tracebacks(log)
    log.write_text("fine\n")
    assert [] == tracebacks(log)


#: A controller as far as its child goes: one that looks like a training.
_CONTROLLER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()", "stream_adapt.refresh.training"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
child.wait()
print(child.returncode, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are found by /proc")
def test_the_training_of_a_controller_is_killed_when_its_time_has_come(tmp_path: Path) -> None:
    team = Team(tmp_path, {}, (1.0, 1.0))
    with subprocess.Popen([sys.executable, "-c", _CONTROLLER], stdout=subprocess.PIPE, text=True) as controller:
        assert controller.stdout is not None
        training = int(controller.stdout.readline())
        team.members["c0"] = Member("c0", (), tmp_path, tmp_path, controller, 0.0)  # type: ignore[arg-type]
        deadline = time.monotonic() + 30
        while trainings_of(controller.pid) != [training]:
            assert time.monotonic() < deadline
        reaper = Reaper(team)
        reaper.tend()
        reaper.kill_training(60.0)
        reaper.tend()
        assert [training] == trainings_of(controller.pid)
        assert 0 == reaper.trainings
        reaper = Reaper(team)
        reaper.kill_training(0.0)
        reaper.tend()
        assert (1, "-9") == (reaper.trainings, controller.stdout.readline().strip())
        reaper.tend()
        assert 1 == reaper.trainings


def test_a_controller_is_killed_when_it_is_old_enough(tmp_path: Path) -> None:
    team = Team(tmp_path, {}, (1.0, 1.0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as controller:
        now = time.monotonic()
        team.members["c0"] = Member("c0", (), tmp_path, tmp_path, controller, now)
        reaper = Reaper(team)
        reaper.kill_controller("c0")
        reaper.tend()
        assert (0, None) == (reaper.controllers, controller.poll())
        team.members["c0"].started_at = now - 60.0
        reaper.tend()
        assert (1, -signal.SIGKILL) == (reaper.controllers, controller.wait(30))
        assert 0.0 == team.age_s("c0")


def test_the_operator_counts_what_it_did_and_keeps_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, KafkaRefused("the broker is away"), ValueError("a bug")])

    def asked(_config: Config, _detail: str) -> None:
        answer = next(answers)
        if answer is not None:
            raise answer

    monkeypatch.setattr(refreshing, "ask", asked)
    operator = Operator(Config(), "v", "w")
    for _ in range(3):
        operator.do("refresh")
    operator.close()
    assert ["refresh"] == operator.done
    assert ["refresh: the broker is away"] == operator.refused
    assert isinstance(operator.error, ValueError)
