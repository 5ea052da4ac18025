"""Following announcements: what is looked for beside the loop, what is refused, and which rows are of which model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from learner_streams import random_model

from stream_adapt.adapt import Adapter, Slow
from stream_adapt.announcements import Announcement
from stream_adapt.config import load
from stream_adapt.errors import ConfigError
from stream_adapt.follow import Follower, Settled
from stream_adapt.models import Model, Registry, RowMode, write_model
from stream_adapt.service import first_model

SERVED = random_model()


@dataclass
class Topic:
    """Announcements by offset; those at `late` and after come in only when the end is read."""

    said: list[Announcement] = field(default_factory=list)
    late: int = 99

    def newest(self) -> Announcement | None:
        return self.said[: self.late][-1] if self.said[: self.late] else None

    def position(self, version: str | None) -> int:
        return max((at for at, one in enumerate(self.said[: self.late]) if one.version == version), default=-1)

    def since(self, version: str) -> list[Announcement]:
        return self.said[self.position(version) + 1 : self.late]

    def read_to_end(self) -> None:
        self.late = 99


def announced(folder_or_version: Path | str, rows: RowMode = "carry", sha256: str | None = None) -> Announcement:
    if isinstance(folder_or_version, str):
        return Announcement(folder_or_version, sha256 or "", None, rows, "a test", 1)
    told = json.loads((folder_or_version / "manifest.json").read_text())["sha256"]
    return Announcement(folder_or_version.name, sha256 or told, None, rows, "a test", 1)


def write(registry: Path, model: Model = SERVED, **changes: float) -> Path:
    """A model that differs from another one in some numbers."""
    weights = msgspec.structs.replace(
        model.weights, **{name: getattr(model.weights, name) + value for name, value in changes.items()}
    )
    return write_model(registry, weights, model.spec, model.manifest.fitted)


@contextmanager
def following(
    topic: Topic, registry: Path, ready: Callable[[Model], Slow] | None = None, **changes: Any
) -> Iterator[Follower]:
    follower = Follower(
        topic, Registry(registry), SERVED, changes.get("adjusted", lambda m: m), ready or Adapter(SERVED).ready
    )
    try:
        yield follower
    finally:
        follower.close()


def until_due(follower: Follower) -> Slow:
    return until(follower.due)


def until_refused(follower: Follower, count: int = 1) -> str:
    """Why the model is refused, once so many looks have found it so."""

    def looked() -> bool:
        assert follower.due() is None
        return sum(follower.standing.refusals.values()) == count

    until(looked)
    return follower.standing.refused_for


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (result := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return result


def test_what_is_announced_is_due_once_when_it_is_ready_and_nobody_waits_for_it(tmp_path: Path) -> None:
    folder, adapter, go_on = write(tmp_path, bias=1), Adapter(SERVED), threading.Event()

    def slowly(model: Model) -> Slow:
        assert go_on.wait(20)
        return adapter.ready(model)

    topic = Topic([announced(folder)])
    with following(topic, tmp_path, slowly) as follower:
        started = time.monotonic()
        assert [None] * 50 == [follower.due() for _ in range(50)]
        assert time.monotonic() - started < 5
        assert (SERVED.version, folder.name) == (follower.standing.served, follower.standing.announced)
        go_on.set()
        assert until_due(follower).model.version == folder.name
        assert follower.due() is None
        assert (folder.name, None, 1) == (
            follower.standing.served,
            follower.standing.announced,
            follower.standing.swaps,
        )


def test_a_model_that_is_missing_is_looked_for_until_it_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path, bias=1)
    topic = Topic([announced(folder)])
    away = folder.rename(tmp_path / ".away")
    with following(topic, tmp_path) as follower:
        assert until_refused(follower) == "missing"
        assert "not there" in follower.standing.problem
        away.rename(folder)
        assert until_due(follower).model.version == folder.name
        assert {"missing": 1, "damaged": 0, "unfit": 0} == follower.standing.refusals
        assert ("", "") == (follower.standing.refused_for, follower.standing.problem)


def truncated(folder: Path) -> Announcement:
    said = announced(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    return said


def of_another_hash(folder: Path) -> Announcement:
    return announced(folder, sha256="0" * 64)


def not_finite(folder: Path) -> Announcement:
    """With a hash that is right: whoever wrote it did not look."""
    import hashlib

    from safetensors.numpy import load, save

    arrays = load((folder / "model.safetensors").read_bytes())
    arrays["bias"] = arrays["bias"] * float("nan")
    content = save(arrays)
    (folder / "model.safetensors").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return announced(folder)


def of_another_form(folder: Path) -> Announcement:
    return announced(write(folder.parent, random_model(size=4)))


def with_another_f(folder: Path) -> Announcement:
    return announced(write(folder.parent, implicit_item=1))


def with_a_path_for_a_name(_: Path) -> Announcement:
    return announced("../../etc")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "damaged"),
        (of_another_hash, "damaged"),
        (not_finite, "damaged"),
        (of_another_form, "unfit"),
        (with_another_f, "unfit"),
        (with_a_path_for_a_name, "damaged"),
    ],
)
def test_a_bad_model_is_refused_and_counted_once_and_the_one_in_service_stays(
    tmp_path: Path, spoil: Callable[[Path], Announcement], reason: str
) -> None:
    topic = Topic([spoil(write(tmp_path, bias=1))])
    with following(topic, tmp_path) as follower:
        assert until_refused(follower) == reason
        time.sleep(0.6)  # it looks again, and the files are the same
        assert follower.due() is None
        assert (SERVED.version, 1) == (follower.standing.served, follower.standing.refusals[reason])
        topic.said.append(announced(write(tmp_path, bias=2)))
        assert until_due(follower).model.version == topic.said[-1].version


def test_a_model_that_the_configuration_does_not_agree_with_is_unfit(tmp_path: Path) -> None:
    def disagreed(_: Model) -> Model:
        raise ConfigError("input.feedback: other levels")

    with following(Topic([announced(write(tmp_path, bias=1))]), tmp_path, adjusted=disagreed) as follower:
        assert until_refused(follower) == "unfit"
        assert "other levels" in follower.standing.problem


def test_a_bug_in_the_making_is_raised_in_the_loop(tmp_path: Path) -> None:
    def broken(_: Model) -> Slow:
        raise RuntimeError("a bug")

    topic = Topic([announced(write(tmp_path, bias=1))])
    with following(topic, tmp_path, broken) as follower, pytest.raises(RuntimeError, match="a bug"):
        until(follower.due)


def test_what_was_announced_before_the_newest_is_not_served_any_more(tmp_path: Path) -> None:
    first, second, adapter = write(tmp_path, bias=1), write(tmp_path, bias=2), Adapter(SERVED)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(model: Model) -> Slow:
        if model.version == first.name:
            begun.set()
            assert go_on.wait(20)
        return adapter.ready(model)

    topic = Topic([announced(first)])
    with following(topic, tmp_path, slowly) as follower:
        assert follower.due() is None
        assert begun.wait(20)
        topic.said.append(announced(second))
        assert until_due(follower).model.version == second.name
        go_on.set()
        time.sleep(0.05)
        assert (None, second.name) == (follower.due(), follower.standing.served)


def test_back_to_the_model_in_service_ends_the_search(tmp_path: Path) -> None:
    topic = Topic([announced("v9")])
    with following(topic, tmp_path) as follower:
        assert until_refused(follower) == "missing"
        topic.said.append(announced(SERVED.version))
        assert follower.due() is None
        assert (None, "", "") == (
            follower.standing.announced, follower.standing.refused_for, follower.standing.problem
        )  # fmt: skip


def test_rows_know_whether_their_model_comes_before_or_after_the_one_in_service(tmp_path: Path) -> None:
    topic = Topic(
        [announced("v1"), announced("v2", "restart_items"), announced(SERVED.version), announced("v4")], late=3
    )
    with following(topic, tmp_path) as follower:
        assert [False, False, False, False] == [follower.ahead(v) for v in ("", "v1", "v2", SERVED.version)]
        assert ("restart_items", "carry") == (follower.row_mode("v1"), follower.row_mode("v2"))
        assert follower.ahead("v4")  # another member has seen what has not come in here yet
        assert not follower.ahead("never announced")
        assert follower.row_mode("never announced") == "restart_items"
        topic.said.append(announced("v1", "restart_items"))
        assert follower.ahead("v1")
        assert (follower.row_mode("v2"), follower.row_mode("v0")) == ("carry", "restart_items")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (("v1", "v2", "v3"), "v3"),
        (("v1", "v2"), "v2"),
        (("v1",), "v1"),
        (("v1", "v2", "v3 of another hash"), "v2"),
    ],
)
def test_a_member_begins_with_what_was_announced_last_of_what_it_has(
    tmp_path: Path, there: tuple[str, ...], expected: str
) -> None:
    hashes = {}
    for at, version in enumerate(("v1", "v2", "v3")):
        folder = write(tmp_path / "all", bias=at)
        manifest = json.loads((folder / "manifest.json").read_text()) | {
            "version": version,
            "parent": f"v{at}" if at else None,
        }
        hashes[version] = manifest["sha256"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        folder.rename(tmp_path / version)
    said = [
        Announcement("v2", hashes["v2"], "v1", "carry", "a test", 1),
        Announcement("v3", "0" * 64 if "v3 of another hash" in there else hashes["v3"], "v2", "carry", "a test", 2),
    ]
    registry = tmp_path / "registry"
    registry.mkdir()
    for version in there:
        (tmp_path / version[:2]).rename(registry / version[:2])
    config = load(None, {}, model__path=str(registry)).config
    assert first_model(config, said).version == expected
    assert first_model(config, []).version == "v1"


def test_who_does_not_follow_carries_all_rows() -> None:
    settled = Settled("v1")
    assert (None, False, "carry") == (settled.due(), settled.ahead("v2"), settled.row_mode("v0"))
