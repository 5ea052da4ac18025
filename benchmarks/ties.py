"""What the order of events within a second does to a user's first events: MovieLens with ties in NumPy's order.

    python benchmarks/ties.py movielens-1m --seeds 3 --baselines vowpal_wabbit

The sets tell the time in seconds, so that which event is a user's first hangs on the order of ties. `replay` has that
of the official file, or with `--ties drawn` one that is drawn; here it is that of `numpy.argsort` as it comes, a sort
that is not stable and may give another order on another processor. quality.md has the table, in "What limits it".
Prints a table of log-loss by a user's n-th event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import click
import numpy as np
from rich.progress import Progress

from stream_adapt.datasets import Source, open_source
from stream_adapt.evaluate.figures import Figures
from stream_adapt.evaluate.replay import ReplayOptions, replay
from stream_adapt.record import UserEvent


@click.command()
@click.argument("source", default="movielens-1m", type=click.Choice(["movielens-100k", "movielens-1m"]))
@click.option("--levels", default="all", show_default=True, type=click.Choice(["two", "all"]))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--baselines", default="", help="As of `replay`.")
def main(source: str, levels: str, seeds: int, baselines: str) -> None:
    """Replays SOURCE with ties in NumPy's order."""
    options = ReplayOptions(source, levels=levels, seeds=seeds, baselines=baselines, device="cpu")  # type: ignore[arg-type]
    result = replay(_in_numpys_order(open_source(source)), options, Progress(disable=True)).result()
    click.echo(_row(["method", "AUC", *(f"from {bucket.n_from}" for bucket in result.cold_start)]))
    click.echo("|---" * (len(result.cold_start) + 2) + "|")
    said: dict[str, Figures] = {"diagonal": result, **result.baselines}
    for method, one in said.items():
        click.echo(_row([method, f"{one.auc:.4f}", *(f"{bucket.logloss:.4f}" for bucket in one.cold_start)]))


def _in_numpys_order(source: Source) -> Source:
    """The same events, from the order of the official file sorted by time."""
    events = sorted(source.events(), key=lambda event: int(event.event_id.rpartition("-")[2]))

    def ordered() -> Iterator[UserEvent]:
        return (events[at] for at in np.argsort([event.timestamp for event in events]).tolist())

    return replace(source, events=ordered)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
