"""A log of events becomes training columns: what the encoder reads, who, when, and which level.

    events ─read_log─▶ Log ─fit─▶ Vocabulary          (known items, fitted features; from the training slice alone)
                        │             │
                        └───encode────┴─▶ Columns ─windows─▶ per-user sequences of at most W events

Features go through `learner.encoder`, the code that service runs, so both read a value alike. Capital letters: n
events, C distinct feature combinations of one role, F rows of the item and event table, A rows of the user table,
K dimensions of the co-occurrence features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from xxhash import xxh3_64_intdigest

from stream_adapt.learner.encoder import FeatureReader, FittedFeature, Role, features_struct
from stream_adapt.learner.encoder import fit as fit_features
from stream_adapt.models import LearnerSpec
from stream_adapt.record import NO_LEVEL, Batch, Longs, UserEvent

Hashes = npt.NDArray[np.uint64]

MS_PER_HOUR = 3_600_000.0
#: Extra vectors and rounds of the subspace iteration that finds the top eigenvectors: the first 64 of MovieLens-1M
#: differ from an exact decomposition's by less than 1 % of their length.
OVERSAMPLING, ROUNDS = 16, 12
#: Events of an item before its own mean counts half.
ITEM_EVENTS = 4.0
#: Standard deviation of the co-occurrence features, over the items that have any.
COOCCURRENCE_SCALE = 0.5


@dataclass(frozen=True, slots=True)
class Log:
    """Events with feedback, in the order in which service would learn them: columns of equal length n."""

    users: Longs  # 0, 1, … in the order of their first event
    items: Hashes  # xxh3-64 of the item id
    times_ms: Longs
    levels: Longs
    features: list[Any]  # structs made by `learner.encoder.features_struct`, or None

    def __len__(self) -> int:
        return len(self.features)

    def head(self, n: int) -> Log:
        """The first n events."""
        return Log(self.users[:n], self.items[:n], self.times_ms[:n], self.levels[:n], self.features[:n])

    def where(self, chosen: npt.NDArray[np.bool_]) -> Log:
        """The events where `chosen` `[n]`; users keep their numbers."""
        features = [self.features[i] for i in np.flatnonzero(chosen).tolist()]
        return Log(self.users[chosen], self.items[chosen], self.times_ms[chosen], self.levels[chosen], features)


def read_log(events: Iterable[UserEvent], spec: LearnerSpec) -> Log:
    """Reads events in the order given; those that carry no feedback teach nothing and are left out."""
    given = list(events)
    struct = features_struct(spec.features)
    return _log(
        users=[e.user_id for e in given],
        items=[e.item_id for e in given],
        times_ms=np.array([e.timestamp for e in given], dtype=np.int64),
        levels=spec.feedback.level_of([e.label for e in given], [e.event_type for e in given]),
        features=[msgspec.convert(e.features, struct) for e in given],
    )


def read_batches(batches: Iterable[Batch]) -> Log:
    """Reads decoded micro-batches in the order given, as `read_log` reads events."""
    given = list(batches)
    return _log(
        users=[u for b in given for u in b.user_ids],
        items=[i for b in given for i in b.item_ids],
        times_ms=np.concatenate([b.timestamps_ms for b in given] or [np.zeros(0, np.int64)]),
        levels=np.concatenate([b.levels for b in given] or [np.zeros(0, np.int8)]),
        features=[f for b in given for f in b.features],
    )


def _log(
    users: Sequence[str], items: Sequence[str], times_ms: Longs, levels: npt.NDArray[np.int8], features: list[Any]
) -> Log:
    taught = np.flatnonzero(levels != NO_LEVEL).tolist()
    return Log(
        users=_numbered(users[i] for i in taught)[0],
        items=item_hashes([items[i] for i in taught]),
        times_ms=times_ms[taught],
        levels=levels[taught].astype(np.int64),
        features=[features[i] for i in taught],
    )


def item_hashes(items: Sequence[str]) -> Hashes:
    """xxh3-64 of item ids as UTF-8 `[n]`: how a model knows an item."""
    known: dict[str, int] = {}
    for item in items:
        if item not in known:
            known[item] = xxh3_64_intdigest(item.encode())
    return np.array([known[item] for item in items], dtype=np.uint64)


def _numbered(values: Iterable[Any]) -> tuple[Longs, list[Any]]:
    """Numbers `[n]` of values in the order in which they first appear, and the distinct values."""
    seen: dict[Any, int] = {}
    numbers = [seen.setdefault(value, len(seen)) for value in values]
    return np.array(numbers, dtype=np.int64), list(seen)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the training slice taught the encoder: the items it knows by id, and the fitted features."""

    item_hash: Hashes  # [I] ascending
    item_events: npt.NDArray[np.float32]  # [I]
    fitted: tuple[FittedFeature, ...]
    item_mean: npt.NDArray[np.float32]  # [I] see `item_means`

    def rows(self, table: Role) -> int:
        """Rows of the user table A, or of the table F that item and event features share."""
        mine = [f for f in self.fitted if (f.feature.of == "user") == (table == "user")]
        return sum(f.width for f in mine)

    def index(self, hashes: Hashes) -> Longs:
        """Numbers `[n]` of items by their hashes `[n]`; the number of known items where one is unknown."""
        found = np.searchsorted(self.item_hash, hashes)
        known = np.append(self.item_hash, np.uint64(0))[found] == hashes
        known &= found < len(self.item_hash)
        return np.where(known, found, len(self.item_hash)).astype(np.int64)


def fit(log: Log, spec: LearnerSpec, max_items: int) -> Vocabulary:
    """Learns the vocabulary from a training slice: its `max_items` most frequent items, its features' values."""
    hashes, counts = np.unique(log.items, return_counts=True)
    kept = np.sort(np.lexsort((hashes, -counts))[:max_items])
    columns = {name: [getattr(f, name) for f in log.features if f is not None] for name in spec.features}
    means = item_means(log, hashes[kept], spec.feedback.target_level)
    return Vocabulary(hashes[kept], counts[kept].astype(np.float32), fit_features(spec.features, columns), means)


def item_means(log: Log, items: Hashes, target: int) -> npt.NDArray[np.float32]:
    """By how much more often than all events those of each item `[I]`, which ascend, reach the target, shrunk to 0."""
    reached = (log.levels >= target) - np.mean(log.levels >= target)  # [n]
    at = np.searchsorted(items, log.items)
    known = np.append(items, np.uint64(0))[at] == log.items
    known &= at < len(items)
    sums, counts = (np.bincount(at[known], by[known], len(items)) for by in (reached, np.ones(len(log))))
    return (sums / (counts + ITEM_EVENTS)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One role's features: C distinct combinations as compressed sparse rows, and which one each event has."""

    index: Tensor  # [n]
    pointers: Tensor  # [C+1]
    rows: Tensor  # [k]
    weights: Tensor  # [k] float32

    def sums(self, events: Tensor, table: Tensor) -> Tensor:
        """Σ weight·row of `table` `[F, D+1]` for the events at `events` `[m]`: `[m, D+1]`."""
        distinct, inverse = torch.unique(self.index[events], return_inverse=True)  # [c], [m]
        starts = self.pointers[distinct]  # [c]
        lengths = self.pointers[distinct + 1] - starts  # [c]
        offsets = lengths.cumsum(0) - lengths  # [c]
        pairs = torch.arange(int(lengths.sum()), device=events.device)  # [j]
        pairs = pairs + (starts - offsets).repeat_interleave(lengths)  # [j]
        weights = self.weights[pairs].to(table.dtype)  # [j]
        summed = embedding_bag(self.rows[pairs], table, offsets, mode="sum", per_sample_weights=weights)  # [c, D+1]
        return summed[inverse]  # [m, D+1]

    def to(self, device: torch.device) -> Encoded:
        """The same on another device."""
        return Encoded(*(t.to(device) for t in (self.index, self.pointers, self.rows, self.weights)))


def _encode_role(log: Log, fitted: tuple[FittedFeature, ...], role: Role) -> Encoded:
    reader = FeatureReader(fitted, role)
    index, keys = _numbered(reader.key(f) for f in log.features)
    pairs = [reader.pairs(key) for key in keys]
    lengths = [len(rows) for rows, _ in pairs]
    return Encoded(
        index=torch.from_numpy(index),
        pointers=torch.tensor([0, *lengths]).cumsum(0),
        rows=torch.tensor([row for rows, _ in pairs for row in rows], dtype=torch.int64),
        weights=torch.tensor([weight for _, weights in pairs for weight in weights], dtype=torch.float32),
    )


@dataclass(frozen=True, slots=True)
class Columns:
    """What training reads of n events."""

    users: Tensor  # [n]
    items: Tensor  # [n] number of the item; I where unknown
    hours: Tensor  # [n] float64, since the first event of the log
    levels: Tensor  # [n]
    of_item: Encoded
    of_event: Encoded
    of_user: Encoded

    def __len__(self) -> int:
        return len(self.users)

    def to(self, device: torch.device) -> Columns:
        """The same on another device."""
        return Columns(
            users=self.users.to(device),
            items=self.items.to(device),
            hours=self.hours.to(device),
            levels=self.levels.to(device),
            of_item=self.of_item.to(device),
            of_event=self.of_event.to(device),
            of_user=self.of_user.to(device),
        )


def encode(log: Log, vocabulary: Vocabulary) -> Columns:
    """Columns of a log under a vocabulary, which may have been fitted to an earlier slice."""
    first_ms = log.times_ms.min() if len(log) else 0
    return Columns(
        users=torch.from_numpy(log.users),
        items=torch.from_numpy(vocabulary.index(log.items)),
        hours=torch.from_numpy((log.times_ms - first_ms) / MS_PER_HOUR),
        levels=torch.from_numpy(log.levels),
        of_item=_encode_role(log, vocabulary.fitted, "item"),
        of_event=_encode_role(log, vocabulary.fitted, "event"),
        of_user=_encode_role(log, vocabulary.fitted, "user"),
    )


def windows(users: Tensor, longest: int) -> list[Tensor]:
    """Event numbers of every user's windows, in time order within a window.

    A user's events are cut into equal windows of at most `longest`, so that none is a short remainder.
    """
    order = torch.sort(users, stable=True).indices  # [n]
    counts = torch.bincount(users)  # [users]
    whole = torch.split(order, counts.tolist())
    return [part for events in whole if len(events) for part in events.tensor_split(-(-len(events) // longest))]


def last_windows(users: Tensor, longest: int) -> list[Tensor]:
    """Event numbers of every user's last events, at most `longest` of them, in time order."""
    order = torch.sort(users, stable=True).indices  # [n]
    return [e[-longest:] for e in torch.split(order, torch.bincount(users).tolist()) if len(e)]


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Event numbers `[B, T]`, padded with each sequence's first event, and a mask `[B, T]` of what is real."""
    longest = max(len(s) for s in sequences)
    numbers = torch.stack([torch.cat([s, s[:1].expand(longest - len(s))]) for s in sequences])  # [B, T]
    lengths = torch.tensor([len(s) for s in sequences], device=numbers.device)  # [B]
    return numbers, torch.arange(longest, device=numbers.device) < lengths[:, None]  # [B, T]


def cooccurrence(columns: Columns, known_items: int, dimensions: int, limit: int, seed: int) -> Tensor:
    """Features `[I+1, K]` of which items the same users touched; no label is read.

    The user × item incidence, rows divided by √count, gives co-occurrences CᵀC; of their positive pointwise mutual
    information (Levy and Goldberg, 2014) these are the top eigenvectors times √eigenvalue. The `limit` items with
    most events take part; others, and the unknown item I, have zeros.
    """
    features = torch.zeros(known_items + 1, dimensions)  # [I+1, K]
    counts = torch.bincount(columns.items, minlength=known_items + 1)[:known_items]  # [I]
    frequent = torch.sort(counts, descending=True, stable=True).indices[:limit]  # [M]
    if not dimensions or len(frequent) <= 1:
        return features
    vectors = _top_eigenvectors(_ppmi(_shared_users(columns, frequent, known_items)), dimensions, seed)  # [M, ≤K]
    scale = COOCCURRENCE_SCALE / vectors.std().clamp_min(1e-12)
    features[frequent, : vectors.shape[1]] = vectors * scale
    return features


def _shared_users(columns: Columns, frequent: Tensor, known_items: int) -> Tensor:
    """CᵀC `[M, M]` of the items `frequent` `[M]`, each user weighted by one over the number of items touched."""
    place = torch.full((known_items + 1,), -1)  # [I+1]
    place[frequent] = torch.arange(len(frequent))
    touched = torch.unique(torch.stack([columns.users, place[columns.items]]), dim=1)  # [2, t]
    users, items = touched[:, touched[1] >= 0]
    shares = torch.bincount(users).to(torch.float32)[users].rsqrt()  # [t]
    shape = (int(columns.users.max()) + 1, len(frequent))
    places = torch.stack([users, items])  # [2, t]
    incidence = torch.sparse_coo_tensor(places, shares, shape, check_invariants=True)  # [users, M]
    shared: Tensor = torch.sparse.mm(incidence.t(), incidence.to_dense())  # [M, M]
    return shared


def _ppmi(shared: Tensor) -> Tensor:
    """Positive pointwise mutual information `[M, M]` of co-occurrences `[M, M]`; an item with itself has none."""
    shared = shared.clone().fill_diagonal_(0.0)
    totals = shared.sum(0).clamp_min(1e-12)  # [M]
    expected = totals[:, None] * totals / totals.sum()  # [M, M]
    return torch.log(shared / expected).clamp_min(0.0)  # [M, M]


def _top_eigenvectors(matrix: Tensor, dimensions: int, seed: int) -> Tensor:
    """Top eigenvectors times √eigenvalue `[M, ≤K]` of a symmetric matrix `[M, M]`, by subspace iteration."""
    generator = torch.Generator().manual_seed(seed)
    width = min(dimensions + OVERSAMPLING, len(matrix))
    basis = torch.randn(len(matrix), width, generator=generator)  # [M, Q]
    for _ in range(ROUNDS):
        basis, _ = torch.linalg.qr(matrix @ basis)  # [M, Q]
    values, rotation = torch.linalg.eigh(basis.T @ matrix @ basis)  # [Q] ascending, [Q, Q]
    roots: Tensor = values.flip(0)[:dimensions].clamp_min(0.0).sqrt()  # [≤K]
    vectors: Tensor = basis @ rotation.flip(1)[:, : len(roots)]  # [M, ≤K]
    return vectors * roots
