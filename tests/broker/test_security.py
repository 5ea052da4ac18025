"""Over SASL_SSL and mutual TLS, with permissions: what works, and how each thing that is missing is named."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broker_app import ITEMS, STARS, App, event
from click.testing import CliRunner, Result
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation, ResourceType

from stream_adapt import cli
from stream_adapt.config import load
from stream_adapt.kafka.permissions import Permission, of_commands, of_member
from stream_adapt.kafka.topics import create_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.record import TopicNames
from stream_adapt.service import topic_specs
from stream_adapt.testing.broker import RunningBroker
from stream_adapt.testing.model import random_model
from stream_adapt.testing.security import Authority, SecuredKafka, secured_kafka

pytestmark = pytest.mark.broker

PASSWORD = "canary-password-7c1d"
PARTITIONS = 2
#: A member that says why it ends does so within seconds, on a machine that has them.
EXIT_TIMEOUT_S = 150.0
KEY_PASSWORD = "canary-passphrase-90ab"


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    with secured_kafka(tmp_path_factory.mktemp("security")) as secured:
        yield secured


@dataclass
class Secured:
    """An application on the secured broker, and its principal."""

    app: App
    kafka: SecuredKafka
    principal: str

    @property
    def permissions(self) -> tuple[Permission, ...]:
        return of_member(TopicNames.of(self.app.name), self.app.name, f"{self.app.name}.0")

    def config(self, properties: dict[str, Any], servers: str, **sections: Any) -> Path:
        kafka = {"bootstrap_servers": servers, "properties": properties}
        return self.app.config(kafka=kafka, topics={"partitions": PARTITIONS}, **sections)

    def by_password(self, **changes: Any) -> Path:
        (self.app.folder / "password").write_text(PASSWORD)
        secret = {"file": str(self.app.folder / "password")}
        return self.config({**self.kafka.by_password(self.principal, secret), **changes}, self.kafka.sasl)

    def run(self, *words: str, config: Path) -> Result:
        """A command in this process; whatever it writes is in its output."""
        return CliRunner(catch_exceptions=True).invoke(cli.cli, [*words, "-c", str(config)])

    def produce(self, count: int) -> None:
        producer = Producer({"bootstrap.servers": self.kafka.admin_servers})
        for number in range(count):
            one = event(number)
            producer.produce(f"{self.app.name}.events", json.dumps(one), one["user_id"])
        assert producer.flush(30) == 0

    def member(self, config: Path, *words: str) -> tuple[int, str]:
        """`stream-adapt run` as a process until it ends: exit code, and what it said."""
        process = self.app.start(*words, config=config)
        code = process.wait(EXIT_TIMEOUT_S)
        return code, config.with_suffix(".log").read_text()


@pytest.fixture
def secured(kafka: SecuredKafka, tmp_path: Path) -> Iterator[Secured]:
    """An application whose principal may do what a member needs, and nothing else."""
    name = f"app-{uuid.uuid4().hex[:8]}"
    app = App(name, RunningBroker(kafka.admin_servers, "embedded"), tmp_path, PARTITIONS)
    random_model(tmp_path / "models", LearnerSpec(feedback=STARS), ITEMS)
    specs = topic_specs(load(app.config(topics={"partitions": PARTITIONS}), {}).config)
    create_topics({"bootstrap.servers": kafka.admin_servers}, specs)
    kafka.add_user(name, PASSWORD)
    made = Secured(app, kafka, name)
    kafka.allow(name, made.permissions)
    yield made
    app.end()


def test_a_member_runs_over_sasl_ssl_with_exactly_the_permissions_that_are_documented(secured: Secured) -> None:
    secured.produce(50)
    code, said = secured.member(secured.by_password(), "--stop-after", "50")
    assert (code, 50) == (0, len(secured.app.scores())), said
    assert PASSWORD not in said


def test_a_member_runs_over_mutual_tls_with_an_encrypted_key(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = secured.kafka.authority.issue(secured.principal, password=KEY_PASSWORD)
    monkeypatch.setenv("TEST_KEY_PASSWORD", KEY_PASSWORD)
    properties = {**secured.kafka.by_certificate(identity), "ssl.key.password": {"env": "TEST_KEY_PASSWORD"}}
    config = secured.config(properties, secured.kafka.tls)
    secured.produce(20)
    code, said = secured.member(config, "--stop-after", "20")
    assert (code, 20) == (0, len(secured.app.scores())), said
    assert KEY_PASSWORD not in said + secured.run("check-config", config=config).output


def wrong_password(s: Secured, _other: Authority) -> Path:
    config = s.by_password()
    (s.app.folder / "password").write_text(f"not-{PASSWORD}")
    return config


def unknown_authority(s: Secured, other: Authority) -> Path:
    return s.by_password(**{"ssl.ca.location": str(other.certificate)})


def expired_certificate(s: Secured, _other: Authority) -> Path:
    return s.config(s.kafka.by_certificate(s.kafka.authority.issue(s.principal, expired=True)), s.kafka.tls)


def foreign_certificate(s: Secured, other: Authority) -> Path:
    return s.config(s.kafka.by_certificate(other.issue(s.principal)), s.kafka.tls)


def no_certificate(s: Secured, _other: Authority) -> Path:
    authority = str(s.kafka.authority.certificate)
    return s.config({"security.protocol": "SSL", "ssl.ca.location": authority}, s.kafka.tls)


def tls_where_none_is_spoken(s: Secured, _other: Authority) -> Path:
    return s.config(s.kafka.by_certificate(s.kafka.authority.issue(s.principal)), s.kafka.admin_servers)


OPTIONS = {
    ResourceType.TOPIC: "topic",
    ResourceType.GROUP: "group",
    ResourceType.TRANSACTIONAL_ID: "transactional-id",
}

CASES: list[tuple[Callable[[Secured, Authority], Path], str]] = [
    (
        wrong_password,
        r"check sasl\.username='app-.*', whether its password is the newest, and sasl\.mechanism='SCRAM-SHA-512'",
    ),
    (unknown_authority, r"check that ssl\.ca\.location='.*other-ca\.pem' is the authority"),
    (expired_certificate, r"renew the client certificate ssl\.certificate\.location='.*': it expired at 20"),
    (foreign_certificate, r"check the client certificate .* \(it is valid until 20.*the broker must trust"),
    (no_certificate, r"give a client certificate, which the broker asks for"),
    (tls_where_none_is_spoken, r"check security\.protocol and the port"),
]
COMMANDS = [
    ("run",),
    ("topics", "create"),
    ("state", "reset", "--yes"),
    ("state", "show", "u"),
    ("state", "erase", "u"),
    ("dead-letters", "list"),
    ("dead-letters", "replay", "--yes"),
]


@pytest.mark.parametrize(("spoil", "to_do"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_being_turned_away_is_said_at_once_with_what_to_do(
    secured: Secured, tmp_path: Path, spoil: Callable[[Secured, Authority], Path], to_do: str
) -> None:
    config = spoil(secured, Authority(tmp_path, "other-ca"))
    for words in COMMANDS if spoil is wrong_password else [("topics", "create")]:
        with pytest.raises(cli.KafkaRefused, match=to_do) as refused:
            cli.cli([*words, "-c", str(config)], standalone_mode=False)
        assert 3 == refused.value.exit_code
        assert PASSWORD not in str(refused.value)


def test_a_member_with_a_wrong_password_ends_with_3_and_no_secret_is_written(secured: Secured, tmp_path: Path) -> None:
    code, said = secured.member(wrong_password(secured, Authority(tmp_path)))
    assert (3, True) == (code, "turn us away" in said), said
    assert PASSWORD not in said
    assert "Traceback" not in said


def test_every_permission_that_a_member_lacks_is_named_and_nothing_is_lost(secured: Secured) -> None:
    secured.produce(10)
    config = secured.by_password()
    rows = [
        one for one in secured.permissions if one.name.endswith(".changelog") and one.operation == AclOperation.READ
    ]
    topics = [one for one in secured.permissions if one.resource == ResourceType.TOPIC and one.required]
    (group,) = [one for one in secured.permissions if one.resource == ResourceType.GROUP]
    (transactions,) = [one for one in secured.permissions if one.resource == ResourceType.TRANSACTIONAL_ID]
    # All but one at once: the changelog may still be described, the others are hidden.
    for lacking in ([one for one in topics if one not in rows], [group], [transactions]):
        secured.kafka.forbid(secured.principal, lacking)
        code, said = secured.member(config, "--stop-after", "1")
        assert (3, []) == (code, [one for one in lacking if str(one) not in said]), said
        assert all(f"--{option} {one.name}" in said for one in lacking for option in [OPTIONS[one.resource]])
        secured.kafka.allow(secured.principal, lacking)
    optional = [one for one in secured.permissions if not one.required]
    secured.kafka.forbid(secured.principal, optional)
    code, said = secured.member(config, "--stop-after", "10")
    assert (0, True) == (code, "grant DescribeConfigs" in said), said
    assert 10 == len({score["event_id"] for score in secured.app.scores()})


#: Every command that talks to Kafka, but `run`.
OTHERS = (
    "topics create",
    "topics check",
    "state show u",
    "state accept-offset --use group --yes",
    "state reset --yes",
    "state erase u",
    "dead-letters list",
    "dead-letters replay --yes",
)


def test_other_commands_run_with_the_permissions_that_are_documented(secured: Secured) -> None:
    config, name = secured.by_password(), secured.app.name
    extra = of_commands(name, TopicNames.of(name), name)
    assert set(extra) <= {" ".join(command.split()[:2]) for command in OTHERS}
    for command in OTHERS:
        permissions = extra.get(" ".join(command.split()[:2]), ())
        secured.kafka.allow(secured.principal, permissions)
        done = secured.run(*command.split(), config=config)
        assert (0, None) == (done.exit_code, done.exception), (command, done.output)
        secured.kafka.forbid(secured.principal, [one for one in permissions if one not in secured.permissions])


def test_a_permission_that_is_withdrawn_ends_a_member_that_runs(secured: Secured) -> None:
    config = secured.by_password()
    process = secured.app.start(config=config)
    secured.produce(10)
    secured.app.wait_for_outputs(10)
    (write,) = [one for one in secured.permissions if one.name == secured.app.scores_topic]
    secured.kafka.forbid(secured.principal, [write])
    secured.produce(10)
    code = process.wait(EXIT_TIMEOUT_S)
    said = config.with_suffix(".log").read_text()
    assert (3, True) == (code, f"{write}" in said.partition("grant this principal")[2]), said
    assert 10 == len(secured.app.scores())
