"""Pretraining: from a log of events to the slow weights θ that service reads.

AdamW minimises the objective over users' sequences. What belongs to an item's id — its embedding, its co-occurrence
features, its popularity — is folded into one `item_vector` at the end: service knows the sum alone. Figures are those
of a training that stops earlier, judged on the events that follow, to which the readout is fitted, too (`readout`); the
weights are of a second one, on everything. In the end the rule itself goes over the log, and θ takes over part of what
that teaches of items (`settling`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_adapt.errors import ConfigError, DataError, ModelError
from stream_adapt.learner.encoder import FittedFeature
from stream_adapt.learner.rules.batching import implicit_scale
from stream_adapt.meta import axes, calibrator, objective, readout, sequences
from stream_adapt.meta.objective.contract import Problem, Rule, Sequences
from stream_adapt.meta.objective.gradient import Gradient
from stream_adapt.meta.objective.kalman import Kalman
from stream_adapt.meta.objective.prequential import predict
from stream_adapt.meta.pace import Clock, Pace, Validate, Watch, held_out
from stream_adapt.meta.sequences import Columns, Log, Vocabulary
from stream_adapt.meta.settling import settled
from stream_adapt.models import Floats32, LearnerSpec, RuleName, SlowWeights
from stream_adapt.record import UserEvent


class TrainSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to train. The defaults were chosen on the first halves of MovieLens-100K and MovieLens-1M."""

    epochs: int = 0  # 0: by the size of the log, EPOCHS
    rate: float = 0.0  # AdamW's, after warm-up; a cosine brings it to 0. 0: by the size of the log, RATES
    warm_up: float = 0.15  # share of all steps
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # norm of the gradient
    item_decay: float = 2.0  # decoupled, times the rate, on the vectors of item ids, of items with COMMON events
    item_bias_decay: float = 0.4  # the same, on their biases
    implicit_decay: float = 2.0  # the same, on what the implicit state adds to the prior mean
    averaged: float = 0.4  # share of the steps, the last ones, after which the parameters are averaged
    id_dropout: float = 0.2  # share of events that see an item without its id, so that unseen items lean on content
    longest: int = 512  # events in a training window; 256 cost AUC 0.0004 on MovieLens-1M, nothing on 100K
    batch_events: int = 0  # in one step, padding included; 0: about STEPS steps an epoch
    max_items: int = 200_000  # known by id: the most frequent
    cooccurrence: int = 64  # K, at most one for ITEMS_PER_COOCCURRENCE items
    cooccurrence_items: int = 5_000  # that take part, the most frequent: memory is the square of it
    item_bias_variance: float = 0.2  # V₀
    item_offset_variance: float = 0.05  # of each coordinate
    settled: float = 0.5  # share of what the rule then learns of items in a pass over the log that θ takes over
    outcome_weight: float = 0.25  # λ of the Kalman rule in service, from 0 to 1; training itself has none
    # Of the events, set aside; 0: no figures, no fitted readout, no λ, and half the time. None: by the size of the log.
    validation_share: float | None = None
    validate: Validate = "later"  # what is set aside: the last events, or all those of some users
    patience: int = 0  # epochs without a lower log-loss there after which training stops; 0: it goes on to the end
    objective: objective.Settings = objective.Settings()
    accumulate: int = 1  # batches whose gradients make one step
    seconds: float = 0.0  # time for all trainings together, if `epochs` would take longer; 0: as long as it takes
    seed: int = 0


#: Steps of an epoch, unless the batches would get smaller or larger than the bounds. On events 40–50 k of
#: MovieLens-100K, batches of 8192 events had an AUC 0.026 below batches of 2048; those of 512 to 1024 did best. On
#: events 400–500 k of MovieLens-1M, 8192 did better than 2048 and 4096 (by 0.002 to 0.005) and as well as 16,384.
STEPS, SMALLEST_BATCH, LARGEST_BATCH = 50, 512, 8_192
#: Windows change their neighbours from epoch to epoch: lengths are taken for up to so much longer when sorted.
JITTER = 0.2
#: Rate for logs up to SMALL_LOG events, and beyond: at 0.01 MovieLens-100K had a log-loss 0.005 higher.
RATES, SMALL_LOG = (0.006, 0.01), 100_000
#: Epochs likewise. With 9 in place of 7 MovieLens-1M had a log-loss 0.0008 lower, MovieLens-100K one 0.002 higher.
EPOCHS = (7, 9)
#: Share that is set aside likewise: the readout of a small log is fitted to few events. With 0.3 in place of 0.1 the
#: calibration error on MovieLens-100K's first half fell from 0.017 to 0.014; more gained nothing on MovieLens-1M.
SHARES = (0.3, 0.1)
#: A training of so few events is over at once, but for what a process does only once.
WARM_UP_EVENTS = 500
#: Where σ² starts. Under the gradient rule, which does not learn it, it only says how sure pretraining is of an item: 1
#: over the curvature of the logistic loss at ½.
NOISE: dict[RuleName, float] = {"kalman": 2.0, "gradient": 4.0}
#: Decay of an item's own vector goes with √(COMMON/events): with few events it rests on what its content says. Over the
#: same for all: AUC +0.0005, log-loss −0.0005, GAUC +0.001 on both MovieLens sets; 300 in place of 50 was worse.
COMMON = 50.0
#: With more co-occurrence features than that the small log is overfitted: AUC −0.004 on MovieLens-100K with 64.
ITEMS_PER_COOCCURRENCE = 40


class Trained(msgspec.Struct, frozen=True):
    """What a training made: θ, the fitted features it reads, how well it did on events it did not see, and how."""

    weights: SlowWeights
    fitted: tuple[FittedFeature, ...]
    figures: dict[str, float]
    about: dict[str, Any] = {}  # objective, budget, epochs: for the manifest


#: Called after each step with the epoch (from 0), the steps done, the steps of all, and the step's loss per event.
Progress = Callable[[int, int, int, float], None]
#: Called with an epoch (from 0) and the log-loss, after it, of what was set aside.
Validated = Callable[[int, float], None]


def pretrain(
    events: Iterable[UserEvent] | Log,
    spec: LearnerSpec,
    settings: TrainSettings | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    validated: Validated | None = None,
    clock: Clock = time.monotonic,
) -> Trained:
    """Trains θ on events in the order in which service would learn them. On the CPU a seed fixes every bit of it,
    unless the time budget ends it.

    Args:
        events: the log; events without feedback are skipped.
        spec: what is learned.
        settings: how to train.
        device: auto (CUDA where there is one), cpu or cuda.
        progress: told of every step.
        validated: told of the log-loss on what was set aside, after every epoch.
        clock: that the budget is measured by.

    Raises:
        DataError: there is too little to learn from.
        ConfigError: the device is unknown or absent, or a setting makes no sense.
        ModelError: training diverged.
    """
    return pretrain_each(events, [spec], settings, device, progress, validated, clock)[0]


def pretrain_each(
    events: Iterable[UserEvent] | Log,
    specs: Sequence[LearnerSpec],
    settings: TrainSettings | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    validated: Validated | None = None,
    clock: Clock = time.monotonic,
) -> list[Trained]:
    """`pretrain` for specs that differ in covariance and calibrator alone: they share the training, not the readout."""
    settings, spec = settings or TrainSettings(), specs[0]
    log = events if isinstance(events, Log) else sequences.read_log(events, spec)
    settings = msgspec.structs.replace(settings, epochs=settings.epochs or EPOCHS[len(log) > SMALL_LOG])
    check_log(log, spec)
    where = torch_device(device)
    held = held_out(log, settings.validate, set_aside(settings, len(log)), settings.seed)  # [n]
    if not held.any():
        settings = msgspec.structs.replace(settings, outcome_weight=0.0)  # what is not fitted stays as in training
    steps = Steps(progress, trainings=2 if held.any() else 1)
    spent = _warmed_up(log, spec, where, clock) if settings.seconds else 0.0
    timed = _timed(settings, int(np.sum(~held)) if held.any() else 0, len(log), spent)
    figures: dict[str, float] = {}
    stop_after, part, corrections = settings.epochs, 1.0, [readout.Correction() for _ in specs]
    if held.any():
        encoded: list[Columns] = []  # once: the vocabulary stays

        def judge(parameters: Parameters, vocabulary: Vocabulary) -> dict[str, float]:
            if not encoded:
                encoded.append(sequences.encode(log, vocabulary).to(where))
            return figures_of(parameters, encoded[0], held, settings)

        watch = Watch(lambda p, v: judge(p, v)["log_loss"], settings.patience, validated)
        rehearsal, vocabulary = train(log.where(~held), spec, timed[0], where, steps, watch=watch, clock=clock)
        figures = judge(rehearsal, vocabulary)
        # What is fitted to a training fits no other that went further.
        stop_after = max(1, watch.epochs) if settings.patience else stop_after
        part = steps.share if steps.in_time else part
        rehearsed = _folded_for(specs, rehearsal, vocabulary, encoded[0], settings)
        pairs = zip(rehearsed, specs, strict=True)
        for at, (weights, each) in enumerate(pairs):
            corrections[at] = readout.fit(weights, each, vocabulary.fitted, log.where(held))
            if each.calibrator_terms:
                corrected, known = corrections[at].apply(weights), vocabulary.fitted
                coefficients = calibrator.fit(corrected, each, known, log.where(~held), log.where(held))
                corrections[at] = corrections[at]._replace(calibrator=coefficients)
    parameters, vocabulary = train(log, spec, timed[1], where, steps, stop_after=stop_after, part=part, clock=clock)
    folded = _folded_for(specs, parameters, vocabulary, sequences.encode(log, vocabulary).to(where), settings)
    epochs = round(steps.share * part * settings.epochs, 2)
    about = {"objective": objective.told(settings.objective), "epochs": epochs, "budget_s": settings.seconds}
    return [
        Trained(
            settled(correction.apply(weights), each, vocabulary.fitted, log, settings.settled),
            vocabulary.fitted,
            figures,
            about,
        )
        for correction, weights, each in zip(corrections, folded, specs, strict=True)
    ]


def _warmed_up(log: Log, spec: LearnerSpec, device: torch.device, clock: Clock) -> float:
    """Seconds that were spent on what a process's first training does once: several, on imports of torch's."""
    started = clock()
    train(log.head(WARM_UP_EVENTS), spec, TrainSettings(epochs=1), device, Steps(None, 1))
    return clock() - started


def _timed(settings: TrainSettings, rehearsed: int, events: int, spent: float) -> tuple[TrainSettings, TrainSettings]:
    """Settings of a training on some events and of one on all: what time is left goes by what each has to read."""
    left = max(settings.seconds - spent, 0.1 * settings.seconds)
    seconds = left * rehearsed / (rehearsed + events)
    first, rest = (msgspec.structs.replace(settings, seconds=s) for s in (seconds, left - seconds))
    return first, rest


def set_aside(settings: TrainSettings, events: int) -> float:
    """The share of so many events that is set aside."""
    return SHARES[events > SMALL_LOG] if settings.validation_share is None else settings.validation_share


def torch_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda.

    Raises:
        ConfigError: it is none of these, or there is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name!r} must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': this machine has no CUDA device that torch can use; take auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_log(log: Log, spec: LearnerSpec) -> None:
    """Whether there is something to learn from.

    Raises:
        DataError: one of the two kinds of feedback is missing.
    """
    yes = int((log.levels >= spec.feedback.target_level).sum())
    if not 0 < yes < len(log):
        raise DataError(
            f"{len(log)} events with feedback, {yes} of them at or above {spec.feedback.target!r}: "
            "training needs both kinds; check the events and the configuration of feedback"
        )


class Parameters(nn.Module):
    """θ as it is trained: positive numbers as logarithms, what an item's id says in three parts.

    I known items, K co-occurrence features, F and A rows of the feature tables, L levels, D dimensions.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        cooccurrence: Tensor,
        levels: Tensor,
        spec: LearnerSpec,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        width = spec.dimension + 1

        def table(rows: int) -> nn.Parameter:
            values = torch.randn(rows, width, generator=generator) * 0.1
            values[:, -1] = 0.0
            return nn.Parameter(values)

        self.id_vector = nn.Parameter(table(len(vocabulary.item_hash)).data[:, :-1].clone())  # [I, D]
        self.id_bias = nn.Parameter(torch.zeros(len(vocabulary.item_hash)))  # [I]
        self.cooccurrence_weight = table(cooccurrence.shape[1])  # [K, D+1]
        self.popularity_weight = table(1)  # [1, D+1]
        self.feature_vector = table(vocabulary.rows("item"))  # [F, D+1]
        self.user_vector = nn.Parameter(torch.zeros(vocabulary.rows("user"), width))  # [A, D+1]
        self.prior_mean = nn.Parameter(torch.zeros(width))  # [D+1]
        # P₀ or, of the gradient rule, its rates.
        self.log_prior_variance = nn.Parameter(torch.full((width,), math.log(0.5)))  # [D+1]
        scores, thresholds = _level_priors(levels, spec)
        self.level_scores = nn.Parameter(scores)  # [L]
        self.thresholds = nn.Parameter(thresholds)  # [L-1]
        self.bias = nn.Parameter(scores[levels].mean(0, keepdim=True))  # [1]
        self.log_noise = nn.Parameter(torch.tensor(math.log(NOISE[spec.rule])))
        leak = torch.tensor([0.003, 0.01]).log()  # [2]
        self.log_leak = nn.Parameter(leak.view(2, *[1] * (len(spec.leak_shape) - 1)).repeat(1, *spec.leak_shape[1:]))
        self.log_readout = nn.Parameter(torch.tensor([1.0, math.pi / 8]).log())  # [2] α, κ (MacKay, 1992)
        self.readout_bias = nn.Parameter(torch.zeros(1))  # [1] β
        hidden = spec.implicit
        self.implicit_id = nn.Parameter(torch.zeros(len(vocabulary.item_hash), hidden))  # [I, H]
        content = torch.randn(cooccurrence.shape[1], hidden, generator=generator) * 0.1
        self.implicit_cooccurrence = nn.Parameter(content)  # [K, H]
        self.implicit_map = nn.Parameter(torch.randn(hidden, width, generator=generator) * 0.1)  # [H, D+1]
        self.cooccurrence: Tensor
        self.popularity: Tensor
        self.rarity: Tensor
        self.register_buffer("cooccurrence", cooccurrence)  # [I+1, K]
        # Standardised but for the mean: an unknown item has 0 events, and its popularity must add nothing.
        popularity = torch.log1p(torch.from_numpy(vocabulary.item_events))
        popularity = torch.cat([popularity / popularity.std(correction=0).clamp_min(1e-3), torch.zeros(1)])
        self.register_buffer("popularity", popularity)  # [I+1]
        events = torch.from_numpy(vocabulary.item_events).clamp_min(1.0)
        self.register_buffer("rarity", (COMMON / events).sqrt())  # [I]
        self.target = spec.feedback.target_level
        self.spec = spec

    def decays(self, settings: TrainSettings) -> dict[str, float | Tensor]:
        """Decoupled decay of each parameter that has one; of a tensor's rows if they have one each."""
        return {
            "id_vector": settings.item_decay * self.rarity[:, None],
            "id_bias": settings.item_bias_decay,
            "implicit_id": settings.item_decay,
            "implicit_map": settings.implicit_decay,
        }

    def item_content(self) -> Tensor:
        """What co-occurrence and popularity add to x̃ `[I+1, D+1]`; zeros for the unknown item, the last."""
        return self.cooccurrence @ self.cooccurrence_weight + self.popularity[:, None] * self.popularity_weight

    def item_id(self) -> Tensor:
        """What the id itself adds to x̃ `[I+1, D+1]`; zeros for the unknown item, the last."""
        return nn.functional.pad(torch.cat([self.id_vector, self.id_bias[:, None]], 1), (0, 0, 0, 1))

    def implicit_item(self) -> Tensor:
        """f `[I+1, H]`: what an event adds to its user's implicit state; zeros for the unknown item, the last."""
        return nn.functional.pad(self.implicit_id, (0, 0, 0, 1)) + self.cooccurrence @ self.implicit_cooccurrence

    def readout(self) -> Tensor:
        """α, κ, β `[3]`."""
        return torch.cat([self.log_readout.exp(), self.readout_bias])

    def all_thresholds(self) -> Tensor:
        """What to add to the target's logit for each threshold `[L−1]`; 0 at the target."""
        return torch.cat(
            [self.thresholds[: self.target - 1], torch.zeros_like(self.bias), self.thresholds[self.target :]]
        )

    def rule(self) -> Rule:
        """The update rule under this θ: the one place in training that asks for its name."""
        make = Kalman if self.spec.rule == "kalman" else partial(Gradient, normalized=self.spec.normalized)
        noise, leak = self.log_noise.exp(), self.log_leak.exp()
        return make(self.log_prior_variance.exp(), noise, leak, self.readout(), self.level_scores)

    def problem(self, columns: Columns, numbers: Tensor, real: Tensor, id_kept: Tensor | None) -> Problem:
        """What objectives judge of events `numbers` `[B, T]`; see `forward`."""
        seen = self(columns, numbers, real, id_kept)
        return Problem(self.rule(), seen, columns.levels[numbers], self.all_thresholds(), self.target)

    def forward(self, columns: Columns, numbers: Tensor, real: Tensor, id_kept: Tensor | None) -> Sequences:
        """Reads events `numbers` `[B, T]`; where `id_kept` `[B, T]` is 0 an item's id says nothing."""
        events, items = numbers.flatten(), columns.items[numbers]  # [B*T], [B, T]
        ids = self.item_id()[items]  # [B, T, D+1]
        vectors = self.item_content()[items] + (ids if id_kept is None else ids * id_kept[..., None])  # [B, T, D+1]
        for encoded in (columns.of_item, columns.of_event):
            vectors = vectors + encoded.sums(events, self.feature_vector).view_as(vectors)  # [B, T, D+1]
        means = self.prior_mean + columns.of_user.sums(events, self.user_vector).view_as(vectors)  # [B, T, D+1]
        x = nn.functional.pad(vectors[..., :-1], (0, 1), value=1.0)  # [B, T, D+1]
        lean = ((self._implicit(items, real) @ self.implicit_map) * x).sum(-1)  # [B, T]
        prior = self.bias + vectors[..., -1] + (means * x).sum(-1) + lean  # [B, T]
        scores = self.level_scores[columns.levels[numbers]]  # [B, T]
        return Sequences(x, prior, scores, _gaps(columns.hours[numbers]), real, lean)

    def _implicit(self, items: Tensor, real: Tensor) -> Tensor:
        """ψ `[B, T, H]` of what came before each event, from the items `[B, T]` alone."""
        added = self.implicit_item()[items] * real[..., None]  # [B, T, H]
        scale = implicit_scale(torch.arange(items.shape[1], device=items.device))  # [T]
        return (added.cumsum(1) - added) * scale[:, None].to(added.dtype)


def _gaps(hours: Tensor) -> Tensor:
    """Hours since the event before `[B, T]`; 0 at the first, and for an event that came late."""
    return nn.functional.pad(hours.diff(dim=1), (1, 0)).clamp_min(0.0).float()


def _level_priors(levels: Tensor, spec: LearnerSpec) -> tuple[Tensor, Tensor]:
    """Where to start: level scores `[L]` and threshold offsets `[L−1]` from how often each level was said."""
    counts = torch.bincount(levels, minlength=len(spec.feedback.levels)).double() + 1.0  # [L]
    shares = counts / counts.sum()  # [L]
    below = shares.cumsum(0) - shares  # [L]
    cut = torch.logit(below[spec.feedback.target_level])
    scores = torch.logit(below + shares / 2) - cut  # [L]
    return scores.float(), (cut - torch.logit(below[1:])).float()


class Steps:
    """Counts the steps of one or two trainings as one."""

    def __init__(self, progress: Progress | None, trainings: int) -> None:
        self._progress, self.left, self._before = progress, trainings, 0
        self.share = 0.0  # of its planned steps that the training before did
        self.in_time = False  # whether it was the clock that ended it

    def __call__(self, epoch: int, pace: Pace, loss: float) -> None:
        """A training did a step; the next training is taken to be as long."""
        if not math.isfinite(loss):
            raise ModelError(
                f"training diverged: the loss of step {pace.done} of {pace.steps} is {loss}; lower the rate"
            )
        if self._progress is not None:
            self._progress(epoch, self._before + pace.shown, self._before + pace.steps * self.left, loss)

    def finish(self, pace: Pace) -> None:
        """A training is over."""
        self._before += pace.shown
        self.left -= 1
        self.share, self.in_time = pace.done / pace.steps, pace.over and pace.done < pace.steps


def train(
    log: Log,
    spec: LearnerSpec,
    settings: TrainSettings,
    device: torch.device,
    told: Steps,
    *,
    watch: Watch | None = None,
    stop_after: int | None = None,
    part: float = 1.0,
    clock: Clock = time.monotonic,
    kind: Callable[..., Parameters] = Parameters,
    vocabulary: Vocabulary | None = None,
) -> tuple[Parameters, Vocabulary]:
    """Trains θ, as `kind` makes it, until epochs (at most `stop_after`) or seconds are over, or `watch` ends it.

    Of all steps a `part` is planned, by the end of which the rate has come down. Once `averaged` of these are left, θ
    is the mean of what the steps since then made. The vocabulary is that of the log, if it is not given.
    """
    started, generator = clock(), torch.Generator().manual_seed(settings.seed)
    number = settings.epochs or EPOCHS[len(log) > SMALL_LOG]
    vocabulary = vocabulary or sequences.fit(log, spec, settings.max_items)
    columns = sequences.encode(log, vocabulary)
    content = _cooccurrence(columns, len(vocabulary.item_hash), settings)
    parameters = kind(vocabulary, content, columns.levels, spec, generator).to(device)
    windows, events = sequences.windows(columns.users, settings.longest), settings.batch_events or _usual(len(log))
    epochs = [_epoch(windows, events, settings.accumulate, generator) for _ in range(number)]
    columns, aim = columns.to(device), objective.make(settings.objective)
    pace = Pace(max(1, round(part * sum(map(len, epochs)))), settings.seconds, clock, started)
    optimiser, schedule = _optimiser(parameters, settings, settings.rate or RATES[len(log) > SMALL_LOG], pace)
    averaged = torch.optim.swa_utils.AveragedModel(parameters)
    served = parameters
    for epoch, batches in enumerate(epochs[:stop_after]):
        for chosen in batches:
            losses = []
            optimiser.zero_grad()
            for batch in chosen:
                loss = _loss(parameters, columns, batch, aim, settings.id_dropout, generator)
                torch.autograd.backward(loss / len(chosen))
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(parameters.parameters(), settings.clip)
            optimiser.step()
            pace.advance()
            schedule.step()
            if pace.at > (1.0 - settings.averaged) * pace.steps:
                averaged.update_parameters(parameters)
                served = cast("Parameters", averaged.module)
            told(epoch, pace, sum(losses) / len(losses))
            if pace.over:
                break
        if pace.over or (watch is not None and watch.enough(epoch, served, vocabulary)):
            break
    told.finish(pace)
    if watch is not None:
        watch.restore(served)
    return served, vocabulary


def _usual(events: int) -> int:
    """Events in one step, for about STEPS steps an epoch."""
    return min(max(events // STEPS, SMALLEST_BATCH), LARGEST_BATCH)


def _cooccurrence(columns: Columns, known: int, settings: TrainSettings) -> Tensor:
    dimensions = min(settings.cooccurrence, known // ITEMS_PER_COOCCURRENCE)
    return sequences.cooccurrence(columns, known, dimensions, settings.cooccurrence_items, settings.seed)


def _epoch(windows: list[Tensor], events: int, accumulate: int, generator: torch.Generator) -> list[list[list[Tensor]]]:
    """An epoch's batches in a random order, as many together as make a step; no two epochs have the same batches."""
    batches = _batches(windows, events, 1.0 + JITTER * torch.rand(len(windows), generator=generator))
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [[batches[i] for i in order[at : at + accumulate]] for at in range(0, len(order), accumulate)]


def _batches(windows: list[Tensor], events: int, jitter: Tensor | None = None) -> list[list[Tensor]]:
    """Windows of like lengths together, as many as make about `events` with padding.

    `jitter` `[windows]` is what each length is multiplied with before they are sorted.
    """
    lengths = torch.tensor([len(window) for window in windows]) * (1.0 if jitter is None else jitter)  # [windows]
    batches: list[list[Tensor]] = [[]]
    longest = 0
    for place in torch.sort(lengths, descending=True, stable=True).indices.tolist():
        window = windows[place]
        longest = max(longest, len(window))
        if batches[-1] and (len(batches[-1]) + 1) * longest > events:
            batches.append([])
            longest = len(window)
        batches[-1].append(window)
    return batches


def _optimiser(
    parameters: Parameters, settings: TrainSettings, rate: float, pace: Pace
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    decays, named = parameters.decays(settings), dict(parameters.named_parameters())
    by_row = [(named[name], decay) for name, decay in decays.items() if isinstance(decay, Tensor)]
    whole = {name: decay for name, decay in decays.items() if not isinstance(decay, Tensor)}
    groups = [{"params": [p], "weight_decay": whole.get(name, 0.0)} for name, p in named.items()]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=settings.betas)
    optimiser.register_step_post_hook(partial(_shrink, by_row))
    warm = max(1, round(settings.warm_up * pace.steps))

    def share(_: int) -> float:
        falling = min(max(0.0, pace.at - warm) / max(1, pace.steps - warm), 1.0)
        return min((pace.at + 1) / warm, 0.5 * (1.0 + math.cos(math.pi * falling)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, share)


@torch.no_grad()
def _shrink(by_row: list[tuple[nn.Parameter, Tensor]], optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """What AdamW's decay does, with a decay for each row."""
    rate = optimiser.param_groups[0]["lr"]
    for parameter, decay in by_row:
        parameter.mul_(1.0 - rate * decay)


def _loss(
    parameters: Parameters,
    columns: Columns,
    batch: list[Tensor],
    aim: objective.Objective,
    id_dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean loss per event of one batch of windows."""
    numbers, real = sequences.padded(batch)  # [B, T]
    id_kept = (torch.rand(numbers.shape, generator=generator) >= id_dropout).float()  # [B, T]
    device = columns.users.device
    numbers, real, id_kept = numbers.to(device), real.to(device), id_kept.to(device)
    try:
        return aim.judge(parameters.problem(columns, numbers, real, id_kept)).mean()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # K + σ²I has no root only once its numbers overflow.
        raise ModelError(f"training diverged: {error}; lower the rate") from error


def _folded_for(
    specs: Sequence[LearnerSpec],
    parameters: Parameters,
    vocabulary: Vocabulary,
    columns: Columns,
    settings: TrainSettings,
) -> list[SlowWeights]:
    """θ for each spec: as trained, or in axes of its own for a diagonal covariance."""
    weights = fold(parameters, vocabulary, settings)
    if parameters.spec.rule == "kalman":
        weights = msgspec.structs.replace(weights, outcome_weight=np.array([settings.outcome_weight], np.float32))
    narrow = [spec.rule == "kalman" and spec.covariance == "diagonal" for spec in specs]
    turned = axes.turned(weights, _second_moment(parameters, columns)) if any(narrow) else weights
    both = zip(specs, (turned if each else weights for each in narrow), strict=True)
    return [calibrator.without(each, spec, vocabulary.item_mean) for spec, each in both]


@torch.no_grad()
def _second_moment(parameters: Parameters, columns: Columns) -> npt.NDArray[np.float64]:
    """Mean of x xᵀ `[D, D]` over at most `MOMENT_EVENTS` events, spread evenly."""
    numbers = torch.linspace(0, len(columns) - 1, min(len(columns), MOMENT_EVENTS)).long()[:, None]  # [m, 1]
    numbers = numbers.to(columns.users.device)
    x = parameters(columns, numbers, torch.ones_like(numbers, dtype=torch.bool), None).x[:, 0, :-1].double()  # [m, D]
    moment: npt.NDArray[np.float64] = (x.T @ x / len(x)).cpu().numpy()
    return moment


def fold(parameters: Parameters, vocabulary: Vocabulary, settings: TrainSettings) -> SlowWeights:
    """θ as service reads it."""

    def array(tensor: Tensor) -> Floats32:
        return tensor.detach().cpu().numpy().astype(np.float32)

    items = parameters.item_id() + parameters.item_content()  # [I+1, D+1]
    return SlowWeights(
        item_hash=vocabulary.item_hash,
        item_vector=array(items[:-1]),
        item_events=vocabulary.item_events,
        feature_vector=array(parameters.feature_vector),
        user_vector=array(parameters.user_vector),
        prior_mean=array(parameters.prior_mean),
        prior_variance=array(parameters.log_prior_variance.exp()),
        implicit_item=array(parameters.implicit_item()[:-1]),
        implicit_map=array(parameters.implicit_map),
        level_scores=array(parameters.level_scores),
        bias=array(parameters.bias),
        noise=array(parameters.log_noise.exp()[None]),
        leak=array(parameters.log_leak.exp()),
        readout=array(parameters.readout()),
        item_variance=np.array([settings.item_bias_variance, settings.item_offset_variance], dtype=np.float32),
    )


#: Events that the second moment of x is taken over: enough for its D·(D+1)/2 numbers.
MOMENT_EVENTS = 32_768
#: Events judged at once, padding included: bounds memory, and changes no figure.
FIGURE_EVENTS = 8192


@torch.no_grad()
def figures_of(
    parameters: Parameters, columns: Columns, held: npt.NDArray[np.bool_], settings: TrainSettings
) -> dict[str, float]:
    """AUC and log-loss, adapted and frozen, of the events `held` `[n]`; items stay as trained.

    Of a user's events only the last `longest` are read.
    """
    judged = torch.from_numpy(held)  # [n]
    windows = [w for w in sequences.last_windows(columns.users.cpu(), settings.longest) if judged[w].any()]
    said = [_judge(parameters, columns, batch, judged) for batch in _batches(windows, FIGURE_EVENTS)]
    adapted, frozen, levels = torch.cat(said, 1).cpu()  # [m] each
    target = levels >= parameters.target  # [m]
    return {
        "events": float(len(target)),
        "auc": _auc(adapted, target),
        "log_loss": _log_loss(adapted, target),
        "frozen_auc": _auc(frozen, target),
        "frozen_log_loss": _log_loss(frozen, target),
    }


def _judge(parameters: Parameters, columns: Columns, batch: list[Tensor], judged: Tensor) -> Tensor:
    """Logits adapted and frozen, and levels, of a batch's events that are `judged` `[n]`: `[3, m]`."""
    numbers, real = sequences.padded(batch)  # [B, T]
    shown = real & judged[numbers]  # [B, T]
    numbers, real, shown = (t.to(columns.users.device) for t in (numbers, real, shown))
    problem = parameters.problem(columns, numbers, real, None)
    both = predict(problem), problem.rule.frozen(problem.seen)
    return torch.stack([*both, columns.levels[numbers].float()])[:, shown]  # [3, m]


def _log_loss(logits: Tensor, target: Tensor) -> float:
    return float(nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype)))


def _auc(logits: Tensor, target: Tensor) -> float:
    """Area under the ROC curve: the chance that a yes ranks above a no, ties counting half; NaN without both."""
    _, group, sizes = torch.unique(logits, return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0) - (sizes - 1) / 2.0)[group].double()  # [m]
    yes = int(target.sum())
    below = float(ranks[target].sum()) - yes * (yes + 1) / 2
    return below / (yes * (len(target) - yes)) if 0 < yes < len(target) else math.nan
