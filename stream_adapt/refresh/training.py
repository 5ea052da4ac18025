"""Training a challenger, as a process of its own: `python -m stream_adapt.refresh.training FOLDER`.

In the folder lies `job.json`; what comes of it is written there, whole or not at all: `progress.json` now and then, and
`outcome.json` at the end. Whatever happens here, the champion serves: a process that crashes leaves no outcome, and one
that hangs is ended from outside.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from stream_adapt import logs, service
from stream_adapt.config import Config
from stream_adapt.errors import DataError, StreamAdaptError
from stream_adapt.kafka import properties
from stream_adapt.kafka.reading import TopicReader
from stream_adapt.models import Model, Registry, write_model
from stream_adapt.refresh.window import Window, read_window

log = structlog.get_logger(__name__)

JOB, PROGRESS, OUTCOME = "job.json", "progress.json", "outcome.json"
#: Between two reports of progress.
_REPORT_S = 2.0


class Job(msgspec.Struct, frozen=True):
    """What is to be trained. Secrets are in the configuration as references alone."""

    config: dict[str, Any]
    champion: str
    now_ms: int  # the window ends here
    newer: dict[int, int] = {}  # by partition: offset from which on the world was another one


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of it: a challenger, or why there is none."""

    challenger: str | None = None
    reason: str = ""
    figures: dict[str, float] = {}
    trained_until: dict[int, int] = {}
    no_better: bool = False  # it did what it should, and found nothing that helps


class Progress(msgspec.Struct, frozen=True):
    """How far it is."""

    stage: str  # reading or training
    done: int = 0
    steps: int = 0
    loss: float | None = None


Report = Callable[[Progress], None]


def train(job: Job, report: Report = lambda _progress: None) -> Outcome:
    """Reads the window, trains, and writes a challenger into the registry.

    Raises:
        StreamAdaptError: the input or the registry cannot be read or written, or training diverged.
    """
    config = Config.model_validate(job.config)
    champion = Registry(config.model.path).read(job.champion)
    report(Progress("reading"))
    window = _window(config, service.as_configured(config, champion), job)
    return challenge(config, champion, window, moved=bool(job.newer), report=report)


def challenge(
    config: Config,
    champion: Model,
    window: Window,
    *,
    moved: bool,
    report: Report = lambda _progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Trains on a window, and writes a challenger into the registry.

    Args:
        config: `refresh` says how, `model` where.
        champion: as it is in the registry.
        window: what is learned from.
        moved: whether the world is known to have moved within the window.
        report: told how far it is.
        clock: that `refresh.training_s` is measured by.

    Raises:
        StreamAdaptError: the registry cannot be written, or training diverged.
    """
    import torch

    from stream_adapt.meta import refine

    settings = config.refresh
    torch.set_num_threads(settings.threads)
    served = service.as_configured(config, champion)
    log.info("training", events=len(window.log), champion=champion.version, newer=int(window.newer.sum()))
    reported = 0.0

    def told(_epoch: int, done: int, steps: int, loss: float) -> None:
        nonlocal reported
        if time.monotonic() - reported > _REPORT_S:
            reported = time.monotonic()
            report(Progress("training", done, steps, loss))

    how = msgspec.structs.replace(refine.SETTINGS, seconds=settings.training_s, seed=settings.seed)
    newer = window.newer if moved else None
    try:
        trained = refine.refine(window.log, served, how, settings.device, newer=newer, progress=told, clock=clock)
    except refine.NoBetter as found:
        return Outcome(reason=str(found), figures=_finite(found.figures), no_better=True)
    folder = write_model(
        Registry(config.model.path).path,
        trained.weights,
        champion.spec,
        trained.fitted,
        trained_on={"source": window.about.source, **trained.about},
        figures=_finite(trained.figures),
        parent=champion.version,
        window=window.about,
        rows=trained.rows,
    )
    return Outcome(folder.name, figures=_finite(trained.figures), trained_until=window.ends)


def _window(config: Config, served: Model, job: Job) -> Window:
    decoder = service.build_decoder(config, served)
    with TopicReader(properties.common(config), config.topic("events")) as reader:
        return read_window(
            reader,
            decoder,
            since_ms=job.now_ms - int(config.refresh.window_s * 1000),
            most=config.refresh.window_events,
            newer=job.newer,
        )


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value == value and abs(value) != float("inf")}


def write(path: Path, value: msgspec.Struct) -> None:
    """Writes a value as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)


def main(folder: Path) -> int:
    """Does the job in the folder; exit code 0 says that there is an outcome."""
    job = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    config = Config.model_validate(job.config)
    logs.configure(config.log)
    os.nice(config.refresh.nice)
    try:
        outcome = train(job, lambda progress: write(folder / PROGRESS, progress))
    except (DataError, StreamAdaptError) as error:
        outcome = Outcome(reason=f"{type(error).__name__}: {error}")
    write(folder / OUTCOME, outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
