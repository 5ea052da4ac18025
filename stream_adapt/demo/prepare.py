"""What the demo streams, and the model it streams it to: the data cut in halves, slow weights learned from the first.

A model is kept in the cache and used again when nothing that went into it is different: the events themselves, the
specification, the settings, and the code that trains.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import xxhash
from rich.console import Console

from stream_adapt import __version__, meta
from stream_adapt.datasets import Source, open_source
from stream_adapt.demo.wire import Encoded
from stream_adapt.errors import DataError, ModelError
from stream_adapt.local import cache_folder
from stream_adapt.models import MODEL_FORMAT, LearnerSpec, read_model, write_model
from stream_adapt.pretraining import progress_bar
from stream_adapt.record import UserEvent

#: Fewer events than this cannot be cut into halves that say anything.
_FEWEST_EVENTS = 1000
#: The stream is cut into so many equal parts to find a user who comes back in many of them.
_PARTS = 120
#: The stream itself judges the model: no events are set aside for that, which halves the work.
_SETTINGS = {"validation_share": 0.0}
#: Words that describe an item, at most.
_WORDS = 2


@dataclass(frozen=True)
class Data:
    """A source cut in halves by time."""

    source: Source
    count: int
    spec: LearnerSpec

    @property
    def half(self) -> int:
        return self.count // 2

    def first(self) -> Iterator[UserEvent]:
        """What the model is pretrained on."""
        return islice(self.source.events(), self.half)

    def second(self) -> Iterator[UserEvent]:
        """What is streamed."""
        return islice(self.source.events(), self.half, None)


@dataclass(frozen=True)
class Followed:
    """The user whose events are shown, and their items in words, by event id."""

    user_id: str
    items: dict[str, str]


def open_data(source: str, mapping: Path | None) -> Data:
    """Opens a source by name or path.

    Raises:
        ConfigError, DataError: there is no such source, or too little in it.
    """
    opened = open_source(source, mapping=mapping)
    count = opened.count if opened.count is not None else sum(1 for _ in opened.events())
    if count < _FEWEST_EVENTS:
        raise DataError(f"{opened.name}: {count} events; the demo needs {_FEWEST_EVENTS} or more")
    # Full covariance: better than the diagonal at a user's first events, and here rows are few.
    return Data(opened, count, LearnerSpec(opened.features, opened.feedback, covariance="full"))


def encode(events: Iterator[UserEvent]) -> list[Encoded]:
    """Events as they are produced: event v1, keyed by user."""
    to_json = msgspec.json.Encoder().encode
    return [Encoded(event.event_id, event.user_id.encode(), to_json(event)) for event in events]


def pretrained(data: Data, console: Console, *, retrain: bool) -> tuple[Path, bool]:
    """A model's folder, and whether it was in the cache already.

    Raises:
        DataError, ModelError: training has too little to learn from, or diverged.
    """
    registry = cache_folder() / "models" / f"{file_name(data.source.name)}-{_fingerprint(data)}"
    if not retrain and (cached := _usable(registry)):
        return cached, True
    shutil.rmtree(registry, ignore_errors=True)
    return _train(data, registry, console), False


def file_name(source: str) -> str:
    """A source's name or path as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", Path(source).name)


def choose_user(data: Data) -> Followed:
    """The user who comes back in most parts of the stream, so that somebody watching sees the scores move."""
    part = max(1, (data.count - data.half) // _PARTS)
    parts: defaultdict[str, set[int]] = defaultdict(set)
    for number, event in enumerate(data.second()):
        parts[event.user_id].add(number // part)
    user_id = max(parts, key=lambda user: len(parts[user]))
    names = [name for name, feature in data.spec.features.items() if feature.of == "item"]
    return Followed(user_id, {e.event_id: _in_words(e, names) for e in data.second() if e.user_id == user_id})


def _in_words(event: UserEvent, names: Sequence[str]) -> str:
    """An item's id, and what little its features say to a person: `Alien (1979) · Action, Horror`."""
    said = []
    for name in names:
        value = event.features.get(name)
        if isinstance(value, str):
            said.append(value)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            said.append(", ".join(str(word) for word in value[:_WORDS]))
        elif isinstance(value, float) and value.is_integer():
            said.append(f"{value:.0f}")
    return " · ".join([event.item_id, *said])


def _fingerprint(data: Data) -> str:
    digest = xxhash.xxh3_64(f"{__version__} {MODEL_FORMAT}".encode())
    digest.update(msgspec.json.encode([data.spec, _SETTINGS]))
    # Defaults of training and training itself. Read, not imported: torch takes seconds.
    for path in sorted(Path(*meta.__path__).rglob("*.py")):
        digest.update(path.read_bytes())
    to_json = msgspec.json.Encoder().encode
    for event in data.first():
        digest.update(to_json(event))
    return digest.hexdigest()


def _usable(registry: Path) -> Path | None:
    """The folder of a model that is whole; None if there is none."""
    for manifest in registry.glob("[!.]*/manifest.json"):
        try:
            read_model(manifest.parent)
        except ModelError:
            continue
        return manifest.parent
    return None


def _train(data: Data, registry: Path, console: Console) -> Path:
    # Torch makes this folder in any case; left to itself among the temporary ones, and leaves it there.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torch"))
    from stream_adapt.meta.trainer import TrainSettings, pretrain

    with progress_bar(console) as told:
        settings = msgspec.convert(_SETTINGS, TrainSettings)
        trained = pretrain(data.first(), data.spec, settings, progress=told)
    about = {"source": data.source.name, "events": data.half}
    return write_model(registry, trained.weights, data.spec, trained.fitted, trained_on=about, figures=trained.figures)
