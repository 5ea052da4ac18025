"""How long fast weights alone take to heal a drift: the long synthetic streams of `bench drift`, gone on with.

    stream-adapt bench drift --sets synthetic-long --scenarios permute
    python benchmarks/continued.py

Without refreshes log-loss is not back where those streams end. Synthetic streams are drawn piece by piece, so that a
longer one begins with the shorter one, event by event; this is checked. With refreshes, and the level, are what the
first command kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

import click
import numpy as np

from stream_adapt.bench_recovery import Course, reached, refresh_run
from stream_adapt.bench_streams import Member, Streams, kept_in
from stream_adapt.config import DriftSettings
from stream_adapt.datasets.drifts import Drift, splice
from stream_adapt.datasets.synthetic import Synthetic
from stream_adapt.datasets.synthetic import source as synthetic_source
from stream_adapt.models import Model
from stream_adapt.record import UserEvent

NAME: Final = "synthetic-long"
KIND: Final = "permute"
#: As `bench drift` has them.
RATE, WITHIN = 100.0, 0.01


@click.command()
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--events", default=1_000_000, show_default=True, help="Of each stream, its first half included.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="That of bench drift.")
def main(seeds: int, events: int, folder: Path | None) -> None:
    """Events after the drift until log-loss is that of a model of the new world, with refreshes and without."""
    click.echo("| seed | with refreshes | without | ratio |\n|---|---|---|---|")
    for seed in range(seeds):
        streams = Streams(NAME, seed, kept_in(folder))
        kept = refresh_run(streams, KIND, DriftSettings(), RATE)
        assert kept.level_before is not None and kept.level_new_world is not None, "every drift that lasts has levels"
        longer = _continued(streams, events)
        alone = _course(longer, streams.model)
        level = max(kept.level_before, kept.level_new_world) + WITHIN
        without = reached(alone.loss, streams.place, level, streams.place)
        told = f"{without:,}" if without else f"not in {len(longer) - streams.place:,}"
        ratio = (kept.as_pretrained or np.nan) / (without or len(longer) - streams.place)
        click.echo(f"| {seed} | {kept.as_pretrained or 0:,} | {told} | {'' if without else '≤ '}{ratio:.2f} |")


def _continued(streams: Streams, events: int) -> list[UserEvent]:
    """The second half of a stream with the drift, and what comes after it."""
    source = synthetic_source(Synthetic(seed=streams.seed, events=events, drift="none"))
    later = list(islice(source.events(), streams.count, None))
    held = replace(source, events=lambda: iter(later), count=len(later))
    longer = list(splice(held, Drift(KIND, streams.place, seed=streams.seed)).events())
    if any(one != other for one, other in zip(streams.events(KIND), longer, strict=False)):
        raise click.ClickException(f"seed {streams.seed}: the longer stream does not begin with the shorter one")
    return longer


def _course(events: Iterable[UserEvent], model: Model) -> Course:
    member, target = Member(model), model.spec.feedback.target_level
    said = [(member.take(one)[0].score, one.batch.levels >= target) for one in member.read(events)]
    scores, targets = zip(*said, strict=True)
    return Course(np.concatenate(scores), np.concatenate(targets))


if __name__ == "__main__":
    main()
