"""What is observed: Apache Kafka, members, a load and Prometheus, on loopback, each a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import psutil
import yaml
from flow import Flow, Record, calm
from rich.console import Console

from stream_adapt import config, service
from stream_adapt.demo import prepare
from stream_adapt.errors import ConfigError, KafkaRefused, StreamAdaptError
from stream_adapt.kafka import properties
from stream_adapt.kafka.embedded import HOST, EmbeddedKafka, free_ports
from stream_adapt.kafka.topics import create_topics
from stream_adapt.local import dying_with_parent

APP = "observed"
JOB = "stream-adapt"
RULES = Path(__file__).parents[1] / "prometheus" / "rules.yaml"
#: A member compiles its rule, and restores; everything else answers sooner.
START_TIMEOUT_S = 180.0
_EXIT_TIMEOUT_S = 60.0
#: Training, comparing and watching, of which each has settings of seconds.
_REFRESH_TIMEOUT_S = 400.0


class ObserveError(StreamAdaptError):
    """Something that was started does not do what it should."""


@dataclass(frozen=True)
class Settings:
    """How the world is set up; what is short is for the check."""

    per_second: float = 300.0
    partitions: int = 4
    scrape_s: float = 5.0
    broker: Mapping[str, str] = field(default_factory=dict)
    member: Mapping[str, Any] = field(default_factory=dict)
    leader: Mapping[str, Any] = field(default_factory=dict)  # on top of that for a, which refreshes the model
    rules: str | None = None  # the shipped ones if not given
    prometheus_port: int | None = None


#: The member that there is all the time.
LEADER = "a"
CONTROLLER, TRAINING = "stream_adapt.refresh.supervise", "stream_adapt.refresh.training"


class World:
    """Starts everything in order; what is left is stopped when the `with` ends, the broker last."""

    def __init__(self, settings: Settings, folder: Path, console: Console) -> None:
        self.settings = settings
        self.folder = folder
        self.members: dict[str, subprocess.Popen[bytes]] = {}
        self.kafka = EmbeddedKafka(folder / "kafka", properties=settings.broker)
        self._console = console
        self._stack = ExitStack()
        self._configs: dict[str, Path] = {}
        self._ports: dict[str, int] = {}
        self._load: Flow | None = None

    def __enter__(self) -> Self:
        with self._console.status("a model, from the synthetic stream"):
            cached, _ = prepare.pretrained(prepare.open_data("synthetic", None), self._console, retrain=False)
        # A registry of our own: refreshes write into it.
        self.model = Path(shutil.copytree(cached, self.folder / "models" / cached.name))
        with self._console.status("Apache Kafka"):
            self._stack.enter_context(self.kafka)
        self._stack.callback(self.stop)
        self.create_topics()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stop(self) -> None:
        """Ends all but the broker."""
        self.stop_load()
        for name in list(self.members):
            self.end(name)

    def create_topics(self) -> None:
        """Those of the application that are not there."""
        settings = config.load(self.config_of("a"), {}).config
        deadline = time.monotonic() + 30
        while True:  # one that was deleted just now may still be there a little
            outcomes = create_topics(properties.common(settings), service.topic_specs(settings))
            if all(outcome.ok for outcome in outcomes):
                return
            if time.monotonic() > deadline:
                raise KafkaRefused("; ".join(str(outcome) for outcome in outcomes if not outcome.ok))
            time.sleep(0.5)

    # Members

    def config_of(self, name: str, *, instance: str | None = None, model: Path | None = None) -> Path:
        """A member's configuration file; the same every time."""
        if name not in self._configs:
            (self._ports[name],) = free_ports(1)
            sections: dict[str, Any] = {
                "app": {"name": APP, "instance": instance or name},
                "kafka": {"bootstrap_servers": self.kafka.bootstrap_servers},
                "topics": {"partitions": self.settings.partitions},
                "model": {"path": str(model or self.model)},
                "metrics": {"host": HOST, "port": self._ports[name]},
                "state": {"dir": str(self.folder / f"state-{name}")},
            }
            self._configs[name] = self.folder / f"{name}.yaml"
            self._configs[name].write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
            self.configure(name, self.settings.member)
            if name == LEADER:
                self.configure(name, self.settings.leader)
        return self._configs[name]

    def configure(self, name: str, more: Mapping[str, Any]) -> None:
        """Changes keys, by section, in a member's file; it reads them when it is started."""
        path = self.config_of(name)
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, values in more.items():
            sections[section] = {**sections.get(section, {}), **values}
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")

    def start(self, name: str, *, wait: bool = True, instance: str | None = None, model: Path | None = None) -> None:
        """A member; returns when it is ready, unless told not to wait."""
        path = self.config_of(name, instance=instance, model=model)
        self.members[name] = self._spawn(["run", "-c", str(path)], self.folder / f"{name}.log")
        if wait:
            self.wait_ready(name)

    def wait_ready(self, name: str) -> None:
        """Returns when the member does its part."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers(f"{self.url_of(name)}/readyz"):
            if self.members[name].poll() is not None or time.monotonic() > deadline:
                raise ObserveError(f"{name} is not ready: see {self.folder / name}.log")
            time.sleep(0.2)

    def stands_still_s(self, name: str) -> float:
        """Since a member's loop last turned, as the member says."""
        with urllib.request.urlopen(f"{self.url_of(name)}/metrics", timeout=5) as answer:
            told = answer.read().decode()
        found = re.search(r"^stream_adapt_last_turn_timestamp_seconds\S* (\S+)$", told, re.MULTILINE)
        if found is None:
            raise ObserveError(f"{name} does not say when its loop last turned")
        return time.time() - float(found[1])

    def url_of(self, name: str) -> str:
        """Of a member's port."""
        return f"http://{HOST}:{self._ports[name]}"

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self.members[name].kill()
        self.members[name].wait(_EXIT_TIMEOUT_S)

    def end(self, name: str) -> int:
        """SIGTERM, if it runs; returns its exit code. It is not a member any more."""
        return _end(self.members.pop(name))

    def supervise(self) -> None:
        """Starts again who ended by itself."""
        for name, process in list(self.members.items()):
            if process.poll() is not None:
                self.start(name, wait=False)

    def refresh_processes(self, module: str) -> list[psutil.Process]:
        """Below the member that refreshes: its controller, or a training."""
        try:
            below = psutil.Process(self.members[LEADER].pid).children(recursive=True)
            return [process for process in below if module in process.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def refresh_now(self) -> None:
        """Asks for a refresh and waits for its end."""
        command = [sys.executable, "-m", "stream_adapt", "refresh", "-c", str(self.config_of(LEADER)), "--json"]
        with (self.folder / "refresh.log").open("ab") as log:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=_REFRESH_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise ObserveError(f"no refresh, exit code {done.returncode}: see {self.folder / 'refresh.log'}")

    # Load

    def start_load(self, records: Iterator[Record] | None = None) -> None:
        """Events until `stop_load`; if not given, those of the world that the model knows."""
        self._load = self.flow(records if records is not None else calm(), self.settings.per_second)
        self._load.__enter__()

    def stop_load(self) -> None:
        """No more events."""
        if self._load is not None:
            self._load.__exit__()
            self._load = None

    def flow(self, records: Iterator[Record], per_second: float) -> Flow:
        """Records into the input."""
        return Flow(self.kafka.bootstrap_servers, f"{APP}.events", records, per_second)

    # Prometheus

    def start_prometheus(self) -> Prometheus:
        """Scrapes the members and judges the rules."""
        program = shutil.which("prometheus")
        if program is None:
            raise ConfigError(
                "there is no `prometheus` on the PATH: install it (Debian: apt-get install --no-install-recommends "
                "prometheus) or put its folder on the PATH"
            )
        folder = self.folder / "prometheus"
        folder.mkdir()
        (folder / "rules.yaml").write_text(self.settings.rules or RULES.read_text(encoding="utf-8"), encoding="utf-8")
        every = f"{int(self.settings.scrape_s * 1000)}ms"
        scrape = {"job_name": JOB, "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}]}
        settings = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [scrape],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        self.scrape(*self.members)
        (port,) = free_ports(1, self.settings.prometheus_port)
        arguments = [
            "--config.file=prometheus.yaml", "--storage.tsdb.path=data", f"--web.listen-address={HOST}:{port}",
            "--query.lookback-delta=15s" if self.settings.scrape_s < 5 else "--query.lookback-delta=5m",
        ]  # fmt: skip
        process = _popen([program, *arguments], folder / "prometheus.log", folder)
        self._stack.callback(_end, process)
        prometheus = Prometheus(f"http://{HOST}:{port}")
        deadline = time.monotonic() + 30
        while not self._answers(f"{prometheus.url}/-/ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ObserveError(f"Prometheus does not answer: see {folder / 'prometheus.log'}")
            time.sleep(0.1)
        return prometheus

    def scrape(self, *names: str) -> None:
        """These members are scraped from now on."""
        targets = [{"targets": [f"{HOST}:{self._ports[name]}" for name in names]}] if names else []
        file = self.folder / "prometheus" / "targets.json"
        file.with_suffix(".new").write_text(json.dumps(targets), encoding="utf-8")
        file.with_suffix(".new").replace(file)

    def _spawn(self, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        return _popen([sys.executable, "-m", "stream_adapt", *arguments], log)

    @staticmethod
    def _answers(url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except (OSError, urllib.error.HTTPError):
            return False


@dataclass(frozen=True)
class Prometheus:
    """Asks a running Prometheus through its HTTP API."""

    url: str

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        found = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}

    def now(self, expression: str) -> list[dict[str, Any]]:
        """Series of an expression at this moment."""
        return list(self._get("query", query=expression)["result"])

    def over(self, expression: str, start: float, end: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """Series of an expression between two times."""
        wanted = {"query": expression, "start": start, "end": end, "step": step_s}
        return list(self._get("query_range", **wanted)["result"])

    def _get(self, what: str, **parameters: Any) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{urlencode(parameters)}", timeout=60) as answer:
                return dict(json.load(answer)["data"])
        except urllib.error.HTTPError as refused:
            with refused:
                told = json.load(refused).get("error", refused.reason)
            raise ObserveError(f"Prometheus refuses {parameters.get('query', what)!r}: {told}") from refused


def _popen(command: list[str], log: Path, folder: Path | None = None) -> subprocess.Popen[bytes]:
    prefix = config.ENVIRONMENT_PREFIX
    ours = {name: value for name, value in os.environ.items() if not name.startswith(prefix)}
    cache = {name: value for name, value in os.environ.items() if name == f"{prefix}CACHE_DIR"}
    with log.open("ab") as out:
        # A session of its own: Ctrl-C goes to us, and we end it in order.
        return subprocess.Popen(
            dying_with_parent(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder,
            env=ours | cache, start_new_session=True,
        )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(_EXIT_TIMEOUT_S)
