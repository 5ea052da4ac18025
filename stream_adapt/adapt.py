"""Adapt: score every event with its user's fast weights, then learn from it.

The second stage of the path. It owns the rows of all shards (`state/`) and calls the rule (`learner/rules/`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stream_adapt.learner import rules
from stream_adapt.learner.encoder import EncodingCache, FeatureReader, event_pairs
from stream_adapt.learner.rules.events import LEARN_ALL, Events, Scores, Screen
from stream_adapt.models import Model
from stream_adapt.record import Adapted, Batch, Flag, Ints, Longs, UserId, joined
from stream_adapt.state.expiry import Expiry
from stream_adapt.state.overlay import Overlay
from stream_adapt.state.table import Slots, Table

#: Idle users are looked for every so many windows of a partition: few enough looks to cost next to nothing.
_EXPIRY_WINDOWS = 64


@dataclass(frozen=True)
class Slow:
    """A model made ready to serve: everything of an adapter that hangs on θ."""

    model: Model
    first_user: Mapping[str, npt.NDArray[np.float32]]
    content: EncodingCache
    priors: EncodingCache
    event_features: FeatureReader
    adapt_rows: rules.AdaptRows


class Adapter:
    """The learner in service: rows, overlay and the rule, for one model at a time.

    `adapt` changes rows at once; they are the state only after `commit`, and `abort` puts back what they were.
    `device` says what runs the rule: "cpu" or "auto" is the compiled one, "cuda" the batched one on the GPU, and
    "torch-cpu" the batched one on the CPU, which is there to be compared. `screen` says which events teach nothing.
    `folder` gets the rows, which else lie in memory. Users idle for longer than `ttl_s`, in event time, are dropped;
    items keep no time, and stay.
    """

    def __init__(
        self,
        model: Model,
        device: str = "auto",
        screen: Screen = LEARN_ALL,
        *,
        folder: Path | None = None,
        ttl_s: float | None = None,
    ) -> None:
        self._screen = screen
        self._device = device
        self._slow = self.ready(model)
        spec = model.spec
        rule = rules.find(spec.rule)
        self.users = Table(rule.user_layout(spec), self._start_users, folder)
        self.items = Table(rule.item_layout(spec), self._start_items, folder)
        self.overlay = Overlay(self.users, self.items)
        every = _EXPIRY_WINDOWS * spec.window
        self._expiry = Expiry(self.users, self.overlay, ttl_s, every) if ttl_s is not None else None

    @property
    def model(self) -> Model:
        """The model in service."""
        return self._slow.model

    def ready(self, model: Model) -> Slow:
        """Makes a model ready to serve, by any thread; nothing changes."""
        rule, fitted, weights = rules.find(model.spec.rule), model.manifest.fitted, model.weights
        on_cpu = self._device in ("auto", "cpu")
        return Slow(
            model,
            rule.first_user(model),
            EncodingCache(FeatureReader(fitted, "item"), weights.feature_vector),
            EncodingCache(FeatureReader(fitted, "user"), weights.user_vector),
            FeatureReader(fitted, "event"),
            rule.compiled(model) if on_cpu else rule.batched(model, self._device.removeprefix("torch-")),
        )

    def serve(self, slow: Slow) -> None:
        """Serves another model from now on; its spec is that of the one before. Rows stay as they are."""
        assert self.overlay.is_empty, "the model was changed in the middle of a batch"
        assert slow.model.spec == self.model.spec, "rows of this model have another form"
        self._slow = slow

    def restart_items(self, partitions: Collection[int]) -> None:
        """Drops the rows of all items of these shards; an abort puts them back. Those met again start from θ."""
        for partition in partitions:
            for item_id, _ in list(self.items.items(partition)):
                self.overlay.remove(self.items, partition, item_id)

    def adapt(self, batch: Batch) -> Adapted:
        """Scores and learns n events in order; rows of users and items first met are started from θ.

        What a user's events before an erasure taught goes with it; those after it start anew.
        """
        if not batch.erasures:
            return self._adapt_and_expire(batch)
        parts, erased, start = [], [], 0
        for erasure in batch.erasures:
            parts.append(self._adapt_and_expire(batch.between(start, erasure.position)))
            erased.append(self.erase(erasure.partition, erasure.user_id))
            start = erasure.position
        parts.append(self._adapt_and_expire(batch.between(start, len(batch))))
        return replace(joined(Adapted, parts), erased=erased)

    def erase(self, partition: int, user_id: UserId) -> bool:
        """Drops a user's row; an abort puts it back. Returns whether there was one."""
        if self.users.find(partition, user_id) is None:
            return False
        self.overlay.remove(self.users, partition, user_id)
        return True

    def _adapt_and_expire(self, batch: Batch) -> Adapted:
        """The same without erasures; rows that idled too long go at their offsets."""
        if self._expiry is None:
            return self.learn(self.prepare(batch))
        due = self._expiry.due(batch.partitions, batch.offsets)
        said = [self.learn(self.prepare(batch.between(0, due[0][0] if due else len(batch))))]
        for (start, multiples), (stop, _) in pairwise([*due, (len(batch), 0)]):
            self._expiry.check(int(batch.partitions[start]), multiples)
            said.append(self.learn(self.prepare(batch.between(start, stop))))
        self._expiry.passed(batch.partitions, batch.offsets)
        return joined(Adapted, said)

    def passed(self, partitions: Ints, offsets: Longs) -> None:
        """These n records were handled, whether `adapt` saw them or not."""
        if self._expiry is None:
            return
        for at, multiples in self._expiry.due(partitions, offsets):
            self._expiry.check(int(partitions[at]), multiples)
        self._expiry.passed(partitions, offsets)

    def resume(self, partition: int, next_offset: int) -> None:
        """The rows of the partition were loaded; they are those before this offset."""
        if self._expiry is not None:
            self._expiry.resume(partition, next_offset)

    def prepare(self, batch: Batch) -> Events:
        """Finds or starts the rows of n events, keeps their old bytes, and encodes what the events say."""
        users = self.users.slots(batch.partitions, batch.user_ids)
        items = self.items.slots(batch.partitions, batch.item_ids)
        self.overlay.keep(self.users, users)
        self.overlay.keep(self.items, items)
        return self._encode(batch, users, items)

    def learn(self, events: Events) -> Adapted:
        """Runs the rule over n prepared events."""
        scores = Scores.empty(len(events.user))
        self._slow.adapt_rows(self.users.rows, self.items.rows, events, scores)
        unseen = events.known == len(self.model.weights.item_hash)
        return Adapted(*scores, unseen=unseen)

    def warm_up(self) -> None:
        """Compiles the rule and what turns rows into bytes, or loads them: seconds that no event should wait for."""
        nothing = np.zeros(0, dtype=np.int64)
        self.adapt(Batch([], [], [], [], nothing, nothing.astype(np.int8), nothing.astype(np.int32), nothing))
        self.commit()
        for table in (self.users, self.items):
            table.layout.from_values([table.layout.to_bytes(np.zeros((), table.layout.dtype))])

    def commit(self) -> None:
        """The rows as they are now are the committed state."""
        self.overlay.forget()
        if self._expiry is not None:
            self._expiry.commit()

    def abort(self) -> None:
        """Back to the rows of the last commit, byte for byte."""
        self.overlay.restore()
        if self._expiry is not None:
            self._expiry.abort()

    def drop(self, partitions: Collection[int]) -> None:
        """Forgets the rows of partitions that now belong to another member; nothing may be uncommitted."""
        assert self.overlay.is_empty, "rows were dropped in the middle of a batch"
        for partition in partitions:
            self.users.drop(partition)
            self.items.drop(partition)
            if self._expiry is not None:
                self._expiry.drop(partition)

    def _encode(self, batch: Batch, users: Slots, items: Slots) -> Events:
        slow = self._slow
        content = slow.content.index(batch.features)
        prior = slow.priors.index(batch.features)
        pointers, rows, weights = event_pairs(slow.event_features, batch.features)
        return Events(
            user=users,
            item=items,
            partition=batch.partitions,
            known=self._known(self.items.rows["hash"][items]),
            window=batch.offsets // slow.model.spec.window,
            time_ms=batch.timestamps_ms,
            level=batch.levels,
            content=content,
            content_vectors=slow.content.vectors,
            prior=prior,
            prior_vectors=slow.priors.vectors + slow.model.weights.prior_mean,
            pointers=pointers,
            rows=rows,
            weights=weights,
            event_hash=self._event_hashes(batch.event_ids),
            screen=self._screen,
        )

    def _event_hashes(self, event_ids: Sequence[str]) -> npt.NDArray[np.uint32]:
        """What rings keep of n event ids: the low half of xxh3-64, never 0. All 0 where nobody looks for duplicates."""
        n = len(event_ids)
        if not self._screen.barred & Flag.DUPLICATE:
            return np.zeros(n, dtype=np.uint32)
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, event_ids)), np.uint64, n)
        return np.maximum(hashes.astype(np.uint32), 1)

    def _known(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Rows in θ's item table; its last row, of zeros, for items that θ does not know."""
        known = self.model.weights.item_hash
        if not len(known):
            return np.zeros(len(hashes), dtype=np.int64)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[at] == hashes, at, len(known))

    def _start_users(self, slab: npt.NDArray[Any], slots: Slots, _: Sequence[str]) -> None:
        for name, values in self._slow.first_user.items():
            slab[name][slots] = values

    def _start_items(self, slab: npt.NDArray[Any], slots: Slots, item_ids: Sequence[str]) -> None:
        hashes = np.array([xxhash.xxh3_64_intdigest(item_id.encode()) for item_id in item_ids], dtype=np.uint64)
        bias_variance, offset_variance = self.model.weights.item_variance.astype(np.float64)
        events = np.append(self.model.weights.item_events, np.float32(0.0))[self._known(hashes)]
        seen = events / np.float64(self.model.weights.noise[0])
        slab["hash"][slots] = hashes
        slab["c_var"][slots] = 1.0 / (1.0 / bias_variance + seen)
        slab["delta_var"][slots] = (1.0 / (1.0 / offset_variance + seen))[:, None]
