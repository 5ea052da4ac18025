"""The demo's parts that need no broker: its counts, and what it says when the member ends by itself."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_adapt.demo import prepare
from stream_adapt.demo.flow import DemoOptions, run_demo
from stream_adapt.demo.member import Member, MemberError
from stream_adapt.demo.tally import ReadScore, Tally
from stream_adapt.errors import ConfigError, DataError

IDS = [f"e{number}" for number in range(1, 4)]


class Message:
    """As the reader hands them on."""

    def __init__(self, topic: str, value: Any, headers: list[tuple[str, bytes]] | None = None) -> None:
        self._topic, self._value, self._headers = topic, value, headers

    def topic(self) -> str:
        return self._topic

    def value(self) -> bytes:
        return self._value if isinstance(self._value, bytes) else msgspec.json.encode(self._value)

    def headers(self) -> list[tuple[str, bytes]] | None:
        return self._headers


def score(number: int, user: str = "u", adapted: float = 0.5, target: int | None = 1) -> Message:
    return Message("scores", ReadScore(f"e{number}", user, adapted, 0.5, target, number, "v1", 0, number))


def letter(value: Any) -> Message:
    return Message("dead-letters", value, [("stream-adapt.reason", b"future_timestamp")])


@pytest.fixture
def tally() -> Tally:
    return Tally(IDS, "scores", followed="u")


def test_one_output_for_every_event_is_no_fault(tally: Tally) -> None:
    tally.add([score(1), score(2), letter({"event_id": "e3"})])
    assert tally.faults() == []
    assert (tally.scores, tally.dead_letters, tally.outputs) == (2, 1, 3)
    assert tally.reasons == {"future_timestamp": 1}


def test_a_missing_a_doubled_and_an_unknown_output_are_named(tally: Tally) -> None:
    tally.add([score(1), score(1), score(3), letter(b"not an event")])
    missing, extra = tally.faults()
    assert missing == "1 events without an output, such as e2"
    assert extra == "2 outputs too many, such as a dead letter that is no event, e1"


def test_a_score_and_a_dead_letter_of_one_event_are_one_too_many(tally: Tally) -> None:
    tally.add([score(1), score(2), score(3), letter({"event_id": "e1"})])
    assert tally.faults() == ["1 outputs too many, such as e1"]


def test_figures_are_of_scores_whose_outcome_is_known(tally: Tally) -> None:
    tally.add([score(1, adapted=0.9), score(2, adapted=0.1, target=0), score(3, adapted=0.0, target=None)])
    adapted, frozen = tally.overall()
    assert (adapted.auc, frozen.auc) == (1.0, 0.5)
    assert tally.recent()[0].auc == 1.0


def test_the_cold_start_curve_counts_each_users_events_in_their_order(tally: Tally) -> None:
    tally.add([score(2, "a", 0.8), score(3, "b", 0.5), score(1, "a", 0.5)])
    first, later = tally.curves().cold_start["adapted"][:2]
    assert (first.events, later.events) == (2, 1)
    assert later.value == pytest.approx(-math.log(0.8))


def test_only_the_followed_users_events_are_kept_to_be_shown(tally: Tally) -> None:
    tally.add([score(1), score(2, user="somebody else"), *(score(n) for n in range(3, 30))])
    assert [shown.event_id for shown in tally.shown] == [f"e{n}" for n in range(22, 30)]


def test_a_tally_of_nothing_has_no_figures_and_no_error(tally: Tally) -> None:
    adapted, frozen = tally.overall()
    assert adapted.auc != adapted.auc
    assert frozen.log_loss != frozen.log_loss
    assert tally.rate() == 0.0
    assert tally.curves().window == 0


def test_a_member_that_ends_by_itself_is_shown_with_its_log_and_its_exit_code(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("no_such_section: {}\n")
    ended = pytest.raises(MemberError, match=r"exit code 2[\s\S]*no_such_section")
    with Member(config, tmp_path / "log", os.environ, ("127.0.0.1", 9)) as member, ended as caught:
        member.wait_until_ready()
    assert caught.value.exit_code == 2


def test_unusable_options_are_refused_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="seconds=0"):
        run_demo(DemoOptions(seconds=0))
    with pytest.raises(ConfigError, match="no time to train"):
        run_demo(DemoOptions(drift=True, fast=True))
    with pytest.raises(DataError, match="no-such-source"):
        run_demo(DemoOptions(source="no-such-source"))


def test_a_source_becomes_part_of_a_file_name() -> None:
    assert prepare.file_name("movielens-100k") == "movielens-100k"
    assert prepare.file_name("/data/my log.csv.gz") == "my-log.csv.gz"
