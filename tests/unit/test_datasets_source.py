"""Opening a data set by name or path."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import msgspec
import pytest

from stream_adapt.datasets import NAMES, Source, open_source, ties_drawn
from stream_adapt.datasets.source import STARS
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.local import cache_folder
from stream_adapt.record import UserEvent


def test_the_names_are_the_ones_of_the_command_line() -> None:
    assert NAMES == ("movielens-100k", "movielens-1m", "synthetic")


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(DataError, match=r"'movielens-2m'.*movielens-100k, movielens-1m, synthetic"):
        open_source("movielens-2m")


def test_a_log_without_a_mapping_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item,time\n")
    with pytest.raises(ConfigError, match="mapping file"):
        open_source(str(log))


def test_a_mapping_for_a_named_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="synthetic is described already"):
        open_source("synthetic", mapping=tmp_path / "mapping.yaml")


def test_synthetic_has_defaults() -> None:
    source = open_source("synthetic")
    assert isinstance(source, Source)
    assert (source.count, source.drift_at, source.feedback) == (100_000, 75_000, STARS)


def test_stars_are_five_levels_and_four_is_the_target() -> None:
    levels = STARS.level_of([1.0, 2.0, 3.0, 4.0, 5.0], ["rating"] * 5)
    assert levels.tolist() == [0, 1, 2, 3, 4]
    assert STARS.target_level == 3


def test_ties_are_drawn_within_a_time_and_the_same_in_every_pass() -> None:
    given = [event for _, event in zip(range(300), open_source("synthetic").events(), strict=False)]
    coarse = [replace_time(event, k // 10 if k != 150 else 3) for k, event in enumerate(given)]
    source = replace(open_source("synthetic"), events=lambda: iter(coarse))
    drawn, other = ties_drawn(source), ties_drawn(source, seed=1)
    events = list(drawn.events())
    assert [event.timestamp for event in coarse] == [event.timestamp for event in events]  # also of one that is late
    for kept, moved in zip(ticks(coarse), ticks(events), strict=True):
        assert set(kept) == set(moved)
    assert coarse != events
    assert events == list(drawn.events())
    assert events != list(other.events())


def replace_time(event: UserEvent, time: int) -> UserEvent:
    return msgspec.structs.replace(event, timestamp=time, features={})


def ticks(events: list[UserEvent]) -> list[list[str]]:
    return [[event.event_id for event in tied] for _, tied in groupby(events, lambda event: event.timestamp)]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("STREAM_ADAPT_CACHE_DIR", raising=False)
    assert tmp_path / "stream-adapt" == cache_folder()
    monkeypatch.setenv("STREAM_ADAPT_CACHE_DIR", str(tmp_path / "own"))
    assert tmp_path / "own" == cache_folder()
