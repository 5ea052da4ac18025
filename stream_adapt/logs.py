"""Logging: structured lines on stderr, for people or for machines, in which nobody is named.

User ids, and record keys that hold them, appear as keyed hashes (`pseudonym`): equal ids look equal, and without the
key, `log.hash_key`, nobody can try ids out. Tracebacks show what they quote the same way. Values of secrets are
replaced wherever they turn up: in our lines, in librdkafka's, and in tracebacks.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
import threading
import traceback
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from stream_adapt import config

if TYPE_CHECKING:
    from stream_adapt.config import LogSection
    from stream_adapt.errors import StreamAdaptError

log = structlog.get_logger(__name__)

#: Hexadecimal digits of a pseudonym: two of a million users share theirs with a chance of 0.2 %.
_DIGITS = 12
#: What a message quotes, as `repr` would.
_QUOTED = re.compile(r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*\"""", re.DOTALL)
#: Quoted by Python itself, and no secret.
_PLAIN = re.compile(r"'(?:utf-8|ascii|NoneType|bytes|str|int|float|list|tuple|dict|set)'")
#: Lines of a traceback that are frames and their code; everything else is what exceptions say.
_FRAME = re.compile(r" {2,}|Traceback \(|The above exception|During handling|$")
#: Exceptions whose text is Kafka's or ours, and names no user.
_TRUSTED = ("cimpl.", "confluent_kafka.", "stream_adapt.errors.", "stream_adapt.kafka.")

_state: dict[str, Any] = {"key": secrets.token_bytes(32), "json": False}


class _Stderr(logging.StreamHandler[TextIO]):
    """Ours among the handlers; writes to what is stderr at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure(section: LogSection) -> None:
    """Sets up structlog, and sends lines of librdkafka, warnings and uncaught errors the same way.

    Raises:
        ConfigError: the key is referred to and is not there.
    """
    key = config.resolve_secret("log.hash_key", section.hash_key)
    if key is not None:
        _state["key"] = blake2b(str(key).encode(), digest_size=32).digest()
    _state["json"] = section.format == "json"
    level = logging.getLevelNamesMapping()[section.level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_traceback),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = _Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _renderer(section),
                _without_secrets,
            ],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [*(h for h in root.handlers if not isinstance(h, _Stderr)), handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def pseudonym(identifier: str | bytes) -> str:
    """What a log says in place of a user id or of a record's key: its keyed hash, 12 hexadecimal digits."""
    content = identifier if isinstance(identifier, bytes) else identifier.encode(errors="surrogatepass")
    return blake2b(content, key=_state["key"], digest_size=_DIGITS // 2).hexdigest()


def without_quotes(message: str) -> str:
    """A message with pseudonyms in place of what it quotes: of 'ann', say, as `repr` writes it."""
    return _QUOTED.sub(_hash_quoted, message)


def _hash_quoted(found: re.Match[str]) -> str:
    quoted = found.group()
    if _PLAIN.fullmatch(quoted):
        return quoted
    return f"#{pseudonym(quoted.removeprefix('b')[1:-1])}"


def say(error: StreamAdaptError) -> None:
    """The last line of a command that ends on purpose, in the form that the log has."""
    if _state["json"]:
        log.error("stopped", error=str(error), kind=type(error).__name__, exit_code=error.exit_code)
    else:
        sys.stderr.write(config.without_secrets(f"stream-adapt: {error}\n"))


def note(message: str) -> None:
    """A line that is not an error, in the form that the log has."""
    if _state["json"]:
        log.warning(message)
    else:
        sys.stderr.write(f"stream-adapt: {message}\n")


def _renderer(section: LogSection) -> structlog.typing.Processor:
    if section.format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)


def _without_secrets(_logger: Any, _method: str, line: Any) -> Any:
    return config.without_secrets(str(line))


def _traceback(exc_info: Any) -> str:
    """Frames without values of variables; what exceptions quote is a pseudonym, but for Kafka's errors and ours."""
    lines = "".join(traceback.format_exception(*exc_info)).rstrip("\n").split("\n")
    return "\n".join(
        line if _FRAME.match(line) or line.startswith(_TRUSTED) else without_quotes(line) for line in lines
    )


def _uncaught(kind: type[BaseException], raised: object, trace: TracebackType | None) -> None:
    # The Kafka client raises a bare KafkaError at times, which is no exception.
    error = raised if isinstance(raised, BaseException) else kind(raised)
    if issubclass(kind, KeyboardInterrupt):
        return
    if _state["json"]:
        log.critical("bug", exc_info=(kind, error, trace))
    else:
        sys.stderr.write(config.without_secrets(_traceback((kind, error, trace))) + "\n")
