"""The command line: help is there and quick, one JSON object on stdout, and every error has its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from stream_adapt import __version__, cli, config, errors, runner, service

HEAVY = ("torch", "numba", "matplotlib", "confluent_kafka", "scipy")

HELP = """
import sys
from click.testing import CliRunner
from stream_adapt.cli import cli
for words in {words!r}:
    assert CliRunner().invoke(cli, [*words, "--help"]).exit_code == 0, words
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def commands(
    group: click.Group = cli.cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it, groups included."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands())
LEAVES = {words: command for words, command in COMMANDS.items() if not isinstance(command, click.Group)}


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `stream-adapt arguments…`, through the entry point."""
    monkeypatch.setattr(sys, "argv", ["stream-adapt", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return 0 if code is None else int(code)


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_every_command_has_help_and_says_what_each_option_is_for(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.cli, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    command = COMMANDS.get(words, cli.cli)
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_help_of_all_commands_imports_nothing_heavy() -> None:
    script = HELP.format(words=[(), *COMMANDS], heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_can_answer_in_json(words: tuple[str, ...]) -> None:
    assert "--json" in [name for param in LEAVES[words].params for name in param.opts]


def test_objectives_are_those_that_the_outer_loop_knows() -> None:
    from stream_adapt.meta import objective

    assert objective.NAMES == (*cli.OBJECTIVES, "direct")


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"stream-adapt, version {__version__}\n"


def test_check_config_prints_one_object_with_every_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("app: {name: shop}\nkafka: {properties: {sasl.password: {env: MY_SECRET}}}\n")
    monkeypatch.setenv("MY_SECRET", "canary-4711")
    monkeypatch.setenv("STREAM_ADAPT_METRICS_PORT", "0")
    assert run_main(monkeypatch, "check-config", "-c", str(path), "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["app.name"] == {"value": "shop", "source": str(path)}
    assert found["metrics.port"] == {"value": 0, "source": "environment STREAM_ADAPT_METRICS_PORT"}
    assert found["delivery"] == {"value": "exactly_once", "source": "default"}
    assert set(found) >= {key for key, _, _ in config.effective(config.load(None, {}))} - {"kafka.properties"}
    assert "canary-4711" not in out + err


def test_check_config_for_people_says_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "check-config") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["input.max_batch", "16384", "default"] in lines


def test_check_config_knows_rivers_detectors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAM_ADAPT_DRIFT_DETECTOR", "Nothing")
    assert run_main(monkeypatch, "check-config") == 2
    assert "River has ADWIN" in capsys.readouterr().err


def test_a_wrong_configuration_ends_with_2_and_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("delivery: perhaps\n")
    assert run_main(monkeypatch, "check-config", "-c", str(path), "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stream-adapt: delivery='perhaps'")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["run", "--no-such-option"], ["run", "-c", "not-there.yaml"]]
)
def test_wrong_usage_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    assert "Error:" in capsys.readouterr().err


RAISED = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.StreamAdaptError)]


@pytest.mark.parametrize("error", RAISED)
def test_every_error_of_ours_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[errors.StreamAdaptError]
) -> None:
    def fail(*_: Any) -> None:
        raise error("what happened, and what to do")

    monkeypatch.setattr(config, "load", fail)
    assert run_main(monkeypatch, "run") == error.exit_code
    assert capsys.readouterr().err == "stream-adapt: what happened, and what to do\n"


def test_ctrl_c_ends_like_a_program_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupt)
    assert run_main(monkeypatch, "check-config") == 128 + signal.SIGINT


def test_a_second_signal_ends_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled_twice(_config: config.Config, shutdown: runner.Shutdown, _stop_after: int | None) -> None:
        shutdown(signal.SIGTERM, None)
        shutdown(signal.SIGTERM, None)

    monkeypatch.setattr(service, "run", signalled_twice)
    assert run_main(monkeypatch, "run") == 128 + signal.SIGTERM
    assert "stopped at once" in capsys.readouterr().err
