"""Another model between two batches: rows, scores and control rows depend on where the swap was, on nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import test_runner as loop
from learner_streams import (
    adapt_all,
    assert_said_equal,
    cut,
    part,
    random_model,
    random_stream,
    state_of,
)
from test_runner import Broker, Log, Restorer, Seen, record

from stream_adapt.adapt import Adapter, Slow
from stream_adapt.commit import Outcome
from stream_adapt.follow import Standing
from stream_adapt.learner import encoder
from stream_adapt.learner.rules.gradient import step as gradient
from stream_adapt.learner.rules.kalman import step as kalman
from stream_adapt.models import Model, RowMode
from stream_adapt.record import Adapted
from stream_adapt.runner import Runner
from stream_adapt.state.row import CONTROL_KEY, ControlRow

RULES: list[dict[str, Any]] = [{"covariance": "diagonal"}, {"covariance": "full"}, {"rule": "gradient"}]


def successor(model: Model, version: str = "v2", seed: int = 7) -> Model:
    """Another θ of the same form; f is kept."""
    spec = model.spec
    other = random_model(spec.covariance, rule=spec.rule, features=bool(spec.features), seed=seed, window=spec.window)
    weights = msgspec.structs.replace(other.weights, implicit_item=model.weights.implicit_item)
    return Model(msgspec.structs.replace(other.manifest, version=version), weights)


def go_over(adapter: Adapter, model: Model, rows: RowMode) -> None:
    """As the runner does it."""
    adapter.serve(adapter.ready(model))
    if rows == "restart_items":
        adapter.restart_items([0, 1, 2])
    adapter.commit()


def joined(parts: Iterable[Adapted]) -> Adapted:
    parts = list(parts)
    names = ("score", "frozen_score", "updated_score", "uncertainty", "adaptations", "flags")
    return Adapted(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


@pytest.mark.parametrize("rows", ["carry", "restart_items"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_and_scores_depend_on_the_offsets_of_swaps_and_not_on_the_cuts_of_batches(
    rule: dict[str, Any], rows: RowMode
) -> None:
    model = random_model(**rule, features=True)
    stream, swaps = random_stream(700, features=True), (0, 260, 523, 700)
    ends = []
    for size in (1000, 64, 7):
        adapter, said = Adapter(model), []
        for k, start in enumerate(swaps[:-1]):
            if k:
                go_over(adapter, successor(model, f"v{k}", seed=k), rows)
            said.append(adapt_all(adapter, cut(part(stream, slice(start, swaps[k + 1])), size)))
        ends.append((joined(said), state_of(adapter)))
    for one in ends[1:]:
        assert_said_equal(ends[0][0], one[0])
        assert ends[0][1] == one[1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_after_a_swap_nothing_of_the_old_model_is_left(rule: dict[str, Any]) -> None:
    """Carried rows under the new θ score as in a new adapter that was given these rows."""
    model, (early, late) = random_model(**rule, features=True), cut(random_stream(400, features=True), 200)
    adapter, other = Adapter(model), successor(model)
    adapter.adapt(early)
    adapter.commit()
    before = state_of(adapter)
    go_over(adapter, other, "carry")
    assert before == state_of(adapter)
    fresh = Adapter(other)
    for mine, its in ((adapter.users, fresh.users), (adapter.items, fresh.items)):
        for partition in mine.partitions:
            ids, slots = zip(*mine.items(partition), strict=True)
            its.load(partition, ids, mine.rows[list(slots)])
    assert_said_equal(fresh.adapt(late), adapter.adapt(late))
    assert state_of(fresh) == state_of(adapter)


def test_items_that_start_anew_are_as_the_new_model_has_them_and_users_are_carried() -> None:
    model, stream = random_model(), random_stream(200)
    adapter, other = Adapter(model), successor(model)
    adapter.adapt(stream)
    adapter.commit()
    users = state_of(adapter)[0]
    go_over(adapter, other, "restart_items")
    assert (users, {}) == state_of(adapter)
    untaught = part(stream, slice(0, 40))
    untaught.levels[:] = -1
    fresh = Adapter(other)
    adapter.adapt(untaught)
    fresh.adapt(untaught)
    assert state_of(fresh)[1] == state_of(adapter)[1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_swap_compiles_nothing(rule: dict[str, Any]) -> None:
    model, stream = random_model(**rule, features=True), random_stream(100, features=True)
    adapter = Adapter(model)
    adapter.adapt(stream)
    adapter.commit()
    compiled = (kalman._adapt, gradient._adapt, encoder._sum_rows)
    before = [len(one.signatures) for one in compiled]
    go_over(adapter, successor(model), "carry")
    adapter.adapt(stream)
    assert before == [len(one.signatures) for one in compiled]


def test_a_model_of_another_form_or_in_the_middle_of_a_batch_is_a_bug() -> None:
    adapter = Adapter(random_model())
    with pytest.raises(AssertionError, match="another form"):
        adapter.serve(adapter.ready(random_model(size=4)))
    adapter.adapt(random_stream(10))
    with pytest.raises(AssertionError, match="middle of a batch"):
        adapter.serve(adapter.ready(successor(random_model())))


# In the loop


@dataclass
class Models:
    """What is due is set by the test; versions come in the order of `order`."""

    order: tuple[str, ...] = ("v", "v2", "v3")
    rows: RowMode = "carry"
    next: Slow | None = None
    served: str = "v"
    standing: Standing = field(default_factory=lambda: Standing("v"))

    def due(self) -> Slow | None:
        found, self.next = self.next, None
        if found is not None:
            self.served = found.model.version
            self.standing = Standing(self.served)
        return found

    def ahead(self, version: str) -> bool:
        return self.order.index(version) > self.order.index(self.served)

    def row_mode(self, version: str) -> RowMode:
        return self.rows


class Watch(Seen):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, dict[int, str]]] = []

    def following(self, standing: Standing, waiting: Mapping[int, str]) -> None:
        self.told.append((standing.served, dict(waiting)))


@dataclass
class Stage:
    """A runner over a log of one partition."""

    log: Log
    broker: Broker
    restorer: Restorer
    models: Models
    runner: Runner
    adapter: Adapter
    watch: Watch

    def serve(self, model: Model) -> None:
        self.models.next = self.adapter.ready(model)

    def versions(self) -> list[str]:
        return [json.loads(value or b"")["model_version"] for value in self.broker.outputs]

    def control(self, at: int = -1) -> ControlRow:
        return ControlRow.from_bytes(self.broker.rows[at][CONTROL_KEY] or b"")


def staged(
    records: int, script: list[Any] | None = None, control: ControlRow | None = None, rows: RowMode = "carry"
) -> Stage:
    log, broker, models = Log([record(n) for n in range(records)]), Broker(script or []), Models(rows=rows)
    restorer = Restorer(controls={0: control} if control else {})
    if control:
        log.positions.next_offsets[0] = control.next_offset
    runner, adapter, _ = loop.build(log, broker, restorer, max_batch=10)
    watch = Watch()
    runner._models, runner._observer = models, watch
    runner.assigned([0])
    return Stage(log, broker, restorer, models, runner, adapter, watch)


def test_a_swap_is_recorded_at_once_and_later_scores_name_the_new_model() -> None:
    stage = staged(20)
    stage.log.records, rest = stage.log.records[:10], stage.log.records[10:]
    stage.runner._restore()
    stage.runner.turn()
    stage.serve(successor(stage.adapter.model))
    stage.runner.turn()  # no record is there
    assert stage.broker.commits == [{0: 10}, {0: 10}]
    assert ("v2", 10, 10) == (stage.control().model_version, stage.control().next_offset, stage.control().model_since)
    stage.runner.turn()
    assert len(stage.broker.commits) == 2
    stage.log.records += rest
    stage.runner.turn()
    assert stage.versions() == ["v1"] * 10 + ["v2"] * 10  # the emitter of these tests begins with v1
    assert ("v2", 20, 10) == (stage.control().model_version, stage.control().next_offset, stage.control().model_since)
    assert ["v", "v2"] == [served for served, _ in stage.watch.told]


@pytest.mark.parametrize("outcome", [Outcome.ABORTED, Outcome.RECOVERED])
def test_items_are_dropped_once_in_the_transaction_that_names_the_model(outcome: Outcome) -> None:
    calm, stormy = staged(30, rows="restart_items"), staged(30, [Outcome.COMMITTED, outcome], rows="restart_items")
    for stage in (calm, stormy):
        stage.runner._restore()
        stage.runner.turn()
        items = {key for key in stage.broker.rows[0] if key and key.startswith(b"i:")}
        stage.serve(successor(stage.adapter.model))
        for _ in range(4):
            stage.runner.turn()
        dropped = [[key for key, value in rows.items() if value is None] for rows in stage.broker.rows]
        assert items
        assert ([], True, []) == (dropped[0], set(dropped[1]) <= items, dropped[2])
        came_again = {key for key in stage.broker.rows[1] if key in items and stage.broker.rows[1][key] is not None}
        assert items == set(dropped[1]) | came_again
    assert stormy.watch.aborts == (outcome is Outcome.ABORTED)
    assert calm.broker.rows == stormy.broker.rows
    assert state_of(calm.adapter) == state_of(stormy.adapter)


def restored_row(version: str) -> ControlRow:
    return ControlRow(0, 5, version, "", 1, {}, 2)


def test_rows_of_an_earlier_model_go_over_where_they_stand() -> None:
    stage = staged(5, control=restored_row("v"), rows="restart_items")
    stage.serve(successor(stage.adapter.model))
    stage.runner.turn()  # the model, then the rows
    stage.adapter.items.slots([0], ["i1"])
    stage.adapter.commit()
    stage.runner.turn()
    assert stage.broker.rows[0].keys() == {b"i:i1", CONTROL_KEY}
    assert ("v2", 5, 5) == (stage.control().model_version, stage.control().next_offset, stage.control().model_since)


def test_rows_of_a_later_model_wait_for_it_and_their_records_are_not_read() -> None:
    stage = staged(9, control=restored_row("v2"))
    stage.runner._restore()
    assert ({}, []) == (stage.runner.shards, stage.log.resumed)
    stage.runner._follow()
    assert ("v", {0: "v2"}) == stage.watch.told[-1]
    stage.serve(successor(stage.adapter.model))
    stage.runner._follow()
    assert ("v2", {}) == stage.watch.told[-1]
    assert (stage.log.resumed, stage.runner.shards[0]) == ([0], restored_row("v2"))
    stage.runner.turn()
    assert ("v2", 9, 2) == (stage.control().model_version, stage.control().next_offset, stage.control().model_since)


def test_a_shard_that_waits_and_is_taken_away_is_forgotten() -> None:
    stage = staged(9, control=restored_row("v3"))
    stage.runner._restore()
    stage.runner.revoked([0])
    stage.runner._follow()
    assert ("v", {}) == stage.watch.told[-1]
    stage.serve(successor(stage.adapter.model, "v3"))
    stage.runner._follow()
    assert ([], {}) == (stage.log.resumed, stage.runner.shards)


def test_a_shard_that_goes_over_and_is_taken_away_is_not_written() -> None:
    stage = staged(0)
    stage.runner._restore()
    stage.serve(successor(stage.adapter.model))
    stage.runner._follow()
    stage.runner.revoked([0])
    stage.runner.turn()
    assert stage.broker.commits == []


def test_two_swaps_before_a_commit_are_one_and_there_and_back_is_none() -> None:
    stage = staged(0)
    stage.runner._restore()
    first = stage.adapter.model
    for model in (successor(first), first):
        stage.serve(model)
        stage.runner._follow()
    stage.runner.turn()
    assert stage.broker.commits == []
    stage.models.order = ("v2", "v", "v3")
    for model in (successor(first), successor(first, "v3")):
        stage.serve(model)
        stage.runner._follow()
    stage.runner.turn()
    assert ["v3"] == [ControlRow.from_bytes(rows[CONTROL_KEY] or b"").model_version for rows in stage.broker.rows]
