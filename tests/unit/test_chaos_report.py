"""What counts as a failure, and what the command makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from stream_adapt.chaos import flow
from stream_adapt.chaos.flow import ChaosOptions, run_chaos
from stream_adapt.chaos.report import ChaosResult
from stream_adapt.chaos.schedule import Action
from stream_adapt.cli import cli
from stream_adapt.errors import ConfigError


def _result(**changes: Any) -> ChaosResult:
    return ChaosResult(minutes=1.0, seed=2, members=3, protocol="classic", broker="Apache Kafka", **changes)


@pytest.mark.parametrize("name", ["lost", "doubled", "unexpected", "invalid", "rows_different", "scores_different"])
def test_one_of_anything_that_must_not_be_is_a_failure(name: str) -> None:
    assert _result(inputs=5, outputs=5).ok
    assert not _result(**{name: 1}).ok


def test_a_fault_in_words_is_a_failure() -> None:
    assert not _result(faults=["m0 after 5 s: ended by itself with exit code 1"]).ok


def _invoke(monkeypatch: pytest.MonkeyPatch, result: ChaosResult, *arguments: str) -> tuple[Result, list[ChaosOptions]]:
    seen: list[ChaosOptions] = []

    def run(options: ChaosOptions, _console: Console) -> ChaosResult:
        seen.append(options)
        return result

    monkeypatch.setattr(flow, "run_chaos", run)
    return CliRunner().invoke(cli, ["chaos", *arguments]), seen


def test_the_command_prints_one_object_with_the_schedule_and_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    told, seen = _invoke(
        monkeypatch, _result(schedule=[Action(1.5, "kill", "m1")]), "--json", "--minutes", "1", "--seed", "2"
    )
    assert 0 == told.exit_code
    printed = json.loads(told.stdout)
    assert [{"at_s": 1.5, "kind": "kill", "member": "m1"}] == printed["schedule"]
    assert (1.0, 2, 3) == (seen[0].minutes, seen[0].seed, seen[0].members)


def test_the_command_names_the_offenders_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = _invoke(monkeypatch, _result(lost=1, faults=["lost: e7, input [1]@9"], logs="kept"))
    assert 1 == told.exit_code
    assert "" == told.stdout
    assert "lost: e7, input [1]@9" in told.stderr
    assert "kept" in told.stderr


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="--keep"):
        run_chaos(ChaosOptions(keep=tmp_path), Console(stderr=True))
