"""What librdkafka says of an error at each request of a transaction, measured on Apache Kafka through the fault proxy.

`tests/broker/test_flags.py` measures every row again; `tests/README.md` shows them as a table.
"""

from __future__ import annotations

from typing import NamedTuple

from stream_adapt.testing.proxy import Api

COMMITS = "retried silently, commits"
NEXT_COMMITS = "abort works, the next transaction commits"
NEXT_ABORTS = "abort works, the next transaction aborts (OUT_OF_ORDER_SEQUENCE_NUMBER), the one after commits"
NEXT_UNFLAGGED = "abort works, the next call raises it without any flag"
ABORT_FATAL = "the abort is fatal (INVALID_TXN_STATE)"
NEW_PRODUCER = "needs a new producer"


class Flag(NamedTuple):
    """One error, told once for one request that is answered by the proxy instead of the broker, or after the broker."""

    api: Api
    error: str  # name in KafkaError, or "connection closed"
    seen: str  # what the client raises: call, code, flag
    then: str
    applied: bool = False  # the broker had done what was asked
    committed: bool = False  # a transaction that did not seem to


def _aborts(error: str, call: str = "send_offsets") -> str:
    return f"{call}: {error}, abortable"


def _fatal(error: str, call: str) -> str:
    return f"{call}: {error}, fatal"


FLAGS = (
    *(
        Flag(Api.PRODUCE, error, COMMITS, "")
        for error in ("NOT_LEADER_FOR_PARTITION", "NOT_ENOUGH_REPLICAS", "REQUEST_TIMED_OUT", "INVALID_MSG")
    ),
    Flag(Api.PRODUCE, "connection closed", COMMITS, ""),
    Flag(Api.PRODUCE, "connection closed", COMMITS, "", applied=True),
    *(
        Flag(Api.PRODUCE, error, _aborts(error), NEXT_ABORTS)
        for error in (
            "MSG_SIZE_TOO_LARGE",
            "INVALID_RECORD",
            "PRODUCER_FENCED",
            "INVALID_TXN_STATE",
            "TRANSACTION_ABORTABLE",
        )
    ),
    Flag(Api.PRODUCE, "UNKNOWN_PRODUCER_ID", _aborts("UNKNOWN_PRODUCER_ID"), NEXT_COMMITS),
    Flag(Api.PRODUCE, "TOPIC_AUTHORIZATION_FAILED", _aborts("TOPIC_AUTHORIZATION_FAILED"), NEXT_UNFLAGGED),
    Flag(Api.PRODUCE, "INVALID_PRODUCER_EPOCH", _fatal("_FENCED", "flush"), NEW_PRODUCER),
    Flag(Api.PRODUCE, "OUT_OF_ORDER_SEQUENCE_NUMBER", _fatal("OUT_OF_ORDER_SEQUENCE_NUMBER", "flush"), NEW_PRODUCER),
    *(
        Flag(Api.ADD_PARTITIONS_TO_TXN, error, COMMITS, "")
        for error in ("CONCURRENT_TRANSACTIONS", "NOT_COORDINATOR", "UNKNOWN_TOPIC_OR_PART", "connection closed")
    ),
    *(
        Flag(Api.ADD_PARTITIONS_TO_TXN, error, _aborts(error), ABORT_FATAL)
        for error in ("INVALID_PRODUCER_ID_MAPPING", "TRANSACTION_ABORTABLE", "TOPIC_AUTHORIZATION_FAILED")
    ),
    Flag(Api.ADD_PARTITIONS_TO_TXN, "INVALID_PRODUCER_EPOCH", _fatal("_FENCED", "flush"), NEW_PRODUCER),
    Flag(Api.ADD_PARTITIONS_TO_TXN, "PRODUCER_FENCED", _fatal("_FENCED", "flush"), NEW_PRODUCER),
    Flag(Api.ADD_PARTITIONS_TO_TXN, "INVALID_TXN_STATE", _fatal("INVALID_TXN_STATE", "flush"), NEW_PRODUCER),
    Flag(Api.ADD_OFFSETS_TO_TXN, "CONCURRENT_TRANSACTIONS", COMMITS, ""),
    Flag(Api.ADD_OFFSETS_TO_TXN, "connection closed", COMMITS, ""),
    *(
        Flag(Api.ADD_OFFSETS_TO_TXN, error, _aborts(error), NEXT_COMMITS)
        for error in ("TRANSACTION_ABORTABLE", "GROUP_AUTHORIZATION_FAILED")
    ),
    Flag(Api.ADD_OFFSETS_TO_TXN, "INVALID_PRODUCER_EPOCH", _fatal("_FENCED", "send_offsets"), NEW_PRODUCER),
    Flag(Api.ADD_OFFSETS_TO_TXN, "INVALID_TXN_STATE", _fatal("INVALID_TXN_STATE", "send_offsets"), NEW_PRODUCER),
    *(
        Flag(Api.TXN_OFFSET_COMMIT, error, COMMITS, "")
        for error in ("COORDINATOR_LOAD_IN_PROGRESS", "NOT_COORDINATOR", "connection closed")
    ),
    *(
        Flag(Api.TXN_OFFSET_COMMIT, error, _aborts(error), NEXT_COMMITS)
        for error in (
            "ILLEGAL_GENERATION",
            "UNKNOWN_MEMBER_ID",
            "REBALANCE_IN_PROGRESS",
            "STALE_MEMBER_EPOCH",
            "FENCED_INSTANCE_ID",
            "GROUP_AUTHORIZATION_FAILED",
            "TRANSACTION_ABORTABLE",
        )
    ),
    Flag(Api.TXN_OFFSET_COMMIT, "INVALID_PRODUCER_EPOCH", _fatal("_FENCED", "send_offsets"), NEW_PRODUCER),
    *(
        Flag(Api.END_TXN, error, COMMITS, "", applied)
        for error in (
            "NOT_COORDINATOR",
            "CONCURRENT_TRANSACTIONS",
            "COORDINATOR_LOAD_IN_PROGRESS",
            "connection closed",
        )
        for applied in (False, True)
    ),
    *(
        Flag(Api.END_TXN, error, _aborts(error, "commit"), NEXT_COMMITS)
        for error in (
            "REQUEST_TIMED_OUT",
            "INVALID_PRODUCER_ID_MAPPING",
            "UNKNOWN_PRODUCER_ID",
            "TRANSACTION_ABORTABLE",
        )
    ),
    *(
        Flag(Api.END_TXN, error, _aborts(error, "commit"), ABORT_FATAL, applied=True, committed=True)
        for error in (
            "REQUEST_TIMED_OUT",
            "INVALID_PRODUCER_ID_MAPPING",
            "UNKNOWN_PRODUCER_ID",
            "TRANSACTION_ABORTABLE",
        )
    ),
    *(
        Flag(Api.END_TXN, error, _fatal(code, "commit"), NEW_PRODUCER, applied, committed=applied)
        for error, code in (
            ("INVALID_PRODUCER_EPOCH", "_FENCED"),
            ("PRODUCER_FENCED", "_FENCED"),
            ("INVALID_TXN_STATE", "INVALID_TXN_STATE"),
        )
        for applied in (False, True)
    ),
)
