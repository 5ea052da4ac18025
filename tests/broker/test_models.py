"""Another model in the running loop, on a real broker: who serves what, from where on, and whom nobody asks.

Members run in this process where what they are told from outside does not matter: starting one takes seconds.
"""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from broker_app import ITEMS, STARS, App, event
from click.testing import CliRunner
from test_restore import Member, changelog, rows_of, until

from stream_adapt.announcements import Announcement, announce
from stream_adapt.cli import cli
from stream_adapt.config import load
from stream_adapt.errors import ModelError, ModelUnfit
from stream_adapt.models import LearnerSpec, Registry, read_model, write_model
from stream_adapt.state.row import ControlRow
from stream_adapt.testing.broker import read_all
from stream_adapt.testing.model import random_model

pytestmark = pytest.mark.broker

#: Within which all members serve what is announced.
DEADLINE_S = 5.0


def registry(app: App) -> Path:
    return app.folder / "models"


def successor(app: App, parent: str | None = None, seed: int = 1, **about: Any) -> Path:
    """Writes another θ of the same form, with f kept; returns its folder."""
    served = read_model(registry(app))
    other = read_model(random_model(app.folder / "other", served.spec, ITEMS, seed=seed))
    weights = msgspec.structs.replace(other.weights, implicit_item=served.weights.implicit_item)
    return write_model(registry(app), weights, served.spec, (), parent=parent or served.version, **about)


def models(app: App, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["models", *words, "-c", str(app.config()), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def promote(app: App, version: str, *words: str) -> dict[str, Any]:
    return models(app, "promote", version, "--reason", "a test", *words)["announcement"]  # type: ignore[no-any-return]


def controls(app: App) -> dict[int, ControlRow]:
    """The newest control row of every partition."""
    records = read_all(app.broker.bootstrap_servers, changelog(app))
    newest = {m.partition(): m.value() for m in records if m.key() == b"c:"}
    return {int(p or 0): ControlRow.from_bytes(value) for p, value in newest.items()}  # type: ignore[arg-type]


def versions_by_partition(app: App) -> dict[int, list[tuple[int, str]]]:
    """Offset and version of every score, in the order of the input. Fails if an event has two scores."""
    scores = app.scores()
    assert Counter(s["event_id"] for s in scores).most_common(1)[0][1] == 1
    found: dict[int, list[tuple[int, str]]] = {}
    for s in sorted(scores, key=lambda s: s["source_offset"]):
        found.setdefault(s["source_partition"], []).append((s["source_offset"], s["model_version"]))
    return found


def in_turn(told: list[tuple[int, str]]) -> list[str]:
    """Versions of a partition's scores, each run of equal ones once."""
    return [v for k, (_, v) in enumerate(told) if not k or told[k - 1][1] != v]


def everywhere(app: App, partitions: int) -> bool:
    """Whether every partition has scores: what is promoted now comes after some of each."""
    return partitions == len({score["source_partition"] for score in app.scores()})


def serving(member: Member) -> str:
    return member.pipeline.adapter.model.version if member.pipeline else ""


@dataclass
class Feed:
    """Produces events as long as it lasts."""

    app: App
    count: int = 0
    per_turn: int = 40

    def on(self) -> None:
        self.app.produce(event(n) for n in range(self.count, self.count + self.per_turn))
        self.count += self.per_turn

    def until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> float:
        """Feeds until the condition holds; returns how long that took."""
        started = time.monotonic()
        while not condition():
            self.on()
            assert time.monotonic() - started < timeout_s, "waited in vain"
        return time.monotonic() - started


def test_a_group_serves_what_is_promoted_and_rolled_back_within_seconds_and_no_score_goes_back(
    make_app: Callable[..., App],
) -> None:
    app = make_app(6)
    first, second = read_model(registry(app)).version, successor(app, rows="restart_items").name
    feed = Feed(app)
    with ExitStack() as stack:
        group = [stack.enter_context(Member(app, name).running()) for name in "abc"]
        until(lambda: [2, 2, 2] == [len(m.watch.shards) for m in group])
        feed.until(lambda: everywhere(app, 6))
        said = promote(app, second)
        assert (second, first, "restart_items") == (said["version"], said["previous"], said["rows"])
        took = feed.until(lambda: [second] * 3 == [serving(m) for m in group])
        assert took < DEADLINE_S
        feed.on()
        said = models(app, "rollback", "--reason", "worse")["announcement"]
        assert (first, second, "restart_items") == (said["version"], said["previous"], said["rows"])
        assert feed.until(lambda: [first] * 3 == [serving(m) for m in group]) < DEADLINE_S
        feed.on()
        app.wait_for_outputs(feed.count)
    assert [None] * 3 == [m.error for m in group]
    told = versions_by_partition(app)
    assert sum(map(len, told.values())) == feed.count
    assert {(first, second, first)} == {tuple(in_turn(one)) for one in told.values()}
    for partition, row in controls(app).items():
        last = [offset for offset, version in told[partition] if version == second][-1]
        assert (row.model_version, row.model_since > last) == (first, True)


@dataclass
class Process:
    """A member that is a process, and what it says of itself."""

    app: App
    config: Path
    port: int = 0
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.config.with_suffix(".log")
        self.process = self.app.start(config=self.config)

    def ready(self) -> dict[str, Any]:
        """/readyz; nothing while it does not answer."""
        found = re.search(r'"port": ?(\d+)', self.log.read_text())
        if found is None:
            return {}
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/readyz", timeout=5) as answer:
                return json.load(answer)  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            return json.load(error)  # type: ignore[no-any-return]
        except OSError:
            return {}


def process(app: App, instance: str = "0", **sections: Any) -> Process:
    return Process(app, app.config(instance, log={"format": "json"}, **sections))


def test_a_member_that_is_killed_around_a_swap_serves_the_announced_model_when_it_is_back(
    make_app: Callable[..., App],
) -> None:
    app = make_app(2)
    first, second = read_model(registry(app)).version, successor(app).name
    feed = Feed(app)
    member = process(app, input={"max_batch": 50})
    feed.until(lambda: everywhere(app, 2))
    for _ in range(10):
        feed.on()  # a backlog, so that the swap is in the middle of it
    promote(app, second)
    until(lambda: member.ready().get("model_version") == second)
    assert app.stop(member.process, signal.SIGKILL) == -signal.SIGKILL
    feed.on()
    again = process(app)
    app.wait_for_outputs(feed.count)
    until(again.ready)
    assert (second, second) == tuple(again.ready()[key] for key in ("model_version", "announced_version"))
    assert app.stop(again.process) == 0
    told = versions_by_partition(app)
    assert sum(map(len, told.values())) == feed.count
    assert {(first, second)} == {tuple(in_turn(one)) for one in told.values()}
    for partition, row in controls(app).items():
        begins = next(offset for offset, version in told[partition] if version == second)
        assert (row.model_version, row.model_since) == (second, begins)


def test_a_member_that_lacks_the_model_is_not_ready_says_what_it_serves_and_serves_it_when_it_is_there(
    make_app: Callable[..., App],
) -> None:
    app = make_app(1)
    first = read_model(registry(app)).version
    folder = successor(app)
    feed = Feed(app)
    member = process(app)
    feed.until(lambda: member.ready().get("ready"))
    away = folder.rename(app.folder / "not yet")
    announce(load(app.config()).config, announcement(folder.name, away))
    told = until_told(member, "outdated")
    assert (False, first, folder.name) == (told["ready"], told["model_version"], told["announced_version"])
    assert f"serves {first}; {folder.name} is announced: " in told["reason"]
    feed.on()
    app.wait_for_outputs(feed.count)  # it goes on meanwhile
    away.rename(folder)
    started = time.monotonic()
    until(lambda: member.ready().get("model_version") == folder.name)
    assert time.monotonic() - started < DEADLINE_S
    feed.on()
    app.wait_for_outputs(feed.count)
    until(lambda: member.ready()["ready"])
    assert app.stop(member.process) == 0
    assert [[first, folder.name]] == [in_turn(one) for one in versions_by_partition(app).values()]


def until_told(member: Process, state: str) -> dict[str, Any]:
    until(lambda: member.ready().get("state") == state)
    return member.ready()


def announcement(version: str, folder: Path, **changes: Any) -> Announcement:
    sha256 = json.loads((folder / "manifest.json").read_text())["sha256"]
    return Announcement(**{"version": version, "sha256": sha256, "previous": None, "rows": "carry", "reason": "a test",
                           "decided_ms": 1} | changes)  # fmt: skip


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def not_finite(folder: Path) -> None:
    model = read_model(folder)
    from safetensors.numpy import save

    arrays = msgspec.structs.asdict(model.weights) | {"bias": model.weights.bias * float("nan")}
    (folder / "model.safetensors").write_bytes(save(arrays))


def test_bad_models_are_refused_and_counted_the_one_in_service_stays_and_a_good_one_follows(
    make_app: Callable[..., App],
) -> None:
    app = make_app(2)
    first, config = read_model(registry(app)).version, load(app.config()).config
    bad = [successor(app, seed=k) for k in (1, 2, 3)]
    other = random_model(registry(app), LearnerSpec(feedback=STARS, dimension=4), ITEMS)
    said = [announcement(one.name, one) for one in (*bad, other)]
    said[2] = msgspec.structs.replace(said[2], sha256="0" * 64)
    truncated(bad[0])
    not_finite(bad[1])
    feed = Feed(app)
    # A folder for itself: it is the newest in the registry that has no parent.
    with Member(app, model={"path": str(registry(app) / first)}).running() as member:
        until(lambda: len(member.watch.shards) == 2)
        for count, one in enumerate(said, 1):
            announce(config, one)
            until(lambda n=count: member.watch.standing is not None  # type: ignore[misc]
                  and sum(member.watch.standing.refusals.values()) == n)  # fmt: skip
            assert member.watch.standing is not None
            assert (first, one.version) == (member.watch.standing.served, member.watch.standing.announced)
            feed.on()
        assert {"missing": 0, "damaged": 3, "unfit": 1} == member.watch.standing.refusals
        app.wait_for_outputs(feed.count)
        good = successor_of(app, first)
        promote_with(app, first, good)
        assert feed.until(lambda: serving(member) == good) < DEADLINE_S
        feed.on()
        app.wait_for_outputs(feed.count)
    assert member.error is None
    told = versions_by_partition(app)
    assert sum(map(len, told.values())) == feed.count
    assert {(first, good)} == {tuple(in_turn(one)) for one in told.values()}


def successor_of(app: App, version: str) -> str:
    served = Registry(registry(app)).read(version)
    other = read_model(random_model(app.folder / "other", served.spec, ITEMS, seed=9))
    weights = msgspec.structs.replace(other.weights, implicit_item=served.weights.implicit_item)
    return write_model(registry(app), weights, served.spec, (), parent=version).name


def promote_with(app: App, served: str, version: str) -> None:
    path = str(app.config(model={"path": str(registry(app) / served)}))
    words = ["models", "promote", version, "--reason", "a test", "-c", path]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0


def test_rows_that_moved_on_wait_for_their_model_where_it_is_missing(make_app: Callable[..., App]) -> None:
    """Members have registries of their own; one of them has not got the new model."""
    app = make_app(2)
    folder = successor(app)
    first, second = read_model(registry(app)).version, folder.name
    poor = app.folder / "poor"
    poor.mkdir()
    (poor / first).symlink_to(registry(app) / first)
    feed = Feed(app)
    with Member(app, "a").running() as rich:
        feed.until(lambda: everywhere(app, 2))
        promote(app, second)
        feed.until(lambda: serving(rich) == second)
        feed.on()
        app.wait_for_outputs(feed.count)
    with Member(app, "b", model={"path": str(poor)}).running() as member:
        until(lambda: member.watch.waiting == {0: second, 1: second})
        feed.on()
        assert (first, set()) == (serving(member), member.watch.shards)
        (poor / second).symlink_to(folder)
        app.wait_for_outputs(feed.count)
    assert (None, None) == (rich.error, member.error)
    assert {(first, second)} == {tuple(in_turn(one)) for one in versions_by_partition(app).values()}


def test_rows_that_missed_a_swap_go_over_when_they_are_restored(make_app: Callable[..., App]) -> None:
    """Promoted while nobody ran; all is as if the member had run on."""
    ends = []
    for running in (True, False):
        app = make_app(1)
        # θ of both runs is the same; its version is in no row.
        second = successor(app, rows="restart_items").name
        events = [event(n) for n in range(300)]
        app.produce(events[:150])
        if running:
            with Member(app).running() as member:
                app.wait_for_outputs(150)
                promote(app, second)
                until(lambda: serving(member) == second)  # noqa: B023
                app.produce(events[150:])
                app.wait_for_outputs(300)
            assert member.error is None
        else:
            Member(app, stop_after=150).serve()
            promote(app, second)
            app.produce(events[150:])
            Member(app, stop_after=150).serve()
        row = controls(app)[0]
        assert (row.model_version, row.model_since, row.next_offset) == (second, 150, 300)
        ends.append((rows_of(app), [(s["event_id"], s["score"], s["adaptations"]) for s in app.scores()]))
    assert ends[0] == ends[1]


def test_what_cannot_follow_is_not_promoted_and_what_there_is_is_shown(make_app: Callable[..., App]) -> None:
    app = make_app(1)
    first, second = read_model(registry(app)).version, successor(app).name
    random = random_model(registry(app), LearnerSpec(feedback=STARS), ITEMS, seed=5).name
    config = str(app.config(model={"path": str(registry(app) / first)}))

    def invoke(*words: str) -> Any:
        return CliRunner().invoke(cli, ["models", *words, "-c", config])

    for words, kind, message in (
        ((random, "--reason", "x"), ModelUnfit, "implicit_item differs for 200 of the 200 items"),
        (("nowhere", "--reason", "x"), ModelError, "not there"),
    ):
        refused = invoke("promote", *words).exception
        assert isinstance(refused, kind)
        assert message in str(refused)
    assert "there is nothing to go back to" in str(invoke("rollback", "--reason", "x").exception)
    assert invoke("promote", second, "--reason", "better").exit_code == 0
    assert "is served already" in str(invoke("promote", second, "--reason", "x").exception)
    listed = json.loads(invoke("list", "--json").stdout)["versions"]
    assert {first: False, second: True, random: False} == {one["version"]: one["served"] for one in listed}
    assert {first: None, second: "promoted", random: None} == {one["version"]: one["decision"] for one in listed}
    told = json.loads(invoke("show", "--json").stdout)
    assert (second, first, "better") == (
        told["manifest"]["version"], told["manifest"]["parent"], told["announcement"]["reason"]
    )  # fmt: skip
    assert second in invoke("list").stdout
    assert "in the place of" in invoke("show", second).stdout
    assert invoke("rollback", "--reason", "worse").exit_code == 0
    assert "rolled_back" in invoke("show", second).stdout
    assert "To do: `stream-adapt models promote VERSION`" in str(invoke("rollback", "--reason", "x").exception)
