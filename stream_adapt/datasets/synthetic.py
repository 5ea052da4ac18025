"""A synthetic stream whose truth is known: tastes, content, feedback in levels, and a drift at a known event.

K taste dimensions. A user has a taste p `[K]` near the centre of a segment and a mood a; an item has traits q `[K]`
and a quality b. How much a user likes an item is

    y = p·q/√K + b + a + noise          level = 1 + number of thresholds below y

which is an ordinal probit with latent factors (McCullagh 1980, Regression Models for Ordinal Data). Items are drawn
by Zipf's law, users in bursts: a few are active at a time, each for a geometric number of events. Features of every
type show a part of the truth: an item's category and tags, its price, an embedding of its traits, and the user's
segment; the hour of an event has no effect.

The same parameters give the same events; streams that differ only in `drift` are the same before `drift_at`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from stream_adapt.datasets.source import STARS, Source
from stream_adapt.errors import ConfigError
from stream_adapt.learner.encoder import Bag, Categorical, Feature, Numeric, Vector
from stream_adapt.record import FeatureValue, ItemId, UserEvent, UserId

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Drift = Literal["none", "flip", "permute"]

#: Cuts of y into five levels: most feedback is good, as in MovieLens.
_THRESHOLDS = np.array([-2.0, -1.0, 0.0, 1.2])
_LEVELS = len(_THRESHOLDS) + 1
#: Events drawn at a time. Part of what a seed means: another value gives another stream.
_CHUNK = 16_384
_EMBEDDING_NOISE = 0.3
_HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Synthetic:
    """Parameters of a stream.

    `drift` is what changes at `drift_at`, by default after three quarters of the events: with `flip` the feedback on
    half of the items turns round (level l becomes 6 − l); with `permute` the catalogue is numbered anew, so that an
    id stands for another item, traits, content and popularity included; with `none` nothing does.
    """

    seed: int = 1
    events: int = 100_000
    drift: Drift = "flip"
    drift_at: int | None = None
    users: int = 2_000
    items: int = 1_000
    segments: int = 6
    dimensions: int = 8  # K
    popularity: float = 0.8  # exponent of Zipf's law over items
    active: int = 16  # users active at a time
    burst: float = 20.0  # mean events of a user's burst
    gap_ms: float = 2_000.0  # mean time between two events of the stream
    noise: float = 0.8  # standard deviation
    start_ms: int = 1_700_000_000_000  # 14 November 2023

    def __post_init__(self) -> None:
        counts = ("events", "users", "items", "segments", "dimensions", "active")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"synthetic.{name}={getattr(self, name)} must be at least 1")
        if self.burst < 1 or self.gap_ms <= 0 or self.noise < 0 or self.popularity < 0 or self.start_ms < 0:
            raise ConfigError(f"synthetic: burst must be at least 1, gap_ms above 0, nothing below 0: {self}")
        if self.drift_at is not None and not 0 <= self.drift_at <= self.events:
            raise ConfigError(f"synthetic.drift_at={self.drift_at} must lie within the {self.events} events")

    @property
    def drift_index(self) -> int | None:
        """Index of the first event after the drift; None if there is no drift."""
        if self.drift == "none":
            return None
        return self.events * 3 // 4 if self.drift_at is None else self.drift_at

    @property
    def features(self) -> dict[str, Feature]:
        """One declared feature or more of every type and role."""
        return {
            "category": Categorical(of="item"),
            "tags": Bag(of="item"),
            "price": Numeric(of="item", hats=5),
            "embedding": Vector(of="item", length=self.dimensions),
            "segment": Categorical(of="user"),
            "hour": Numeric(of="event"),
        }


def source(parameters: Synthetic | None = None) -> Source:
    """The stream as a data set, by default with the default parameters."""
    parameters = parameters or Synthetic()
    return Source(
        name="synthetic",
        features=parameters.features,
        feedback=STARS,
        events=lambda: events(parameters),
        count=parameters.events,
        drift_at=parameters.drift_index,
    )


def events(parameters: Synthetic) -> Iterator[UserEvent]:
    """The events, in the order of time."""
    world = _World(parameters)
    users = [UserId(f"user-{number}") for number in range(parameters.users)]
    items = [ItemId(f"item-{number}") for number in range(parameters.items)]
    of_user, of_item = world.features_of_users(), world.features_of_items()
    label = [float(level) for level in range(_LEVELS + 1)]
    for index, (user, item, product, level, at) in enumerate(_columns(world)):
        features = {**of_item[product], **of_user[user], "hour": float(at // _HOUR_MS % 24)}
        yield UserEvent(f"synthetic-{index}", users[user], items[item], "rating", at, label[level], features)


class _World:
    """Who is there and what they are like; drawn first, so that it depends on the seed and the sizes alone."""

    def __init__(self, parameters: Synthetic) -> None:
        self.parameters = parameters
        self.random = np.random.default_rng(parameters.seed)
        draw, dimensions = self.random.normal, parameters.dimensions
        centres = draw(0.0, 1.0, (parameters.segments, dimensions))
        self.segment = self.random.integers(parameters.segments, size=parameters.users)
        self.taste: Floats = centres[self.segment] + draw(0.0, 1.0, (parameters.users, dimensions))  # [users, K]
        self.mood: Floats = draw(0.0, 0.4, parameters.users)
        self.traits: Floats = draw(0.0, 1.0, (parameters.items, dimensions))  # [items, K]
        self.quality: Floats = draw(0.3, 0.5, parameters.items)
        self.embedding: Floats = self.traits + draw(0.0, _EMBEDDING_NOISE, self.traits.shape)
        weight = 1.0 / np.arange(1, parameters.items + 1) ** parameters.popularity
        self.cumulative: Floats = np.cumsum(self.random.permutation(weight / weight.sum()))
        self.flipped = self.random.permutation(parameters.items) < parameters.items // 2
        self.renumbered: Longs = self.random.permutation(parameters.items)

    def features_of_items(self) -> list[dict[str, FeatureValue]]:
        category = np.abs(self.traits).argmax(axis=1).tolist()
        price = np.round(np.exp(2.0 + self.quality), 2).tolist()
        embedding = np.round(self.embedding, 4).tolist()
        tags = [[f"tag-{k}" for k in np.flatnonzero(traits > 0.5).tolist()] for traits in self.traits]
        return [
            {"category": f"category-{c}", "tags": t, "price": p, "embedding": e}
            for c, t, p, e in zip(category, tags, price, embedding, strict=True)
        ]

    def features_of_users(self) -> list[dict[str, FeatureValue]]:
        return [{"segment": f"segment-{number}"} for number in self.segment.tolist()]

    def levels(self, user: Longs, product: Longs) -> Longs:
        """Levels 1 to 5 `[n]` of n users' feedback on n products."""
        match = np.einsum("nk,nk->n", self.taste[user], self.traits[product]) / np.sqrt(self.parameters.dimensions)
        liking = match + self.quality[product] + self.mood[user]
        liking += self.random.normal(0.0, self.parameters.noise, len(user))
        levels: Longs = 1 + np.searchsorted(_THRESHOLDS, liking)
        return levels


def _columns(world: _World) -> Iterator[tuple[int, int, int, int, int]]:
    """(user, item id, product that the id stands for, level, ms) of every event."""
    parameters, random = world.parameters, world.random
    drift_at = parameters.events if parameters.drift_index is None else parameters.drift_index
    active = random.integers(parameters.users, size=parameters.active)
    clock = float(parameters.start_ms)
    for start in range(0, parameters.events, _CHUNK):
        user = _bursts(world, active)
        product = np.minimum(np.searchsorted(world.cumulative, random.random(_CHUNK)), parameters.items - 1)
        level = world.levels(user, product)
        times = clock + np.cumsum(random.exponential(parameters.gap_ms, _CHUNK))
        clock = float(times[-1])
        item = product.copy()
        after = np.arange(start, start + _CHUNK) >= drift_at
        _drift(world, after, item, level)
        here = min(_CHUNK, parameters.events - start)
        columns = (user, item, product, level, times.astype(np.int64))
        yield from zip(*(column[:here].tolist() for column in columns), strict=True)


def _bursts(world: _World, active: Longs) -> Longs:
    """Users `[_CHUNK]`: each event belongs to one of the `active` users, who leaves with probability 1/burst.

    `active` is changed in place to who is active afterwards.
    """
    random, parameters = world.random, world.parameters
    place = random.integers(len(active), size=_CHUNK)
    leaves = random.random(_CHUNK) < 1.0 / parameters.burst
    newcomers = random.integers(parameters.users, size=_CHUNK)
    user = np.empty(_CHUNK, dtype=np.int64)
    for p in range(len(active)):
        at = np.flatnonzero(place == p)
        left = np.cumsum(leaves[at])
        follow = np.concatenate([active[p : p + 1], newcomers[at][leaves[at]]])
        user[at] = follow[left - leaves[at]]
        active[p] = follow[-1]
    return user


def _drift(world: _World, after: npt.NDArray[np.bool_], item: Longs, level: Longs) -> None:
    """Changes item ids or levels of the events `after` the drift, in place."""
    if world.parameters.drift == "flip":
        turned = after & world.flipped[item]
        level[turned] = _LEVELS + 1 - level[turned]
    elif world.parameters.drift == "permute":
        item[after] = world.renumbered[item[after]]
