"""`stream-adapt pretrain`: a data set in, a model on disk out, with a progress bar on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from stream_adapt.datasets import Source, open_source
from stream_adapt.errors import ConfigError, DataError
from stream_adapt.models import Calibrator, Covariance, LearnerSpec, RuleName, write_model
from stream_adapt.record import UserEvent

if TYPE_CHECKING:  # torch takes seconds to import: only where it is used
    from stream_adapt.meta.objective import Settings
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
    calibrator: Calibrator = "none"
    epochs: int | None = None
    objective: str = "prequential"
    support: float | None = None  # of maml and fomaml
    seconds: float = 0.0  # time for training; 0: as long as it takes
    validate: str = "later"
    patience: int = 0
    accumulate: int = 1
    seed: int = 0
    device: str = "auto"


class Pretrained(msgspec.Struct):
    """What came of it."""

    folder: str
    version: str
    source: str
    events: int
    seconds: float
    objective: str
    figures: dict[str, float]  # on the events that were set aside, of a training that did not see them


def pretrain_source(request: Request, console: Console) -> Pretrained:
    """Learns the slow weights from a data set and writes a model.

    Raises:
        ConfigError, DataError, ModelError: each says what is wrong and what to do.
    """
    from stream_adapt.meta.trainer import pretrain

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
        calibrator=request.calibrator,
    )
    settings = _settings(request)
    with progress_bar(console, settings.objective.name) as told:
        validated = told.validated if console.is_terminal else None
        trained = pretrain(events, spec, settings, request.device, told, validated)
    about = {"source": source.name, "events": count, "share": request.share, "seed": request.seed, **trained.about}
    folder = write_model(
        request.registry, trained.weights, spec, trained.fitted, trained_on=about, figures=trained.figures
    )
    seconds = round(time.monotonic() - started, 3)
    return Pretrained(str(folder), folder.name, source.name, count, seconds, request.objective, trained.figures)


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


class Told:
    """Moves a bar: told of every step, and of the validation loss after every epoch."""

    def __init__(self, bar: Progress, objective: str) -> None:
        self._bar, self._task = bar, bar.add_task(f"pretraining, {objective}", total=None, loss="reading events")
        self._validation = ""

    def __call__(self, _epoch: int, done: int, steps: int, loss: float) -> None:
        self._bar.update(self._task, completed=done, total=steps, loss=f"loss {loss:.3f}{self._validation}")

    def validated(self, _epoch: int, loss: float) -> None:
        """The log-loss on what was set aside, after an epoch."""
        self._validation = f", validation {loss:.4f}"


@contextmanager
def progress_bar(console: Console, objective: str = "prequential") -> Iterator[Told]:
    """A bar that the trainer's callbacks move; gone when the block ends, and never there but on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    more = (TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, *more, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Told(bar, objective)


def _settings(request: Request) -> TrainSettings:
    from stream_adapt.meta.trainer import TrainSettings

    given: dict[str, Any] = {
        "objective": told_objective(request.objective, request.support),
        **{name: getattr(request, name) for name in ("seconds", "validate", "patience", "accumulate", "seed")},
    }
    if request.epochs is not None:
        given["epochs"] = request.epochs
    return TrainSettings(**given)


def told_objective(name: str, support: float | None) -> Settings:
    """The objective that a person named.

    Raises:
        ConfigError: there is no such objective, or it has no support events to be told of.
    """
    from stream_adapt.meta import objective

    if support is not None and name not in ("maml", "fomaml"):
        raise ConfigError(f"support={support:g}: only maml and fomaml have support events, objective is {name}")
    given = objective.Settings(name=name)  # type: ignore[arg-type]  # `make` refuses what is not one
    settings = given if support is None else msgspec.structs.replace(given, support=support)
    objective.make(settings)
    return settings
