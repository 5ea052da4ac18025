"""Why brokers turn a client away, as librdkafka puts it, and what that means for the operator."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AclOperation, ResourceType

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.access import PATIENCE_S, Gate, certificate_end, reach
from stream_adapt.kafka.permissions import Permission, denied, missing, of_member, to_do
from stream_adapt.kafka.topics import product_topics
from stream_adapt.record import TopicNames
from stream_adapt.testing.security import Authority

WRONG_PASSWORD = KafkaError(KafkaError._AUTHENTICATION, "SASL authentication error: Authentication failed")
ALL_DOWN = KafkaError(KafkaError._ALL_BROKERS_DOWN, "1/1 brokers are down")
NO_ROUTE = KafkaError(KafkaError._TRANSPORT, "Connect to ipv4#127.0.0.1:1 failed: Connection refused")
SETTINGS = {"bootstrap.servers": "b:9092", "sasl.username": "films", "sasl.password": "canary", "sasl.mechanism": "X"}


class Client:
    def poll(self, timeout: float) -> None:
        """Says nothing."""


def test_a_wrong_password_names_the_user_and_never_the_password() -> None:
    gate = Gate(SETTINGS)
    gate.noted(WRONG_PASSWORD)
    with pytest.raises(KafkaRefused, match=r"brokers at b:9092 turn us away.*sasl\.username='films'") as refused:
        gate.refuse()
    assert "canary" not in str(refused.value)


def test_a_broker_that_is_not_there_is_no_refusal() -> None:
    gate = Gate(SETTINGS)
    gate.noted(NO_ROUTE)
    gate.noted(ALL_DOWN)
    gate.refuse()
    assert "" == gate.because


@pytest.mark.parametrize(
    ("every_s", "down", "let_in", "ends"),
    [(5, True, False, True), (5, False, False, False), (5, True, True, False), (40, True, False, False)],
    ids=["by all", "by one of them", "and let in again", "now and then"],
)
def test_a_member_ends_when_all_turn_it_away_for_long(every_s: int, down: bool, let_in: bool, ends: bool) -> None:
    now = [0.0]
    gate = Gate(SETTINGS, lambda: now[0])
    if down:
        gate.noted(ALL_DOWN)
    for moment in range(0, int(PATIENCE_S) * 3, every_s):
        now[0] = moment
        gate.noted(WRONG_PASSWORD)
        if moment < PATIENCE_S:
            gate.refuse_at_last()
        if let_in and moment == 60:
            gate.passed()
    if ends:
        with pytest.raises(KafkaRefused):
            gate.refuse_at_last()
    else:
        gate.refuse_at_last()


def test_a_first_contact_is_tried_again_and_ends_as_soon_as_we_are_turned_away() -> None:
    tries = []

    def ask(seconds: float) -> str:
        tries.append(seconds)
        if len(tries) < 3:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return "answer"

    gate = Gate(SETTINGS)
    assert "answer" == reach(ask, Client(), gate)
    tries.clear()
    gate.noted(WRONG_PASSWORD)
    with pytest.raises(KafkaRefused, match="turn us away"):
        reach(ask, Client(), gate)
    assert 2 == len(tries)


def test_nobody_there_is_told_at_the_time_limit() -> None:
    def ask(_seconds: float) -> None:
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    with pytest.raises(KafkaRefused, match=r"no broker answered within 0 s.*kafka\.bootstrap_servers"):
        reach(ask, Client(), Gate(SETTINGS), timeout_s=0)


def test_the_end_of_a_certificate_is_read(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    valid, expired = authority.issue("valid"), authority.issue("late", expired=True)
    now = datetime.now(UTC)
    for identity, later in ((valid, True), (expired, False)):
        end = certificate_end(identity.certificate)
        assert end is not None
        assert later is (end > now)
    for content in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", b"\xff" * 90):
        (tmp_path / "bad.pem").write_bytes(content)
        assert certificate_end(tmp_path / "bad.pem") is None
    whole = base64.b64decode(b"".join(valid.certificate.read_bytes().splitlines()[1:-1]))
    for cut in range(0, len(whole), 7):
        text = base64.b64encode(whole[:cut]).decode()
        (tmp_path / "cut.pem").write_text(f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----")
        assert certificate_end(tmp_path / "cut.pem") in (None, certificate_end(valid.certificate))


def test_a_permission_may_be_implied_and_what_is_not_told_counts_as_given() -> None:
    topic, group = ResourceType.TOPIC, ResourceType.GROUP
    describe = Permission(AclOperation.DESCRIBE, topic, "t")
    read = Permission(AclOperation.READ, topic, "t")
    on_group = Permission(AclOperation.READ, group, "g")
    assert [] == missing([describe, on_group], {(topic, "t"): [AclOperation.WRITE]})
    assert [read] == missing([describe, read, on_group], {(topic, "t"): [AclOperation.WRITE]})
    assert [] == missing([read], {(topic, "t"): [AclOperation.ALL]})
    assert [on_group] == missing([on_group], {(group, "g"): ()})


def test_what_is_missing_is_said_with_the_command_that_gives_it() -> None:
    error = KafkaError(KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
    said = denied(error, AclOperation.WRITE, topic="t", transactional_id="films.0") or ""
    assert "Write on transactional id films.0" in said
    assert "--operation Write --transactional-id films.0" in said
    assert denied(KafkaError(KafkaError._TRANSPORT), AclOperation.READ, topic="t") is None
    both = [Permission(one, ResourceType.TOPIC, "t") for one in (AclOperation.READ, AclOperation.WRITE)]
    assert "--operation Read --operation Write --topic t`" in to_do(both)


def test_every_topic_that_is_created_has_its_permissions() -> None:
    needed = of_member(TopicNames.of("app"), "app", "app.0")
    named = {one.name for one in needed if one.resource == ResourceType.TOPIC}
    controllers = {"app.alarms", "app.refresh"}
    assert {spec.name for spec in product_topics("app", 1)} == named | controllers
