"""The tables of rules, faults and flags are what `tests/README.md` shows, and every test that they name exists."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import cache

import generate
import pytest
import tables
from faults import FAULTS
from flags import FLAGS
from rules import RULES

TESTS = generate.ROOT / "tests"
NAMED = [test for rule in RULES for test in rule.tests] + [fault.test for fault in FAULTS]


def test_generated_parts_are_what_the_tables_say() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert sorted(tables.blocks()) == sorted(generate.names(text)), "each generated part stands in the document once"
    assert tables.rewritten(text) == text, "run `make docs`"


@cache
def _collected() -> dict[str, set[str]]:
    """Every test that pytest finds in the files of the tables: path and name → its parameters."""
    paths = sorted({test.partition("::")[0] for test in NAMED})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", *paths]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    found: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        test, _, parameters = line.removeprefix("tests/").partition("[")
        found.setdefault(test, set()).add(parameters)
    return found


@pytest.mark.parametrize("test", sorted(set(NAMED)))
def test_every_test_that_is_named_is_collected(test: str) -> None:
    name, bracket, parameters = test.partition("[")
    found = _collected().get(name)
    assert found, "there is no such test"
    assert not bracket or parameters in found, "it has no such parameters"


def test_nothing_is_listed_twice() -> None:
    names = [fault.name for fault in FAULTS]
    rows = [(flag.api, flag.error, flag.applied) for flag in FLAGS]
    assert len(set(names)) == len(names)
    assert len(set(rows)) == len(rows)


def test_modules_have_names_of_their_own() -> None:
    """Else pytest collects the first of two and stops at the second."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [] == [name for name, count in names.items() if count > 1]
