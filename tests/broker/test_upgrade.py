"""A rolling upgrade, and the way back, between two builds of this program on a real Apache Kafka.

The older build is the last one whose models and rows have the format before this one's, and whose control rows and
topics are those from before models were announced. While it may come back this build writes rows as that one does; then
members are started again without `state.row_format`, and write them in their own format. The older build is taken from
the repository's history; what a build without history is held to is in `tests/unit/test_releases.py`.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from broker_app import ITEMS, RUN, App, event

from stream_adapt.local import cache_folder
from stream_adapt.models import MODEL_FORMAT, read_model
from stream_adapt.state.row import CONTROL_KEY, ROW_FORMAT
from stream_adapt.testing.broker import read_all

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(1_500)]

ROOT = Path(__file__).parents[2]
#: MODEL_FORMAT 2, no models topic, no learning topic.
OLD = "646f38e26f233be3dca25f7617e7fd9ec72add05"
PHASE = 1_000
#: Two builds may round differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

_MODEL = """
from pathlib import Path
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.model import random_model
from stream_adapt.adapt import Adapter
from stream_adapt.models import read_model
feedback = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1, 5), (2, 3, 4, 5)))
Adapter(read_model(random_model(Path({folder!r}), LearnerSpec(feedback=feedback), {items!r})))  # compiles
"""


def program(build: Path, code: str) -> list[str]:
    """Runs code with the modules of a build."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(build)!r})\n{code}"]


@pytest.fixture
def old_build(tmp_path: Path) -> Path:
    """The older build's modules."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git to get an older build with")
    command = [git, "-C", str(ROOT), "archive", "--format=tar", OLD, "stream_adapt"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no history with an older build: {done.stderr.decode(errors='replace').strip()[:200]}")
    folder = cache_folder() / "builds" / OLD[:12]  # kept: compiling its steps takes a minute
    if not folder.is_dir():
        unpacked = tmp_path / "old-build"
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(unpacked, filter="data")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


def rows(app: App) -> dict[tuple[int, bytes], bytes]:
    """The last version of each row, by partition and key."""
    messages = read_all(app.broker.bootstrap_servers, f"{app.name}.changelog")
    last = {(m.partition() or 0, m.key() or b""): m.value() for m in messages}
    return {where: value for where, value in last.items() if value is not None and where[1] != CONTROL_KEY}


def formats(app: App) -> set[int]:
    """Of the rows in the changelog."""
    return {int.from_bytes(value[:2], "little") for value in rows(app).values()}


def test_members_are_replaced_by_a_newer_build_one_by_one_and_back_again(
    make_app: Callable[..., App], old_build: Path
) -> None:
    app, calm = make_app(), make_app()
    models = app.folder / "old-models"
    subprocess.run(program(old_build, _MODEL.format(folder=str(models), items=ITEMS)), check=True, timeout=600)
    (manifest,) = models.glob("*/manifest.json")
    assert MODEL_FORMAT - 1 == json.loads(manifest.read_bytes())["format"]

    old = (*program(old_build, "import stream_adapt.cli; print(stream_adapt.__file__); stream_adapt.cli.main()"), "run")
    for_old = {name: app.config(name, model={"path": str(models)}) for name in ("a", "b")}
    for_both = {name: app.config(name, model={"path": str(models)}, state={"row_format": 1}) for name in for_old}
    members = {name: app.start(config=config, command=old) for name, config in for_old.items()}
    sent = 0

    def go_on() -> None:
        """Events flow, and every one of them gets its score."""
        nonlocal sent
        app.produce(event(number) for number in range(sent, sent + PHASE))
        sent += PHASE
        app.wait_for_outputs(sent, timeout_s=180)

    def replace(name: str, config: Path, command: tuple[str, ...], sent_signal: int = signal.SIGTERM) -> None:
        assert (0 if sent_signal == signal.SIGTERM else -sent_signal) == app.stop(members[name], sent_signal), app.log()
        log = config.with_suffix(".log")
        so_far = log.read_text().count("partitions assigned") if log.exists() else 0
        members[name] = app.start(config=config, command=command)
        deadline = time.monotonic() + 180
        while log.read_text().count("partitions assigned") == so_far:  # it has its share before events flow again
            assert time.monotonic() < deadline, app.log()[-3000:]
            time.sleep(0.1)
        go_on()

    go_on()
    replace("a", for_both["a"], RUN)  # up
    replace("b", for_both["b"], RUN, signal.SIGKILL)
    replace("a", for_old["a"], old)  # and down again
    replace("b", for_old["b"], old)
    replace("a", for_both["a"], RUN, signal.SIGKILL)  # and up for good
    replace("b", for_both["b"], RUN)
    assert {ROW_FORMAT - 1} == formats(app)
    replace("a", for_old["a"], RUN)  # rows of both formats
    replace("b", for_old["b"], RUN, signal.SIGKILL)
    go_on()
    assert ROW_FORMAT in formats(app)
    for member in members.values():
        assert 0 == app.stop(member), app.log()[-3000:]
    assert f"{old_build}/stream_adapt/__init__.py" in app.log()

    calm.produce(event(number) for number in range(sent))
    alone = calm.start(config=calm.config("a", model={"path": str(models)}))
    calm.wait_for_outputs(sent, timeout_s=180)
    assert 0 == calm.stop(alone)
    assert [] == app.dead_letters()
    expected = {score["event_id"]: score for score in calm.scores()}
    scores = app.scores()
    assert (sent, expected.keys()) == (len(scores), {score["event_id"] for score in scores})
    for name in ("score", "frozen_score", "updated_score"):
        columns = [[side[name] for side in (expected[score["event_id"]], score)] for score in scores]
        np.testing.assert_allclose(*np.array(columns).T, **CLOSE, err_msg=name)
    _compare_rows(rows(calm), rows(app), models)


def _compare_rows(
    expected: dict[tuple[int, bytes], bytes], found: dict[tuple[int, bytes], bytes], models: Path
) -> None:
    from stream_adapt.learner import rules

    spec = read_model(models).spec
    rule = rules.find(spec.rule)
    layouts = {b"u:": rule.user_layout(spec), b"i:": rule.item_layout(spec)}
    assert expected.keys() == found.keys()
    for where, value in expected.items():
        layout = layouts[where[1][:2]]
        one, other = layout.from_bytes(value), layout.from_bytes(found[where])
        for field in layout.fields:
            np.testing.assert_allclose(one[field.name], other[field.name], **CLOSE, err_msg=f"{where} {field.name}")
