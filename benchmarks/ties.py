"""What the order of events within a second does to a user's first events: MovieLens with ties in another order.

    python benchmarks/ties.py movielens-1m --orders file,chance,numpy --seeds 3 --baselines vowpal_wabbit

The sets tell the time in seconds, so that which event is a user's first hangs on the order of ties. `file` is that of
the official file, which `replay` has; `chance` is drawn; `numpy` is that of `numpy.argsort` as it comes, a sort that is
not stable and may give another order on another processor. Prints a table of log-loss by a user's n-th event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import click
import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from stream_adapt.datasets import Source, open_source
from stream_adapt.evaluate.figures import Figures
from stream_adapt.evaluate.replay import ReplayOptions, replay

Longs = npt.NDArray[np.int64]

#: From times `[n]`, in the order of the file, to the events' new order `[n]`.
ORDERS: dict[str, Callable[[Longs], Longs]] = {
    "file": lambda times: np.argsort(times, kind="stable"),
    "chance": lambda times: np.lexsort((np.random.default_rng(0).random(len(times)), times)),
    "numpy": np.argsort,
}


@click.command()
@click.argument("source", default="movielens-1m", type=click.Choice(["movielens-100k", "movielens-1m"]))
@click.option("--orders", default=",".join(ORDERS), show_default=True)
@click.option("--levels", default="all", show_default=True, type=click.Choice(["two", "all"]))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--baselines", default="", help="As of `replay`.")
def main(source: str, orders: str, levels: str, seeds: int, baselines: str) -> None:
    """Replays SOURCE with ties in each order."""
    if unknown := set(orders.split(",")) - ORDERS.keys():
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(ORDERS)}", param_hint="--orders")
    options = ReplayOptions(source, levels=levels, seeds=seeds, baselines=baselines, device="cpu")  # type: ignore[arg-type]
    opened, header = open_source(source), False
    for name in orders.split(","):
        result = replay(_reordered(opened, ORDERS[name]), options, Progress(disable=True)).result()
        if not header:
            buckets = [f"from {bucket.n_from}" for bucket in result.cold_start]
            click.echo("\n".join(_rows([["order of ties", "method", "AUC", *buckets]])))
            click.echo("|---" * (len(buckets) + 3) + "|")
            header = True
        said: dict[str, Figures] = {"diagonal": result, **result.baselines}
        click.echo("\n".join(_rows([[name, method, *_figures(one)] for method, one in said.items()])))


def _reordered(source: Source, order: Callable[[Longs], Longs]) -> Source:
    """The same events; those of one time stand as an order says that is given them as in the official file."""
    events = sorted(source.events(), key=lambda event: int(event.event_id.rpartition("-")[2]))
    places = order(np.array([event.timestamp for event in events], dtype=np.int64))
    return replace(source, events=lambda: (events[place] for place in places.tolist()))


def _figures(one: Figures) -> list[str]:
    return [f"{one.auc:.4f}", *(f"{bucket.logloss:.4f}" for bucket in one.cold_start)]


def _rows(table: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in table]


if __name__ == "__main__":
    main()
