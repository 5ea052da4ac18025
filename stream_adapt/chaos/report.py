"""What a run led to, and whether that is a pass."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from stream_adapt.chaos.schedule import Action


class ChaosResult(msgspec.Struct):
    """All figures of a run; `--json` prints it.

    `takeover_s_*`: from a kill or stop of a member to the next commit in every partition that it held, whoever made it.
    """

    minutes: float
    seed: int
    members: int
    protocol: str
    broker: str
    inputs: int = 0  # committed records of the input topic
    outputs: int = 0
    scores: int = 0
    dead_letters: int = 0
    lost: int = 0
    doubled: int = 0
    unexpected: int = 0  # outputs of records that are not committed inputs
    invalid: int = 0  # outputs that are not what their input calls for
    upstream_aborted: int = 0  # transactions of the load
    kills: int = 0
    stops: int = 0
    joins: int = 0
    leaves: int = 0
    broker_restarts: int = 0
    proxy_faults: int = 0
    refreshes: int = 0  # asked for
    promotions: int = 0  # announced by a controller, rollbacks included
    promotions_by_hand: int = 0
    trainer_kills: int = 0
    controller_kills: int = 0
    controller_stops: int = 0
    swaps_scored: int = 0  # places, in all partitions, where the scores go over to another version
    skipped: int = 0  # actions for which nobody was there: the member was being restarted, or the broker was
    rows_compared: int = 0
    rows_different: int = 0
    max_row_error: float = 0.0
    scores_compared: int = 0
    scores_different: int = 0
    takeovers: int = 0
    takeover_s_p50: float = 0.0
    takeover_s_p99: float = 0.0
    exit_codes: dict[str, int] = {}
    drain_s: float = 0.0
    seconds: float = 0.0
    markers_left_out: int = 0  # transactions that the broker ended without a marker in some partition: `broker.py`
    notes: list[str] = []  # what may explain faults, and what brokers and clients did by themselves
    faults: list[str] = []  # everything that should not have been, in words
    logs: str | None = None  # where logs are, if they were kept
    schedule: list[Action] = []

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, doubled or different, and nobody ended as it should not."""
        wrong = self.lost + self.doubled + self.unexpected + self.invalid + self.rows_different + self.scores_different
        return not wrong and not self.faults


def show(result: ChaosResult, console: Console) -> None:
    """The result for a person."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _figures(result):
        table.add_row(name, value)
    console.print(table)
    for fault in result.faults:
        console.print(f"  {fault}", style="red", markup=False)
    for note in result.notes:
        console.print(f"  {note}", style="yellow", markup=False)
    if result.ok:
        console.print("every input has exactly one output, and every row is as if nothing had happened", style="green")
    else:
        console.print(f"FAILED; logs and data: {result.logs}", style="bold red", markup=False)


def _figures(result: ChaosResult) -> list[tuple[str, str]]:
    done = f"{result.kills} kills, {result.stops} stops, {result.joins} joins, {result.leaves} leaves"
    around = f"{result.broker_restarts} restarts of the broker, {result.proxy_faults} faults of the network"
    rows = f"{result.rows_compared:,} compared with a calm run, {result.rows_different:,} different"
    scores = f"{result.scores_compared:,} compared with a calm run, {result.scores_different:,} different"
    worked = (
        f"{result.refreshes} asked for, {result.promotions} promotions, {result.promotions_by_hand} by hand, "
        f"{result.swaps_scored} swaps of a partition; {result.trainer_kills} trainings and {result.controller_kills} "
        f"controllers killed, {result.controller_stops} stopped"
    )
    return [
        ("done", f"{done}, {around}"),
        *([("refreshes", worked)] if result.refreshes else []),
        ("inputs", f"{result.inputs:,} committed"),
        ("outputs", f"{result.scores:,} scores + {result.dead_letters:,} dead letters"),
        ("lost", f"{result.lost:,}"),
        ("doubled", f"{result.doubled:,}"),
        ("unexpected", f"{result.unexpected:,}"),
        ("invalid", f"{result.invalid:,}"),
        ("rows", rows),
        ("scores", scores),
        ("takeover", f"{result.takeover_s_p50:.1f} s median, {result.takeover_s_p99:.1f} s p99 of {result.takeovers}"),
        ("exit codes", ", ".join(f"{code}: {count}" for code, count in sorted(result.exit_codes.items()))),
        ("seed", str(result.seed)),
    ]
