"""`bench scale` counts what it makes, and its limit on memory is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_adapt.bench_scale import Scale, ScaleResult, _limit_file, _limited, run_scale


def test_every_user_gets_a_row_and_the_figures_fit_together(tmp_path: Path) -> None:
    result = run_scale(Scale(users=20_001, events=5_000, partitions=3, folder=str(tmp_path)), print)
    assert (20_001, 512, None, None) == (result.rows, result.row_bytes, result.limit_bytes, result.charged_bytes)
    assert result.rows * result.row_bytes <= result.slab_bytes
    assert result.resident_bytes > result.base_bytes > 0
    assert min(result.events_per_s, result.uniform_events_per_s, result.new_users_per_s) > 0
    assert [] == list(tmp_path.iterdir())


def test_memory_stays_below_the_rows_half_as_much_again_and_150_bytes_a_user(tmp_path: Path) -> None:
    users = 60_000
    result: ScaleResult = run_scale(Scale(users=users, events=1_000, folder=str(tmp_path)), print)
    assert result.resident_bytes - result.base_bytes <= 1.5 * users * result.row_bytes + 150 * users


def test_the_limit_is_a_group_of_its_own_that_is_gone_afterwards() -> None:
    with _limited(300_000_000) as group:
        if group is None:
            pytest.skip("no cgroup can be made here")
        assert 299_990_000 < int(_limit_file(group).read_text()) <= 300_000_000
    assert not group.exists()
    with _limited(None) as nothing:
        assert nothing is None
