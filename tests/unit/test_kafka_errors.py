"""Every error that the client library can give has a consequence."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError, KafkaException

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.consumer import generation
from stream_adapt.kafka.errors import Consequence, consequence, describe, kafka_error

CODES = {name: code for name, code in vars(KafkaError).items() if name.isupper() and isinstance(code, int)}


def test_the_library_still_has_the_errors_we_know() -> None:
    assert len(CODES) > 150


@pytest.mark.parametrize("name", sorted(CODES))
def test_every_error_has_a_consequence_and_a_description(name: str) -> None:
    error = KafkaError(CODES[name])
    assert isinstance(consequence(error), Consequence)
    assert str(CODES[name]) in describe(error)


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
