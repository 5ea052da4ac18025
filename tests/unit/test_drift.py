"""Drift: what moves raises an alarm, what does not raises none, and nothing is forgotten."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_adapt.config import DriftSettings
from stream_adapt.drift import SIGNALS, Alarm, DriftMonitor, Watched, detectors
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.learning import Summary

GROUP = 256
REFERENCE = 16 * GROUP
NOTHING: dict[str, float] = {}


def summary(number: int, *, excess: float = 0.0, events: int = GROUP, **changes: Any) -> Summary:
    """A window whose events cost so much more than their scores expect; with some noise, the same for equal numbers."""
    noise = np.random.default_rng(number).normal(0.0, 0.03)
    loss = (0.55 + excess + noise) * events
    values: dict[str, Any] = {
        "partition": number % 2,
        "window": number // 2,
        "first_offset": number // 2 * events,
        "last_offset": (number // 2 + 1) * events - 1,
        "domain": "",
        "model_version": "v1",
        "events": events,
        "labelled": events,
        "loss": loss,
        "loss_frozen": 0.6 * events,
        "entropy": 0.55 * events,
        "target": 0.6 * events,
        "score": (0.6 + noise / 10) * events,
        "unseen": 3,
        "first_ms": number * 1000,
        "last_ms": number * 1000 + 999,
    }
    return Summary(**{**values, **changes})


def settings(**changes: Any) -> DriftSettings:
    return DriftSettings.model_validate(
        {"group_events": GROUP, "reference_events": REFERENCE, "cooldown_events": 20 * GROUP, **changes}
    )


def monitor(**changes: Any) -> DriftMonitor:
    return DriftMonitor(settings(**changes), now_ms=lambda: 77)


def windows(start: int, stop: int, **changes: Any) -> list[Summary]:
    return [summary(number, **changes) for number in range(start, stop)]


def test_a_rise_is_told_with_what_moved_since_when_and_how_much() -> None:
    watch = monitor(signals=["excess_loss"])
    assert [] == watch.add(windows(0, 200))
    alarms = watch.add(windows(200, 240, excess=0.2))
    alarm = alarms[0]
    assert ("excess_loss", None, "PageHinkley", "v1", 77) == (
        alarm.signal, alarm.domain, alarm.detector, alarm.model_version, alarm.detected_ms
    )  # fmt: skip
    assert 0.2 == pytest.approx(alarm.value, abs=0.05)
    assert 0.0 == pytest.approx(alarm.reference, abs=0.02)
    assert {0: 100 * GROUP, 1: 100 * GROUP} == pytest.approx(alarm.since, abs=4 * GROUP)
    assert 199_999 == pytest.approx(alarm.since_ms, abs=8_000)
    assert GROUP <= alarm.events <= 20 * GROUP


def test_a_fall_is_no_alarm() -> None:
    watch = monitor()
    assert [] == watch.add(windows(0, 200) + windows(200, 600, excess=-0.2))


def test_what_the_scores_expect_to_be_hard_is_no_drift() -> None:
    watch = monitor(signals=["excess_loss"])
    harder = [
        msgspec.structs.replace(one, loss=one.loss + 0.1 * GROUP, entropy=one.entropy + 0.1 * GROUP)
        for one in windows(200, 400)
    ]
    assert [] == watch.add(windows(0, 200) + harder)


def test_nothing_is_told_while_the_reference_is_gathered_and_then_it_stays() -> None:
    watch = monitor(signals=["excess_loss"])
    assert [] == watch.add(windows(0, 10, excess=1.0))
    assert [None] == [one.reference for one in watch.statistics()]
    watch.restart("another model")
    watch.add(windows(0, 200))
    (before,) = watch.statistics()
    watch.add(windows(200, 400, excess=0.2))
    (after,) = watch.statistics()
    assert before.reference == after.reference
    assert 0.2 == pytest.approx(after.value, abs=0.05)


def test_what_holds_on_is_told_again_after_each_cooldown_and_what_is_over_is_not() -> None:
    watch = monitor(signals=["excess_loss"])
    watch.add(windows(0, 200))
    lasting = [bool(watch.add([one])) for one in windows(200, 300, excess=0.2)]
    first = lasting.index(True)
    assert [first, first + 20, first + 40] == [i for i, told in enumerate(lasting) if told][:3]
    assert [] == watch.add(windows(300, 500))[1:]


def test_a_rise_during_the_cooldown_after_a_false_alarm_is_told_at_its_end() -> None:
    watch = monitor(signals=["excess_loss", "unseen"])
    watch.add(windows(0, 200))
    blip = [watch.add([one]) for one in windows(200, 205, unseen=200)]
    assert ["unseen"] == [alarm.signal for alarms in blip for alarm in alarms]
    told = [watch.add([one]) for one in windows(205, 260, excess=0.2)]
    first = next(i for i, alarms in enumerate(told) if alarms)
    assert "excess_loss" in [alarm.signal for alarm in told[first]]
    assert 20 == pytest.approx(first, abs=5)


def followed(watch: DriftMonitor, **changes: Any) -> DriftMonitor:
    """Who goes on with what a monitor left in a record."""
    left = msgspec.json.decode(msgspec.json.encode(watch.watched()), type=Watched)
    return DriftMonitor(settings(**changes), now_ms=lambda: 77, watched=left)


@pytest.mark.parametrize("at", [7, 100, 203, 230, 330], ids=["gathering", "calm", "rising", "told", "over"])
def test_who_goes_on_watching_tells_what_the_one_before_would_have_told(at: int) -> None:
    stream = [*windows(0, 200), *windows(200, 320, excess=0.2), *windows(320, 500), *windows(500, 560, excess=0.2)]
    told, first = monitor().add(stream), monitor()
    before = first.add(stream[:at])
    second = followed(first)
    assert first.statistics() == second.statistics()
    after = second.add(stream[at:])
    assert len(told) > 2
    assert told[: len(before)] == before
    assert [one.reference for one in told] == [one.reference for one in [*before, *after]]
    for expected, actual in zip(told, [*before, *after], strict=True):
        assert expected.since == pytest.approx(actual.since, abs=4 * GROUP)
        assert expected.events == pytest.approx(actual.events, abs=4 * GROUP)
        assert expected.value == pytest.approx(actual.value, abs=0.05)


def test_what_was_watched_of_groups_of_another_size_is_gathered_anew() -> None:
    watch = monitor(signals=["excess_loss", "loss"])
    watch.add(windows(0, 100))
    other = followed(watch, signals=["excess_loss"], group_events=GROUP // 2)
    assert [None] == [one.reference for one in other.statistics()]
    fewer = followed(watch, signals=["unseen", "excess_loss"])
    assert [("unseen", True), ("excess_loss", False)] == [
        (one.signal, one.reference is None) for one in fewer.statistics()
    ]


def test_domains_are_handed_on_unless_partitions_are_too_many_for_a_record() -> None:
    watch = monitor(signals=["excess_loss"])
    watch.add([summary(n, domain=("books", "music")[n % 2]) for n in range(100)])
    assert watch.statistics() == followed(watch, signals=["excess_loss"]).statistics()
    watch.add([summary(n, partition=n) for n in range(9_000)])
    left = watch.watched()
    assert ([None], 9_000) == ([one.domain for one in left.standings], len(left.place.offsets))
    assert len(msgspec.json.encode(left)) < 500_000


def test_what_was_handed_on_does_not_move_with_the_one_before() -> None:
    watch = monitor()
    watch.add(windows(0, 100))
    left = watch.watched()
    kept = msgspec.json.encode(left)
    other = DriftMonitor(settings(), watched=left)
    for one in (watch, other):
        one.add(windows(100, 140, excess=0.2))
    assert kept == msgspec.json.encode(left)


def test_numbers_that_are_not_finite_do_not_silence_the_monitor() -> None:
    watch = monitor(signals=["excess_loss"])
    spoilt = msgspec.structs.replace(summary(7), loss=math.nan)
    assert [] == watch.add([*windows(0, 100), spoilt, *windows(100, 200)])
    assert watch.add(windows(200, 240, excess=0.2))


def test_a_domain_that_moves_alone_is_named() -> None:
    watch = monitor(signals=["excess_loss"], group_events=64, reference_events=64 * 32)
    calm = [summary(n, domain=("books", "music", "films")[n % 3], events=64) for n in range(600)]
    assert [] == watch.add(calm)
    moved = [
        summary(n, domain=domain, events=64, excess=0.25 if domain == "music" else 0.0)
        for n in range(600, 700)
        for domain in (("books", "music", "films")[n % 3],)
    ]
    assert "music" in [alarm.domain for alarm in watch.add(moved)]
    assert {None, "books", "music", "films"} == {one.domain for one in watch.statistics()}


def test_no_more_domains_are_watched_than_told() -> None:
    watch = monitor(domains=2)
    watch.add([summary(n, domain=f"d{n % 9}") for n in range(100)])
    assert {None, "d0", "d1"} == {one.domain for one in watch.statistics()}


@pytest.mark.parametrize("name", list(detectors()))
def test_every_detector_of_river_can_be_configured_and_fed(name: str) -> None:
    watch = monitor(detector=name, signals=list(SIGNALS))
    watch.add(windows(0, 100))
    alarms = watch.add(windows(100, 250, excess=0.3))
    assert {name} >= {alarm.detector for alarm in alarms}
    assert all(one.value is not None and one.reference is not None for one in watch.statistics())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detector": "Nothing"}, "drift.detector='Nothing': River has ADWIN, .*binary.DDM"),
        ({"detector": "ADWIN", "parameters": {"lambda": 1}}, "lambda.*ADWIN takes .*delta"),
        ({"parameters": {"mode": "sideways"}}, "mode"),
        ({"signals": ["mood"]}, "'mood' is none; there are loss, excess_loss"),
    ],
)
def test_detectors_parameters_and_signals_that_there_are_not_are_refused_with_those_that_there_are(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        monitor(**changes)


@pytest.mark.parametrize("name", list(detectors()))
def test_equal_summaries_give_equal_alarms(name: str) -> None:
    stream = [*windows(0, 100), *windows(100, 200, excess=0.1)]
    assert monitor(detector=name).add(stream) == monitor(detector=name).add(stream)


def test_parameters_are_those_for_groups_where_they_were_measured_and_rivers_for_others() -> None:
    assert "up" == settings().detector_parameters["mode"]
    assert {"clock": 1} == settings(detector="ADWIN").detector_parameters
    assert {} == settings(detector="binary.DDM").detector_parameters
    assert {"delta": 1.0} == settings(parameters={"delta": 1.0}).detector_parameters


def test_an_alarm_survives_its_record_and_another_format_is_refused() -> None:
    alarm = Alarm("unseen", "books", "ADWIN", 0.5, 0.1, {0: 5, 3: 7}, 1000, 512, "v1", 77)
    assert alarm == Alarm.from_bytes(alarm.to_bytes())
    with pytest.raises(DataError, match="format=2"):
        Alarm.from_bytes(alarm.to_bytes().replace(b'"format":1', b'"format":2'))
    with pytest.raises(DataError, match="not an alarm"):
        Alarm.from_bytes(b"nope")
