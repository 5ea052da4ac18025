"""The rules' README says what the code says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from stream_adapt.learner import rules
from stream_adapt.models import LearnerSpec, RuleName, SlowWeights

README = (Path(rules.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", rules.names())
def test_the_tables_of_rows_are_those_of_the_layouts(rule: RuleName) -> None:
    spec = LearnerSpec(rule=rule)
    for layout in (rules.find(rule).user_layout(spec), rules.find(rule).item_layout(spec)):
        assert layout.describe() in README


def test_every_rule_and_every_array_of_slow_weights_is_named() -> None:
    arrays = {f.name for f in msgspec.structs.fields(SlowWeights)} - {"item_hash", "item_events"}
    assert all(f"`{name}`" in README for name in {*rules.names()} | arrays)


def test_every_test_that_is_named_exists() -> None:
    for name in (
        "contract/test_batched.py",
        "contract/test_rules.py",
        "reference/test_kalman_equations.py",
        "reference/test_gradient_equations.py",
    ):
        assert f"tests/{name}" in README
        assert (Path(__file__).parents[1] / name).exists()
