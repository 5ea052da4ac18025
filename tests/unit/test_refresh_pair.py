"""Two models side by side: equal rows, events that neither knows, and what is decided by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
import torch
from learner_streams import FEEDBACK, KNOWN_ITEMS, START_MS, random_model
from registry_server import registry_server

from stream_adapt.codecs.avro import AvroInput
from stream_adapt.codecs.framed import FramedInput
from stream_adapt.codecs.protobuf import ProtobufInput
from stream_adapt.codecs.registry import Registry
from stream_adapt.config import Config
from stream_adapt.meta import refine
from stream_adapt.meta.sequences import read_log
from stream_adapt.models import Model
from stream_adapt.record import ItemId, RawBatch, UserEvent, UserId
from stream_adapt.refresh.decide import Comparison
from stream_adapt.refresh.pair import SideBySide, sampled

MARGIN, ERROR = 0.0005, 0.01 / 3
SETTINGS = msgspec.structs.replace(refine.SETTINGS, epochs=3, validation_share=0.2)


def world(n: int, seed: int, flipped: bool = False) -> list[UserEvent]:
    """Even items are liked, by some users more than by others; flipped, the label is what nobody said."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, 60, n), random.integers(0, KNOWN_ITEMS, n)
    mood = np.random.default_rng(7).normal(0, 0.7, 60)
    liking = np.where(item % 2 == 0, 1.0, -1.0) + mood[user] + random.normal(0, 1, n)
    stars = np.clip(np.round(3 + liking), 1, 5)
    stars = 6 - stars if flipped else stars
    return [
        UserEvent(f"e{seed}-{k}", UserId(f"u{u}"), ItemId(f"i{i}"), "rating", START_MS + 60_000 * k, float(s))
        for k, (u, i, s) in enumerate(zip(user.tolist(), item.tolist(), stars.tolist(), strict=True))
    ]


def raw(events: list[UserEvent], first_offset: int = 0) -> RawBatch:
    values = [json.dumps(msgspec.to_builtins(e)).encode() for e in events]
    offsets = first_offset + np.arange(len(events), dtype=np.int64)
    return RawBatch([e.user_id.encode() for e in events], values, np.zeros(len(events), np.int32), offsets)  # type: ignore[arg-type]


def trained(start: Model, events: list[UserEvent], version: str, seed: int = 0, rate: float = 0.02) -> Model:
    settings = msgspec.structs.replace(SETTINGS, seed=seed, rate=rate)
    weights = refine.refine(read_log(events, start.spec), start, settings, "cpu").weights
    manifest = msgspec.structs.replace(start.manifest, version=version)
    return Model(manifest, weights)


@cache
def champion() -> Model:
    """A model of the world."""
    torch.set_num_threads(1)
    assert FEEDBACK == random_model().spec.feedback
    return trained(random_model(), world(2_000, seed=1), "champion")


def compared(first: Model, second: Model, n: int = 1_200) -> Comparison:
    """Both start with the rows that the first model has after some events, and see the same from there on."""
    before = SideBySide(Config(), first, first, "carry")
    before.begin({0: 0}, {})
    before.follow(raw(world(600, seed=2)))
    pair = SideBySide(Config(), first, second, "carry")
    for kind, table in pair.tables.items():
        ids, slots = zip(*before.tables[kind].items(0), strict=True)
        table.load(0, ids, before.tables[kind].rows[np.array(slots)])
    pair.begin({0: 600}, {0: 650})
    pair.follow(raw(world(n, seed=3), first_offset=600))
    assert n - 50 == pair.events
    return pair.compared()


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_bad_challenger_is_refused(seed: int) -> None:
    bad = trained(champion(), world(500, seed=100 + seed, flipped=True), "bad", seed, rate=0.2)
    found = compared(champion(), bad)
    assert not found.beyond(MARGIN, ERROR)
    assert found.gain < 0
    assert found.short_of(MARGIN, ERROR), "a regression would be seen in service"


def test_a_better_one_is_taken() -> None:
    found = compared(random_model(), champion())
    assert found.beyond(MARGIN, ERROR)


def test_the_same_model_and_one_that_differs_by_nothing_are_not() -> None:
    same = compared(champion(), champion())
    assert 0.0 == same.gain
    noise = np.random.default_rng(0).normal(0, 0.003, champion().weights.item_vector.shape).astype(np.float32)
    nudged = msgspec.structs.replace(champion().weights, item_vector=champion().weights.item_vector + noise)
    assert not compared(champion(), Model(champion().manifest, nudged)).beyond(MARGIN, ERROR)


def test_the_newest_events_are_compared_alone() -> None:
    parts = [raw(world(300, seed=2)), raw(world(200, seed=3))]
    whole = SideBySide(Config(), random_model(), champion(), "carry")
    whole.begin({0: 0}, {})
    for part in parts:
        whole.follow(part)
    tail = SideBySide(Config(), random_model(), champion(), "carry")
    tail.begin({0: 0}, {})
    tail.follow(parts[0])
    tail.forget()
    tail.follow(parts[1])
    assert 200 == tail.events
    assert tail.compared() == whole.compared(200)
    assert whole.compared(10_000) == whole.compared()
    assert whole.compared() != tail.compared()


def test_rows_restart_where_the_manifest_says_so() -> None:
    pair = SideBySide(Config(), champion(), champion(), "restart_items")
    solo = SideBySide(Config(), champion(), champion(), "carry")
    solo.begin({0: 0}, {})
    solo.follow(raw(world(300, seed=2)))
    for kind, table in pair.tables.items():
        ids, slots = zip(*solo.tables[kind].items(0), strict=True)
        table.load(0, ids, solo.tables[kind].rows[np.array(slots)])
    pair.begin({0: 300}, {})
    assert 0 == len(pair._second.items)
    assert len(pair._first.users) == len(pair._second.users) > 0


def test_a_sample_is_of_whole_users_and_about_as_large_as_asked_for() -> None:
    users = [f"user-{k}".encode() for k in range(4_000)]
    share = np.mean([sampled(user, 0.3) for user in users])
    assert share == pytest.approx(0.3, abs=0.03)
    assert all(sampled(user, 1.0) for user in users)
    assert {u for u in users if sampled(u, 0.1)} < {u for u in users if sampled(u, 0.3)}


@pytest.mark.parametrize(("form", "make"), [("avro", AvroInput), ("protobuf", ProtobufInput)], ids=["avro", "protobuf"])
def test_events_in_another_format_are_compared_as_those_in_json(
    form: str, make: Callable[[Registry, str], FramedInput]
) -> None:
    events = world(60, seed=4)
    with registry_server() as server:
        sections = {"input": {"format": form}, "registry": {"url": server.url}, "topics": {"events": "events"}}
        codec = make(Registry(server.url, {}, register=True), "events")
        framed = SideBySide(Config.model_validate(sections), random_model(), random_model(), "carry")
        framed.begin({0: 0}, {})
        in_json = raw(events)
        framed.follow(RawBatch(in_json.keys, [codec.event(e) for e in events], in_json.partitions, in_json.offsets))
    plain = SideBySide(Config(), random_model(), random_model(), "carry")
    plain.begin({0: 0}, {})
    plain.follow(raw(events))
    assert 60 == framed.events
    assert plain.compared() == framed.compared()
