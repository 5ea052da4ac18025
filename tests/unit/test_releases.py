"""What earlier releases wrote is read, and gone on from, by this one: recordings in `tests/data/releases`.

A folder is a release, named by its commit; `record.py` there wrote it, with that release's own code.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from pydantic import ValidationError
from test_restorer import Log

from stream_adapt import learning
from stream_adapt.adapt import Adapter
from stream_adapt.announcements import Announcement
from stream_adapt.config import Config, StateSection
from stream_adapt.decode import Decoder
from stream_adapt.drift import ALARM_FORMAT, Alarm
from stream_adapt.emit import Emitter
from stream_adapt.learning import LEARNING_FORMAT
from stream_adapt.models import MODEL_FORMAT, Model, read_model
from stream_adapt.pipeline import Pipeline
from stream_adapt.record import RawBatch, Score, TopicNames
from stream_adapt.refresh.record import FORMAT as REFRESH_FORMAT
from stream_adapt.refresh.record import RefreshState, Request
from stream_adapt.restore import Expected, Restorer
from stream_adapt.service import build_pipeline
from stream_adapt.state.row import CONTROL_FORMAT, CONTROL_KEY, ROW_FORMAT, ControlRow, Kind, Layout

RELEASES = sorted(path for path in (Path(__file__).parents[1] / "data" / "releases").iterdir() if path.is_dir())
#: The clock of all recordings.
RECORDED_MS = 1_800_000_000_000
#: Releases may round differently: their compiled steps need not be the same to the last bit.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Recording(msgspec.Struct):
    """What `record.py` writes."""

    events: list[bytes]
    half: int
    changelog: list[tuple[bytes, bytes | None]]
    scores: list[bytes]
    ended: list[tuple[bytes, bytes | None]]
    others: dict[str, list[bytes]]


@cache
def recording(release: Path) -> Recording:
    return msgspec.msgpack.decode((release / "recording.msgpack").read_bytes(), type=Recording)


def restored(release: Path, model: Model) -> tuple[Adapter, ControlRow]:
    """The rows that the release had written half-way."""
    adapter = Adapter(model)
    tables = {Kind.USER: adapter.users, Kind.ITEM: adapter.items}
    expected = Expected(TopicNames.of("app"), "app", "topic-1", exactly_once=True)
    log = Log(list(recording(release).changelog), chunk=7)
    restorer = Restorer(log, tables, expected)
    restorer.begin({0: recording(release).half})
    found: dict[int, ControlRow | None] = {}
    while restorer.unfinished:
        found.update(restorer.step(1.0))
    control = found[0]
    assert control is not None
    return adapter, control


def raw(values: list[bytes], start: int) -> RawBatch:
    keys: list[bytes | None] = [json.loads(value)["user_id"].encode() for value in values]
    return RawBatch(keys, list(values), np.zeros(len(values), np.int32), np.arange(start, start + len(values)))


def compare(layout: Layout, expected: bytes, found: bytes) -> None:
    for field in layout.fields:
        one, other = layout.from_bytes(expected)[field.name], layout.from_bytes(found)[field.name]
        np.testing.assert_allclose(one, other, **CLOSE, err_msg=field.name)


def test_there_is_a_recording_of_this_release_and_of_one_before_it() -> None:
    formats = {json.loads(path.read_bytes())["format"] for path in RELEASES[0].parent.glob("*/models/*/manifest.json")}
    assert {MODEL_FORMAT - 1, MODEL_FORMAT} <= formats
    kinds = {kind for release in RELEASES for kind in recording(release).others}
    assert {"learning", "announcement", "alarm", "refresh", "request"} == kinds
    changelogs = [recording(release).changelog for release in RELEASES]
    rows = [value for changelog in changelogs for key, value in changelog if value and key != CONTROL_KEY]
    assert {ROW_FORMAT - 1, ROW_FORMAT} <= {int.from_bytes(value[:2], "little") for value in rows}


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_rows_of_a_release_come_back_and_go_on_as_they_would_have_there(release: Path) -> None:
    told, model = recording(release), read_model(release / "models")
    adapter, control = restored(release, model)
    assert (told.half, model.version, "topic-1") == (control.next_offset, control.model_version, control.topic_id)
    decoder = Decoder(model.spec.features, model.spec.feedback, now_ms=lambda: RECORDED_MS)
    emitter = Emitter(TopicNames.of("app"), model.version, model.spec.feedback.target_level)
    pipeline = Pipeline(decoder, adapter, emitter)
    work = pipeline(raw(told.events[told.half :], told.half))
    assert [] == work.dead_letters
    scores: list[Any] = [msgspec.json.decode(value or b"", type=Score) for value in work.outputs[0].values]
    expected = [msgspec.json.decode(value, type=Score) for value in told.scores]
    for name in ("score", "frozen_score", "updated_score", "uncertainty"):
        columns = [[getattr(score, name) for score in side] for side in (expected, scores)]
        np.testing.assert_allclose(*columns, **CLOSE, err_msg=name)
    for name in ("event_id", "level", "target", "adaptations", "flags", "source_offset", "model_version"):
        assert [getattr(score, name) for score in expected] == [getattr(score, name) for score in scores]

    changed = dict(told.changelog)
    for block in pipeline.changes([]):
        changed |= dict(zip(block.keys, block.values, strict=True))  # type: ignore[arg-type]
    ended = {key: value for key, value in told.ended if key != CONTROL_KEY}
    layouts = {b"u:": adapter.users.layout, b"i:": adapter.items.layout}
    assert ended.keys() == changed.keys() - {CONTROL_KEY}
    for key, value in ended.items():
        now = changed[key]
        assert (value is None) is (now is None)
        if value is not None and now is not None:
            compare(layouts[key[:2]], value, now)


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_other_records_of_a_release_are_read(release: Path) -> None:
    read = {
        "learning": learning.decode,
        "announcement": msgspec.json.Decoder(Announcement).decode,
        "alarm": Alarm.from_bytes,
        "refresh": lambda value: RefreshState.decode(value, "here"),
        "request": msgspec.json.Decoder(Request).decode,
    }
    for kind, values in recording(release).others.items():
        for value in values:
            assert json.loads(value).items() <= json.loads(msgspec.json.encode(read[kind](value))).items()


def test_rows_are_written_in_this_format_or_where_asked_in_the_one_before() -> None:
    assert ROW_FORMAT == StateSection().row_format
    for row_format in (ROW_FORMAT - 1, ROW_FORMAT):
        config = Config(
            model={"path": RELEASES[0] / "models"},
            input={"max_future_s": 10**9},
            state={"rows": "memory", "row_format": row_format},
        )
        pipeline = build_pipeline(config, read_model(RELEASES[0] / "models"), TopicNames.of("app"))
        assert [] == pipeline(raw(recording(RELEASES[0]).events[:20], 0)).dead_letters
        values = [value for block in pipeline.changes([]) for value in block.values if value]
        assert {row_format} == {int.from_bytes(value[:2], "little") for value in values}
    for row_format in (ROW_FORMAT - 2, ROW_FORMAT + 1):
        with pytest.raises(ValidationError, match="row_format"):
            StateSection(row_format=row_format)


def test_the_readme_says_which_formats_there_are() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    formats = {
        "rows": ROW_FORMAT,
        "control rows": CONTROL_FORMAT,
        "models: manifest": MODEL_FORMAT,
        "where a refresh is": REFRESH_FORMAT,
        "learning records, alarms": LEARNING_FORMAT,
    }
    assert LEARNING_FORMAT == ALARM_FORMAT
    for what, number in formats.items():
        assert re.search(rf"^\| {what}[^|]*\| {number}\b", text, re.MULTILINE), what
