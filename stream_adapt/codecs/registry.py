"""The schema registry: what is asked of it, and what its errors mean.

| answer                            | meaning                                                                        |
|-----------------------------------|--------------------------------------------------------------------------------|
| 404 for a schema id               | the id is not known: records that carry it are dead letters                    |
| 401, 403                          | `RegistryRefused`: exit 3                                                      |
| 409, 422 when a schema is written | `RegistryRefused`: it does not fit what is registered                          |
| no connection, 429, 5xx           | `RegistryUnreachable`: waited for; says nothing of any record                  |
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import structlog

from stream_adapt.codecs import NotDecoded
from stream_adapt.errors import ConfigError, RegistryRefused, RegistryUnreachable

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

#: A value begins with this, then four bytes of the schema's id, big-endian: Confluent's wire format.
MAGIC = 0
HEADER_BYTES = 5
#: An id that is not known is asked for again after this: a registry behind another may learn of it later.
_FORGET_S = 60.0
_REQUEST_TIMEOUT_S = 5.0
#: At the start; later nothing is given up.
_START_DEADLINE_S = 60.0
_BETWEEN_TRIES_S = 2.0
_BUSY = 429
_UNKNOWN, _DENIED = 404, (401, 403)


class Registry:
    """A client of the registry that remembers ids which are not known."""

    def __init__(
        self, url: str, settings: Mapping[str, Any], register: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: of the registry; several, comma-separated; `mock://NAME` is one in memory.
            settings: of confluent-kafka's SchemaRegistryClient.
            register: whether schemas of what we write may be registered; else they must be there.
            clock: seconds that never go back.

        Raises:
            ConfigError: the extra is not installed, or the settings are wrong.
        """
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient
        except ImportError as error:
            raise ConfigError(f"input.format and output.format need the extra `registry` ({error})") from error
        self.url = _without_password(url)
        self.register = register
        self._clock = clock
        self._types: dict[int, str] = {}
        self._unknown: dict[int, float] = {}  # by id: when it was asked for
        defaults = {"timeout": _REQUEST_TIMEOUT_S, "max.retries": 0}
        try:
            self.client = SchemaRegistryClient.new_client({"url": url, **defaults, **settings})
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"registry.url={self.url}, registry.properties: {error}") from error

    def learn(self, values: Iterable[bytes | None]) -> None:
        """Asks for every schema id in these values that is not known yet.

        Raises:
            RegistryUnreachable, RegistryRefused: see this module.
        """
        for schema_id in {id_of(v) for v in values if v is not None and len(v) > HEADER_BYTES and v[0] == MAGIC}:
            now = self._clock()
            if schema_id in self._types or now - self._unknown.get(schema_id, -_FORGET_S) < _FORGET_S:
                continue
            found = self.ask(lambda wanted=schema_id: self.client.get_schema(wanted))  # type: ignore[misc]
            if found is None:
                self._unknown[schema_id] = now
                log.warning("schema id is not known", registry=self.url, schema_id=schema_id)
            else:
                self._types[schema_id] = found.schema_type or "AVRO"

    def check(self, value: bytes, schema_type: str) -> None:
        """Whether a value has an id that is known, of a schema of this type.

        Raises:
            NotDecoded: it has not.
        """
        if len(value) <= HEADER_BYTES or value[0] != MAGIC:
            raise NotDecoded("not_framed", f"{len(value)} bytes that begin with {value[:1].hex()!r}, not with an id")
        schema_id = id_of(value)
        found = self._types.get(schema_id)
        if found is None:
            raise NotDecoded("unknown_schema", f"schema id {schema_id} is not in the registry")
        if found != schema_type:
            raise NotDecoded("incompatible_schema", f"schema id {schema_id} is {found}, expected {schema_type}")

    def ask(self, question: Callable[[], _T]) -> _T | None:
        """The registry's answer; None for what it does not have.

        Raises:
            RegistryUnreachable, RegistryRefused: see this module.
        """
        from confluent_kafka.schema_registry.error import SchemaRegistryError

        try:
            return question()
        except SchemaRegistryError as error:
            status = error.http_status_code
            if status == _UNKNOWN:
                return None
            if status == _BUSY or status >= 500:
                raise RegistryUnreachable(f"{self.url}: {error}") from error
            hint = "registry.properties" if status in _DENIED else "registry.register_schemas and the subject's rules"
            raise RegistryRefused(f"{self.url}: {error}. To do: check {hint}") from error
        except OSError as error:
            raise RegistryUnreachable(f"{self.url}: {error}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise RegistryUnreachable(f"{self.url}: {error}") from error
            raise

    def insist(self, question: Callable[[], _T], sleep: Callable[[float], object] = time.sleep) -> _T | None:
        """The same at the start: asked again for a while.

        Raises:
            RegistryRefused, RegistryUnreachable: at last.
        """
        deadline = self._clock() + _START_DEADLINE_S
        while True:
            try:
                return self.ask(question)
            except RegistryUnreachable as error:
                if self._clock() > deadline:
                    raise
                log.warning("waiting for the schema registry", error=str(error))
                sleep(_BETWEEN_TRIES_S)


def id_of(value: bytes) -> int:
    """The schema id that a value begins with."""
    return int.from_bytes(value[1:HEADER_BYTES], "big")


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//(hidden)@", url)
