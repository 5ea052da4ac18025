"""`stream-adapt pretrain`: a data set in, a model on disk out, with a progress bar on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from stream_adapt.datasets import Source, open_source
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.models import Covariance, LearnerSpec, RuleName, write_model
from stream_adapt.record import UserEvent

if TYPE_CHECKING:  # torch takes seconds to import: only where it is used
    from stream_adapt.meta.trainer import Progress as Told
    from stream_adapt.meta.trainer import TrainSettings


@dataclass(frozen=True)
class Request:
    """What to learn, from what, and where to put it."""

    source: str
    registry: Path
    mapping: Path | None = None
    share: float = 1.0  # of the events, the first ones
    rule: RuleName = "kalman"
    covariance: Covariance = "diagonal"
    normalized: bool = LearnerSpec().normalized
    dimension: int = LearnerSpec().dimension
    epochs: int | None = None
    seed: int = 0
    device: str = "auto"


class Pretrained(msgspec.Struct):
    """What came of it."""

    folder: str
    version: str
    source: str
    events: int
    seconds: float
    figures: dict[str, float]  # on the last tenth of the events, of a training that did not see it


def pretrain_source(request: Request, console: Console) -> Pretrained:
    """Learns the slow weights from a data set and writes a model.

    Raises:
        ConfigError, DataError, ModelError: each says what is wrong and what to do.
    """
    from stream_adapt.meta.trainer import TrainSettings, pretrain

    started = time.monotonic()
    source = open_source(request.source, mapping=request.mapping)
    events, count = first_share(source, request.share)
    spec = LearnerSpec(
        source.features,
        source.feedback,
        request.rule,
        covariance=request.covariance,
        normalized=request.normalized,
        dimension=request.dimension,
    )
    settings = _settings(TrainSettings(seed=request.seed), request)
    with progress_bar(console) as told:
        trained = pretrain(events, spec, settings, request.device, told)
    about = {"source": source.name, "events": count, "share": request.share, "seed": request.seed}
    folder = write_model(
        request.registry, trained.weights, spec, trained.fitted, trained_on=about, figures=trained.figures
    )
    seconds = round(time.monotonic() - started, 3)
    return Pretrained(str(folder), folder.name, source.name, count, seconds, trained.figures)


def first_share(source: Source, share: float) -> tuple[Iterator[UserEvent], int]:
    """The first `share` of a source's events, and how many that is.

    Raises:
        ConfigError: the share is not above 0 and at most 1.
        DataError: the source is empty.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share={share}: give a number above 0 and up to 1, the part of the events to learn from")
    count = source.count if source.count is not None else sum(1 for _ in source.events())
    kept = round(share * count)
    if kept == 0:
        raise DataError(f"{source.name}: {count} events, and the first {share:.0%} of them is none")
    return islice(source.events(), kept), kept


@contextmanager
def progress_bar(console: Console) -> Iterator[Told]:
    """A bar that the trainer's progress callback moves; gone when the block ends, and never there but on a terminal."""
    columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    more = (TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, *more, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pretraining", total=None, loss="reading events")

        def told(_epoch: int, done: int, steps: int, loss: float) -> None:
            bar.update(task, completed=done, total=steps, loss=f"loss {loss:.3f}")

        yield told


def _settings(settings: TrainSettings, request: Request) -> TrainSettings:
    return settings if request.epochs is None else msgspec.structs.replace(settings, epochs=request.epochs)
