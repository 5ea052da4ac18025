"""What Avro and Protobuf share: values that begin with the id of a schema, and topics that hold several kinds of them.

Schemas are registered under subjects `<topic>-<record>`, so that scores and receipts may share a topic.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from stream_adapt.codecs.registry import Registry
from stream_adapt.errors import RegistryRefused
from stream_adapt.record import EraseRequest, Receipt, Score, UserEvent, UserId

#: Nesting that is still looked at: event v1 has three levels.
DEEPEST = 16


class Reader(Protocol):
    """Reads any record by the schema that it was written with."""

    def prepare(self, values: Iterable[bytes | None]) -> None:
        """Learns the schemas of these."""

    def __call__(self, value: bytes) -> dict[str, Any]:
        """The record's fields as JSON has them; raises NotDecoded."""


class Writer:
    """Writes one kind of record to one topic."""

    def __init__(self, registry: Registry, topic: str, full_name: str) -> None:
        from confluent_kafka.serialization import MessageField, SerializationContext

        self.context = SerializationContext(topic, MessageField.VALUE)
        self.subject = f"{topic}-{full_name}"
        self._registry = registry

    @abstractmethod
    def __call__(self, record: Any) -> bytes:
        """A record as it is written."""

    def prove(self, example: msgspec.Struct) -> None:
        """Registers the schema, or finds it."""
        if self._registry.insist(lambda: self(example)) is None:
            raise RegistryRefused(
                f"{self._registry.url}: subject {self.subject} is not there. To do: register schemas/, or set "
                "registry.register_schemas"
            )


def settings(registry: Registry) -> dict[str, Any]:
    """Of confluent-kafka's serialisers."""
    from confluent_kafka.schema_registry import topic_record_subject_name_strategy

    return {
        "auto.register.schemas": registry.register,
        "subject.name.strategy": topic_record_subject_name_strategy,
    }


#: Makes a writer of one kind of record, `schemas/<name>`, to a topic.
WriterOf = Callable[[str, str], Writer]


class FramedInput:
    """Events and erase requests."""

    def __init__(self, topic: str, read: Reader, writer: WriterOf) -> None:
        self._topic = topic
        self._read = read
        self._writer = writer
        self._event: Writer | None = None

    def prepare(self, values: Iterable[bytes | None]) -> None:
        """Learns the schemas of these."""
        self._read.prepare(values)

    def to_json(self, value: bytes) -> bytes:
        """The same event as JSON."""
        return msgspec.json.encode(self._read(value))

    def erase(self, request: EraseRequest) -> bytes:
        """A request for the events topic."""
        writer = self._writer(self._topic, "erase-v1")
        writer.prove(request)
        return writer(request)

    def event(self, event: UserEvent) -> bytes:
        """An event, as a producer would write it; for tools and tests."""
        event = msgspec.structs.replace(event, features=event.features or None)
        if self._event is None:
            self._event = self._writer(self._topic, "event-v1")
            self._event.prove(event)
        return self._event(event)


class FramedOutput:
    """Scores and receipts."""

    def __init__(self, topic: str, read: Reader, writer: WriterOf) -> None:
        self.score = writer(topic, "score-v1")
        self.receipt = writer(topic, "receipt-v1")
        self._read = read

    def prove(self) -> None:
        """Registers both schemas, or finds them, before anything is read.

        Raises:
            RegistryRefused, RegistryUnreachable: see registry.py.
        """
        self.score.prove(_SCORE)
        self.receipt.prove(_RECEIPT)

    def read_receipt(self, value: bytes) -> Receipt:
        """A receipt as it was written."""
        self._read.prepare([value])
        return msgspec.convert(self._read(value), Receipt)


#: Examples, to have the schemas registered.
_RECEIPT = Receipt("e", UserId("u"), (), False, 0, 0, "t", 0, 0)
_SCORE = msgspec.convert(
    {
        "event_id": "e", "user_id": "u", "item_id": "i", "score": 0.5, "frozen_score": 0.5, "updated_score": 0.5,
        "level": None, "target": None, "uncertainty": 0.0, "model_version": "v", "adaptations": 0, "flags": (),
        "event_timestamp": 0, "scored_at": 0, "source_topic": "t", "source_partition": 0, "source_offset": 0,
    },
    Score,
)  # fmt: skip
