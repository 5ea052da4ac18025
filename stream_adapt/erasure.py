"""Erasing a user: a request to every input partition, and the receipts that say it is done.

A user's row lies in whichever partitions the user's records were, and each partition's owner knows only its own; so
the request goes to all of them, and the member that owns a partition drops the row in the order of the records.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream_adapt.codecs import OutputCodec
from stream_adapt.config import Config
from stream_adapt.emit import SCHEMA_HEADER
from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.formats import Formats
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.reading import TopicReader
from stream_adapt.record import ERASE, EraseRequest, UserId

_FLUSH_S = 30.0


class Erased(msgspec.Struct):
    """What was asked for, and what is known of it."""

    event_id: str
    partitions: list[int]  # that the request was written to
    receipts: list[int]  # partitions whose receipt was seen; none are waited for unless told to
    had_row: list[int]  # those of them that had a row of the user


def erase(
    config: Config, user: str, wait_s: float | None, progress: Callable[[Erased], None] = lambda _: None
) -> Erased:
    """Writes the request to every partition of the input.

    Args:
        config: names brokers and topics.
        user: whose row is erased.
        wait_s: how long to wait for every partition's receipt; None: not at all.
        progress: told whenever a receipt was seen.

    Raises:
        ConfigError: the user id is empty.
        KafkaRefused: the request could not be written everywhere, or receipts are missing after `wait_s`; asking again
            does no harm.
    """
    if not user:
        raise ConfigError("the user id is empty")
    settings, topic = properties.common(config), config.topic("events")
    formats = Formats.of(config)
    with TopicReader(settings, config.topic("scores")) as scores:
        partitions = scores.partitions(topic)
        ends = {p: end for p, (_, end) in scores.ends(scores.partitions()).items()} if wait_s is not None else {}
        now_ms = time.time_ns() // 1_000_000
        request = EraseRequest(f"erase-{uuid.uuid4()}", UserId(user), ERASE, now_ms)
        value = formats.input.erase(request) if formats.input else msgspec.json.encode(request)
        _write(clients.producer({**settings, "enable.idempotence": True}), topic, request, value, partitions)
        erased = Erased(request.event_id, partitions, [], [])
        if wait_s is not None:
            scores.assign(ends)
            _wait(scores, formats.output, erased, topic, time.monotonic() + wait_s, wait_s, progress)
    return erased


def _write(producer: Producer, topic: str, request: EraseRequest, value: bytes, partitions: Iterable[int]) -> None:
    refused: dict[int, str] = dict.fromkeys(partitions, "no answer")

    def delivered(error: KafkaError | None, message: Message) -> None:
        if error is None:
            refused.pop(message.partition() or 0, None)
        else:
            refused[message.partition() or 0] = describe(error)

    key = request.user_id.encode()
    try:
        for partition in partitions:
            producer.produce(topic, value, key, partition=partition, on_delivery=delivered)
        producer.flush(_FLUSH_S)
    except (KafkaException, SystemError) as error:
        found = kafka_error(error)
        raise KafkaRefused(f"{topic}: the request was not written: {found and describe(found)}") from error
    if refused:
        raise KafkaRefused(f"{topic}: the request is not in these partitions: {refused}. To do: ask again")


def _wait(
    scores: TopicReader,
    output: OutputCodec,
    erased: Erased,
    topic: str,
    deadline: float,
    wait_s: float,
    progress: Callable[[Erased], None],
) -> None:
    missing = set(erased.partitions)
    while missing:
        if time.monotonic() > deadline:
            raise KafkaRefused(
                f"{scores.topic}: no receipt of {erased.event_id} from partitions {sorted(missing)} of {topic} within "
                f"{wait_s:.0f} s. The request is in the log, and is done when a member comes to it: is one running, "
                "and how large is its lag?"
            )
        for message in scores.poll():
            if not message.error() and (SCHEMA_HEADER, b"receipt/v1") in (message.headers() or []):
                receipt = output.read_receipt(message.value() or b"")
                if receipt.event_id == erased.event_id and receipt.source_partition in missing:
                    missing.discard(receipt.source_partition)
                    erased.receipts = sorted({*erased.receipts, receipt.source_partition})
                    if receipt.had_row:
                        erased.had_row = sorted({*erased.had_row, receipt.source_partition})
                    progress(erased)
