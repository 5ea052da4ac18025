"""What `bench drift` measures on: second halves of data sets, with and without drift, and a member that reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from stream_adapt import __version__
from stream_adapt.adapt import Adapter
from stream_adapt.datasets import NAMES, Source, open_source
from stream_adapt.datasets.drifts import KINDS, Drift, DriftKind, splice
from stream_adapt.datasets.synthetic import Synthetic
from stream_adapt.datasets.synthetic import source as synthetic_source
from stream_adapt.decode import Decoder
from stream_adapt.errors import ConfigError
from stream_adapt.learning import Summary, decode, encode, summarize
from stream_adapt.local import cache_folder
from stream_adapt.models import MODEL_FORMAT, LearnerSpec, Model, RowMode, read_model, write_model
from stream_adapt.record import Adapted, Batch, RawBatch, UserEvent

#: Events of a transaction: as many as a busy member takes in its latency bound.
_BATCH = 1_024
#: Events after a drift within which it has to be seen, where there are so many.
_IN_TIME = 40_000
#: A drift comes so many events, at least and at most, after the model went into service.
_EARLIEST, _LATEST = 40_000, 200_000
#: Events of the synthetic streams, by name. The long one leaves room for what takes more than a drift's first hour.
_SYNTHETIC = {"synthetic": 200_000, "synthetic-long": 600_000}

_to_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Run:
    """What one stream told, and where its drift is: the index of an event, or None."""

    name: str
    kind: DriftKind | None
    drift_at: int | None
    summaries: Sequence[Summary]


def kept_in(folder: Path | None) -> Path:
    """Where models and results of this release are kept."""
    return (folder or cache_folder() / "bench-drift") / f"{__version__}-{MODEL_FORMAT}"


class Streams:
    """The second half of a data set as it is, and with each kind of drift; and the model of its first half."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed = name, seed
        self._source = _source(name, seed)
        self.folder = folder / name / f"seed-{seed}"
        self.count = (self._source.count or 0) // 2

    def runs(self) -> Iterator[Run]:
        """Each stream: what was kept of it, or measured and kept."""
        kinds: tuple[DriftKind | None, ...] = (None, *KINDS)
        if not all(self._kept(kind).exists() for kind in kinds):
            for kind, told in self._measured().items():
                write(self._kept(kind), b"".join(value + b"\n" for value in encode(told, 0)))
        for kind in kinds:
            lines = self._kept(kind).read_bytes().splitlines()
            read = [summary for line in lines for summary in decode(line).summaries]
            yield Run(self.name, kind, None if kind is None else self.place, read)

    def events(self, kind: DriftKind | None) -> Iterator[UserEvent]:
        """The second half, with a drift or as it is."""
        if kind is None:
            return iter(self._later)
        held = replace(self._source, events=lambda: iter(self._later), count=self.count)
        return splice(held, Drift(kind, self.place, seed=self.seed)).events()

    @cached_property
    def model(self) -> Model:
        """Of the first half: the one in the folder, or pretrained and put there."""
        if not any(self.folder.glob("*/manifest.json")):
            self.pretrain(islice(self._source.events(), self.count), self.folder)
        return read_model(self.folder)

    def pretrain(self, events: Iterable[UserEvent], registry: Path) -> None:
        """Puts a model of these events into a registry."""
        from stream_adapt.meta.trainer import TrainSettings, pretrain

        spec = LearnerSpec(self._source.features, self._source.feedback)
        trained = pretrain(events, spec, TrainSettings(seed=self.seed), "cpu")
        write_model(registry, trained.weights, spec, trained.fitted, figures=trained.figures)

    @property
    def model_folder(self) -> Path:
        """Where it is."""
        return self.folder / self.model.version

    @cached_property
    def place(self) -> int:
        """Where the drift is: an event of the second half that follows from the seed."""
        earliest, latest = min(_EARLIEST, round(0.45 * self.count)), min(_LATEST, self.count - self._in_time)
        return int(np.random.default_rng(self.seed).integers(earliest, latest + 1))

    def _kept(self, kind: DriftKind | None) -> Path:
        return self.folder / f"{kind or 'stationary'}.jsonl"

    def _measured(self) -> dict[DriftKind | None, list[Summary]]:
        """Every stream up to the drift is the same one; what comes after it is put back before the next kind's turn."""
        member = Member(self.model)
        before = member.learn(self._later[: self.place])
        found: dict[DriftKind | None, list[Summary]] = {}
        for kind in KINDS:
            found[kind] = before + member.try_out(islice(self.events(kind), self.place, self.place + self._in_time))
        found[None] = before + member.learn(self._later[self.place :])
        return found

    @cached_property
    def _later(self) -> list[UserEvent]:
        return list(islice(self._source.events(), self.count, None))

    @property
    def _in_time(self) -> int:
        return min(_IN_TIME, round(0.4 * self.count))


def write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.rename(path)


def _source(name: str, seed: int) -> Source:
    """A data set; a synthetic one is another for each seed."""
    if name in _SYNTHETIC:
        return synthetic_source(Synthetic(seed=seed, events=_SYNTHETIC[name], drift="none"))
    if name not in NAMES:
        raise ConfigError(f"sets: {name!r} is none of {', '.join(dict.fromkeys((*NAMES, *_SYNTHETIC)))}")
    return open_source(name)


@dataclass(frozen=True, slots=True)
class Transaction:
    """Records that are taken in together, and the events they are."""

    raw: RawBatch
    batch: Batch


class Member:
    """What a member with one partition says of events, and tells of its learning."""

    def __init__(self, model: Model) -> None:
        self.adapter = Adapter(model, device="cpu")
        self._decoder = Decoder(model.spec.features, model.spec.feedback)
        self._offset = 0

    def learn(self, events: Iterable[UserEvent]) -> list[Summary]:
        """Scores and learns events, in transactions; returns what they tell."""
        return [summary for one in self.read(events) for summary in self.take(one)[1]]

    def try_out(self, events: Iterable[UserEvent]) -> list[Summary]:
        """The same, and then all of it is undone."""
        offset = self._offset
        told = [summary for one in self.read(events) for summary in self._process(one)[1]]
        self.adapter.abort()
        self._offset = offset
        return told

    def read(self, events: Iterable[UserEvent]) -> Iterator[Transaction]:
        """Events as transactions, at the offsets that follow."""
        for chunk in _chunks(events):
            n = len(chunk)
            keys: list[bytes | None] = [event.user_id.encode() for event in chunk]
            offsets = np.arange(self._offset, self._offset + n)
            raw = RawBatch(keys, list(map(_to_json, chunk)), np.zeros(n, np.int32), offsets)
            self._offset += n
            yield Transaction(raw, self._decoder(raw)[0])

    def take(self, one: Transaction) -> tuple[Adapted, list[Summary]]:
        """Scores and learns a transaction's events."""
        found = self._process(one)
        self.adapter.commit()
        return found

    def serve(self, model: Model, rows: RowMode) -> None:
        """Goes over to another model, between two transactions."""
        self.adapter.serve(self.adapter.ready(model))
        if rows == "restart_items":
            self.adapter.restart_items(self.adapter.items.partitions)
            self.adapter.commit()

    def _process(self, one: Transaction) -> tuple[Adapted, list[Summary]]:
        model = self.adapter.model
        said = self.adapter.adapt(one.batch)
        told = summarize(
            [(one.batch, said)],
            window=model.spec.window,
            target_level=model.spec.feedback.target_level,
            model_version=model.version,
        )
        return said, told


def _chunks(events: Iterable[UserEvent]) -> Iterator[list[UserEvent]]:
    rest = iter(events)
    while chunk := list(islice(rest, _BATCH)):
        yield chunk
