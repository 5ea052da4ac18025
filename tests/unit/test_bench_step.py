"""`bench step`: every rule and variant is timed, and the rows are those that service has."""

from __future__ import annotations

import json

from click.testing import CliRunner

from stream_adapt.bench import step_cost
from stream_adapt.cli import cli
from stream_adapt.learner.rules import find

#: Bytes of a user's row and an item's.
ROWS = {
    "kalman-diagonal": (512, 304),
    "kalman-full": (1056, 304),
    "gradient-normalized": (448, 304),
    "gradient-plain": (448, 304),
}


def test_every_variant_is_timed() -> None:
    costs = step_cost(rounds=2)
    assert ROWS == {name: (cost.row_bytes, cost.item_row_bytes) for name, cost in costs.items()}
    assert set(ROWS) == {f"{rule}-{variant}" for rule in ("kalman", "gradient") for variant in find(rule).variants}
    assert all(0.0 < cost.least_us_per_event <= cost.us_per_event for cost in costs.values())


def test_the_command_prints_what_was_measured() -> None:
    told = json.loads(CliRunner().invoke(cli, ["bench", "step", "--json"]).stdout)
    assert set(told) == set(ROWS)
    assert set(told["kalman-diagonal"]) == {"us_per_event", "least_us_per_event", "row_bytes", "item_row_bytes"}
    lines = CliRunner().invoke(cli, ["bench", "step"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ROWS)
