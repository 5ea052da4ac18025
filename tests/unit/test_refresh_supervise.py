"""The controller as a child of `run`: started again when it dies, ended with the block, configured without secrets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stream_adapt.config import Config
from stream_adapt.refresh import supervise
from stream_adapt.refresh.supervise import supervised


def command(script: str, file: Path) -> list[str]:
    code = f"import sys, os, time, pathlib; file = pathlib.Path(sys.argv[1]); said = sys.stdin.read(); {script}"
    return [sys.executable, "-c", code, str(file)]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FIRST_PAUSE_S", 0.01)
    file = tmp_path / "starts"
    with supervised(Config(), command("file.open('a').write('x'); os._exit(1)", file)):
        until(lambda: file.exists() and len(file.read_text()) >= 3)


def test_a_child_gets_the_configuration_and_ends_with_the_block(tmp_path: Path) -> None:
    file = tmp_path / "told"
    script = "file.with_suffix('.part').write_text(f'{os.getpid()} {said}'); file.with_suffix('.part').rename(file); "
    config = Config.model_validate({"app": {"name": "films"}, "log": {"hash_key": {"env": "SECRET"}}})
    with supervised(config, command(script + "time.sleep(600)", file)):
        until(file.exists)
        pid, told = file.read_text().split(" ", 1)
        child = psutil.Process(int(pid))
        assert config == Config.model_validate(json.loads(told))
    assert not child.is_running()
