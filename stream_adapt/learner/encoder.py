"""The encoder φ: declared features and an item id become one vector x̃ of length D+1.

Every feature is a sum of `weight × row` over the rows of one table, so one sparse form serves them all:

| type        | value                 | rows it touches                                         |
|-------------|-----------------------|---------------------------------------------------------|
| categorical | string                | its own, weight 1                                       |
| bag         | list of strings       | one for each known string, weight 1/√(strings given)    |
| numeric     | number                | one, weight (value − mean)/scale; with `hats: k` the two |
|             |                       | neighbouring knots of k, weights that sum to 1          |
| vector      | k numbers             | k, weight the number itself                             |

The last column of a row, index D, adds to the bias. Features `of: item` and `of: event` add to x̃; features
`of: user` add to the prior mean w₀ of that user. Values never seen in pretraining add nothing.

Capital letters: n events, D dimensions, F rows of the item and event table, A rows of the user table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from numba import njit

from stream_adapt.errors import ConfigError

Floats32 = npt.NDArray[np.float32]
Role = Literal["item", "user", "event"]
#: (rows touched, their weights)
Pairs = tuple[list[int], list[float]]

#: A numeric feature further than this many standard deviations out counts as this far.
NUMERIC_CLIP = 5.0
#: Larger numbers are refused: float32 could not square them.
NUMBER_LIMIT = 1e9
#: Strings in one bag.
BAG_LIMIT = 1000
#: Room for encodings of distinct combinations of item (or user) features, counted in combinations and the pairs of
#: each, some 100 bytes apiece; beyond it the cache starts anew.
CACHE_LIMIT = 1_000_000
#: Room for features as they were sent; beyond it the interner starts anew.
INTERN_LIMIT_BYTES = 64_000_000
_INTERN_OVERHEAD_BYTES = 400  # of Python's objects for each
#: Features looked up before it is judged whether that pays.
INTERN_TRIAL = 50_000


class Categorical(msgspec.Struct, frozen=True, tag_field="type", tag="categorical", forbid_unknown_fields=True):
    """One string of a vocabulary; the `limit` most frequent are kept."""

    of: Role = "item"
    limit: int = 10_000


class Bag(msgspec.Struct, frozen=True, tag_field="type", tag="bag", forbid_unknown_fields=True):
    """A list of strings of a vocabulary; the `limit` most frequent are kept."""

    of: Role = "item"
    limit: int = 10_000


class Numeric(msgspec.Struct, frozen=True, tag_field="type", tag="numeric", forbid_unknown_fields=True):
    """A number, standardised; with `hats` > 1 a piecewise linear function with knots at that many quantiles."""

    of: Role = "item"
    hats: int = 0


class Vector(msgspec.Struct, frozen=True, tag_field="type", tag="vector", forbid_unknown_fields=True):
    """Numbers made upstream (an embedding of text or image), always `length` of them."""

    length: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    of: Role = "item"


Feature = Categorical | Bag | Numeric | Vector


class FittedFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A declared feature after pretraining: where its rows start and what its values mean."""

    name: str
    feature: Feature
    start: int  # first row in its table
    width: int  # number of rows
    vocabulary: tuple[str, ...] = ()
    knots: tuple[float, ...] = ()
    mean: float = 0.0
    scale: float = 1.0


def features_struct(declared: Mapping[str, Feature]) -> type[msgspec.Struct]:
    """The struct that JSON features decode into: one optional field per declared feature; others are skipped.

    Decoding refuses numbers beyond ±NUMBER_LIMIT and vectors of another length than declared.
    """
    fields = [(name, _json_type(feature) | None, None) for name, feature in declared.items()]
    return msgspec.defstruct("Features", fields, frozen=True, gc=False)


def _json_type(feature: Feature) -> Any:
    number = Annotated[float, msgspec.Meta(ge=-NUMBER_LIMIT, le=NUMBER_LIMIT)]
    if isinstance(feature, Categorical):
        return str
    if isinstance(feature, Bag):
        return Annotated[tuple[str, ...], msgspec.Meta(max_length=BAG_LIMIT)]
    if isinstance(feature, Numeric):
        return number
    return Annotated[tuple[number, ...], msgspec.Meta(min_length=feature.length, max_length=feature.length)]


def fit(declared: Mapping[str, Feature], columns: Mapping[str, Sequence[Any]]) -> tuple[FittedFeature, ...]:
    """Learns vocabularies, means and knots from the pretraining events; `columns[name]` holds `[n]` values or None.

    Rows are numbered apart for features of users (table A) and for those of items and events (table F).
    """
    starts = {"user": 0, "x": 0}
    fitted = []
    for name, feature in declared.items():
        table = "user" if feature.of == "user" else "x"
        one = _fit_one(name, feature, starts[table], [v for v in columns[name] if v is not None])
        starts[table] += one.width
        fitted.append(one)
    return tuple(fitted)


def _fit_one(name: str, feature: Feature, start: int, values: Sequence[Any]) -> FittedFeature:
    if isinstance(feature, Vector):
        return FittedFeature(name, feature, start, feature.length)
    if isinstance(feature, Numeric):
        return _fit_numeric(name, feature, start, np.asarray(values, dtype=np.float64))
    strings = values if isinstance(feature, Categorical) else (s for bag in values for s in bag)
    vocabulary = _most_frequent(strings, feature.limit)
    return FittedFeature(name, feature, start, len(vocabulary), vocabulary=vocabulary)


def _most_frequent(strings: Iterable[str], limit: int) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for string in strings:
        counts[string] = counts.get(string, 0) + 1
    return tuple(sorted(counts, key=lambda s: (-counts[s], s))[:limit])


def _fit_numeric(name: str, feature: Numeric, start: int, values: npt.NDArray[np.float64]) -> FittedFeature:
    if values.size == 0:
        return FittedFeature(name, feature, start, 1)
    if feature.hats > 1:
        knots = np.unique(np.quantile(values, np.linspace(0, 1, feature.hats)))
        if knots.size > 1:
            return FittedFeature(name, feature, start, int(knots.size), knots=tuple(knots.tolist()))
    scale = float(values.std()) or 1.0
    return FittedFeature(name, feature, start, 1, mean=float(values.mean()), scale=scale)


class _Reader:
    """Turns one fitted feature's value into pairs."""

    def __init__(self, fitted: FittedFeature) -> None:
        self.fitted = fitted
        self.row = {value: fitted.start + i for i, value in enumerate(fitted.vocabulary)}
        readers: dict[type, Callable[[Any], Pairs]] = {
            Categorical: self._categorical,
            Bag: self._bag,
            Numeric: self._numeric,
            Vector: self._vector,
        }
        self.read = readers[type(fitted.feature)]

    def _categorical(self, value: str) -> Pairs:
        row = self.row.get(value)
        return ([], []) if row is None else ([row], [1.0])

    def _bag(self, value: tuple[str, ...]) -> Pairs:
        rows = [self.row[v] for v in value if v in self.row]
        return rows, [1.0 / math.sqrt(len(value))] * len(rows) if rows else []

    def _numeric(self, value: float) -> Pairs:
        fitted = self.fitted
        if not fitted.knots:
            weight = (value - fitted.mean) / fitted.scale
            return [fitted.start], [min(max(weight, -NUMERIC_CLIP), NUMERIC_CLIP)]
        knots = fitted.knots
        value = min(max(value, knots[0]), knots[-1])
        right = min(max(int(np.searchsorted(knots, value, side="right")), 1), len(knots) - 1)
        share = (value - knots[right - 1]) / (knots[right] - knots[right - 1])
        return [fitted.start + right - 1, fitted.start + right], [1.0 - share, share]

    def _vector(self, value: tuple[float, ...]) -> Pairs:
        return list(range(self.fitted.start, self.fitted.start + len(value))), list(value)


class FeatureReader:
    """Reads the sparse pairs of one role from a features struct; used alike in training and in service."""

    def __init__(self, fitted: Sequence[FittedFeature], role: Role) -> None:
        self._readers = [_Reader(f) for f in fitted if f.feature.of == role]
        self.names = tuple(reader.fitted.name for reader in self._readers)
        self._values = _getter(self.names)

    def __bool__(self) -> bool:
        return bool(self._readers)

    def key(self, features: Any) -> tuple[Any, ...]:
        """The role's values, hashable: equal keys have equal pairs."""
        return self._values(features) if features is not None else ()

    def keys(self, features: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Keys of the features of n events."""
        values = self._values
        return [values(f) if f is not None else () for f in features]

    def pairs(self, key: tuple[Any, ...]) -> Pairs:
        """Rows and weights of a key."""
        rows: list[int] = []
        weights: list[float] = []
        for reader, value in zip(self._readers, key, strict=False):  # the empty key: no features at all
            if value is not None:
                more_rows, more_weights = reader.read(value)
                rows += more_rows
                weights += more_weights
        return rows, weights


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """Reads several attributes at once; `attrgetter` gives a tuple only for two or more."""
    if len(names) > 1:
        return attrgetter(*names)
    if names:
        read = attrgetter(*names)
        return lambda features: (read(features),)
    return lambda _: ()


class Sparse(NamedTuple):
    """n sparse vectors in compressed rows."""

    pointers: npt.NDArray[np.int32]  # [n+1]
    rows: npt.NDArray[np.int32]  # [k] of a table
    weights: Floats32  # [k]


def sparse(reader: FeatureReader, keys: Iterable[tuple[Any, ...]]) -> Sparse:
    """The pairs of n keys."""
    pointers, rows, weights = [0], [], []
    for key in keys:
        more_rows, more_weights = reader.pairs(key)
        rows += more_rows
        weights += more_weights
        pointers.append(len(rows))
    return Sparse(np.array(pointers, np.int32), np.array(rows, np.int32), np.array(weights, np.float32))


def event_pairs(reader: FeatureReader, features: Sequence[Any]) -> Sparse:
    """The pairs of the features of n events."""
    if not reader:
        return Sparse(np.zeros(len(features) + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    return sparse(reader, reader.keys(features))


class Interned(Sequence[Any]):
    """Features of n events, of which many are the same: an event's place among the distinct ones.

    Batches of one `series` share their list of distinct features, which only grows, so that an encoding found once is
    found again by its place.
    """

    def __init__(self, distinct: Sequence[Any], places: npt.NDArray[np.int32], series: object) -> None:
        self.distinct = distinct
        self.places = places
        self.series = series

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Interned(self.distinct, self.places[i], self.series)
        return self.distinct[self.places[i]]


class Interner:
    """Decodes the JSON of features once for every distinct string of bytes.

    Producers send an item's features with each of its events, in the same bytes; looking bytes up costs a third of
    decoding them and looking their values up. Where few are the same it only costs: `worth_it` then says so.
    """

    def __init__(self, struct: type[msgspec.Struct]) -> None:
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(struct | None).decode
        self._asked = 0
        self._missed = 0
        self._begin()

    def _begin(self) -> None:
        self._places: dict[bytes, int] = {}
        self._distinct: list[Any] = []
        self._bytes = 0
        self._series = object()

    @property
    def worth_it(self) -> bool:
        """Whether most features were met before, as far as can be said yet."""
        return self._asked < INTERN_TRIAL or 2 * self._missed < self._asked

    def make_room(self) -> None:
        """Starts anew if too much is kept. Places given before are void."""
        if self._bytes > INTERN_LIMIT_BYTES:
            self._begin()

    def places(self, raws: Sequence[bytes]) -> list[int]:
        """Places of n features. Raises what msgspec raises, if one of them is not as declared."""
        found = [*map(self._places.get, raws)]
        self._asked += len(raws)
        if None in found:
            for raw in dict.fromkeys(raw for raw, place in zip(raws, found, strict=True) if place is None):
                self._distinct.append(self._decode(raw))
                self._places[raw] = len(self._distinct) - 1
                self._bytes += len(raw) + _INTERN_OVERHEAD_BYTES
                self._missed += 1
            found = [*map(self._places.get, raws)]
        return found  # type: ignore[return-value]  # none is missing now

    def column(self, places: Sequence[int]) -> Interned:
        """The features at n places."""
        return Interned(self._distinct, np.array(places, dtype=np.int32), self._series)


class EncodingCache:
    """Encodings of the distinct keys of one role: an array `[C, D+1]` and, per event, an index into it.

    A key's vector is summed row by row in float32, so it does not depend on the batch in which it was first met.
    """

    def __init__(self, reader: FeatureReader, table: Floats32) -> None:
        self._reader = reader
        self._table = table
        self._index: dict[tuple[Any, ...], int] = {}
        self._pairs = 0
        self._series: object = None
        self._at_place = np.zeros(0, dtype=np.int32)
        self.vectors = np.zeros((64, table.shape[1]), dtype=np.float32)

    def index(self, features: Sequence[Any]) -> npt.NDArray[np.int32]:
        """Indices `[n]` into `vectors` of the features of n events. Earlier indices may become invalid."""
        if not self._reader:
            return np.zeros(len(features), dtype=np.int32)
        if len(self._index) + self._pairs > CACHE_LIMIT:
            self._index.clear()
            self._pairs = 0
            self._series = None
        if isinstance(features, Interned):
            return self._by_place(features)
        return self._by_key(features)

    def _by_place(self, features: Interned) -> npt.NDArray[np.int32]:
        if features.series is not self._series:
            self._series, self._at_place = features.series, np.zeros(0, dtype=np.int32)
        known = len(self._at_place)
        if known < len(features.distinct):
            self._at_place = np.concatenate([self._at_place, self._by_key(features.distinct[known:])])
        return self._at_place[features.places]

    def _by_key(self, features: Sequence[Any]) -> npt.NDArray[np.int32]:
        keys = self._reader.keys(features)
        found = [*map(self._index.get, keys)]
        if None in found:
            self._add(list(dict.fromkeys(key for key, slot in zip(keys, found, strict=True) if slot is None)))
            found = [*map(self._index.get, keys)]
        return np.array(found, dtype=np.int32)

    def _add(self, keys: Sequence[tuple[Any, ...]]) -> None:
        pairs, first = sparse(self._reader, keys), len(self._index)
        self._pairs += len(pairs.rows)
        if first + len(keys) > len(self.vectors):
            more = np.zeros((max(len(self.vectors), len(keys)), self.vectors.shape[1]), dtype=np.float32)
            self.vectors = np.concatenate([self.vectors, more])
        _sum_rows(self._table, *pairs, self.vectors[first : first + len(keys)])
        self._index.update(zip(keys, range(first, first + len(keys)), strict=True))


@njit(cache=True)
def _sum_rows(table, pointers, rows, weights, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """out[i] = Σ weight × table row, in order, float32."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = 0.0
        for k in range(pointers[i], pointers[i + 1]):
            for j in range(out.shape[1]):
                out[i, j] += weights[k] * table[rows[k], j]


def parse_features(raw: Mapping[str, Any]) -> dict[str, Feature]:
    """Declared features from configuration.

    Raises:
        ConfigError: names the feature and what is wrong with it.
    """
    parsed = {}
    for name, value in raw.items():
        if not name.isidentifier():
            raise ConfigError(f"features.{name}: a feature's name is letters, digits and underscores")
        try:
            parsed[name] = msgspec.convert(value, Feature)
        except msgspec.ValidationError as error:
            raise ConfigError(f"features.{name}={value!r}: {error}") from error
    return parsed
