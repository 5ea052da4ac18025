"""Logs: nobody is named, no secret is told, and what librdkafka repeats is counted."""

from __future__ import annotations

import ast
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import yaml
from bad_records import BAD_VALUES, FEATURES, THREE_STARS, good_event
from click.testing import CliRunner
from confluent_kafka import KafkaError, KafkaException

from stream_adapt import config, logs
from stream_adapt.breaker import Breaker
from stream_adapt.cli import cli
from stream_adapt.config import LogSection, load
from stream_adapt.decode import Decoder
from stream_adapt.errors import DeadLetterBreaker, KafkaRefused
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.changelog import Records
from stream_adapt.record import RawBatch, TopicNames
from stream_adapt.restore import load as load_rows
from stream_adapt.state.row import Field, Kind, Layout
from stream_adapt.state.table import Table

USER, SECRET = "canary-user-7f3a", 'canary-"secret\\ä-91c2'
PACKAGE = Path(config.__file__).parent
FORMATS = pytest.mark.parametrize("form", ["console", "json"])

Configured = Callable[[str], io.StringIO]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configured]:
    """Configures the log and returns what stands for stderr; everything is as before at the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.excepthook
    stderr = io.StringIO()

    def configure(form: str) -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", stderr)
        logs.configure(LogSection(format=form, level="debug"))  # type: ignore[arg-type]
        return stderr

    yield configure
    root.handlers[:], root.level, sys.excepthook = before
    logging.captureWarnings(False)
    structlog.reset_defaults()
    logs._state["json"] = False
    config._secrets.clear()


def told(stderr: io.StringIO, form: str) -> str:
    """The log; lines of json are objects."""
    text = stderr.getvalue()
    if form == "json":
        for line in text.splitlines():
            assert isinstance(json.loads(line), dict)
    return text


def secret_config(tmp_path: Path, **log: Any) -> Path:
    (tmp_path / "password").write_text(SECRET + "\n")
    path = tmp_path / "c.yaml"
    reference = {"file": str(tmp_path / "password")}
    path.write_text(yaml.safe_dump({
        "kafka": {"bootstrap_servers": "127.0.0.1:1", "properties": {
            "security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "me",
            "sasl.password": reference, "debug": "all"}},
        "log": log,
    }))  # fmt: skip
    return path


def test_a_pseudonym_is_the_keys_own_and_twelve_digits_long(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = LogSection(hash_key={"env": "CANARY_KEY"})
    monkeypatch.setenv("CANARY_KEY", "first")
    logs.configure(section)
    first = logs.pseudonym(USER)
    assert first == logs.pseudonym(USER.encode())
    assert len(first) == len(bytes.fromhex(first)) * 2 == 12
    assert first != logs.pseudonym(USER + "x")
    monkeypatch.setenv("CANARY_KEY", "second")
    logs.configure(section)
    assert first != logs.pseudonym(USER)
    monkeypatch.setenv("CANARY_KEY", "first")
    logs.configure(section)
    assert first == logs.pseudonym(USER)


def test_what_a_message_quotes_is_a_pseudonym() -> None:
    said = logs.without_quotes(f"key={USER.encode()!r}, user_id={USER!r}: 'utf-8', at `$.user_id`, {'it' + chr(39)!r}")
    assert USER not in said
    assert said.count(f"#{logs.pseudonym(USER)}") == 2
    assert "'utf-8', at `$.user_id`, #" in said


@FORMATS
@pytest.mark.parametrize("how", ["uncaught", "logged"])
def test_a_bugs_traceback_names_neither_a_user_nor_a_secret(configured: Configured, form: str, how: str) -> None:
    stderr = configured(form)
    config._secrets.add(SECRET)
    try:
        try:
            {}[USER]
        except KeyError as error:
            raise ValueError(f"row {USER!r} with {SECRET}") from error
    except ValueError as error:
        if how == "uncaught":
            logs._uncaught(type(error), error, error.__traceback__)
        else:
            structlog.get_logger().error("no", exc_info=True)
    text = told(stderr, form)
    assert "ValueError: row #" in text
    assert "KeyError: #" in text
    assert "test_logs.py" in text
    assert USER not in text
    assert "canary" not in text.replace("CANARY", "")


@FORMATS
def test_kafkas_own_words_stay_readable_in_a_traceback(configured: Configured, form: str) -> None:
    stderr = configured(form)
    try:
        raise KafkaRefused("topic 'shop.events' is not there")
    except KafkaRefused:
        structlog.get_logger().error("no", exc_info=True)
    assert "topic 'shop.events' is not there" in told(stderr, form)


@FORMATS
def test_the_last_line_of_a_command_has_the_logs_form(configured: Configured, form: str) -> None:
    stderr = configured(form)
    config._secrets.add(SECRET)
    logs.say(KafkaRefused(f"no answer for {SECRET}"))
    logs.note("stopped at once")
    text = told(stderr, form)
    assert "no answer for (hidden)" in text
    assert "stopped at once" in text


@FORMATS
def test_a_stream_of_bad_records_that_trips_the_breaker_names_nobody(configured: Configured, form: str) -> None:
    stderr = configured(form)
    decoder = Decoder(FEATURES, THREE_STARS)
    topics = TopicNames.of("shop")
    values = [good_event(user_id=USER), *(_with_canary(value) for _, value, _ in BAD_VALUES)]
    n = len(values)
    raw = RawBatch([f"other-{USER}".encode()] * n, values, np.zeros(n, np.int32), np.arange(n))
    _, dead = decoder(raw)
    assert len(dead) > 1
    for letter in dead:
        with pytest.raises(DeadLetterBreaker) as stopped:
            Breaker(topics, 0.05, 10).committed(raw, [letter])
        logs.say(stopped.value)
        assert letter.reason in str(stopped.value)
    text = told(stderr, form)
    assert "key_mismatch" in text
    assert USER not in text


def _with_canary(value: bytes | None) -> bytes | None:
    """A bad record whose ids, where it has any, are the canary."""
    return value and value.replace(b'"u"', b'"%s"' % USER.encode()).replace(b'"i"', b'"%s"' % USER.encode())


@FORMATS
def test_a_damaged_changelog_names_nobody(configured: Configured, form: str) -> None:
    stderr = configured(form)
    layout = Layout(Kind.USER, (Field("count", "<i8", (), "events"),))
    table = Table(layout, lambda *_: None)
    value = layout.to_bytes(np.zeros((), layout.dtype))
    keys: list[bytes | None] = [f"x:{USER}".encode(), f"u:{USER}".encode() + b"\xff", f"u:{USER}".encode()]
    loaded = load_rows({Kind.USER: table}, 0, Records(keys, [value, value, value[:-1]], [0, 1, 2]), {})
    assert 3 == len(loaded.damaged)
    for offset, problem in loaded.damaged:
        structlog.get_logger().warning("damaged", first=f"offset {offset}: {problem}")
    text = told(stderr, form)
    assert USER not in text
    assert logs.pseudonym(f"x:{USER}") in text


@FORMATS
def test_librdkafka_with_debug_all_tells_no_secret(configured: Configured, form: str, tmp_path: Path) -> None:
    settings = load(secret_config(tmp_path), {}).config
    stderr = configured(form)
    admin = clients.admin(properties.common(settings))
    with pytest.raises(Exception):  # noqa: B017 - nobody listens there
        admin.list_topics(timeout=1)
    clients.tell(admin)
    text = told(stderr, form)
    assert "sasl.password = [redacted]" in text
    assert "canary" not in text


def test_a_refused_property_does_not_tell_a_secret(configured: Configured, tmp_path: Path) -> None:
    stderr = configured("console")
    settings = load(secret_config(tmp_path), {}).config
    common = properties.common(settings)
    with pytest.raises(Exception) as refused:
        clients.producer({**common, "security.protocol": common["sasl.password"]})
    assert "canary" in str(refused.value)
    logs._uncaught(type(refused.value), refused.value, refused.value.__traceback__)
    assert "(hidden)" in stderr.getvalue()
    assert "canary" not in stderr.getvalue()


@pytest.mark.parametrize("command", [["check-config"], ["check-config", "--json"], ["run", "--help"], ["--help"]])
def test_no_output_of_a_command_has_the_secret(command: list[str], tmp_path: Path) -> None:
    path = secret_config(tmp_path, hash_key={"file": str(tmp_path / "password")})
    arguments = command if "--help" in command else [*command, "-c", str(path)]
    result = CliRunner().invoke(cli, arguments)
    assert 0 == result.exit_code, result.output
    assert "canary" not in result.output


def test_a_commands_end_without_a_broker_tells_no_secret_and_is_json(tmp_path: Path) -> None:
    path = secret_config(tmp_path, format="json", level="debug")
    ended = subprocess.run(
        [sys.executable, "-m", "stream_adapt", "topics", "create", "-c", str(path)], capture_output=True, text=True
    )
    assert 3 == ended.returncode, ended.stderr[-2000:]
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert "stopped" == lines[-1]["event"]
    assert "canary" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("value", ["plain", {"env": "A", "file": "B"}, {"vault": "x"}])
def test_the_hash_key_is_a_reference(value: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"log": {"hash_key": value}}))
    with pytest.raises(config.ConfigError) as refused:
        load(tmp_path / "c.yaml", {})
    assert "log.hash_key" in str(refused.value)
    assert "plain" not in str(refused.value)


FAIL = (
    "FAIL [{client}] [thrd:127.0.0.1:{port}/bootstrap]: 127.0.0.1:{port}/bootstrap: Connect to ipv4#127.0.0.1:{port} "
    "failed: Connection refused (after 0ms in state CONNECT)"
)


def fail(clock: list[float], at: float, said: ConnectionLog, client: str = "a#consumer-1", port: int = 1) -> None:
    clock[0] = at
    record = logging.LogRecord("librdkafka", logging.ERROR, "", 0, FAIL.format(client=client, port=port), None, None)
    assert not said.errors.filter(record)


class ConnectionLog:
    """The filter under test on a clock of its own."""

    def __init__(self, clock: list[float]) -> None:
        self.errors = clients.ConnectionErrors(lambda: clock[0])


def test_an_outage_is_told_at_once_and_then_counted() -> None:
    clock = [0.0]
    said = ConnectionLog(clock)
    with structlog.testing.capture_logs() as lines:
        for k in range(200):  # twenty a second
            fail(clock, k * 0.05, said)
        fail(clock, 10.0, said)
        fail(clock, 10.1, said)
        fail(clock, 10.2, said, client="b#producer-1")
    assert [0, 199, 0] == [line["repeated"] for line in lines]
    assert {"warning"} == {line["log_level"] for line in lines}
    assert "127.0.0.1:1/bootstrap" == lines[0]["broker"]
    assert lines[0]["reason"].startswith("Connect to ipv4#127.0.0.1:1 failed: Connection refused")
    assert ["a#consumer-1", "a#consumer-1", "b#producer-1"] == [line["client"] for line in lines]


def test_other_lines_of_librdkafka_go_on() -> None:
    record = logging.LogRecord("librdkafka", logging.WARNING, "", 0, "CONFWARN [x] [thrd:app]: what", None, None)
    assert clients.ConnectionErrors().filter(record)


#: Console programs of their own, and what stands in for a broker: their clients' lines are for a person.
_THEIR_OWN = ("chaos", "demo", "testing", "kafka/embedded.py", "kafka/clients.py")


def test_every_client_is_made_in_one_place() -> None:
    made = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(_THEIR_OWN):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
        made += [f"{name}: {found}" for found in names & {"Consumer", "Producer", "AdminClient"}]
    assert [] == made


def test_what_is_raised_without_being_an_exception_is_told_as_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSection(format="json"))
    sys.excepthook(KafkaException, KafkaError(KafkaError._TRANSPORT), None)  # type: ignore[arg-type]
    told = json.loads(capsys.readouterr().err)
    assert "bug" == told["event"]
    assert "_TRANSPORT" in told["exception"]
