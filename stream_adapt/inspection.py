"""`stream-adapt state show`: what the changelog holds of one user, in words and numbers an operator can follow.

A user's row lies in every partition that the user's records were in, so all of them are read; of the rows of others
nothing is decoded. Items are named by the shard's item rows, whose keys are item ids: a ring keeps their hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from stream_adapt import service
from stream_adapt.config import Config
from stream_adapt.errors import ConfigError, ModelError
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.changelog import ChangelogReader, Records
from stream_adapt.learner import rules
from stream_adapt.learner.rules.compiled import HORIZON
from stream_adapt.learner.rules.layout import applied
from stream_adapt.models import LearnerSpec, Model
from stream_adapt.state.row import CONTROL_KEY, PREFIX, ControlRow, Kind, fingerprint_of, row_bytes_of

_READ_S = 0.2
#: Items of the ring whose part in a score is shown, the newest first.
_EXPLAINED = 3
#: Coordinates of x̃ that are shown of each: those with the largest parts.
_TOP = 5
#: What pretraining offers; a row whose model is not at hand is recognised among these.
_DIMENSIONS, _RINGS = range(1, 257), (16, *range(1, 16), *range(17, 129))

Floats = npt.NDArray[np.float64]
#: Told how many offsets are read, and how many there are.
Progress = Callable[[int, int], None]


class RingEvent(msgspec.Struct):
    """One of the last events that a row remembers."""

    item_hash: str  # xxh3-64 of the item id, 16 hexadecimal digits
    item_id: str | None  # None: no item row of the shard has this hash
    known: bool | None  # whether the model has a vector for the item; None: no model
    time: str  # ISO 8601, UTC, to the second
    level: int
    level_name: str | None
    logit: float  # z, before the event was learned


class Part(msgspec.Struct):
    """What one coordinate of x̃ adds to z: x · (prior + deviation)."""

    coordinate: int
    x: float
    prior: float
    deviation: float
    adds: float


class Composition(msgspec.Struct):
    """How z comes about for an item, from the rows and the model as they are now, without any feature.

    z = bias + item_bias + item_bias_learned + user_bias + prior_taste + learned_taste
    """

    item_hash: str
    item_id: str | None
    z: float
    bias: float  # b
    item_bias: float  # the item's under θ; 0 for an item that the model does not know
    item_bias_learned: float  # Δc of the shard
    user_bias: float  # prior and deviation of the last coordinate
    prior_taste: float  # Σ prior · x over the D coordinates of taste
    learned_taste: float  # Σ deviation · x
    top: list[Part]  # coordinates with the largest parts


class ShownRow(msgspec.Struct):
    """A user's row in one partition."""

    partition: int
    as_of_offset: int | None  # of the input partition: the first record whose effect is not in the row
    count: int
    last_event: str | None  # ISO 8601, UTC
    deviation: list[float]  # [D+1] fast weights less their prior, w − w₀, as of the last event; the last is the bias
    deviation_sd: list[float] | None  # [D+1] √ of P's diagonal; None: the rule keeps no variance
    prior_mean: list[float] | None  # [D+1] m₀ + B ψ, which user attributes add to; None: no model
    weights: list[float] | None  # [D+1] m₀ + deviation; None: no model, or user attributes add to m₀
    missed: float | None  # Σ (target − score) over the events learned, as of the last one; None: there is no calibrator
    events: list[RingEvent]  # the newest first
    contributions: list[Composition]


class Shown(msgspec.Struct):
    """What the changelog holds of a user."""

    user: str
    rows: list[ShownRow]  # none: no partition has a row of the user
    partitions: int  # that were read
    records: int
    model_version: str | None
    features_left_out: list[str]  # declared features: what they add to z is in no row
    notes: list[str]


@dataclass(slots=True)
class _Found:
    """Newest undamaged value by key, of one partition."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    damaged: int = 0


def show(config: Config, user: str, progress: Progress = lambda _done, _total: None) -> Shown:
    """Reads what is committed of a user; members may run meanwhile.

    Args:
        config: names brokers, topics and the model; without a model there are no names, priors and contributions.
        user: the user id.
        progress: told how far the changelog is read.

    Raises:
        ConfigError: the user id is empty.
        KafkaRefused: the changelog cannot be read.
    """
    if not user:
        raise ConfigError("the user id is empty")
    notes: list[str] = []
    model = _model(config, notes)
    partitions = changelog_partitions(config)
    reader = service.build_changelog_reader(config)
    key = PREFIX[Kind.USER] + user.encode()
    records = 0

    def counted(done: int, total: int) -> None:
        nonlocal records
        records = done
        progress(done, total)

    try:
        found = _newest(reader, partitions, lambda other: other in (key, CONTROL_KEY), counted)
        holding = {p: one for p, one in found.items() if key in one.values}
        rows = {p: row for p, one in holding.items() if (row := _row(p, one.values[key], model, notes)) is not None}
        wanted = {int(h) for row, _ in rows.values() for h in row["ring_item"][: int(row["count"])]}
        items = _newest(reader, list(rows), lambda other: _hash_of(other) in wanted, lambda _done, _total: None)
    finally:
        reader.close()
    if damaged := sum(one.damaged for one in found.values()):
        notes.append(f"{damaged} damaged records were left out; the last good version is shown")
    return Shown(
        user,
        [_shown(p, row, spec, found[p], items[p], model) for p, (row, spec) in sorted(rows.items())],
        len(partitions),
        records,
        model.version if model else None,
        sorted(model.spec.features) if model else [],
        notes,
    )


def changelog_partitions(config: Config) -> list[int]:
    """Partitions of the changelog.

    Raises:
        KafkaRefused: a topic is missing, or no broker answers.
    """
    described = service.describe_topics(clients.reached_admin(properties.common(config)), config)
    return list(range(len(described[config.topic("changelog")].partitions)))


def read_through(
    reader: ChangelogReader, partitions: Collection[int], take: Callable[[int, Records], None], progress: Progress
) -> None:
    """Hands over everything that the partitions hold up to their ends as they are now.

    Raises:
        KafkaRefused: the changelog cannot be read.
    """
    if not partitions:
        return
    reader.begin(partitions)
    total = sum(max(tail.target - tail.start, 0) for tail in reader.tails.values())
    left = len(partitions)
    while left := left - len(reader.finish()):
        for partition, records in reader.read(_READ_S).items():
            take(partition, records)
        progress(total - sum(max(t.target - t.position, 0) for t in reader.tails.values()), total)


def _newest(
    reader: ChangelogReader, partitions: Collection[int], wanted: Callable[[bytes], bool], progress: Progress
) -> dict[int, _Found]:
    """By partition: the last undamaged value of each key that is wanted; what was dropped is left out."""
    found = {partition: _Found() for partition in partitions}

    def take(partition: int, records: Records) -> None:
        one = found[partition]
        for key, value in zip(records.keys, records.values, strict=True):
            if key is None or not wanted(key):
                continue
            if value is None:
                one.values.pop(key, None)
            elif fingerprint_of(value) is not None:
                one.values[key] = value
            else:
                one.damaged += 1

    read_through(reader, partitions, take, progress)
    return found


def _hash_of(key: bytes) -> int:
    """Of the item that a key is of; −1, which no item has, for other keys."""
    return xxhash.xxh3_64_intdigest(key[2:]) if key.startswith(PREFIX[Kind.ITEM]) else -1


def _model(config: Config, notes: list[str]) -> Model | None:
    try:
        return service.champion(config)
    except ModelError as error:
        notes.append(f"no model, so no names of levels, no prior and no contributions: {error}")
        return None


def _row(partition: int, value: bytes, model: Model | None, notes: list[str]) -> tuple[Any, LearnerSpec] | None:
    """The row, and what its form is: the model's, or else one that fits."""
    spec = model.spec if model else None
    if spec is None or rules.user_layout(spec).fingerprint != fingerprint_of(value):
        if spec is not None:
            notes.append(f"partition {partition}: the row is of another model than the one of model.path")
        spec = _recognised(value)
    if spec is None:
        notes.append(f"partition {partition}: there is a row, of a form that this release does not know")
        return None
    return rules.user_layout(spec).from_bytes(value)[0], spec


def _recognised(value: bytes) -> LearnerSpec | None:
    """The sizes of a row whose model is not at hand: its layout's fingerprint tells them."""
    least, most = row_bytes_of(value)
    for ring in _RINGS:
        for dimension in _DIMENSIONS:
            for settings in _FORMS:
                spec = LearnerSpec(dimension=dimension, ring=ring, **settings)
                near = least - _SLACK_BYTES <= _least_bytes(spec) <= most
                if near and rules.user_layout(spec).fingerprint == fingerprint_of(value):
                    return spec
    return None


#: Settings that rows' forms differ in, beside their sizes.
_FORMS: tuple[dict[str, Any], ...] = tuple(
    {**form, **implicit, **calibrator}
    for form in ({"covariance": "diagonal"}, {"covariance": "full"}, {"rule": "gradient"})
    for implicit in ({}, {"implicit": 0})
    for calibrator in ({}, {"calibrator": "linear"})
)
#: Fields of every row and gaps between fields, at most.
_SLACK_BYTES = 48


def _least_bytes(spec: LearnerSpec) -> int:
    width = spec.dimension + 1
    variances = 0 if spec.rule == "gradient" else width if spec.covariance == "diagonal" else width * (width + 1) // 2
    return 4 * width + 4 * variances + 4 * spec.implicit + 21 * spec.ring


def _shown(partition: int, row: Any, spec: LearnerSpec, found: _Found, items: _Found, model: Model | None) -> ShownRow:
    control = ControlRow.from_bytes(found.values[CONTROL_KEY]) if CONTROL_KEY in found.values else None
    same = model is not None and rules.user_layout(model.spec).fingerprint == rules.user_layout(spec).fingerprint
    model = model if same else None
    count, deviation = int(row["count"]), row["d"].astype(np.float64)
    variance = diagonal(row["P"], len(deviation)) if "P" in row.dtype.names else None
    names = {_hash_of(key): key[2:].decode(errors="backslashreplace") for key in items.values}
    events = [_event(row, at, names, model) for at in ring_order(count, spec.ring)[::-1]]
    prior = _prior(model, row) if model else None
    attributes = model is not None and len(model.weights.user_vector) > 0
    rows = _item_rows(items, spec)
    last = dict.fromkeys(event.item_hash for event in events)
    return ShownRow(
        partition,
        control.next_offset if control else None,
        count,
        _time(int(row["last_ms"])) if count else None,
        _rounded(deviation),
        _rounded(np.sqrt(np.maximum(variance, 0.0))) if variance is not None else None,
        _rounded(prior) if prior is not None else None,
        _rounded(prior + deviation) if prior is not None and not attributes else None,
        round(float(row["missed"]), 6) if "missed" in row.dtype.names else None,
        events,
        [compose(model, prior, deviation, int(h, 16), rows, names) for h in list(last)[:_EXPLAINED]]
        if model and prior is not None
        else [],
    )


def _event(row: Any, at: int, names: Mapping[int, str], model: Model | None) -> RingEvent:
    item, level = int(row["ring_item"][at]), int(row["ring_level"][at])
    levels = model.spec.feedback.levels if model else ()
    return RingEvent(
        f"{item:016x}",
        names.get(item),
        _known(model, item) is not None if model else None,
        _time(int(row["ring_time_s"][at]) * 1000),
        level,
        str(levels[level]) if 0 <= level < len(levels) else None,
        round(float(row["ring_logit"][at]), 6),
    )


def ring_order(count: int, ring: int) -> list[int]:
    """Places of a ring that hold events, the oldest first; the k-th event lies at k mod N."""
    return [k % ring for k in range(max(count - ring, 0), count)]


def diagonal(packed: npt.NDArray[Any], width: int) -> Floats:
    """Variances `[…, D+1]` of P `[…, D+1]` or of its packed lower triangle."""
    at = np.arange(width)
    return packed[..., at if packed.shape[-1] == width else at * (at + 3) // 2].astype(np.float64)


def _item_rows(items: _Found, spec: LearnerSpec) -> dict[int, tuple[float, Floats]]:
    """By hash: Δc and δ of an item of the shard."""
    layout = rules.item_layout(spec)
    values = [value for key, value in items.values.items() if key.startswith(PREFIX[Kind.ITEM])]
    rows, intact = layout.from_values(values)
    rows = rows[intact]
    c, _, delta, _ = applied(rows)
    return {int(h): (float(c[i]), delta[i]) for i, h in enumerate(rows["hash"])}


def _prior(model: Model, row: Any) -> Floats:
    """m₀ + B ψ `[D+1]`: the prior mean, as the items that the user has learned of move it."""
    weights, count = model.weights, int(row["count"])
    state = row["implicit"].astype(np.float64) / np.sqrt((1.0 + count) * (1.0 + count / HORIZON))  # [H] ψ
    moved: Floats = weights.prior_mean.astype(np.float64) + state @ weights.implicit_map
    return moved


def compose(
    model: Model,
    prior: Floats,
    deviation: Floats,
    item: int,
    rows: Mapping[int, tuple[float, Floats]],
    names: Mapping[int, str],
) -> Composition:
    """How z of an item comes about, from what row and model say without features: z = b + c + ⟨w₀ + d, [x + δ; 1]⟩."""
    weights = model.weights
    size = len(deviation) - 1
    at = _known(model, item)
    vector = weights.item_vector[at].astype(np.float64) if at is not None else np.zeros(size + 1)
    learned, delta = rows.get(item, (0.0, np.zeros(size)))
    x = vector[:size] + delta
    of_prior, of_deviation = prior[:size] * x, deviation[:size] * x
    adds = of_prior + of_deviation
    parts = {
        "bias": float(weights.bias[0]),
        "item_bias": float(vector[size]),
        "item_bias_learned": learned,
        "user_bias": float(prior[size] + deviation[size]),
        "prior_taste": float(of_prior.sum()),
        "learned_taste": float(of_deviation.sum()),
    }
    top = np.argsort(-np.abs(adds), kind="stable")[:_TOP].tolist()
    return Composition(
        item_hash=f"{item:016x}",
        item_id=names.get(item),
        z=round(sum(parts.values()), 6),
        top=[Part(j, *_rounded(np.array([x[j], prior[j], deviation[j], adds[j]]))) for j in top],
        **{name: round(part, 6) for name, part in parts.items()},
    )


def _known(model: Model | None, item: int) -> int | None:
    """Row of an item in θ, or None."""
    if model is None or not len(model.weights.item_hash):
        return None
    known = model.weights.item_hash
    at = int(np.searchsorted(known, np.uint64(item)))
    return at if at < len(known) and int(known[at]) == item else None


def _rounded(numbers: Floats) -> list[float]:
    return [round(float(number), 6) for number in numbers]


def _time(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):  # an event may claim any time
        return f"{ms} ms"


def tables(shown: Shown) -> RenderableType:
    """For people."""
    parts: list[RenderableType] = [Text(f"note: {note}") for note in shown.notes]
    if not shown.rows:
        parts.append(Text(f"no row of this user in {shown.partitions} partitions of the changelog"))
    for row in shown.rows:
        parts += _row_tables(row)
    if any(row.contributions for row in shown.rows):
        left_out = ", ".join(shown.features_left_out) or "none is declared"
        parts.append(Text(f"contributions are as of now, and without features ({left_out})"))
    return Group(*parts)


def _row_tables(row: ShownRow) -> list[RenderableType]:
    head = f"partition {row.partition}: {row.count} events learned, the last at {row.last_event}"
    if row.as_of_offset is not None:
        head += f"; as of offset {row.as_of_offset}"
    if row.missed is not None:
        head += f"; targets less scores add up to {row.missed:+.3f}"
    weights = RichTable(title="fast weights: deviation from the prior", title_justify="left")
    for name in ("coordinate", "deviation", "± sd", "prior", "weight"):
        weights.add_column(name, justify="right")
    for j, d in enumerate(row.deviation):
        sd = f"{row.deviation_sd[j]:.4f}" if row.deviation_sd else ""
        prior = f"{row.prior_mean[j]:.4f}" if row.prior_mean else ""
        weight = f"{row.weights[j]:.4f}" if row.weights else ""
        weights.add_row("bias" if j == len(row.deviation) - 1 else str(j), f"{d:.4f}", sd, prior, weight)
    ring = RichTable(title="last events, the newest first", title_justify="left")
    for name in ("time", "item", "level", "logit"):
        ring.add_column(name)
    for event in row.events:
        item = event.item_id if event.item_id is not None else f"#{event.item_hash}"
        item += " (not in the model)" if event.known is False else ""
        ring.add_row(event.time, Text(_printable(item)), event.level_name or str(event.level), f"{event.logit:.4f}")
    shown: list[RenderableType] = [Text(head), weights, ring]
    if row.contributions:
        shown.append(_contributions(row.contributions))
    return shown


def _contributions(compositions: Collection[Composition]) -> RichTable:
    table = RichTable(title="what a score of these items is made of", title_justify="left")
    for name in ("item", "z", "bias", "item", "item learned", "user bias", "prior", "learned", "largest coordinates"):
        table.add_column(name, justify="left" if name == "largest coordinates" else "right")
    for one in compositions:
        item = one.item_id if one.item_id is not None else f"#{one.item_hash}"
        numbers = [one.z, one.bias, one.item_bias, one.item_bias_learned]
        numbers += [one.user_bias, one.prior_taste, one.learned_taste]
        top = " ".join(f"{part.coordinate}:{part.adds:+.3f}" for part in one.top)
        table.add_row(Text(_printable(item)), *(f"{number:+.3f}" for number in numbers), top)
    return table


def _printable(text: str) -> str:
    """Ids come from outside: nothing in them moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
