"""Dead letters: seeing what was refused, and writing it to the input again once the cause is mended.

A replay writes original key, bytes and headers to the partition that the record came from, with a header that counts
its replays, and commits how far it came in the same transaction: in a group of its own, as the offset of the first
dead letter that it has not replayed, with a map of those behind it that it has (`Memory`). So neither a crash nor a
second run, with whatever filter, writes a record twice.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import msgspec
import numpy as np
from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from stream_adapt.config import Config
from stream_adapt.decode import REASONS
from stream_adapt.emit import HEADER_PREFIX, REPLAYS_HEADER, SCHEMA_HEADER
from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.reading import TopicReader
from stream_adapt.record import Headers, Source

#: Characters of a payload, a key or a detail that are shown.
EXCERPT_LIMIT = 160
#: Records of one transaction.
_BATCH = 5_000
#: Kafka's own limit is 4,096 (offset.metadata.max.bytes).
_METADATA_LIMIT = 4_000
_TRANSACTION_TIMEOUT_S = 60.0
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Letter(msgspec.Struct, frozen=True):
    """One record of the dead-letters topic."""

    partition: int
    offset: int
    time_ms: int
    reason: str
    detail: str
    source_topic: str
    source: Source
    key: bytes | None
    value: bytes | None
    headers: Headers  # the refused record's own
    truncated: bool
    replays: int

    @property
    def name(self) -> str:
        """Where it lies, and where it came from."""
        partition, offset = self.source
        return f"[{self.partition}]@{self.offset} (from {self.source_topic}[{partition}]@{offset}, {self.reason})"


class Listed(msgspec.Struct, frozen=True):
    """A dead letter for people: nothing in it can do harm on a terminal."""

    partition: int
    offset: int
    time: str
    reason: str
    detail: str
    source_topic: str
    source_partition: int
    source_offset: int
    key: str
    bytes: int
    excerpt: str
    truncated: bool
    replays: int


class Listing(msgspec.Struct, frozen=True):
    """What `dead-letters list` found: the newest letters, and how many there are of each reason."""

    topic: str
    matched: int
    reasons: dict[str, int]
    letters: list[Listed]


class Replay(msgspec.Struct):
    """What `dead-letters replay` does, or did."""

    topic: str
    selected: int = 0
    reasons: dict[str, int] = {}
    done_before: int = 0  # matched, and were replayed by an earlier run
    refused: list[str] = []  # cannot be replayed, by name
    replayed: int = 0


@dataclass(frozen=True)
class Filter:
    """Which dead letters are meant; what is empty lets all through."""

    reasons: Collection[str] = ()
    offsets: Collection[Source] = ()  # partition and offset in the dead-letters topic

    def __post_init__(self) -> None:
        for reason in self.reasons:
            if reason not in REASONS:
                raise ConfigError(f"--reason {reason}: there is no such reason; there are {', '.join(REASONS)}")

    def __call__(self, letter: Letter) -> bool:
        return (not self.reasons or letter.reason in self.reasons) and (
            not self.offsets or (letter.partition, letter.offset) in self.offsets
        )


@dataclass
class Memory:
    """Which dead letters of one partition were replayed: all before `base`, and some behind it.

    Kafka keeps it as a committed offset and its metadata: a bitmap of the offsets behind `base`, compressed.
    """

    base: int = 0
    later: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, committed: TopicPartition | None) -> Memory:
        """What was committed."""
        if committed is None:
            return cls()
        found = re.fullmatch(r"v1:(.*)", committed.metadata or "")
        bitmap = zlib.decompress(base64.b64decode(found[1])) if found else b""
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
        return cls(committed.offset, set((committed.offset + np.flatnonzero(bits)).tolist()))

    def __contains__(self, offset: int) -> bool:
        return offset < self.base or offset in self.later

    def metadata(self) -> str:
        """The map of what lies behind `base`.

        Raises:
            ConfigError: it is too patchy for what Kafka keeps with an offset.
        """
        if not self.later:
            return ""
        bits = bytearray((max(self.later) - self.base) // 8 + 1)
        for offset in self.later:
            bits[(offset - self.base) // 8] |= 1 << (offset - self.base) % 8
        text = "v1:" + base64.b64encode(zlib.compress(bytes(bits), 9)).decode()
        if len(text) > _METADATA_LIMIT:
            raise ConfigError(
                f"what was replayed up to dead letter {max(self.later)} is too patchy to be remembered ({len(text):,} "
                f"of {_METADATA_LIMIT:,} characters): replay those before {self.base + 1:,} first, or all of them"
            )
        return text


def since_ms(text: str, now: datetime) -> int:
    """`2h`, `30m`, `7d` or `45s` ago, or a time in ISO 8601, as ms since the epoch.

    Raises:
        ConfigError: it is neither.
    """
    if found := re.fullmatch(r"(\d{1,9})([smhd])", text):
        return int(now.timestamp() * 1000) - int(found[1]) * _UNITS_S[found[2]] * 1000
    try:
        then = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--since {text}: 45s, 30m, 2h, 7d, or a time such as 2026-01-31T12:00:00Z") from None
    return int((then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() * 1000)


def source_of(text: str) -> Source:
    """`PARTITION:OFFSET`, or an offset of partition 0.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(?:(\d{1,9}):)?(\d{1,18})", text)
    if found is None:
        raise ConfigError(f"--offset {text}: an offset, or PARTITION:OFFSET, of the dead-letters topic")
    return int(found[1] or 0), int(found[2])


def printable(content: bytes | str | None, limit: int = EXCERPT_LIMIT) -> str:
    """Text that is safe on any terminal: what is no printable character is written as an escape, a longer end cut."""
    if content is None:
        return ""
    text = content[: 4 * limit].decode("utf-8", "backslashreplace") if isinstance(content, bytes) else content
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def letter_of(message: Message) -> Letter:
    """A record of the dead-letters topic, whoever wrote it."""
    given: Headers = message.headers() or ()  # type: ignore[assignment]
    ours = {name: (value or b"").decode(errors="replace") for name, value in given if name.startswith(HEADER_PREFIX)}
    named = f"{HEADER_PREFIX}source."
    return Letter(
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        time_ms=message.timestamp()[1],
        reason=ours.get(f"{HEADER_PREFIX}reason", "?") if SCHEMA_HEADER in ours else "?",
        detail=ours.get(f"{HEADER_PREFIX}detail", ""),
        source_topic=ours.get(f"{named}topic", "?"),
        source=(_number(ours.get(f"{named}partition")), _number(ours.get(f"{named}offset"))),
        key=message.key(),
        value=message.value(),
        headers=[(name, value) for name, value in given if not name.startswith(HEADER_PREFIX)],
        truncated=ours.get(f"{HEADER_PREFIX}truncated") == "true",
        replays=max(_number(ours.get(REPLAYS_HEADER)), 0),
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text) else -1


def list_letters(config: Config, wanted: Filter, since: int | None, limit: int) -> Listing:
    """The newest dead letters that are wanted, and how many there are of each reason.

    Args:
        config: names brokers and topics.
        wanted: which ones.
        since: only those written then or later, ms since the epoch.
        limit: at most so many are given; all are counted.

    Raises:
        KafkaRefused: the topic is missing or cannot be read.
    """
    topic = config.topic("dead_letters")
    reasons: Counter[str] = Counter()
    newest: deque[Letter] = deque(maxlen=limit)
    with TopicReader(properties.common(config), topic) as reader:
        ranges = reader.ends(reader.partitions())
        if since is not None:
            ranges = {p: (start, ranges[p][1]) for p, start in reader.since(list(ranges), since).items()}
        for letter in filter(wanted, map(letter_of, reader.records(ranges))):
            reasons[letter.reason] += 1
            newest.append(letter)
    shown = sorted(newest, key=lambda letter: (letter.time_ms, letter.partition, letter.offset))
    return Listing(topic, reasons.total(), dict(reasons.most_common()), [_listed(letter) for letter in shown])


def _listed(letter: Letter) -> Listed:
    return Listed(
        partition=letter.partition,
        offset=letter.offset,
        time=datetime.fromtimestamp(letter.time_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        reason=printable(letter.reason),
        detail=printable(letter.detail),
        source_topic=printable(letter.source_topic),
        source_partition=letter.source[0],
        source_offset=letter.source[1],
        key=printable(letter.key),
        bytes=len(letter.value or b""),
        excerpt=printable(letter.value),
        truncated=letter.truncated,
        replays=letter.replays,
    )


def table(listing: Listing) -> Group:
    """The listing for a terminal."""
    shown = Table(Column("offset", no_wrap=True), Column("reason, time (UTC)", no_wrap=True), show_lines=True)
    shown.add_column("source", overflow="fold", min_width=16)
    shown.add_column("key, bytes, payload; what was wrong", overflow="fold")
    for one in listing.letters:
        flags = [*(["payload cut"] if one.truncated else []), *([f"replayed {one.replays}×"] if one.replays else [])]
        shown.add_row(
            f"{one.partition}:{one.offset}",
            "\n".join([one.reason, one.time[:19].replace("T", " "), *flags]),
            Text(f"{one.source_topic}[{one.source_partition}]@{one.source_offset}"),
            Text(f"{one.key}, {one.bytes:,} bytes\n{one.excerpt}\n{one.detail}"),
        )
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in listing.reasons.items())
    return Group(
        shown, Text(f"{len(listing.letters):,} of {listing.matched:,} in {listing.topic}: {reasons or 'none'}")
    )


def tell(plan: Replay, line: Callable[[str], None]) -> None:
    """What a replay is about to do, line by line; those that cannot be replayed by name."""
    reasons = ", ".join(f"{printable(reason)} {count:,}" for reason, count in plan.reasons.items())
    line(f"to replay to {plan.topic}: {plan.selected:,}{f' ({reasons})' if reasons else ''}")
    if plan.done_before:
        line(f"replayed before, left out: {plan.done_before:,} (--from-beginning takes them, too)")
    for name in plan.refused:
        line(f"cannot be replayed: {name}")


class Replayer:
    """Writes dead letters to the input again."""

    def __init__(self, config: Config, wanted: Filter, *, from_beginning: bool = False) -> None:
        """Chooses.

        Args:
            config: names brokers and topics.
            wanted: which dead letters.
            from_beginning: also those that were replayed before.
        """
        self._settings = properties.common(config)
        self._topic = config.topic("dead_letters")
        self._to = config.topic("events")
        self._group = f"{config.group_id}.dead-letters-replay"
        self._transactional_id = f"{config.app.name}.dead-letters-replay"
        self._wanted = wanted
        self._from_beginning = from_beginning
        self._refused: KafkaError | None = None

    def run(self, agreed: Callable[[Replay], bool], progress: Callable[[int], None]) -> Replay:
        """Replays what is wanted, in transactions of some thousand records each.

        Args:
            agreed: shown what would be replayed and what cannot be; nothing is written unless it says so.
            progress: told how many records were replayed so far.

        Raises:
            KafkaRefused: says how far it came; what was replayed is remembered, and a second run goes on.
            ConfigError: what would have to be remembered is too patchy; nothing of that transaction was written.
        """
        with TopicReader(self._settings, self._topic, self._group) as reader:
            reader.partitions()  # is anybody there?
            producer = self._producer()  # first: ends what a run that died left open, before offsets are looked at
            memories = self._memories(reader)
            ranges = self._ranges(reader, memories)
            partitions, left = set(reader.partitions(self._to)), _Left()
            plan = self._plan(reader, ranges, memories, partitions)
            if not agreed(plan):
                return plan
            for batch in self._batches(reader, ranges, memories, left, partitions):
                self._write(producer, reader, batch, memories, left, plan)
                progress(plan.replayed)
            return plan

    def _batches(
        self,
        reader: TopicReader,
        ranges: Mapping[int, tuple[int, int]],
        memories: dict[int, Memory],
        left: _Left,
        partitions: Collection[int],
    ) -> Iterator[list[Letter]]:
        """What is to be replayed, some thousand at a time; `left` follows what is read."""
        batch: list[Letter] = []
        for letter in map(letter_of, reader.records(ranges)):
            done = letter.offset in memories[letter.partition]
            if self._wanted(letter) and not self._problem(letter, partitions) and (self._from_beginning or not done):
                batch.append(letter)
                done = True
            left.note(letter, done)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _write(
        self,
        producer: Producer,
        reader: TopicReader,
        batch: list[Letter],
        memories: dict[int, Memory],
        left: _Left,
        plan: Replay,
    ) -> None:
        """One transaction: the records, and the memory of them."""
        after = {p: left.memory(p, memories[p], batch) for p in {letter.partition for letter in batch}}
        offsets = [TopicPartition(self._topic, p, m.base, m.metadata()) for p, m in after.items()]
        try:
            producer.begin_transaction()
            for letter in batch:
                self._produce(producer, letter)
            producer.send_offsets_to_transaction(offsets, reader.group_metadata(), _TRANSACTION_TIMEOUT_S)
            producer.commit_transaction(_TRANSACTION_TIMEOUT_S)
        except (KafkaException, SystemError) as error:
            with suppress(KafkaException, SystemError):
                producer.abort_transaction(_TRANSACTION_TIMEOUT_S)
            found = self._refused or kafka_error(error)
            raise KafkaRefused(
                f"{self._to}: {plan.replayed:,} of {plan.selected:,} dead letters were replayed, the next could not "
                f"be: {describe(found) if found else error}. To do: run it again, it goes on where it stopped"
            ) from error
        memories.update(after)
        plan.replayed += len(batch)

    def _produce(self, producer: Producer, letter: Letter) -> None:
        count = (REPLAYS_HEADER, str(letter.replays + 1).encode())
        headers: list[tuple[str, str | bytes | None]] = [*letter.headers, count]
        write = partial(
            producer.produce,
            self._to,
            letter.value,
            letter.key,
            partition=letter.source[0],
            headers=headers,
            on_delivery=self._delivered,
        )
        while True:
            try:
                write()
            except BufferError:  # the queue is full: wait until the broker took some
                producer.poll(0.1)
            else:
                return

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        self._refused = self._refused or error

    def _producer(self) -> Producer:
        producer = clients.producer({**self._settings, "transactional.id": self._transactional_id, "linger.ms": 5})
        try:
            producer.init_transactions(_TRANSACTION_TIMEOUT_S)
        except KafkaException as error:
            found = kafka_error(error)
            raise KafkaRefused(
                f"no producer with transactional.id {self._transactional_id!r}: {found and describe(found)}. To do: "
                "check that the brokers are up, and that the principal may Write and Describe this transactional id"
            ) from error
        return producer

    def _memories(self, reader: TopicReader) -> dict[int, Memory]:
        partitions = reader.partitions()
        committed = reader.committed(partitions)
        return {p: Memory.of(committed.get(p)) for p in partitions}

    def _ranges(self, reader: TopicReader, memories: Mapping[int, Memory]) -> dict[int, tuple[int, int]]:
        ends = reader.ends(list(memories))
        if self._from_beginning:
            return ends
        return {p: (max(low, memories[p].base), high) for p, (low, high) in ends.items()}

    def _plan(
        self,
        reader: TopicReader,
        ranges: Mapping[int, tuple[int, int]],
        memories: Mapping[int, Memory],
        partitions: Collection[int],
    ) -> Replay:
        plan, reasons = Replay(self._to), Counter[str]()
        for letter in filter(self._wanted, map(letter_of, reader.records(ranges))):
            if letter.offset in memories[letter.partition] and not self._from_beginning:
                plan.done_before += 1
            elif problem := self._problem(letter, partitions):
                plan.refused.append(f"{self._topic}{printable(letter.name)}: {problem}")
            else:
                reasons[letter.reason] += 1
        plan.selected, plan.reasons = reasons.total(), dict(reasons.most_common())
        return plan

    def _problem(self, letter: Letter, partitions: Collection[int]) -> str | None:
        """Why a dead letter cannot be replayed."""
        if letter.truncated:
            return "its payload was cut; it is still at its source, if the log still holds that"
        if letter.source_topic != self._to:
            return f"it did not come from {self._to}"
        if letter.source[0] not in partitions:
            return f"{self._to} has no partition {letter.source[0]}"
        return None


class _Left:
    """What was read of each partition: the first letter that stays as it is, and where reading has come to."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}
        self._next: dict[int, int] = {}

    def note(self, letter: Letter, done: bool) -> None:
        """A letter was read; `done`: it is replayed now, or was before."""
        self._next[letter.partition] = letter.offset + 1
        if not done:
            self._first.setdefault(letter.partition, letter.offset)

    def memory(self, partition: int, before: Memory, batch: Iterable[Letter]) -> Memory:
        """The memory of a partition once a batch is replayed."""
        base = max(self._first.get(partition, self._next[partition]), before.base)
        later = before.later | {letter.offset for letter in batch if letter.partition == partition}
        return Memory(base, {offset for offset in later if offset >= base})
