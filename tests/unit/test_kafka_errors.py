"""Every error that the client library can give has a consequence."""

from __future__ import annotations

from itertools import product

import pytest
from confluent_kafka import KafkaError, KafkaException
from flags import COMMITS, FLAGS, NEW_PRODUCER, Flag

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.consumer import generation
from stream_adapt.kafka.errors import Consequence, consequence, describe, kafka_error

CODES = {name: code for name, code in vars(KafkaError).items() if name.isupper() and isinstance(code, int)}


def test_the_library_still_has_the_errors_we_know() -> None:
    assert len(CODES) > 150


@pytest.mark.parametrize("name", sorted(CODES))
def test_every_error_has_a_description(name: str) -> None:
    assert str(CODES[name]) in describe(KafkaError(CODES[name]))


@pytest.mark.parametrize("name", sorted(CODES))
def test_every_error_with_every_flags_has_its_consequence(name: str) -> None:
    """Abortable comes first, and what is neither flagged nor known to be a fencing needs a new producer."""
    fencing = name in ("_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH")
    for fatal, retriable, abortable in product((False, True), repeat=3):
        error = KafkaError(CODES[name], "", fatal, retriable, abortable)
        expected = (
            Consequence.ABORT
            if abortable
            else Consequence.FENCED
            if fencing
            else Consequence.RETRY
            if retriable and not fatal
            else Consequence.REBUILD
        )
        assert expected is consequence(error), (fatal, retriable, abortable)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: f"{flag.api.name}-{flag.error}-{flag.applied}")
def test_what_was_measured_on_kafka_has_the_consequence_that_it_needs(flag: Flag) -> None:
    """Whatever needs a new producer, or may have been committed, must not end in an abort that is believed."""
    if flag.seen == COMMITS:
        return
    code, kind = flag.seen.partition(": ")[2].split(", ")
    error = KafkaError(CODES[code], "", kind == "fatal", False, kind == "abortable")
    if flag.then == NEW_PRODUCER:
        assert consequence(error) in (Consequence.REBUILD, Consequence.FENCED)
    else:
        assert consequence(error) is Consequence.ABORT


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KafkaError(KafkaError._FENCED, "", True, False, False), Consequence.FENCED),
        (KafkaError(KafkaError.PRODUCER_FENCED, "", True, False, False), Consequence.FENCED),
        (KafkaError(KafkaError.INVALID_PRODUCER_EPOCH, "", False, False, True), Consequence.ABORT),
        (KafkaError(KafkaError.INVALID_PRODUCER_EPOCH, "", True, False, False), Consequence.FENCED),
        (KafkaError(KafkaError.INVALID_TXN_STATE, "", True, False, False), Consequence.REBUILD),
        (KafkaError(KafkaError.ILLEGAL_GENERATION, "", False, False, True), Consequence.ABORT),
        (KafkaError(KafkaError._TIMED_OUT, "", False, True, True), Consequence.ABORT),
        (KafkaError(KafkaError._TIMED_OUT, "", False, True, False), Consequence.RETRY),
        (KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, "", False, False, False), Consequence.REBUILD),
    ],
)
def test_flags_and_codes_decide_in_order(error: KafkaError, expected: Consequence) -> None:
    assert consequence(error) is expected


def test_the_error_inside_a_system_error_is_found() -> None:
    inner = KafkaException(KafkaError(KafkaError._FENCED))
    outer = SystemError("returned a result with an exception set")
    outer.__cause__ = inner
    found = kafka_error(outer)
    assert found is not None
    assert found.code() == KafkaError._FENCED
    assert kafka_error(SystemError("something else")) is None


def test_the_generation_is_read_from_the_group_metadata() -> None:
    assert generation(b"CGMDv2:\xff\xff\xff\xffg\0\0\1") == -1
    assert generation(b"CGMDv2:\x07\0\0\0g\0\0\1") == 7
    with pytest.raises(KafkaRefused, match="does not know the installed librdkafka"):
        generation(b"CGMDv9:\x07\0\0\0g\0\0\1")
