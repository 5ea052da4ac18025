"""The rules' README says what the code says."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import msgspec
import pytest

from stream_adapt.learner import rules
from stream_adapt.learner.rules.kalman.layout import item_layout, user_layout
from stream_adapt.models import LearnerSpec, SlowWeights
from stream_adapt.state.row import Layout

README = (Path(rules.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("layout", [user_layout(LearnerSpec()), item_layout(LearnerSpec())])
def test_the_tables_of_rows_are_those_of_the_layouts(layout: Layout) -> None:
    assert layout.describe() in README


def test_every_rule_and_every_array_of_slow_weights_is_named() -> None:
    packages = {module.name for module in pkgutil.iter_modules(rules.__path__) if module.ispkg}
    arrays = {f.name for f in msgspec.structs.fields(SlowWeights)} - {"item_hash", "item_events"}
    assert all(f"`{name}`" in README for name in packages | arrays)


def test_every_test_that_is_named_exists() -> None:
    for name in ("contract/test_batched.py", "contract/test_rules.py", "reference/test_kalman_equations.py"):
        assert f"tests/{name}" in README
        assert (Path(__file__).parents[1] / name).exists()
