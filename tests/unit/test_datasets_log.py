"""Logs by a mapping file: every field and feature type, and messages that name file, line, column and value."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_adapt.datasets import Source, open_source
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.record import UserEvent

COLUMNS = {"user_id": "user", "item_id": "item", "timestamp": "time"}
STARS = {"levels": ["1", "2", "3"], "target": "3", "label": {"range": [1, 3], "cuts": [2, 3]}}
FEATURES = {
    "genres": {"type": "bag"},
    "kind": {"type": "categorical"},
    "price": {"type": "numeric", "hats": 4},
    "image": {"type": "vector", "length": 2},
}


def opened(folder: Path, log: str | bytes, name: str = "log.csv", **mapping: Any) -> Source:
    path, described = folder / name, folder / "mapping.yaml"
    content = log.encode() if isinstance(log, str) else log
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    described.write_text(yaml.safe_dump({"columns": COLUMNS, **mapping}))
    return open_source(str(path), mapping=described)


def read(folder: Path, log: str | bytes, name: str = "log.csv", **mapping: Any) -> list[UserEvent]:
    return list(opened(folder, log, name, **mapping).events())


def test_the_least_mapping_is_user_item_and_time(tmp_path: Path) -> None:
    (event,) = read(tmp_path, "time,user,item\n12,ann,7\n")
    assert (
        event.event_id,
        event.user_id,
        event.item_id,
        event.event_type,
        event.timestamp,
    ) == ("log-2", "ann", "7", "event", 12)
    assert (event.label, event.features, event.domain) == (None, {}, None)


EXPECTED = UserEvent(
    "e1",
    "ann",  # type: ignore[arg-type]
    "7",  # type: ignore[arg-type]
    "rating",
    1_700_000_000_000,
    3.0,
    {"genres": ["a", "b"], "kind": "x", "price": 1.5, "image": [0.5, -1.0]},
    "books",
)
FULL = {
    "columns": {**COLUMNS, "event_id": "id", "event_type": "type", "label": "stars", "domain": "shop"},
    "features": FEATURES,
    "feature_columns": {"kind": "k"},
    "feedback": STARS,
}


def test_csv_with_every_field_and_feature_type(tmp_path: Path) -> None:
    log = (
        "id;user;item;type;time;stars;shop;genres;k;price;image\n"
        "e1;ann;7;rating;1700000000000;3;books;a|b;x;1.5;0.5|-1\n"
        "e2;ann;8;rating;1700000000000;;;;;;\n"
    )
    first, second = read(tmp_path, log, delimiter=";", **FULL)
    assert first == EXPECTED
    assert (second.label, second.features, second.domain) == (None, {}, None)


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_json_lines_with_every_field_and_feature_type(tmp_path: Path, name: str) -> None:
    row = {
        "id": "e1",
        "user": "ann",
        "item": 7,
        "type": "rating",
        "time": 1_700_000_000_000,
        "stars": 3,
        "shop": "books",
        "genres": ["a", "b"],
        "k": "x",
        "price": 1.5,
        "image": [0.5, -1],
        "more": {"is": "skipped"},
    }
    assert read(tmp_path, json.dumps(row) + "\n\n", name, **FULL) == [EXPECTED]


def test_gzipped_csv_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert len(read(tmp_path, "\ufeffuser,item,time\na,b,1\n", "log.csv.gz")) == 1


def test_a_source_can_be_read_again(tmp_path: Path) -> None:
    source = opened(tmp_path, "user,item,time\na,b,1\na,b,2\n")
    assert list(source.events()) == list(source.events())
    assert source.count is None


@pytest.mark.parametrize(
    ("unit", "written"),
    [
        ("ms", "1700000000500"),
        ("s", "1700000000.5"),
        ("iso", "2023-11-14T22:13:20.500Z"),
        ("iso", "2023-11-14 22:13:20.500"),
        ("iso", "2023-11-14T23:13:20.500+01:00"),
    ],
)
def test_timestamp_units(tmp_path: Path, unit: str, written: str) -> None:
    (event,) = read(tmp_path, f"user,item,time\na,b,{written}\n", timestamp_unit=unit)
    assert event.timestamp == 1_700_000_000_500


def test_a_log_out_of_order_is_refused_at_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.csv:4: column 'time': '1' is earlier .*sort: true"):
        read(tmp_path, "user,item,time\na,b,1\na,b,2\na,b,1\n")


def test_a_log_out_of_order_is_sorted_on_request_and_ties_keep_their_order(tmp_path: Path) -> None:
    events = read(tmp_path, "user,item,time\na,b,2\na,c,1\na,d,2\na,e,1\n", sort=True)
    assert [event.item_id for event in events] == ["c", "e", "b", "d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (",7,1,,,", r"log\.csv:2: column 'user': '': must not be empty"),
        ("a,7,soon,,,", r"log\.csv:2: column 'time': 'soon': expected a finite number"),
        ("a,7,-1,,,", r"log\.csv:2: column 'time': '-1': expected milliseconds .* timestamp_unit"),
        ("a,7,,,,", r"log\.csv:2: column 'time': '': expected milliseconds"),
        ("a,7,1,9,,", r"log\.csv:2: column 'stars': '9': expected a label within \[1\.0, 3\.0\]"),
        ("a,7,1,nan,,", r"log\.csv:2: column 'stars': 'nan': expected a finite number"),
        ("a,7,1,,cheap,", r"log\.csv:2: column 'price': 'cheap': expected a finite number"),
        ("a,7,1,,1e10,", r"log\.csv:2: column 'price': '1e10': expected a number within"),
        ("a,7,1,,,1|2|3", r"log\.csv:2: column 'image': '1\|2\|3': expected 2 numbers"),
        ("a,7,1,,,1|", r"log\.csv:2: column 'image': '1\|': expected 2 numbers"),
        ("a,7", r"log\.csv:2: 2 cells, the header has 6"),
    ],
)
def test_a_bad_csv_line_is_named_with_column_and_value(tmp_path: Path, line: str, message: str) -> None:
    columns = {**COLUMNS, "label": "stars"}
    features = {name: FEATURES[name] for name in ("price", "image")}
    with pytest.raises(DataError, match=message):
        read(
            tmp_path, f"user,item,time,stars,price,image\n{line}\n", columns=columns, features=features, feedback=STARS
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"log\.jsonl:2: not one JSON object"),
        ("[1]", r"log\.jsonl:2: not one JSON object"),
        ('{"user": "a", "time": 1}', r"log\.jsonl:2: column 'item': None: must not be empty"),
        ('{"user": true, "item": "b", "time": 1}', r"column 'user': True: expected a string or a whole number"),
        ('{"user": "a", "item": "b", "time": true}', r"column 'time': True: expected a finite number"),
        ('{"user": "a", "item": "b", "time": [1]}', r"column 'time': \[1\]: expected a finite number"),
        ('{"user": "a", "item": "b", "time": 1, "genres": ["a", 1]}', r"column 'genres': .* strings in a list"),
        ('{"user": "a", "item": "b", "time": 1, "image": {"a": 1}}', r"column 'image': .* expected 2 numbers"),
        ('{"user": "a", "item": "b", "time": 1, "kind": ["x"]}', r"column 'kind': \['x'\]: expected a string"),
    ],
)
def test_a_bad_json_line_is_named_with_field_and_value(tmp_path: Path, line: str, message: str) -> None:
    good = '{"user": "a", "item": "b", "time": 1}'
    with pytest.raises(DataError, match=message):
        read(tmp_path, f"{good}\n{line}\n", "log.jsonl", features=FEATURES)


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, f"user,item,time\na,b,{'x' * 10_000}\n")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "log"),
    [
        ("log.csv", b"user,item,time\na,\xff,1\n"),
        ("log.csv.gz", None),
        ("log.csv", b'user,item,time\n"' + b"x" * 200_000 + b'",b,1\n'),
    ],
)
def test_a_file_that_is_damaged_is_said_to_be(tmp_path: Path, name: str, log: bytes | None) -> None:
    good = opened(tmp_path, "user,item,time\n" + "a,b,1\n" * 10_000, name)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20] if log is None else log)
    with pytest.raises(DataError, match=r"cannot be read after line \d+"):
        list(good.events())


def test_a_missing_column_is_refused_at_opening_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'time'; its columns are \['user', 'item', 'when'\]"):
        opened(tmp_path, "user,item,when\n")
    with pytest.raises(DataError, match="no column 'price'"):
        opened(tmp_path, "user,item,time\n", features={"price": {"type": "numeric"}})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"colums": {}}, r"mapping\.yaml: .*unknown field `colums`"),
        ({"columns": {"user_id": "user"}}, "missing required field `item_id`"),
        ({"timestamp_unit": "minutes"}, "Invalid enum value 'minutes'"),
        ({"delimiter": ";;"}, "length <= 1"),
        ({"features": {"price": {"type": "money"}}}, r"mapping\.yaml: features\.price"),
        ({"feature_columns": {"price": "p"}}, r"feature_columns\.price: no such feature"),
        ({"feedback": {"levels": ["a", "b"], "target": "c"}}, r"mapping\.yaml: feedback: target='c'"),
        ({"feedback": {"levels": [False, True]}}, "Expected `str`, got `bool`"),
    ],
)
def test_a_wrong_mapping_is_refused(tmp_path: Path, mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, "user,item,time\n", **mapping)


@pytest.mark.parametrize("text", ["", "- a list", "columns: [", "\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    log, mapping = tmp_path / "log.csv", tmp_path / "m.yaml"
    log.write_text("user,item,time\n")
    mapping.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"m\.yaml"):
        open_source(str(log), mapping=mapping)


def test_a_mapping_that_is_not_there_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item,time\n")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        open_source(str(log), mapping=tmp_path / "none.yaml")


def test_the_format_must_be_known_or_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format: csv"):
        opened(tmp_path, "user,item,time\na,b,1\n", "log.txt")
    assert len(read(tmp_path, "user,item,time\na,b,1\n", "log.txt", format="csv")) == 1
