"""An Apache Kafka that lets nobody in without a password or a certificate, and that asks for permissions.

    with secured_kafka(tmp_path) as kafka:
        kafka.add_user("films", "secret")
        kafka.allow("films", [Permission(AclOperation.WRITE, ResourceType.TOPIC, "films.events")])
        Producer({"bootstrap.servers": kafka.sasl, **kafka.by_password("films", "secret")})

Three listeners: SASL_SSL with SCRAM-SHA-512, SSL with client certificates (mutual TLS), and one on loopback in plain
text for the administrator, who may do everything. Certificates are made here, by a certificate authority that lives as
long as the object.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stream_adapt.kafka.embedded import HOST, EmbeddedKafka, free_ports
from stream_adapt.kafka.permissions import Permission

_REQUEST_TIMEOUT_S = 15.0
_DAY = timedelta(days=1)
_SCRAM_ITERATIONS = 4096
_B = TypeVar("_B", AclBinding, AclBindingFilter)


class Authority:
    """A certificate authority: PEM files in a folder."""

    def __init__(self, folder: Path, name: str = "test-ca") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        now = datetime.now(UTC)
        self._certificate = (
            _unsigned(subject, subject, self._key.public_key(), now - _DAY, now + _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / f"{name}.pem"
        self.certificate.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, expired: bool = False, password: str | None = None) -> Identity:
        """A certificate for a client or for the broker on loopback, and its key in PKCS #8.

        Args:
            name: the common name, which is the principal of a client.
            expired: since yesterday.
            password: what the key is encrypted with, if given.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        end = datetime.now(UTC) + (-_DAY if expired else _DAY)
        alternatives = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            _unsigned(_name(name), self._certificate.subject, key.public_key(), end - 2 * _DAY, end)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        identity = Identity(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        identity.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        sealed: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            sealed = serialization.BestAvailableEncryption(password.encode())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)
        identity.key.write_bytes(pem)
        identity.key.chmod(0o600)
        return identity


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class SecuredKafka:
    """The broker, its authority, and what an administrator does: users and permissions."""

    def __init__(self, kafka: EmbeddedKafka, authority: Authority, sasl_port: int, tls_port: int) -> None:
        self.kafka = kafka
        self.authority = authority
        self.sasl = f"{HOST}:{sasl_port}"
        self.tls = f"{HOST}:{tls_port}"
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})

    @property
    def admin_servers(self) -> str:
        """Where no password is asked for, and everything is allowed."""
        return self.kafka.bootstrap_servers

    def add_user(self, name: str, password: str) -> None:
        """A user who logs in by SCRAM-SHA-512; a new password if there is one of that name."""
        how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, _SCRAM_ITERATIONS)
        wanted = UserScramCredentialUpsertion(name, how, password.encode())
        for done in self._admin.alter_user_scram_credentials([wanted]).values():
            done.result(_REQUEST_TIMEOUT_S)

    def allow(self, principal: str, permissions: Iterable[Permission]) -> None:
        """From now on."""
        wanted = [_binding(AclBinding, principal, one) for one in permissions]
        if not wanted:
            return
        self._await(self._admin.create_acls(wanted))
        self._until(lambda known: known >= set(wanted))

    def forbid(self, principal: str, permissions: Collection[Permission]) -> None:
        """What was allowed, no longer."""
        filters = [_binding(AclBindingFilter, principal, one) for one in permissions]
        if not filters:
            return
        self._await(self._admin.delete_acls(filters))
        gone = {_binding(AclBinding, principal, one) for one in permissions}
        self._until(lambda known: not known & gone)

    def _await(self, futures: Mapping[Any, Future[Any]]) -> None:
        for done in futures.values():
            done.result(_REQUEST_TIMEOUT_S)

    def _until(self, holds: Callable[[set[AclBinding]], bool]) -> None:
        """What the controller has written, the broker learns a moment later."""
        anything: Any = None
        every = AclBindingFilter(
            ResourceType.ANY,
            anything,
            ResourcePatternType.ANY,
            anything,
            anything,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        deadline = time.monotonic() + _REQUEST_TIMEOUT_S
        while not holds(set(self._admin.describe_acls(every).result(_REQUEST_TIMEOUT_S))):
            if time.monotonic() > deadline:
                raise TimeoutError("the broker does not take its permissions")
            time.sleep(0.02)

    def by_password(self, user: str, password: Any) -> dict[str, Any]:
        """librdkafka properties of a client of the SASL listener."""
        return {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": password,
            "ssl.ca.location": str(self.authority.certificate),
        }

    def by_certificate(self, identity: Identity) -> dict[str, Any]:
        """librdkafka properties of a client of the TLS listener."""
        return {
            "security.protocol": "SSL",
            "ssl.ca.location": str(self.authority.certificate),
            "ssl.certificate.location": str(identity.certificate),
            "ssl.key.location": str(identity.key),
        }


@contextlib.contextmanager
def secured_kafka(folder: Path, properties: Mapping[str, str] | None = None) -> Iterator[SecuredKafka]:
    """A secured broker for as long as the `with` lasts; its certificates lie in the folder.

    Raises:
        ConfigError, KafkaRefused: as `EmbeddedKafka.start`.
    """
    authority = Authority(folder)
    broker = authority.issue("broker")
    chain = folder / "broker-chain.pem"
    chain.write_bytes(broker.key.read_bytes() + broker.certificate.read_bytes())
    sasl_port, tls_port = free_ports(2)
    settings = {
        "listeners": f"SASL_SSL://{HOST}:{sasl_port},SSL://{HOST}:{tls_port}",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(chain),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(authority.certificate),
        "listener.name.ssl.ssl.client.auth": "required",
        "ssl.principal.mapping.rules": "RULE:^CN=([^,]*).*$/$1/",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        **(properties or {}),
    }
    with EmbeddedKafka(properties=settings) as kafka:
        yield SecuredKafka(kafka, authority, sasl_port, tls_port)


def _binding(kind: Callable[..., _B], principal: str, permission: Permission) -> _B:
    literal, anywhere = ResourcePatternType.LITERAL, "*"
    return kind(
        permission.resource,
        permission.name,
        literal,
        f"User:{principal}",
        anywhere,
        permission.operation,
        AclPermissionType.ALLOW,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _unsigned(subject: x509.Name, issuer: x509.Name, key: Any, start: datetime, end: datetime) -> Any:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return made.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
