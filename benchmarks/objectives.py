"""What the objective of training is worth: the same rule, data, epochs and time budget, and figures from `replay`.

    python benchmarks/objectives.py movielens-100k --seeds 3 --seconds 30

One line of JSON for each objective, then a table in Markdown. Seconds are of the processor, so that what else the
machine does costs no objective its steps. `direct` is the baseline without meta-learning; its seconds include tuning.
"""

from __future__ import annotations

import time

import click
import msgspec
from rich.progress import Progress

from stream_adapt.datasets import open_source
from stream_adapt.evaluate.replay import ReplayOptions, ReplayResult, replay

OBJECTIVES = ("prequential", "maml", "fomaml", "reptile", "direct")


@click.command()
@click.argument("source", default="movielens-100k")
@click.option("--objectives", default=",".join(OBJECTIVES), show_default=True)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--seconds", default=0.0, help="Most processor seconds of one training; 0: as long as its epochs take.")
@click.option("--covariance", default="diagonal", show_default=True, type=click.Choice(["diagonal", "full"]))
def main(source: str, objectives: str, seeds: int, seconds: float, covariance: str) -> None:
    """Trains with each objective on the first half of SOURCE, and replays the second."""
    opened, rows = open_source(source), []
    for name in objectives.split(","):
        options = ReplayOptions(
            source,
            objective=name,
            seeds=seeds,
            seconds=seconds,
            covariance=covariance,  # type: ignore[arg-type]
            device="cpu",
            clock=time.process_time,
        )
        result = replay(opened, options, Progress(disable=True)).result()
        click.echo(msgspec.json.encode(result).decode())
        rows.append(_row(name, result))
    click.echo("\n| set | objective | AUC | log-loss | AUC within users | calibration error | processor s |")
    click.echo("|---|---|---|---|---|---|---|")
    for row in rows:
        click.echo(f"| {opened.name} | {row} |")


def _row(name: str, result: ReplayResult) -> str:
    figures = [
        f"{getattr(result, key):.4f} ± {result.spread[key] / 2:.4f}" for key in ("auc", "logloss", "gauc", "ece")
    ]
    return " | ".join([name, *figures, f"{result.train_s or 0:.0f}"])


if __name__ == "__main__":
    main()
