"""The schema registry: what is asked of it, and what its errors mean.

| answer                            | meaning                                                                        |
|-----------------------------------|--------------------------------------------------------------------------------|
| 404 for a schema id               | the id is not known: records that carry it are dead letters                    |
| 404 for what a schema refers to   | the schema cannot be used: records that carry it are dead letters              |
| 401, 403                          | `RegistryRefused`: exit 3                                                      |
| 409, 422 when a schema is written | `RegistryRefused`: it does not fit what is registered                          |
| no connection, 429, 5xx           | `RegistryUnreachable`: waited for; says nothing of any record                  |
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
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
#: Most schemas that one may refer to, directly or not.
_MOST_REFERENCES = 100
_BUSY = 429
_UNKNOWN, _DENIED = 404, (401, 403)


@dataclass(frozen=True, slots=True)
class Known:
    """A schema of the registry."""

    type: str
    text: str
    imports: tuple[tuple[str, str], ...]  # name and text of what it refers to, each after what it needs itself


class Registry:
    """A client of the registry that remembers schemas, and ids which are of no use."""

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
            raise ConfigError(
                f"input.format and output.format need the extra `registry`, or `protobuf` ({error})"
            ) from error
        self.url = _without_password(url)
        self.register = register
        self._clock = clock
        self._known: dict[int, Known] = {}
        self._useless: dict[int, tuple[float, NotDecoded]] = {}  # by id: when it was asked for, and what was wrong
        defaults = {"timeout": _REQUEST_TIMEOUT_S, "max.retries": 0}
        try:
            self.client = SchemaRegistryClient.new_client({"url": url, **defaults, **settings})
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"registry.url={self.url}, registry.properties: {error}") from error

    def learn(self, values: Iterable[bytes | None], form: str | None = None) -> None:
        """Asks for every schema in these values, and what it refers to, that is not known yet.

        Args:
            values: of records.
            form: that the schemas are wanted in, if the registry has several.

        Raises:
            RegistryUnreachable, RegistryRefused: see this module.
        """
        for schema_id in {id_of(v) for v in values if v is not None and len(v) > HEADER_BYTES and v[0] == MAGIC}:
            now = self._clock()
            asked_at = self._useless[schema_id][0] if schema_id in self._useless else -_FORGET_S
            if schema_id in self._known or now - asked_at < _FORGET_S:
                continue
            try:
                self._known[schema_id] = self._fetch(schema_id, form)
            except NotDecoded as problem:
                self._useless[schema_id] = now, problem
                log.warning("schema is of no use", registry=self.url, schema_id=schema_id, problem=problem.detail)

    def check(self, value: bytes, schema_type: str) -> Known:
        """The schema of a value, which must be of this type.

        Raises:
            NotDecoded: the value has none that can be used.
        """
        if len(value) <= HEADER_BYTES or value[0] != MAGIC:
            raise NotDecoded("not_framed", f"{len(value)} bytes that begin with {value[:1].hex()!r}, not with an id")
        schema_id = id_of(value)
        found = self._known.get(schema_id)
        if found is None:
            problem = self._useless.get(schema_id, (0.0, _unknown(schema_id)))[1]
            raise NotDecoded(problem.reason, problem.detail)
        if found.type != schema_type:
            raise NotDecoded("incompatible_schema", f"schema id {schema_id} is {found.type}, expected {schema_type}")
        return found

    def _fetch(self, schema_id: int, form: str | None) -> Known:
        found = self.ask(lambda: self.client.get_schema(schema_id, fmt=form))
        if found is None:
            raise _unknown(schema_id)
        imports: dict[str, str] = {}
        self._fetch_imports(schema_id, found, form, imports, set())
        return Known(found.schema_type or "AVRO", found.schema_str or "", tuple(imports.items()))

    def _fetch_imports(
        self, schema_id: int, schema: Any, form: str | None, imports: dict[str, str], asked: set[str]
    ) -> None:
        """What a schema refers to, in an order in which each follows what it needs itself."""
        for reference in schema.references or ():
            name, subject, version = reference.name, reference.subject, reference.version
            if name in asked:
                continue
            asked.add(name)
            if len(asked) > _MOST_REFERENCES:
                detail = f"schema id {schema_id} refers to more than {_MOST_REFERENCES} others"
                raise NotDecoded("incompatible_schema", detail)
            found = self.ask(partial(self.client.get_version, subject, version, True, form))
            if found is None:
                detail = f"schema id {schema_id} refers to {name}: version {version} of {subject} is not there"
                raise NotDecoded("incompatible_schema", detail)
            self._fetch_imports(schema_id, found.schema, form, imports, asked)
            imports[name] = found.schema.schema_str or ""

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


def _unknown(schema_id: int) -> NotDecoded:
    return NotDecoded("unknown_schema", f"schema id {schema_id} is not in the registry")


def id_of(value: bytes) -> int:
    """The schema id that a value begins with."""
    return int.from_bytes(value[1:HEADER_BYTES], "big")


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//(hidden)@", url)
