"""The tables of rules, faults and flags are what `tests/README.md` shows, and every test that they name exists."""

from __future__ import annotations

import ast
from functools import cache

import generate
import pytest
import tables
from faults import FAULTS
from flags import FLAGS
from rules import RULES

TESTS = generate.ROOT / "tests"


def test_generated_parts_are_what_the_tables_say() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert sorted(tables.blocks()) == sorted(generate.names(text)), "each generated part stands in the document once"
    assert tables.rewritten(text) == text, "run `make docs`"


@cache
def _tests(path: str) -> set[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", [t for rule in RULES for t in rule.tests] + [f.test for f in FAULTS])
def test_every_test_that_is_named_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert name.partition("[")[0] in _tests(path)


def test_nothing_is_listed_twice() -> None:
    names = [fault.name for fault in FAULTS]
    rows = [(flag.api, flag.error, flag.applied) for flag in FLAGS]
    assert len(set(names)) == len(names)
    assert len(set(rows)) == len(rows)
