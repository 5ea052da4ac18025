"""What the order of events within a second does to a user's first events.

    python benchmarks/ties.py movielens-1m --draws 10 --baselines vowpal_wabbit

The sets tell the time in seconds, so that which event is a user's first hangs on the order of ties. One model,
pretrained on the first half as `replay` has it, is judged on the second with ties as the official file has them, in
orders that are drawn, and in that of `numpy.argsort` as it comes, a sort that is not stable and may give another order
on another processor. Prints a table of log-loss by a user's n-th event: of drawn orders the mean, the least and the
most. Chosen baselines see the same events in the same order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from rich.progress import Progress

from stream_adapt.datasets import Source, open_source, ties_drawn
from stream_adapt.evaluate.halves import cut, two_levels
from stream_adapt.evaluate.replay import Levels, ReplayOptions, replay
from stream_adapt.meta.trainer import pretrain
from stream_adapt.models import LearnerSpec, write_model
from stream_adapt.record import UserEvent


@click.command()
@click.argument("source", default="movielens-1m", type=click.Choice(["movielens-100k", "movielens-1m"]))
@click.option("--levels", default="all", show_default=True, type=click.Choice(["two", "all"]))
@click.option("--draws", default=10, show_default=True, type=click.IntRange(min=1))
@click.option("--baselines", default="", help="As of `replay`.")
def main(source: str, levels: Levels, draws: int, baselines: str) -> None:
    """Judges one model of SOURCE with ties in several orders."""
    opened, found = open_source(source), {}
    with tempfile.TemporaryDirectory() as folder:
        options = ReplayOptions(source, model=_pretrained(opened, levels, Path(folder)), baselines=baselines)
        orders = {"file": opened, "numpy": _in_numpys_order(opened)}
        orders |= {f"drawn {seed}": ties_drawn(opened, seed) for seed in range(draws)}
        for order, reordered in orders.items():
            result = replay(reordered, options, Progress(disable=True)).result()
            buckets = [f"from {bucket.n_from}" for bucket in result.cold_start]
            for method, one in {"diagonal": result, **result.baselines}.items():
                found[order, method] = np.array([bucket.logloss for bucket in one.cold_start])
                click.echo(_row(order, method, found[order, method]), err=True)
    click.echo(f"| order of ties | method | {' | '.join(buckets)} |\n" + "|---" * (len(buckets) + 2) + "|")
    for method in dict.fromkeys(method for _, method in found):
        drawn = np.array([found[f"drawn {seed}", method] for seed in range(draws)])  # [draws, buckets]
        rows = {name: found[name, method] for name in ("file", "numpy")}
        rows |= {
            f"drawn, {name}": over(drawn, 0) for name, over in (("mean", np.mean), ("least", np.min), ("most", np.max))
        }
        for order, row in rows.items():
            click.echo(_row(order, method, row))


def _pretrained(source: Source, levels: Levels, folder: Path) -> Path:
    feedback = two_levels(source.feedback) if levels == "two" else source.feedback
    spec = LearnerSpec(source.features, feedback)
    trained = pretrain(cut(source, spec, 1, warm=True).first.events, spec, device="cpu")
    return write_model(folder, trained.weights, spec, trained.fitted)


def _in_numpys_order(source: Source) -> Source:
    """The same events, from the order of the official file sorted by time."""

    def events() -> Iterator[UserEvent]:
        rows = sorted(source.events(), key=lambda event: int(event.event_id.rpartition("-")[2]))
        return (rows[at] for at in np.argsort([event.timestamp for event in rows]).tolist())

    return replace(source, events=events)


def _row(order: str, method: str, losses: np.ndarray) -> str:
    return f"| {order} | {method} | {' | '.join(f'{loss:.4f}' for loss in losses)} |"


if __name__ == "__main__":
    main()
