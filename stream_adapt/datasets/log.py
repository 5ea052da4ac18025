"""Any log of events: CSV (with a header) or JSON lines, plain or gzipped, described by a mapping file.

The mapping file is YAML:

    columns:                      # where each field of event v1 is
      user_id: customer
      item_id: article
      timestamp: time
      event_id: id                # optional; else the file's name and the line
      event_type: action          # optional; else the event_type below
      label: stars                # optional; an empty cell is no label
      domain: shop                # optional
    event_type: rating
    timestamp_unit: iso           # ms (default) or s since the epoch, or iso (without a zone: UTC)
    features:                     # as in the configuration file; columns of the same names, unless ...
      genres: {type: bag, of: item}
    feature_columns:              # ... named here
      genres: genre_list
    feedback:                     # as in the configuration file; quote words that YAML takes for booleans ("yes")
      levels: ["1", "2", "3", "4", "5"]
      target: "4"
      label: {range: [1, 5], cuts: [2, 3, 4, 5]}
    list_separator: "|"           # between the values of a bag or of a vector in one cell
    delimiter: ","                # between the cells of CSV
    format: csv                   # csv or jsonl; by default as the file is named
    sort: false                   # true: read the whole log into memory and sort it by time
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from stream_adapt.datasets.source import Source
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.learner.encoder import (
    BAG_LIMIT,
    NUMBER_LIMIT,
    Bag,
    Categorical,
    Feature,
    Numeric,
    Vector,
    parse_features,
)
from stream_adapt.learner.feedback import Feedback
from stream_adapt.record import FeatureValue, ItemId, UserEvent, UserId

#: (line number from 1, cells or fields by name)
Line = tuple[int, dict[str, Any]]

_Character = Annotated[str, msgspec.Meta(min_length=1, max_length=1)]
#: Longest value quoted in a message.
_QUOTED = 80


class Columns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which column (CSV) or field (JSON) holds which field of event v1."""

    user_id: str
    item_id: str
    timestamp: str
    event_id: str | None = None
    event_type: str | None = None
    label: str | None = None
    domain: str | None = None


class Mapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping file."""

    columns: Columns
    features: dict[str, Any] = {}
    feature_columns: dict[str, str] = {}
    feedback: Feedback = Feedback()
    event_type: str = "event"
    timestamp_unit: Literal["ms", "s", "iso"] = "ms"
    list_separator: Annotated[str, msgspec.Meta(min_length=1)] = "|"
    delimiter: _Character = ","
    format: Literal["csv", "jsonl"] | None = None
    sort: bool = False


def open_log(path: Path, mapping: Path) -> Source:
    """Opens a log. Lines are read, and checked, when its events are.

    Raises:
        ConfigError: the mapping file cannot be read, or is wrong; names the key.
        DataError: the log has no mapped column; from `events`: names the line, column and value, and says what to do.
    """
    described = read_mapping(mapping)
    features = _declared(described, mapping)
    reader = _Reader(path, described, features)
    reader.check_columns()
    return Source(name=path.name, features=features, feedback=described.feedback, events=reader.events, count=None)


def read_mapping(path: Path) -> Mapping:
    """Reads a mapping file.

    Raises:
        ConfigError: it is not YAML, or a key is missing, unknown or of the wrong type.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return msgspec.convert(raw, Mapping)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _declared(mapping: Mapping, path: Path) -> dict[str, Feature]:
    try:
        features = parse_features(mapping.features)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for name in mapping.feature_columns:
        if name not in features:
            raise ConfigError(f"{path}: feature_columns.{name}: no such feature; declare it under features")
    return features


class _BadValue(Exception):
    """A value that cannot be used, and what would be right."""


class _Reader:
    """Reads one log into events, as its mapping says."""

    def __init__(self, path: Path, mapping: Mapping, features: dict[str, Feature]) -> None:
        self._path = path
        self._mapping = mapping
        self._columns = mapping.columns
        self._stem = path.name.split(".")[0]
        self._features = [
            (name, mapping.feature_columns.get(name, name), _converter(feature, mapping.list_separator))
            for name, feature in features.items()
        ]

    def events(self) -> Iterator[UserEvent]:
        """A pass over the log, in the order of time.

        Raises:
            DataError: a line is wrong, or earlier than the one before it.
        """
        if not self._mapping.sort:
            return self._checked_order()
        events = [self._event(number, row) for number, row in self._lines()]
        return iter(sorted(events, key=lambda event: event.timestamp))

    def check_columns(self) -> None:
        """Refuses a CSV file without a column that the mapping names; a JSON line may leave fields out."""
        if self._format() == "csv":
            for _ in self._guarded(self._csv_lines()):
                break

    def _checked_order(self) -> Iterator[UserEvent]:
        latest = 0
        for number, row in self._lines():
            event = self._event(number, row)
            if event.timestamp < latest:
                column = self._columns.timestamp
                raise DataError(
                    f"{self._path}:{number}: column {column!r}: {_quote(row[column])} is earlier than the line before; "
                    "sort the log by time, or say `sort: true` in the mapping file (reads all of it into memory)"
                )
            latest = event.timestamp
            yield event

    def _event(self, number: int, row: dict[str, Any]) -> UserEvent:
        columns, mapping = self._columns, self._mapping
        read = self._read
        return UserEvent(
            event_id=f"{self._stem}-{number}"
            if columns.event_id is None
            else read(number, row, columns.event_id, _required_text),
            user_id=UserId(read(number, row, columns.user_id, _required_text)),
            item_id=ItemId(read(number, row, columns.item_id, _required_text)),
            event_type=mapping.event_type
            if columns.event_type is None
            else read(number, row, columns.event_type, _required_text),
            timestamp=read(number, row, columns.timestamp, _TIMESTAMPS[mapping.timestamp_unit]),
            label=None if columns.label is None else read(number, row, columns.label, self._label),
            features=self._features_of(number, row),
            domain=None if columns.domain is None else read(number, row, columns.domain, _text),
        )

    def _features_of(self, number: int, row: dict[str, Any]) -> dict[str, FeatureValue]:
        features = {}
        for name, column, convert in self._features:
            value = self._read(number, row, column, convert)
            if value is not None:
                features[name] = value
        return features

    def _label(self, value: Any) -> float | None:
        label, cuts = _number(value), self._mapping.feedback.label
        if label is not None and cuts is not None and not cuts.range[0] <= label <= cuts.range[1]:
            raise _BadValue(
                f"expected a label within {list(cuts.range)}; mend the line, or feedback in the mapping file"
            )
        return label

    def _read(self, number: int, row: dict[str, Any], column: str, convert: Callable[[Any], Any]) -> Any:
        value = row.get(column)
        try:
            return convert(value)
        except _BadValue as problem:
            where = f"{self._path}:{number}: column {column!r}"
            raise DataError(f"{where}: {_quote(value)}: {problem}") from problem

    def _lines(self) -> Iterator[Line]:
        return self._guarded(self._csv_lines() if self._format() == "csv" else self._json_lines())

    def _guarded(self, lines: Iterator[Line]) -> Iterator[Line]:
        """Turns what goes wrong below the level of lines into a DataError."""
        number = 0
        try:
            for line in lines:
                number = line[0]
                yield line
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{self._path}: cannot be read after line {number} ({error}); is it whole, and UTF-8?"
            ) from error

    def _format(self) -> str:
        if self._mapping.format is not None:
            return self._mapping.format
        name = self._path.name.removesuffix(".gz")
        if name.endswith((".jsonl", ".ndjson", ".json")):
            return "jsonl"
        if name.endswith((".csv", ".tsv")):
            return "csv"
        raise ConfigError(f"{self._path}: neither .csv nor .jsonl; say `format: csv` or `format: jsonl` in the mapping")

    def _csv_lines(self) -> Iterator[Line]:
        opener = gzip.open if self._path.name.endswith(".gz") else open
        with opener(self._path, "rt", encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=self._mapping.delimiter)
            header = next(rows, [])
            self._check_header(header)
            for cells in rows:
                if len(cells) != len(header):
                    if not cells:  # an empty line
                        continue
                    raise DataError(
                        f"{self._path}:{rows.line_num}: {len(cells)} cells, the header has {len(header)}; "
                        "mend the line, or set delimiter in the mapping file"
                    )
                yield rows.line_num, dict(zip(header, cells, strict=True))

    def _check_header(self, header: list[str]) -> None:
        mapped = [c for c in msgspec.structs.astuple(self._columns) if c is not None]
        for column in [*mapped, *(column for _, column, _ in self._features)]:
            if column not in header:
                raise DataError(
                    f"{self._path}:1: no column {column!r}; its columns are {header}; "
                    "mend the mapping file (columns, feature_columns, delimiter)"
                )

    def _json_lines(self) -> Iterator[Line]:
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        opener = gzip.open if self._path.name.endswith(".gz") else open
        with opener(self._path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    yield number, decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    shown = _quote(line.decode(errors="replace").rstrip())
                    raise DataError(f"{self._path}:{number}: not one JSON object ({error}): {shown}") from error


# ---- values: a CSV cell is a string, a JSON field any type; empty or null is "not given"


def _quote(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _QUOTED else shown[:_QUOTED] + "…"


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # ids are numbers in many logs
    raise _BadValue("expected a string or a whole number")


def _required_text(value: Any) -> str:
    text = _text(value)
    if text is None:
        raise _BadValue("must not be empty; mend or drop the line")
    return text


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _BadValue("expected a finite number, or nothing")
    return number


def _limited(value: Any) -> float | None:
    number = _number(value)
    if number is not None and abs(number) > NUMBER_LIMIT:
        raise _BadValue(f"expected a number within ±{NUMBER_LIMIT:g}, the limit of features")
    return number


def _since_epoch(scale: int) -> Callable[[Any], int]:
    unit = {1: "milliseconds", 1000: "seconds"}[scale]

    def convert(value: Any) -> int:
        number = _number(value)
        if number is None or number < 0:
            raise _BadValue(f"expected {unit} since the epoch, 0 or more; is timestamp_unit in the mapping file right?")
        return round(number * scale)

    return convert


def _iso(value: Any) -> int:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise _BadValue("expected ISO 8601, such as 2026-01-31T12:00:00Z; see timestamp_unit in the mapping") from None
    milliseconds = round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
    if milliseconds < 0:
        raise _BadValue("expected a time after 1970-01-01")
    return milliseconds


_TIMESTAMPS: dict[str, Callable[[Any], int]] = {"ms": _since_epoch(1), "s": _since_epoch(1000), "iso": _iso}


def _converter(feature: Feature, separator: str) -> Callable[[Any], FeatureValue]:
    match feature:
        case Categorical():
            return _text
        case Numeric():
            return _limited
        case Bag():
            return lambda value: _bag(value, separator)
        case Vector(length=length):
            return lambda value: _vector(value, separator, length)


def _bag(value: Any, separator: str) -> list[str] | None:
    if value is None or value == "":
        return None
    parts = value.split(separator) if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) <= BAG_LIMIT and {str}.issuperset(map(type, parts)):
        return parts
    raise _BadValue(f"expected up to {BAG_LIMIT} strings in a list, or separated by {separator!r}")


def _vector(value: Any, separator: str, length: int) -> list[float] | None:
    if value is None or value == "":
        return None
    parts = value.split(separator) if isinstance(value, str) else value
    try:
        numbers = [] if not isinstance(parts, list) or bool in map(type, parts) else [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != length or not all(-NUMBER_LIMIT <= number <= NUMBER_LIMIT for number in numbers):
        raise _BadValue(
            f"expected {length} numbers within ±{NUMBER_LIMIT:g}, separated by {separator!r} if in one cell"
        )
    return numbers
