"""The check: a calm phase, then one situation after the other for which an alert is there, then calm again.

Each situation names the alerts that it must raise and those that it may; whatever else fires is a false alert, and so
is anything in the calm phases. Then every expression is asked for over the whole run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import yaml
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from flow import drifted, fickle, garbage
from rich.console import Console
from world import APP, CONTROLLER, RULES, TRAINING, ObserveError, Settings, World

from stream_adapt.announcements import Announcement, announce
from stream_adapt.chaos import broker as chaos_broker
from stream_adapt.chaos.schedule import Timeouts
from stream_adapt.config import load
from stream_adapt.models import read_model, write_model

DASHBOARD = Path(__file__).parents[1] / "grafana" / "dashboards" / "stream-adapt.json"
SCRAPE_S = 1.0
#: Longer than every window of the shortened rules.
CALM_S = 25.0
_FIRE_TIMEOUT_S = 90.0
_QUIET_TIMEOUT_S = 120.0
#: How often a broker is stopped to catch a transaction, and for how long each time.
_TRIES, _HELD_S = 20, 1.5
#: What a situation led to late is still its own: a window and a `for`.
_QUIET_S = 10.0
#: Windows, `for` and thresholds of the shipped rules → those of the check, whose situations last seconds.
_WINDOWS = {"1h": "20s", "10m": "20s", "5m": "10s", "2m": "5s"}
_FOR = "3s"
#: What would otherwise be raised before a refresh can have ended.
_FOR_LONGER = {"StreamAdaptModelStale": "20s"}
_THRESHOLDS = {
    "StreamAdaptStalled": ("> 120", "> 4"),
    "StreamAdaptBrokerUnreachable": ("> 60", "> 5"),
    "StreamAdaptLag": ("> 300", "> 6"),
    "StreamAdaptFenced": ("< 600", "< 40"),
    "StreamAdaptRowsRefused": ("< 3600", "< 40"),
    "StreamAdaptNoLift": ("> 1000", "> 500"),
    "StreamAdaptRefreshSilent": ("> 600", "> 10"),
}
#: At 300 events a second: fourteen seconds until it is known what is normal; three of news until a training.
_DRIFT = {"reference_events": 4_096}
_REFRESH = {
    "mode": "child",
    "cooldown_s": 0,
    "settle_events": 1_000,
    "window_events": 12_000,
    "training_s": 15,
    "nice": 0,
    "shadow_events": 1_500,
    "watch_events": 2_000,
    "error": 0.1,
}
#: Users and models that misbehave on purpose are drift, too: until they are done with, only the catalogue is watched.
#: The announcement that follows them is what a controller goes on from that is started later.
_AT_FIRST = {"signals": ["unseen"]}
_LATER = {"signals": ["excess_loss", "unseen"]}


def shortened(rules: str) -> str:
    """The shipped rules with times of seconds."""
    tree = yaml.safe_load(rules)
    for rule in (rule for group in tree["groups"] for rule in group["rules"]):
        rule["expr"] = _short(rule["expr"])
        if "for" in rule:
            rule["for"] = _FOR_LONGER.get(rule["alert"], _FOR)
        if rule.get("alert") in _THRESHOLDS:
            before, after = _THRESHOLDS[rule["alert"]]
            if before not in rule["expr"]:
                raise ObserveError(f"{rule['alert']}: no {before!r} in {rule['expr']!r}; mend the check's thresholds")
            rule["expr"] = rule["expr"].replace(before, after)
    return str(yaml.safe_dump(tree, sort_keys=False))


def _short(expression: str) -> str:
    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}{_WINDOWS[found[2]]}"

    return re.sub(r"(\[|offset )(\d+[smhd])\b", replaced, expression)


@dataclass
class Judged:
    """What came of it."""

    seconds: float = 0.0
    panels: list[str] = field(default_factory=list)
    panels_empty: list[str] = field(default_factory=list)
    expressions: int = 0
    expressions_empty: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    alerts_fired: list[str] = field(default_factory=list)
    alerts_false: list[str] = field(default_factory=list)
    refresh: str = ""  # how the one ended that was left alone, and those that followed it

    @property
    def ok(self) -> bool:
        """No panel empty, every alert fired in its situation, none besides."""
        return not self.panels_empty and not self.alerts_false and set(self.alerts) == set(self.alerts_fired)

    def shown(self) -> dict[str, Any]:
        """Counts, and the names where something is amiss or to be known."""
        counts = {name: len(value) if isinstance(value, list) else value for name, value in asdict(self).items()}
        missing = sorted(set(self.alerts) - set(self.alerts_fired))
        named = {"empty": self.panels_empty, "not_fired": missing, "false": self.alerts_false}
        return {**counts, "named": named, "expressions_without_series": self.expressions_empty}


def run_check(folder: Path, console: Console) -> Judged:
    """Minutes: ten on two busy cores.

    Raises:
        StreamAdaptError: something could not be started, or does not recover.
    """
    timeouts = Timeouts()
    settings = Settings(
        scrape_s=SCRAPE_S,
        rules=shortened(RULES.read_text(encoding="utf-8")),
        broker=chaos_broker.properties(timeouts, replicas=1),
        member={
            "kafka": {
                "session_timeout_ms": int(timeouts.session_s * 1000),
                "transaction_timeout_ms": int(timeouts.transaction_s * 1000),
                "properties": {"reconnect.backoff.max.ms": 500},
            },
            # What blocks is to be seen, and not to be ended, here.
            "metrics": {"stalled_after_s": 60},
        },
        leader={"drift": _DRIFT | _AT_FIRST, "refresh": _REFRESH},
    )
    began = time.monotonic()
    with World(settings, folder, console) as world:
        judged = _Check(world, console).run()
    judged.seconds = round(time.monotonic() - began, 1)
    return judged


#: Brought about when it is entered, and put right when it is left.
Situation = Callable[[], Any]


class _Check:
    def __init__(self, world: World, console: Console) -> None:
        self._world = world
        self._console = console
        self._judged = Judged()

    def run(self) -> Judged:
        world, judged = self._world, self._judged
        self._say("a member, and a load")
        world.start("a")
        world.start_load()
        time.sleep(2)
        self._prometheus = world.start_prometheus()
        self._first_scrapes()
        started = time.time()
        judged.alerts = [rule["alert"] for rule in _rules(world.settings.rules) if "alert" in rule]
        self._calm("calm")
        for situation, expected, possible in (
            (self.bad_records, {"DeadLetters"}, set()),
            (self.fickle_users, {"NoLift"}, set()),
            (self.a_model_that_diverged, {"VersionsDiffer", "NotFinite"}, {"NoLift", "NotProgressing"}),
            (self.a_model_that_is_not_there, {"ModelOutdated"}, set()),
            (self.a_crash, {"Down"}, set()),
            (self.a_restore_that_waits, {"RestoreStalled", "RowsRefused"}, _OF_A_RESTART),
            (self.two_of_one_name, {"Fenced"}, _OF_A_RESTART),
            (self.no_scores_topic, {"Aborting", "NotProgressing", "Lag"}, {"Stalled", *_OF_A_RESTART}),
            (self.a_broker_that_stands_still, {"BrokerUnreachable", "Stalled"}, {"Aborting", *_OF_A_RESTART}),
            (self.a_training_that_dies_after_a_drift, {"ModelStale", "RefreshFailed"}, {"NoLift"}),
            (self.a_controller_that_hangs, {"RefreshSilent"}, set()),
            (self.nobody_is_scraped, {"Absent"}, set()),
        ):
            self._bring_about(situation, expected, possible)
        self._calm("calm again")
        self._ask_everything(started, time.time())
        return judged

    # What the alerts are for

    @contextmanager
    def bad_records(self) -> Iterator[None]:
        """A producer writes something else into a seventh of its records."""
        with self._world.flow(garbage(), per_second=50):
            yield

    @contextmanager
    def fickle_users(self) -> Iterator[None]:
        """Everybody likes one thing, then dislikes the next: what is learned from the first misleads at the second."""
        self._world.stop_load()
        with self._world.flow(fickle(), per_second=300):
            yield
        self._world.start_load()

    @contextmanager
    def a_model_that_diverged(self) -> Iterator[None]:
        """A second member joins with a newer version, whose weights are finite and far too large."""
        world = self._world
        model = read_model(world.model)
        diverged = msgspec.structs.replace(model.weights, prior_mean=np.full_like(model.weights.prior_mean, 1e38))
        registry = world.folder / "diverged"
        write_model(registry, diverged, model.spec, model.manifest.fitted)
        world.start("b", model=registry)
        world.scrape("a", "b")
        yield
        world.scrape("a")
        world.end("b")

    @contextmanager
    def a_crash(self) -> Iterator[None]:
        """`kill -9`."""
        self._world.kill("a")
        yield

    @contextmanager
    def a_restore_that_waits(self) -> Iterator[None]:
        """It comes back to a changelog with damaged records, and an open transaction of a producer that is gone."""
        world = self._world
        stranger = Producer(
            {
                "bootstrap.servers": world.kafka.bootstrap_servers,
                "transactional.id": "stranger",
                "transaction.timeout.ms": 120_000,
            }
        )
        stranger.init_transactions(30)
        self._write_to_changelog(stranger)
        stranger.commit_transaction(30)
        self._write_to_changelog(stranger)  # and this stays open
        world.configure("a", {"drift": _LATER})
        world.start("a", wait=False)
        yield
        stranger.abort_transaction(30)
        world.wait_ready("a")

    def _write_to_changelog(self, stranger: Producer) -> None:
        """A transaction with a damaged record in every partition begins."""
        stranger.begin_transaction()
        for partition in range(self._world.settings.partitions):
            stranger.produce(f"{APP}.changelog", b"too short", b"u:damaged", partition)
        stranger.flush(30)

    @contextmanager
    def two_of_one_name(self) -> Iterator[None]:
        """Somebody starts a second process with the first one's app.instance."""
        world = self._world
        world.start("twin", wait=False, instance="a")
        world.scrape("a", "twin")
        yield
        world.scrape("a")
        world.end("twin")
        self._recover("a")

    @contextmanager
    def no_scores_topic(self) -> Iterator[None]:
        """Somebody deletes the topic of the scores."""
        admin = AdminClient({"bootstrap.servers": self._world.kafka.bootstrap_servers})
        for deleted in admin.delete_topics([f"{APP}.scores"], operation_timeout=30).values():
            deleted.result()
        yield
        self._world.create_topics()
        self._recover("a")

    @contextmanager
    def a_broker_that_stands_still(self) -> Iterator[None]:
        """SIGSTOP to the only broker, in the middle of a transaction: without one a loop goes on turning."""
        pid = self._world.kafka.pid
        assert pid is not None
        for _ in range(_TRIES):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_HELD_S)
            if self._world.stands_still_s("a") > _HELD_S / 2:
                break
            os.kill(pid, signal.SIGCONT)
            time.sleep(_HELD_S)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
        self._recover("a")

    @contextmanager
    def a_model_that_is_not_there(self) -> Iterator[None]:
        """A version is announced whose file nobody has copied; then the one that is served, again."""
        config, served = load(self._world.config_of("a")).config, read_model(self._world.model).manifest
        missing = Announcement(
            version="20991231T235959-00000000",
            sha256="0" * 64,
            previous=served.version,
            rows="carry",
            reason="a file that nobody has",
            decided_ms=int(time.time() * 1000),
        )
        announce(config, missing)
        yield
        announce(config, msgspec.structs.replace(missing, version=served.version, sha256=served.sha256, previous=None))

    @contextmanager
    def a_training_that_dies_after_a_drift(self) -> Iterator[None]:
        """From now on items are taken for one another. The training that follows is killed, the next one is not."""
        world = self._world
        self._wait_for(_KNOWN)
        world.stop_load()
        world.start_load(drifted())
        over = threading.Event()

        def kill() -> None:
            while not over.wait(0.2):
                for process in world.refresh_processes(TRAINING):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()

        killer = threading.Thread(target=kill, name="killer", daemon=True)
        killer.start()
        yield
        over.set()
        killer.join()
        began = time.time()
        world.refresh_now()
        time.sleep(2 * SCRAPE_S)
        ended = self._prometheus.over(_DECIDED, began, time.time())
        self._judged.refresh = ", ".join(sorted(series["metric"]["outcome"] for series in ended))
        self._console.print(f"  left alone: {self._judged.refresh}")

    @contextmanager
    def a_controller_that_hangs(self) -> Iterator[None]:
        """SIGSTOP to the controller of the refresh."""
        (controller,) = self._world.refresh_processes(CONTROLLER)
        controller.suspend()
        yield
        controller.resume()

    @contextmanager
    def nobody_is_scraped(self) -> Iterator[None]:
        """Service discovery finds nobody any more."""
        self._world.scrape()
        yield
        self._world.scrape("a")

    # How they are brought about and judged

    def _bring_about(self, situation: Situation, expected: set[str], possible: set[str]) -> None:
        expected, possible = _full(expected), _full(possible)
        self._say(f"{situation.__name__.replace('_', ' ')}: {', '.join(sorted(expected))}")
        # After the crash its member stays away: the next situation begins with its start.
        lasting = _full({"Down"}) if situation.__name__ == "a_crash" else set()
        began, fired = time.monotonic(), set[str]()
        with situation():
            while not expected <= fired and time.monotonic() - began < _FIRE_TIMEOUT_S:
                fired |= self._prometheus.firing()
                if not lasting:
                    self._world.supervise()
                time.sleep(0.2)
        self._judged.alerts_fired += sorted(expected & fired)
        quiet_since = deadline = time.monotonic()
        deadline += _QUIET_TIMEOUT_S
        while time.monotonic() < min(quiet_since + _QUIET_S, deadline):
            if now := self._prometheus.firing() - lasting:
                fired |= now
                quiet_since = time.monotonic()
            if not lasting:
                self._world.supervise()
            time.sleep(0.2)
        self._note_false(situation.__name__, (fired - expected - possible) | now)

    def _calm(self, name: str) -> None:
        self._say(f"{name}, {CALM_S:.0f} s")
        ends = time.monotonic() + CALM_S
        fired: set[str] = set()
        while time.monotonic() < ends:
            fired |= self._prometheus.firing()
            time.sleep(0.2)
        self._note_false(name, fired)

    def _first_scrapes(self) -> None:
        """Until Prometheus knows the member."""
        self._wait_for("up == 1")
        self._wait_for("absent(ALERTS)")

    def _wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        while not self._prometheus.now(expression):
            if time.monotonic() > deadline:
                raise ObserveError(f"Prometheus has no {expression} after {_QUIET_TIMEOUT_S:.0f} s")
            time.sleep(0.2)

    def _note_false(self, when: str, alerts: set[str]) -> None:
        for alert in sorted(alerts):
            self._judged.alerts_false.append(f"{alert} in {when}")
            self._console.print(f"  false: {alert}")

    def _recover(self, name: str) -> None:
        """Until the member is ready, started again as often as needed."""
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        while time.monotonic() < deadline:
            self._world.supervise()
            try:
                return self._world.wait_ready(name)
            except ObserveError:
                time.sleep(1)
        raise ObserveError(f"{name} does not recover: see {self._world.folder / name}.log")

    def _ask_everything(self, start: float, end: float) -> None:
        self._say("every expression of every panel and rule")
        for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
            if panel["type"] == "row":
                continue
            self._judged.panels.append(panel["title"])
            found = [self._has_series(target["expr"], start, end) for target in panel["targets"]]
            if not any(found):
                self._judged.panels_empty.append(panel["title"])
        for rule in _rules(self._world.settings.rules):
            self._has_series(rule["expr"], start, end)

    def _has_series(self, expression: str, start: float, end: float) -> bool:
        for name, value in {"$__rate_interval": "10s", "$window": "20s", "$job": ".+"}.items():
            expression = expression.replace(name, value)
        self._judged.expressions += 1
        found = bool(self._prometheus.over(expression, start, end))
        if not found:
            self._judged.expressions_empty.append(expression)
        return found

    def _say(self, what: str) -> None:
        self._console.print(what)


_DECIDED = 'stream_adapt_refresh_decision_timestamp_seconds{outcome!="failed"}'
#: What is normal, as somebody says who leads now.
_KNOWN = (
    'max(stream_adapt_drift_reference{signal="excess_loss"})'
    " and time() - max(stream_adapt_refresh_told_timestamp_seconds) < 5"
)
#: What a member that ends and is started again may raise.
_OF_A_RESTART = {"Down", "NotProgressing", "Lag", "RestoreStalled", "RowsRefused", "Fenced", "RefreshSilent"}


def _full(names: set[str]) -> set[str]:
    return {f"StreamAdapt{name}" for name in names}


def _rules(text: str | None) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text or "")["groups"] for rule in group["rules"]]
