"""The baseline `direct`: the learner without meta-learning, as well tuned as can be.

Tuned models without meta-learning often match meta-learners (Buffelli et al., arXiv 2308.08354), so this one has all
that ours has: the encoder, the content, the epochs, the rule that adapts in service, and its code. What it lacks is
that training ever saw the rule. Its rates — how far a user may be from the mean of users, the noise, the leak, how far
items may move — are scalars chosen by coordinate descent over a grid, by the log-loss on the last fifth of the first
half, after a training on the part before it. Then it is trained on all of the first half, and items are settled, as
pretraining does in the end.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from stream_adapt.adapt import Adapter
from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.halves import Half, alone
from stream_adapt.models import LearnerSpec, Model, SlowWeights, read_model, write_model

if TYPE_CHECKING:  # torch takes seconds to import: only where it is used
    from stream_adapt.meta.direct import Directly
    from stream_adapt.meta.sequences import Log
    from stream_adapt.meta.trainer import Progress, TrainSettings

#: Share of the first half that the rates are tuned after; the rest is what they are tuned on.
TUNED_ON = 0.8
#: How often each rate is chosen anew, the others as they are.
ROUNDS = 2


class Rates(msgspec.Struct, frozen=True):
    """What is tuned."""

    taste: float = 4.0  # prior variance of a taste coordinate, times the mean variance of the training users'
    bias: float = 8.0  # the same of a user's bias
    noise: float = 1.0  # σ²
    leak: float = 0.003  # a; b is three times that
    items: float = 0.3  # times V₀ of our learner
    scores: float = 1.0  # times the level scores that the levels' frequencies give
    slope: float = 1.0  # α


#: What is tried; the first value of each rate is where the search starts.
GRID: dict[str, tuple[float, ...]] = {
    "taste": (4.0, 0.5, 1.0, 2.0, 8.0, 16.0, 32.0, 64.0),
    "bias": (8.0, 1.0, 2.0, 4.0, 16.0, 32.0, 64.0),
    "noise": (1.0, 0.25, 0.5, 2.0, 4.0),
    "leak": (0.003, 0.0, 0.001, 0.01, 0.03),
    "items": (0.3, 0.03, 0.1, 1.0, 3.0),
    "scores": (1.0, 0.5, 0.7, 1.4, 2.0),
    "slope": (1.0, 0.6, 0.8, 1.25, 1.6),
}

Track = Callable[[Sequence[str], str], Iterable[str]]


def model(
    first: Half,
    spec: LearnerSpec,
    settings: TrainSettings,
    device: str = "auto",
    track: Track = lambda rates, _: rates,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Model, Rates]:
    """Tunes and trains on the first half; the model is served as ours is.

    Raises:
        DataError, ConfigError, ModelError: as `meta.trainer.pretrain`.
    """
    from stream_adapt.meta import direct, sequences
    from stream_adapt.meta.settling import settled

    spec = msgspec.structs.replace(spec, implicit=0, calibrator="none")

    def train(log: Log) -> Directly:
        return direct.train(log, spec, settings, device, progress, clock)

    cut = int(TUNED_ON * len(first))
    rehearsal = train(sequences.read_log(first.events[:cut], spec))
    rates = tuned(rehearsal, spec, alone(first.events[cut:], spec), track)
    log = sequences.read_log(first.events, spec)
    trained = train(log)
    weights = settled(with_rates(trained, rates), spec, trained.fitted, log, settings.settled)
    return _read_back(weights, spec, trained), rates


def tuned(trained: Directly, spec: LearnerSpec, rest: Half, track: Track = lambda rates, _: rates) -> Rates:
    """The rates with the lowest log-loss on the rest of the half, its users new."""
    said: dict[Rates, float] = {}

    def loss(rates: Rates) -> float:
        if rates not in said:
            said[rates] = _loss(served(trained, spec, rates), rest)
        return said[rates]

    rates = Rates(**{name: values[0] for name, values in GRID.items()})
    for name in track([*GRID] * ROUNDS, "tuning direct"):
        rates = min((msgspec.structs.replace(rates, **{name: value}) for value in GRID[name]), key=loss)
    return rates


def served(trained: Directly, spec: LearnerSpec, rates: Rates) -> Model:
    """The model with these rates."""
    return _read_back(with_rates(trained, rates), spec, trained)


def _read_back(weights: SlowWeights, spec: LearnerSpec, trained: Directly) -> Model:
    """The model, written to disk and read back with all that is checked on the way."""
    with tempfile.TemporaryDirectory(prefix="stream-adapt-") as folder:
        return read_model(write_model(Path(folder), weights, spec, trained.fitted))


def with_rates(trained: Directly, rates: Rates) -> SlowWeights:
    """θ as trained, with rates set by hand."""
    weights, spread = trained.weights, np.maximum(trained.user_variance, 1e-4)
    variance = np.full_like(weights.prior_variance, rates.taste * spread[:-1].mean())
    variance[-1] = rates.bias * spread[-1]
    return msgspec.structs.replace(
        weights,
        prior_variance=variance,
        noise=np.array([rates.noise], np.float32),
        leak=np.array([rates.leak, 3 * rates.leak], np.float32),
        item_variance=weights.item_variance * np.float32(rates.items),
        level_scores=weights.level_scores * np.float32(rates.scores),
        readout=np.array([rates.slope, math.pi / 8, 0.0], np.float32),
    )


def _loss(model: Model, rest: Half) -> float:
    adapter, said = Adapter(model, device="cpu"), []
    for batch in rest.batches:
        said.append(adapter.adapt(batch).score)
        adapter.commit()
    return metrics.log_loss(np.concatenate(said)[rest.taught], rest.targets)
