"""The oracle sees what it must see: a loss, a double, a stranger, a wrong output, a row with one bit turned."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import msgspec
import pytest

from stream_adapt import service
from stream_adapt.chaos import load
from stream_adapt.chaos.load import ID_HEADER, REASON_HEADER, records
from stream_adapt.chaos.oracle import (
    CONTROL_KEY,
    CalmRun,
    Control,
    Input,
    Output,
    Stretch,
    calm_run,
    compare_controls,
    compare_load,
    compare_outputs,
    compare_rows,
    compare_versions,
    control_rows,
    repeated_ids,
    stretches,
)
from stream_adapt.config import Config
from stream_adapt.models import LearnerSpec, Model, read_model
from stream_adapt.record import TopicNames
from stream_adapt.state.row import Kind
from stream_adapt.testing.model import random_model

SEED, PARTITIONS = 3, 2


def _inputs(count: int = 600) -> list[Input]:
    found, ends = [], [0] * PARTITIONS
    for number, record in enumerate(islice(records(SEED, "e"), count)):
        headers, partition = dict(record.headers), number % PARTITIONS
        reason = headers[REASON_HEADER].decode() if REASON_HEADER in headers else None
        found.append(Input((partition, ends[partition]), headers[ID_HEADER].decode(), reason, record.key, record.value))
        ends[partition] += 1 + (number % 50 == 0)  # as behind a transaction's marker
    return found


def _output(one: Input) -> Output:
    if one.reason is None:
        return Output(one.place, f"scores[0]@{one.place[1]}", one.record_id, None, one.key, None)
    return Output(one.place, f"dead-letters[0]@{one.place[1]}", None, one.reason, one.key, one.value)


INPUTS = _inputs()
OUTPUTS = [_output(one) for one in INPUTS]
SCORED = next(one for one in INPUTS if one.reason is None)
REFUSED = next(one for one in INPUTS if one.reason is not None)


def test_one_output_for_each_input_is_fine() -> None:
    said = compare_outputs(INPUTS, OUTPUTS[::-1])
    assert said.ok, said.first
    assert (len(INPUTS), len(INPUTS)) == (said.inputs, said.outputs)
    assert said.scores + said.dead_letters == said.outputs
    assert said.dead_letters > 0


@pytest.mark.parametrize("one", [SCORED, REFUSED], ids=["score", "dead letter"])
def test_a_loss_is_seen_and_named(one: Input) -> None:
    said = compare_outputs(INPUTS, [output for output in OUTPUTS if output.place != one.place])
    assert (1, 0, 0, 0) == (said.lost, said.doubled, said.unexpected, said.invalid)
    assert [f"lost: {one.record_id}, input [{one.place[0]}]@{one.place[1]}"] == said.first


@pytest.mark.parametrize("one", [SCORED, REFUSED], ids=["score", "dead letter"])
def test_a_double_is_seen_and_both_are_named(one: Input) -> None:
    again = _output(one)._replace(where="scores[9]@9")
    said = compare_outputs(INPUTS, [*OUTPUTS, again])
    assert (0, 1, 0, 0) == (said.lost, said.doubled, said.unexpected, said.invalid)
    assert _output(one).where in said.first[0]
    assert again.where in said.first[0]


def test_an_output_of_an_aborted_input_is_unexpected() -> None:
    said = compare_outputs([one for one in INPUTS if one != SCORED], OUTPUTS)
    assert (0, 0, 1, 0) == (said.lost, said.doubled, said.unexpected, said.invalid)


@pytest.mark.parametrize(
    "wrong",
    [
        _output(SCORED)._replace(event_id="another"),
        _output(SCORED)._replace(key=b"another"),
        _output(SCORED)._replace(event_id=None, reason="not_json"),
        _output(REFUSED)._replace(reason="another"),
        _output(REFUSED)._replace(value=b"other bytes"),
        _output(REFUSED)._replace(event_id="e", reason=None),
    ],
)
def test_a_wrong_output_is_invalid(wrong: Output) -> None:
    said = compare_outputs(INPUTS, [wrong if output.place == wrong.place else output for output in OUTPUTS])
    assert (0, 0, 0, 1) == (said.lost, said.doubled, said.unexpected, said.invalid)
    assert wrong.where in said.first[0]


def test_what_cannot_be_read_and_inputs_that_repeat_an_id_are_invalid() -> None:
    assert 1 == compare_outputs(INPUTS, OUTPUTS, ["scores[0]@1: not a score"]).invalid
    twin = INPUTS[0]._replace(place=(0, 10_000))
    assert 1 == compare_outputs([*INPUTS, twin], [*OUTPUTS, _output(twin)]).invalid


def test_inputs_that_a_producer_sent_again_must_have_an_output_each() -> None:
    twin = INPUTS[0]._replace(place=(0, 10_000))
    assert {twin.record_id: [INPUTS[0].place, twin.place]} == repeated_ids([*INPUTS, twin])
    assert {} == repeated_ids(INPUTS)
    assert compare_outputs([*INPUTS, twin], [*OUTPUTS, _output(twin)], sent_again={twin.record_id}).ok
    assert 1 == compare_outputs([*INPUTS, twin], OUTPUTS, sent_again={twin.record_id}).lost
    assert 1 == compare_outputs([*INPUTS, twin], [*OUTPUTS, _output(twin)], sent_again={"another"}).invalid


def test_the_input_topic_must_hold_what_was_acknowledged_and_nothing_else() -> None:
    ids = {one.record_id for one in INPUTS}
    assert [] == compare_load(INPUTS, ids - {"e1"}, {"e1", "e-aborted"})
    assert ["input gone was acknowledged and is not in the topic"] == compare_load(INPUTS, ids | {"gone"}, set())
    assert ["input e1 is in the topic and was never acknowledged"] == compare_load(INPUTS, ids - {"e1"}, set())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    features, feedback = load.declared(SEED)
    items, columns = load.examples(SEED)
    folder: Path = tmp_path_factory.mktemp("models")
    return read_model(random_model(folder, LearnerSpec(features, feedback), items, columns))


def _calm(model: Model, inputs: list[Input] = INPUTS) -> CalmRun:
    return calm_run(service.build_pipeline(Config(), model, TopicNames.of("app")), inputs)


def test_the_calm_run_does_not_depend_on_the_order_between_partitions(model: Model) -> None:
    calm = _calm(model)
    assert calm.rows == _calm(model, INPUTS[::-1]).rows
    assert {p for p, _ in calm.rows} == set(range(PARTITIONS))
    assert {one.place for one in INPUTS if one.reason is None} == set(calm.scores)


def test_equal_rows_are_equal(model: Model) -> None:
    calm = _calm(model)
    rows = compare_rows(calm.rows, {**calm.rows, (0, CONTROL_KEY): b"not compared here"}, calm.layouts)
    assert (len(calm.rows), 0, 0.0, []) == (rows.compared, rows.different, rows.max_error, rows.first)


def test_one_bit_of_one_row_is_seen_and_its_field_named(model: Model) -> None:
    calm = _calm(model)
    key = next(key for key in calm.rows if key[1].startswith("u:"))
    layout = calm.layouts[Kind.USER]
    row = layout.from_bytes(calm.rows[key])
    row["d"].view("u4")[0, 0] ^= 1 << 20
    rows = compare_rows(calm.rows, {**calm.rows, key: layout.to_bytes(row[0])}, calm.layouts)
    assert 1 == rows.different
    assert 0 < rows.max_error < 1
    assert rows.first[0].startswith(f"row {key[1]} of partition {key[0]}: d=")
    damaged = calm.rows[key][:-1] + bytes([calm.rows[key][-1] ^ 1])
    assert 1 == compare_rows(calm.rows, {**calm.rows, key: damaged}, calm.layouts).different


def test_rows_that_only_one_side_has_are_different(model: Model) -> None:
    calm = _calm(model)
    key = next(iter(calm.rows))
    fewer = {k: v for k, v in calm.rows.items() if k != key}
    assert [f"row {key[1]} of partition {key[0]}: not in the changelog"] == compare_rows(
        calm.rows, fewer, calm.layouts
    ).first
    assert [f"row {key[1]} of partition {key[0]}: not in the calm run"] == compare_rows(
        fewer, calm.rows, calm.layouts
    ).first


def test_a_control_row_must_stand_where_the_group_stands() -> None:
    rows = {0: [Control(3), Control(7)], 1: [Control(8)]}
    assert [] == compare_controls(rows, {0: 7, 1: 8})
    assert ["control row of partition 1: next offset 8, the group committed 9"] == compare_controls(rows, {0: 7, 1: 9})
    assert ["control row of partition 2: next offset None, the group committed 1"] == compare_controls(
        rows, {0: 7, 1: 8, 2: 1}
    )


def test_a_calm_run_goes_over_to_another_model_where_the_scores_say_so(
    model: Model, tmp_path_factory: pytest.TempPathFactory
) -> None:
    features, feedback = load.declared(SEED)
    items, columns = load.examples(SEED)
    folder = tmp_path_factory.mktemp("others")
    other = read_model(random_model(folder, LearnerSpec(features, feedback), items, columns, seed=1))
    at = sorted(one.place for one in INPUTS if one.reason is None and one.place[0] == 0)[100][1]
    parts = [Stretch(model.version, 0, at - 1), Stretch(other.version, at, 10_000)]

    def run(versions: dict[int, list[Stretch]]) -> CalmRun:
        pipeline = service.build_pipeline(Config(), model, TopicNames.of("app"))
        return calm_run(pipeline, INPUTS, versions, {model.version: model, other.version: other})

    swapped, stayed = run({0: parts}), run({})
    said = {place: msgspec.json.decode(value)["model_version"] for place, value in swapped.scores.items()}
    assert {place: other.version if place >= (0, at) and place[0] == 0 else model.version for place in said} == said
    assert {key: row for key, row in stayed.rows.items() if key[0] == 1} == {
        key: row for key, row in swapped.rows.items() if key[0] == 1
    }
    assert stayed.rows != swapped.rows
    alone = calm_run(
        service.build_pipeline(Config(), model, TopicNames.of("app")), [i for i in INPUTS if i.place < (0, at)]
    )
    assert {place: _said(value) for place, value in alone.scores.items()} == {
        place: _said(value) for place, value in swapped.scores.items() if place in alone.scores
    }


def _said(score: bytes) -> dict[str, object]:
    """All of it but when."""
    return {**msgspec.json.decode(score), "scored_at": 0}


class _Record:
    """A row of the changelog as it is read back."""

    def __init__(self, key: bytes, value: bytes | None) -> None:
        self._key, self._value = key, value

    def partition(self) -> int:
        return 1

    def key(self) -> bytes:
        return self._key

    def value(self) -> bytes | None:
        return self._value


class _Message:
    """A score as it is read back."""

    def __init__(self, partition: int, offset: int, version: str) -> None:
        self._score = {
            "event_id": "e", "user_id": "u", "item_id": "i", "score": 0.5, "frozen_score": 0.5, "updated_score": 0.5,
            "level": None, "target": None, "uncertainty": 0.1, "model_version": version, "adaptations": 1, "flags": [],
            "event_timestamp": 1, "scored_at": 1, "source_topic": "t", "source_partition": partition,
            "source_offset": offset,
        }  # fmt: skip

    def value(self) -> bytes:
        return msgspec.json.encode(self._score)


def test_scores_tell_where_each_partition_went_over() -> None:
    found = [_Message(0, 3, "b"), _Message(0, 1, "a"), _Message(0, 0, "a"), _Message(1, 7, "b"), _Message(0, 9, "a")]
    assert {
        0: [Stretch("a", 0, 1), Stretch("b", 3, 3), Stretch("a", 9, 9)],
        1: [Stretch("b", 7, 7)],
    } == stretches(found)  # type: ignore[arg-type]


def _parts(*versions: str) -> dict[int, list[Stretch]]:
    return {4: [Stretch(version, n, n) for n, version in enumerate(versions)]}


@pytest.mark.parametrize("versions", ["a", "ab", "aba", "ac", "abac", "c", "bac"])
def test_partitions_that_follow_the_announcements_and_leave_some_out_are_fine(versions: str) -> None:
    assert [] == compare_versions(_parts(*versions), list("abac"))


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ("abab", "b from offset 3 on, after a"),
        ("ca", "a from offset 1 on, after c"),
        ("x", "x from offset 0 on, after nothing"),
    ],
)
def test_a_partition_that_goes_back_and_a_version_that_nobody_announced_are_named(versions: str, told: str) -> None:
    assert [f"partition 4: {told}"] == compare_versions(_parts(*versions), list("abac"))


@pytest.mark.parametrize(
    ("version", "since", "fine"),
    [
        ("b", 11, True), ("b", 12, True), ("b", 15, True), ("b", 10, False), ("b", 16, False),
        ("c", 31, True), ("c", 40, True), ("c", 30, False), ("c", 41, False),
    ],
)  # fmt: skip
def test_a_control_row_names_the_model_and_where_it_took_over(version: str, since: int, fine: bool) -> None:
    rows = {0: [Control(40, version, since)]}
    wrong = compare_controls(rows, {0: 40}, {0: [Stretch("a", 0, 10), Stretch("b", 15, 30)]})
    assert fine is (wrong == []), wrong


@pytest.mark.parametrize(
    ("between", "fine"),
    [
        ([Control(36, "a", 36)], True),  # went back, scored nothing, and came again
        ([Control(36, "b", 12)], False),  # never went
        ([Control(35, "a", 35)], False),  # not there
        ([], False),
    ],
)
def test_a_shard_that_went_over_and_back_without_a_score_says_so_in_its_history(
    between: list[Control], fine: bool
) -> None:
    rows = {0: [Control(11, "a", 0), Control(34, "b", 12), *between, Control(40, "b", 36)]}
    wrong = compare_controls(rows, {0: 40}, {0: [Stretch("a", 0, 10), Stretch("b", 15, 30)]})
    assert fine is (wrong == []), wrong


def test_control_rows_are_read_in_their_order_and_nothing_else() -> None:
    def content(next_offset: int) -> bytes:
        told = {"partition": 1, "next_offset": next_offset, "model_version": "a", "model_since": 3}
        return bytes(8) + msgspec.msgpack.encode(told) + bytes(4)

    changelog = [_Record(b"u:ann", b"a row"), *(_Record(b"c:", content(n)) for n in (5, 9)), _Record(b"i:c", None)]
    assert {1: [Control(5, "a", 3), Control(9, "a", 3)]} == control_rows(changelog)  # type: ignore[arg-type]
