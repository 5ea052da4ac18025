"""Records what a release writes, so that later ones are held to reading it: `python record.py FOLDER [CHECKOUT]`.

FOLDER gets a model and `recording.msgpack`: events, the changelog after half of them, what the release then said of the
others and how its rows ended; beside them a record of each other kind that the release has. CHECKOUT is where the
release lies, say a `git worktree`; the one that is installed if not given. Record a release anew when it is made, into
a folder of its own, and leave what is there: `tests/unit/test_releases.py` reads them all.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if len(sys.argv) > 2:
    sys.path.insert(0, sys.argv[2])

import msgspec
import numpy as np

from stream_adapt.adapt import Adapter
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.learner.encoder import Bag, Numeric
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.models import LearnerSpec, read_model
from stream_adapt.pipeline import Pipeline
from stream_adapt.record import RawBatch, TopicNames
from stream_adapt.restore import fingerprints
from stream_adapt.state.row import ControlRow
from stream_adapt.testing.model import random_model

_NOW_MS = 1_800_000_000_000
_HALF, _ALL = 120, 240
_ITEMS = [f"item-{n}" for n in range(12)]
_SPEC = LearnerSpec(
    features={"year": Numeric(), "genres": Bag()},
    feedback=Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1, 5), (2, 3, 4, 5))),
    dimension=4,
    window=16,
    ring=4,
)


def _event(number: int) -> bytes:
    event = {
        "event_id": f"e{number}",
        "user_id": f"user-{number * 5 % 7}",
        "item_id": _ITEMS[number * 7 % len(_ITEMS)],
        "event_type": "rating",
        "timestamp": _NOW_MS - 10_000_000 + 7_919 * number,
        "label": None if number % 13 == 0 else 1 + number * 3 % 5,
        "features": {"year": 1990 + number % 9, "genres": ["drama"] if number % 2 else ["comedy", "war"]},
    }
    if number % 50 == 49:
        event = {**{name: event[name] for name in ("event_id", "user_id", "timestamp")}, "event_type": "$erase"}
    return msgspec.json.encode(event)


def _raw(values: list[bytes], start: int) -> RawBatch:
    keys: list[bytes | None] = [msgspec.json.decode(value)["user_id"].encode() for value in values]
    n = len(values)
    return RawBatch(keys, list(values), np.zeros(n, np.int32), np.arange(start, start + n))


def main(folder: Path) -> None:
    """Writes the recording of the release that is imported."""
    model = read_model(
        random_model(folder / "models", _SPEC, _ITEMS[:8], {"year": [1990, 1998], "genres": [["drama"]]})
    )
    decoder = Decoder(_SPEC.features, _SPEC.feedback, now_ms=lambda: _NOW_MS)
    adapter = Adapter(model)
    emitter = Emitter(TopicNames.of("app"), model.version, _SPEC.feedback.target_level, now_ms=lambda: _NOW_MS)
    pipeline = Pipeline(decoder, adapter, emitter)
    events = [_event(number) for number in range(_ALL)]

    def work(start: int, stop: int) -> tuple[list[Any], list[tuple[bytes, bytes | None]]]:
        done = pipeline(_raw(events[start:stop], start))
        assert not done.dead_letters, done.dead_letters[0]
        layouts = fingerprints([adapter.users, adapter.items])
        control = ControlRow(0, stop, model.version, "topic-1", _NOW_MS, layouts)
        changed = [pair for block in pipeline.changes([control]) for pair in zip(block.keys, block.values, strict=True)]
        adapter.commit()
        return [done], changed

    first, changelog = work(0, _HALF)
    then, changes = work(_HALF, _ALL)
    scores = [value for outputs in then[0].outputs[:1] for value in outputs.values]
    recording = {
        "events": events,
        "half": _HALF,
        "changelog": changelog,
        "scores": scores,
        "ended": list({**dict(changelog), **dict(changes)}.items()),
        "others": _others(pipeline, first),
    }
    (folder / "recording.msgpack").write_bytes(msgspec.msgpack.encode(recording))


def _others(pipeline: Any, done: list[Any]) -> dict[str, list[bytes]]:
    """Records of the topics that not every release has."""
    found: dict[str, list[bytes]] = {}
    if hasattr(pipeline, "learned"):
        found["learning"] = [value for block in pipeline.learned(done) for value in block.values]
    if find_spec("stream_adapt.announcements"):
        from stream_adapt.announcements import Announcement

        said = Announcement("v2", "0" * 64, "v1", "carry", "better", _NOW_MS, {"gain": 0.01}, "refresh")
        found["announcement"] = [msgspec.json.encode(said)]
    if find_spec("stream_adapt.drift"):
        from stream_adapt.drift import Alarm

        found["alarm"] = [Alarm("loss", None, "ADWIN", 0.6, 0.5, {0: 5, 3: 7}, _NOW_MS, 512, "v1", _NOW_MS).to_bytes()]
    if find_spec("stream_adapt.refresh"):
        from stream_adapt.refresh.record import Decision, RefreshState, Request, Trigger
        from stream_adapt.refresh.states import State

        why = Trigger("alarm", _NOW_MS, "loss", {0: 5})
        last = Decision("rejected", _NOW_MS, "no better", why, "v1", "v2", {"gain": -0.01})
        state = RefreshState(state=State.WATCHING, champion="v1", trigger=why, last=last, trained_until={0: 9})
        found["refresh"] = [state.encode()]
        found["request"] = [msgspec.json.encode(Request("r1", _NOW_MS, "now"))]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
