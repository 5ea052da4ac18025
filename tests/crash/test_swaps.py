"""Crashes around a swap of the model: every shard goes over once, at the offset that its control row names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process import MODEL, MOST, TOPICS, Deployment, Process, Rows, changelog, once_each, outputs, records
from test_scripts import crashes

from stream_adapt.adapt import Adapter, Slow
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.follow import Standing
from stream_adapt.models import Model, RowMode
from stream_adapt.pipeline import Pipeline
from stream_adapt.record import RawBatch
from stream_adapt.state.row import CONTROL_KEY, ControlRow
from stream_adapt.testing.clocks import SettableClock
from stream_adapt.testing.scripted import Crash, Effect, Point, ScriptedBroker

#: The same items with other numbers; what rows hold sums of is kept.
_NEXT = msgspec.structs.replace(
    MODEL.weights, bias=MODEL.weights.bias + 0.5, item_vector=-MODEL.weights.item_vector, noise=MODEL.weights.noise * 2
)
NEXT = Model(msgspec.structs.replace(MODEL.manifest, version="v2"), _NEXT)
COUNT = 40


@dataclass
class Announcing:
    """The models topic and the registry: v2 is announced after some turns, and a member has it some turns later."""

    rows: RowMode
    after: int
    turns: int = 0


class Follows:
    """What a member knows of it."""

    standing = Standing("v")

    def __init__(self, world: Announcing, adapter: Adapter, lag: int) -> None:
        self._world, self._adapter, self._lag = world, adapter, lag

    def due(self) -> Slow | None:
        if self._world.turns < self._world.after or self._adapter.model is NEXT:
            return None
        self._lag -= 1
        return self._adapter.ready(NEXT) if self._lag < 0 else None

    def ahead(self, version: str) -> bool:
        return version == "v2" and self._adapter.model is not NEXT

    def row_mode(self, _: str) -> RowMode:
        return self._world.rows


@dataclass
class Swapping(Deployment):
    """The same deployment, whose members follow."""

    world: Announcing = field(default_factory=lambda: Announcing("carry", 3))
    lag: int = 1

    def _start(self, instance: str) -> None:
        self.starts += 1
        assert self.starts < 40, self.broker.happened
        with self._dying(instance):
            process = Process(self.broker, self.cuts, instance, self.clock, self.most)
            process.runner._models = Follows(self.world, process.adapter, self.lag)
            self.members[instance] = process

    def _turn(self, instance: str) -> None:
        self.world.turns += 1
        super()._turn(instance)


def calm(partition: int, since: int, rows: RowMode) -> Rows:
    """The rows of one partition whose swap was at an offset."""
    clock = SettableClock()
    adapter = Adapter(MODEL)
    pipeline = Pipeline(
        Decoder(MODEL.spec.features, MODEL.spec.feedback, now_ms=clock.now_ms), adapter, Emitter(TOPICS, "v", 4)
    )
    inputs = records(COUNT)[partition]
    for model, start, stop in ((MODEL, 0, since), (NEXT, since, len(inputs))):
        if model is NEXT:
            pipeline.serve(adapter.ready(NEXT))
            adapter.restart_items([partition] if rows == "restart_items" else [])
            adapter.commit()
        part = inputs[start:stop]
        at = np.full(len(part), partition, np.int32)
        pipeline(RawBatch([k for k, _ in part], [v for _, v in part], at, np.arange(start, stop)))
        adapter.commit()
    return {
        (partition, prefix + name.encode()): table.layout.to_bytes(table.rows[slot])
        for prefix, table in ((b"u:", adapter.users), (b"i:", adapter.items))
        for name, slot in table.items(partition)
    }


def survived(
    script: Sequence[Crash],
    rows: RowMode,
    after: int,
    lag: int,
    cuts: Sequence[int] = (5,),
    meanwhile: int = 3,
    most: int = MOST,
) -> None:
    """Runs a script to its end, and lets shards go over that have not."""
    deployment = Swapping(
        ScriptedBroker(records(COUNT), script), cuts, meanwhile, most, world=Announcing(rows, after), lag=lag
    )
    deployment.run()
    for _ in range(60):
        for instance in list(deployment.members):
            deployment._turn(instance)
    broker, happened = deployment.broker, deployment.broker.happened
    assert once_each(broker) == outputs(broker), happened
    found = changelog(broker)
    for partition in broker.inputs:
        control = ControlRow.from_bytes(found.pop((partition, CONTROL_KEY)))
        assert ("v2", len(broker.inputs[partition])) == (control.model_version, control.next_offset), happened
        assert versions(broker, partition) == ["v1"] * (control.model_since > 0) + ["v2"] * goes_on(control, broker)
        expected = calm(partition, control.model_since, rows)
        assert expected == {key: value for key, value in found.items() if key[0] == partition}, happened


def goes_on(control: ControlRow, broker: ScriptedBroker) -> bool:
    """Whether a score came after the swap: records that are no events have none."""
    scores = [json.loads(w.value or b"") for w in broker.committed(TOPICS.scores)]
    return any(
        s["source_partition"] == control.partition and s["source_offset"] >= control.model_since
        for s in scores
        if "model_version" in s
    )


def versions(broker: ScriptedBroker, partition: int) -> list[str]:
    """Versions that the scores of a partition name, each run of equal ones once, in the order of offsets."""
    scores = [json.loads(w.value or b"") for w in broker.committed(TOPICS.scores)]
    told = sorted(
        (s["source_offset"], s["model_version"])
        for s in scores
        if "model_version" in s and s["source_partition"] == partition
    )
    return [v for k, (_, v) in enumerate(told) if not k or told[k - 1][1] != v]


POINTS = (Effect.KILL_BEFORE, Effect.KILL_AFTER, Effect.STOPPED)


@pytest.mark.parametrize("rows", ["carry", "restart_items"])
@pytest.mark.parametrize("effect", POINTS, ids=lambda value: value.name)
@pytest.mark.parametrize("point", [Point.PRODUCE, Point.SEND_OFFSETS, Point.COMMIT], ids=lambda value: value.name)
def test_a_shard_goes_over_once_whoever_dies_meanwhile(point: Point, effect: Effect, rows: RowMode) -> None:
    calls = range(1, 60, 6) if point is Point.PRODUCE else range(1, 7)
    for call in calls:
        survived([Crash(point, call, effect)], rows, after=5, lag=1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(crashes, max_size=6),
    st.sampled_from(["carry", "restart_items"]),
    st.integers(0, 12),
    st.integers(0, 4),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 20),
    st.sampled_from([MOST, 3, 5]),
)
def test_any_script_around_a_swap_is_survived_however_batches_are_cut(
    script: list[Crash], rows: RowMode, after: int, lag: int, cuts: list[int], meanwhile: int, most: int
) -> None:
    survived(script, rows, after, lag, cuts, meanwhile, most)
