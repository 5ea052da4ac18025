"""Two models side by side, on events that neither was trained on, with the same rows.

    changelog ─▶ rows as committed, of a sample of users and all items ─┬─▶ under the champion ───┐
                                                                        └─▶ under the other model ┴─▶ compared
    input, from the offsets that the control rows name ───────────────────▶ scored, then learned, by both

Rows are as of their control rows' offsets, and the input is followed from exactly there: so both models have seen of
every user what service has seen, and nothing twice. Rows go to the other model as they would in service: by the row
mode of its manifest. What is compared is what the pipeline's own adapter says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import structlog
import xxhash

from stream_adapt import service
from stream_adapt.adapt import Adapter
from stream_adapt.config import Config
from stream_adapt.kafka import properties
from stream_adapt.kafka.changelog import Records
from stream_adapt.kafka.reading import TopicReader
from stream_adapt.models import Model, RowMode
from stream_adapt.record import NO_LEVEL, RawBatch
from stream_adapt.refresh.decide import Comparison, Floats, compare
from stream_adapt.refresh.window import raw_batch
from stream_adapt.restore import load
from stream_adapt.state.row import PREFIX, Kind, RowError
from stream_adapt.state.table import Table

log = structlog.get_logger(__name__)

_READ_S = 0.05
#: Records that are scored together.
_CHUNK = 1_024
#: A sample of users is drawn by a hash of their ids that no partitioner uses.
_SEED = 0x5EED


def sampled(user: bytes, share: float) -> bool:
    """Whether a user, by the id as UTF-8, is in the sample: the same everywhere and always."""
    return share >= 1.0 or xxhash.xxh3_64_intdigest(user, _SEED) < share * 2.0**64


class SideBySide:
    """Two adapters with equal rows, and what they said of the same events."""

    def __init__(self, config: Config, champion: Model, other: Model, rows: RowMode) -> None:
        """Starts without rows.

        Args:
            config: as members run it.
            champion: the model that the rows are of.
            other: what it is compared with.
            rows: what becomes of rows that go over to the other model.
        """
        self.champion, self.other = champion.version, other.version
        self._mode = rows
        screen, ttl_s = service.screen_of(config), config.state.ttl_s
        self._first = Adapter(champion, screen=screen, ttl_s=ttl_s)
        self._second = Adapter(other, screen=screen, ttl_s=ttl_s)
        self._decoder = service.build_decoder(config, champion)
        self._target = champion.spec.feedback.target_level
        self._from: dict[int, int] = {}
        self._users: dict[str, int] = {}
        self._said: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Floats, Floats]] = []
        self.events = 0  # with feedback, that are compared

    @property
    def tables(self) -> dict[Kind, Table]:
        """Of the champion, for rows that are loaded."""
        return {Kind.USER: self._first.users, Kind.ITEM: self._first.items}

    def begin(self, offsets: Mapping[int, int], judged_from: Mapping[int, int]) -> None:
        """The champion's rows are all there: hands them to the other model.

        Args:
            offsets: by partition, the first record whose effect is not in the rows.
            judged_from: by partition, the first offset that neither model was trained on.
        """
        for first, second in ((self._first.users, self._second.users), (self._first.items, self._second.items)):
            if first is self._first.items and self._mode == "restart_items":
                continue
            for partition in sorted(first.partitions):
                ids, slots = zip(*first.items(partition), strict=True)
                second.load(partition, ids, first.rows[np.array(slots, dtype=np.int64)])
        for adapter in (self._first, self._second):
            adapter.warm_up()
            for partition, offset in offsets.items():
                adapter.resume(partition, offset)
        self._from = dict(judged_from)

    def follow(self, raw: RawBatch) -> None:
        """Both score and learn these records; what may be judged is kept.

        Raises:
            RegistryUnreachable: they cannot be decoded now.
        """
        self._decoder.prepare(raw)
        for chunk in raw.chunks(_CHUNK):
            batch, _ = self._decoder(chunk)
            first, second = self._first.adapt(batch), self._second.adapt(batch)
            for adapter in (self._first, self._second):
                adapter.passed(chunk.partitions, chunk.offsets)
                adapter.commit()
            starts = np.array([self._from.get(p, 0) for p in batch.partitions.tolist()], dtype=np.int64)
            judged = (batch.levels != NO_LEVEL) & (batch.offsets >= starts)
            if judged.any():
                numbers = [self._users.setdefault(user, len(self._users)) for user in batch.user_ids]
                users = np.array(numbers, dtype=np.int64)[judged]
                targets = batch.levels[judged] >= self._target
                self._said.append((users, targets, first.score[judged], second.score[judged]))
                self.events += int(judged.sum())

    def forget(self) -> None:
        """A new comparison begins with the next event; rows stay."""
        self._said, self.events = [], 0

    def turned(self) -> None:
        """The other model is the champion now: what is said of it from here on comes first."""
        self._first, self._second = self._second, self._first
        self.champion, self.other = self.other, self.champion
        self.forget()

    def compared(self, newest: int | None = None) -> Comparison:
        """The champion and the other model, on all events that may be judged, or on so many of the newest."""
        columns = [np.concatenate(column)[-(newest or 0) :] for column in zip(*self._said, strict=True)]
        if not columns:
            nothing = np.zeros(0)
            return compare(nothing.astype(np.int64), nothing.astype(np.bool_), nothing, nothing)
        return compare(*columns)


class LivePair:
    """`SideBySide` on what service has committed and reads: step by step, so that its owner can do other things."""

    def __init__(
        self, config: Config, champion: Model, other: Model, rows: RowMode, judged_from: Mapping[int, int]
    ) -> None:
        """Reads nothing yet; see `SideBySide`."""
        self.models = SideBySide(config, champion, other, rows)
        self._share = config.refresh.shadow_users if config.input.check_key else 1.0
        self._judged_from = dict(judged_from)
        self._changelog = service.build_changelog_reader(config)
        self._input = TopicReader(properties.common(config), config.topic("events"))
        self._steps: Iterator[int] | None = self._restoring()

    @property
    def ready(self) -> bool:
        """Whether all rows are there, and the input is followed."""
        return self._steps is None

    def step(self, timeout_s: float = _READ_S) -> None:
        """Goes on for a moment.

        Raises:
            KafkaRefused: a topic cannot be read. RowError: rows are of another model's form.
        """
        if self._steps is not None:
            if next(self._steps, None) is None:
                self._steps = None
            return
        messages = [m for m in self._input.poll(timeout_s) if m.error() is None]
        mine = [m for m in messages if self._share >= 1.0 or sampled(m.key() or b"", self._share)]
        if mine:
            self.models.follow(raw_batch(mine))

    def close(self) -> None:
        """Lets go of the clients."""
        self._changelog.close()
        self._input.__exit__()

    def _restoring(self) -> Iterator[int]:
        """Takes in all rows; the steps are turns of reading."""
        partitions = self._input.partitions()
        starts: dict[int, int] = {}
        foreign: dict[bytes, tuple[int, RowError]] = {}
        self._changelog.begin(partitions)
        records = 0
        while self._changelog.tails:
            for partition, found in self._changelog.read(_READ_S).items():
                kept = _of_sample(found, self._share)
                loaded = load(self.models.tables, partition, kept, foreign)
                records += len(kept)
                if loaded.control is not None:
                    starts[partition] = loaded.control.next_offset
            self._changelog.finish()
            yield records
        for _, problem in foreign.values():
            raise problem
        ends = self._input.ends(partitions)
        offsets = {p: starts.get(p, ends[p][0]) for p in partitions}
        judged_from = {p: max(offsets[p], self._judged_from.get(p, 0)) for p in partitions}
        self.models.begin(offsets, judged_from)
        self._input.assign(offsets)
        log.info("two models side by side", champion=self.models.champion, other=self.models.other, records=records)


def _of_sample(records: Records, share: float) -> Records:
    """Without the rows of users who are not in the sample."""
    if share >= 1.0:
        return records
    prefix = PREFIX[Kind.USER]
    kept = [i for i, key in enumerate(records.keys) if not _is_other(key, prefix, share)]
    columns = (records.keys, records.values, records.offsets)
    return Records(*([column[i] for i in kept] for column in columns))  # type: ignore[arg-type]


def _is_other(key: bytes | None, prefix: bytes, share: float) -> bool:
    return key is not None and key.startswith(prefix) and not sampled(key[len(prefix) :], share)
