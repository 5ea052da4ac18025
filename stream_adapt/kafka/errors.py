"""Every Kafka error, mapped to what the transaction loop does about it.

| consequence | when                                       | what the loop does                                   |
|-------------|--------------------------------------------|------------------------------------------------------|
| ABORT       | the error asks for it                      | abort, put rows back, rewind                         |
| FENCED      | another producer has this transactional.id | new producer once; again soon: exit 4                |
| REBUILD     | fatal, or flagged as nothing               | new producer, look whether the transaction committed |
| RETRY       | retriable                                  | the same call again, within the deadline             |

The order matters: an abortable error may be retriable, too, and a fenced producer's is fatal. A stale epoch that asks
for an abort is no fencing yet; the abort itself tells. Neither flags nor codes say all: a commit that is answered with
an abortable error may have been done (the abort is refused then), and a transaction that the broker gave up after its
timeout looks fenced. `commit.py` looks closer. What is told at which request: `tests/README.md`, measured on Apache
Kafka.
Sources: KIP-98, KIP-360, KIP-588, librdkafka's `INTRODUCTION.md` on transactions.
"""

from __future__ import annotations

from enum import Enum

from confluent_kafka import KafkaError, KafkaException


class Consequence(Enum):
    """What an error inside a transaction calls for."""

    RETRY = "retry"
    ABORT = "abort"
    REBUILD = "rebuild"
    FENCED = "fenced"


_FENCED_CODES = frozenset(
    {
        KafkaError._FENCED,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
    }
)

#: The broker will never take this record, however often it is sent.
UNDELIVERABLE_CODES = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.RECORD_LIST_TOO_LARGE,
    }
)


def consequence(error: KafkaError) -> Consequence:
    """What the transaction loop does about an error."""
    if error.txn_requires_abort():
        return Consequence.ABORT
    if error.code() in _FENCED_CODES:
        return Consequence.FENCED
    if error.fatal():
        return Consequence.REBUILD
    if error.retriable():
        return Consequence.RETRY
    return Consequence.REBUILD


def kafka_error(error: BaseException) -> KafkaError | None:
    """The KafkaError inside an exception.

    With a delivery callback installed a fatal producer error surfaces from `flush()` or `poll()` as a SystemError
    whose cause is the KafkaException.
    """
    if isinstance(error, SystemError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, KafkaException) and error.args and isinstance(error.args[0], KafkaError):
        return error.args[0]
    return None


def describe(error: KafkaError) -> str:
    """Name, number and text, as an operator can look them up."""
    return f"{error.name()} ({error.code()}): {error.str()}"
