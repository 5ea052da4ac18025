"""Learning summaries: what each transaction tells of how well it learned, and how it is read back.

A summary is sums over the events of one window of one partition (W consecutive offsets, `offset // W`), of one domain
and one model version. A transaction that ends within a window writes a part of it, and the next one the rest: parts
add up (`total`). Every number that is summed is first rounded to a multiple of 2⁻²⁴, so that sums are exact and what
they add up to does not depend on where batches were cut.

The topic `<app>.learning` gets them in the transaction that they tell of, so what is there is committed, and once.
Field names and meanings: `schemas/learning-v1.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_adapt.errors import DataError
from stream_adapt.record import NO_LEVEL, Adapted, Batch, Floats, Ints, Longs

Bools = npt.NDArray[np.bool_]

#: Raised by one when the meaning of a record changes.
LEARNING_FORMAT = 1

#: Characters of a domain's name that are kept: what names a place is shorter, and a record stays small.
DOMAIN_LIMIT = 64

#: Summaries of a record: at most 0.4 MB with the longest domains there are, and a broker takes 1 MB unless told more.
_RECORD_LIMIT = 512

#: Probabilities are at least so far from 0 and 1 when their logarithm is taken: as far as the scores topic can tell.
_FLOOR = 1e-7

#: Sums of multiples of 2⁻²⁴ are exact in float64 up to 2²⁹: more than any window's.
_GRAIN = 2.0**24


class Summary(msgspec.Struct, frozen=True):
    """How well a part of a window was predicted: sums, of one partition, window, domain and model version.

    Sums over labels are of the labelled events alone. Log-losses are natural, of probabilities clipped to
    [1e-7, 1 − 1e-7].
    """

    partition: int
    window: int
    first_offset: int
    last_offset: int
    domain: str  # "": none was given
    model_version: str
    events: int  # scored
    labelled: int
    loss: float  # Σ log-loss of the score
    loss_frozen: float  # Σ log-loss of the frozen score
    entropy: float  # Σ −p log p − (1−p) log(1−p): the log-loss that the score itself expects
    target: float  # Σ
    score: float  # Σ
    unseen: int  # events whose item θ does not know
    first_ms: int  # event time
    last_ms: int

    @property
    def key(self) -> tuple[int, int, str, str]:
        """Summaries with equal keys are parts of one."""
        return self.partition, self.window, self.domain, self.model_version


class LearningRecord(msgspec.Struct, frozen=True):
    """The value of a record of the learning topic: learning v1."""

    format: int
    committed_ms: int
    summaries: tuple[Summary, ...]


def summarize(
    parts: Sequence[tuple[Batch, Adapted]], *, window: int, target_level: int, model_version: str
) -> list[Summary]:
    """What was learned of n events, by partition, window and domain; each of them once.

    Args:
        parts: chunks of events and what was said of them, in the order of consumption.
        window: W, of the model's spec.
        target_level: the first level that counts as a target of 1.
        model_version: that all of them were scored with.
    """
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return []
    batches, said = [batch for batch, _ in parts], [adapted for _, adapted in parts]
    partitions = np.concatenate([b.partitions for b in batches])
    offsets = np.concatenate([b.offsets for b in batches])
    windows = offsets // window
    times = np.concatenate([b.timestamps_ms for b in batches])
    levels = np.concatenate([b.levels for b in batches])
    score = np.concatenate([a.score for a in said])
    frozen = np.concatenate([a.frozen_score for a in said])
    unseen = np.concatenate([a.unseen for a in said])
    names, domains = _coded(batches)
    order, starts = _grouped(partitions, windows, domains)

    def sums(column: np.ndarray[Any, Any]) -> list[Any]:
        return np.add.reduceat(column[order], starts).tolist()  # type: ignore[no-any-return]

    labelled = levels != NO_LEVEL
    finite = np.isfinite(score) & np.isfinite(frozen)
    if not finite.all():
        labelled &= finite
        score, frozen = np.where(finite, score, 0.5), np.where(finite, frozen, 0.5)
    ends = np.append(starts[1:], len(offsets)) - 1
    columns = (
        partitions[order][starts].tolist(),
        windows[order][starts].tolist(),
        offsets[order][starts].tolist(),
        offsets[order][ends].tolist(),
        [names[code] for code in domains[order][starts].tolist()] if len(domains) else names * len(starts),
        [model_version] * len(starts),
        (ends - starts + 1).tolist(),
        sums(labelled.astype(np.int64)),
        *(
            (np.add.reduceat(np.rint(column[order] * _GRAIN), starts) / _GRAIN).tolist()
            for column in _losses(score, frozen, levels >= target_level, labelled)
        ),
        sums(unseen.astype(np.int64)),
        np.minimum.reduceat(times[order], starts).tolist(),
        np.maximum.reduceat(times[order], starts).tolist(),
    )
    return [Summary(*row) for row in zip(*columns, strict=True)]


def total(summaries: Iterable[Summary]) -> list[Summary]:
    """Parts of the same window added up, in the order in which each window was first met."""
    wholes: dict[tuple[int, int, str, str], Summary] = {}
    for part in summaries:
        whole = wholes.get(part.key)
        wholes[part.key] = part if whole is None else _added(whole, part)
    return list(wholes.values())


def encode(summaries: Sequence[Summary], committed_ms: int) -> Iterator[bytes]:
    """Values of records with these summaries: one, but for more domains than fit into one; none for none."""
    for start in range(0, len(summaries), _RECORD_LIMIT):
        some = tuple(summaries[start : start + _RECORD_LIMIT])
        yield msgspec.json.encode(LearningRecord(LEARNING_FORMAT, committed_ms, some))


def decode(value: bytes) -> LearningRecord:
    """Reads the value of a record of the learning topic.

    Raises:
        DataError: it is no such value, or of a format that this release does not read.
    """
    try:
        found = msgspec.json.decode(value, type=_AnyFormat).format
        if found != LEARNING_FORMAT:
            raise DataError(f"learning record: format={found}, this release reads {LEARNING_FORMAT}; run a newer one")
        return msgspec.json.decode(value, type=LearningRecord)
    except msgspec.DecodeError as error:
        raise DataError(f"not a learning record: {error}: {value[:80]!r}") from error


class _AnyFormat(msgspec.Struct, frozen=True):
    format: int


#: Fields that add up.
_SUMS = ("events", "labelled", "loss", "loss_frozen", "entropy", "target", "score", "unseen")


def _added(a: Summary, b: Summary) -> Summary:
    sums = {name: getattr(a, name) + getattr(b, name) for name in _SUMS}
    return msgspec.structs.replace(
        a,
        first_offset=min(a.first_offset, b.first_offset),
        last_offset=max(a.last_offset, b.last_offset),
        first_ms=min(a.first_ms, b.first_ms),
        last_ms=max(a.last_ms, b.last_ms),
        **sums,
    )


def _losses(score: Floats, frozen: Floats, target: Bools, labelled: Bools) -> list[Floats]:
    """Log-losses of n scores and frozen scores, the scores' entropy, targets and scores: 0 without a label."""
    miss = (~target).astype(np.float64)
    # |miss − p| is the probability of what happened.
    happened, happened_frozen = (np.clip(np.abs(miss - p), _FLOOR, 1 - _FLOOR) for p in (score, frozen))
    log_happened, log_other = np.log(happened), np.log(1 - happened)
    entropy = -(happened * log_happened + (1 - happened) * log_other)
    columns = [-log_happened, -np.log(happened_frozen), entropy, 1 - miss, score]
    return columns if labelled.all() else [column * labelled for column in columns]


def _coded(batches: Sequence[Batch]) -> tuple[list[str], Longs]:
    """Names of the domains that occur, and for each of n events which of them it is `[n]`; `[0]` where all are one."""
    if all(len(batch.domains) == batch.domains.count(None) for batch in batches):
        return [""], np.zeros(0, dtype=np.int64)
    domains = [domain for batch in batches for domain in batch.domains or [None] * len(batch)]
    named = {domain: (domain or "")[:DOMAIN_LIMIT] for domain in dict.fromkeys(domains)}
    names = list(dict.fromkeys(named.values()))
    if len(names) == 1:
        return names, np.zeros(0, dtype=np.int64)
    code = {domain: names.index(name) for domain, name in named.items()}
    return names, np.fromiter(map(code.__getitem__, domains), np.int64, len(domains))


def _grouped(partitions: Ints, windows: Longs, domains: Longs) -> tuple[Any, Longs]:
    """An order of n events in which groups of one partition, window and domain lie together, and where each begins.

    Events of a partition come in runs. Where each run is a group, as almost always, the order is the one there is;
    otherwise runs are numbered, and events sorted by number and domain: 16 bits as a rule, so that NumPy's stable
    sort is a radix sort.
    """
    edges = (windows[1:] != windows[:-1]) | (partitions[1:] != partitions[:-1])
    runs = np.concatenate([[0], np.flatnonzero(edges) + 1])
    _, partition = np.unique(partitions[runs], return_inverse=True)
    low = windows.min()
    _, group = np.unique(partition * (windows.max() - low + 1) + windows[runs] - low, return_inverse=True)
    if len(domains) == 0 and group.max() + 1 == len(runs):
        return slice(None), runs
    of = np.repeat(group, np.diff(runs, append=len(windows)))
    if len(domains):
        of = of * (domains.max() + 1) + domains
    order = np.argsort(of.astype(np.uint16) if of.max() < 1 << 16 else of, kind="stable")
    return order, np.concatenate([[0], np.flatnonzero(np.diff(of[order])) + 1])
