"""Where a changelog ends: a broker that dies while it is asked may tell no offset, and no error."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from confluent_kafka import TopicPartition

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.changelog import log_offsets

ASKED = [TopicPartition("t", 0), TopicPartition("t", 1)]


def _answer(*offsets: int) -> dict[TopicPartition, Future[Any]]:
    futures = {}
    for tp, offset in zip(ASKED, offsets, strict=True):
        futures[tp] = Future[Any]()
        futures[tp].set_result(SimpleNamespace(offset=offset))
    return futures


def test_an_offset_that_is_none_is_asked_for_again() -> None:
    admin = mock.Mock(**{"list_offsets.side_effect": [_answer(5, -1), _answer(-1001, 7), _answer(5, 7)]})
    assert {0: 5, 1: 7} == log_offsets(admin, ASKED, "latest", 30.0)
    assert 3 == admin.list_offsets.call_count


def test_an_offset_that_is_never_told_is_refused() -> None:
    admin = mock.Mock(**{"list_offsets.return_value": _answer(5, -1)})
    with pytest.raises(KafkaRefused, match="no log offsets"):
        log_offsets(admin, ASKED, "latest", 0.0)
