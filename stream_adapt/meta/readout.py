"""The last numbers of θ, σ² by level and the readout α, κ, β, fitted to what the rule says of events not trained on.

Training predicts events that it also learns item vectors from, with items at rest and the covariance in full. Service
does not: so after a training that stopped early, the rule itself goes over the events that follow, users cold and items
learning, and these numbers are moved to where its probabilities would have been most likely. What they moved by is
applied to the training on everything. Platt's scaling (1999) is the case of α and β alone. That levels differ in noise
training does not know: a user's one star says less of the next event than the scores of levels alone would have it.
The Kalman rule learns by the readout, too, so what it says is heard again with the readout that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stream_adapt.learner.encoder import EncodingCache, FeatureReader, FittedFeature, event_pairs
from stream_adapt.learner.rules import find
from stream_adapt.learner.rules.events import Array, Events, Scores
from stream_adapt.meta.sequences import Log
from stream_adapt.models import MODEL_FORMAT, LearnerSpec, Manifest, Model, SlowWeights

Floats = npt.NDArray[np.float64]

#: Powers of 2 on σ² that are tried: from half to eight times what training found.
NOISES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
#: Then σ² of each level goes up or down by such a power, as long as that is better, and that of all by half of it. Of
#: two levels it stays: MovieLens-1M's log-loss was 0.0001 higher with factors.
LEVEL_STEPS = (0.5, 0.25)
#: How far training may be off, as standard deviations of log σ² and what levels add to it, log α, log κ and β: what a
#: few events cannot move far, thousands can.
PRIOR = (0.5, 0.5, 2.0, 0.5)
_ITERATIONS = 60


class Correction(NamedTuple):
    """What the numbers of θ are off by: factors on σ², α and κ, what to add to β, factors on σ² by level; and the
    calibrator, if there is."""

    noise: float = 1.0
    alpha: float = 1.0
    kappa: float = 1.0
    beta: float = 0.0
    level_noise: npt.NDArray[np.float32] | None = None  # [L]
    calibrator: npt.NDArray[np.float32] | None = None  # [K]

    def apply(self, weights: SlowWeights) -> SlowWeights:
        """θ with corrected numbers."""
        factors = np.array([self.alpha, self.kappa, 1.0], np.float32)
        readout = weights.readout * factors + np.array([0.0, 0.0, self.beta], np.float32)
        weights = msgspec.structs.replace(weights, noise=weights.noise * np.float32(self.noise), readout=readout)
        if self.level_noise is not None:
            weights = msgspec.structs.replace(weights, level_noise=weights.level_noise * self.level_noise)
        return weights if self.calibrator is None else msgspec.structs.replace(weights, calibrator=self.calibrator)


def fit(weights: SlowWeights, spec: LearnerSpec, fitted: tuple[FittedFeature, ...], log: Log) -> Correction:
    """The most likely correction given events that θ was not trained on, in the order of time.

    Raises:
        ModelError, ValueError: never for a θ and a log that belong together.
    """
    targets = torch.from_numpy((log.levels >= spec.feedback.target_level).astype(np.float64))  # [n]
    events = encoded(weights, spec, fitted, log)

    def tried(powers: Floats, learns_by: Correction) -> _Tried:
        factors = np.exp2(powers).astype(np.float32)  # [1+L]
        correction = learns_by._replace(noise=float(factors[0]), level_noise=factors[1:])
        z, variance = _linear(correction.apply(weights), spec, events)
        (alpha, kappa, beta), loss = _readout(z, variance, targets, weights.readout)
        loss += 0.5 * float(np.square(np.log(2.0) * powers / PRIOR[0]).sum())
        return _Tried(loss, powers, correction._replace(alpha=alpha, kappa=kappa, beta=beta))

    alone = np.eye(1 + len(weights.level_scores))  # [1+L, 1+L]
    found = Correction()
    for _ in range(2):
        best = min((tried(power * alone[0], found) for power in NOISES), key=lambda one: one.loss)
        found = best.correction
    levels = np.unique(log.levels) if len(weights.level_scores) > 2 else ()
    for step in LEVEL_STEPS:
        here = partial(tried, learns_by=best.correction)
        best = here(best.powers)
        for level in levels:
            best = _descended(here, best, step * alone[1 + level])
        best = _descended(here, best, step / 2 * alone[0])
    return best.correction


class _Tried(NamedTuple):
    """One choice of σ², the best readout given it, and what it costs."""

    loss: float  # of all events, with what the prior adds
    powers: Floats  # [1+L] of 2, on σ² and by level
    correction: Correction


def _descended(tried: Callable[[Floats], _Tried], best: _Tried, step: Floats) -> _Tried:
    """As many steps one way, or else the other, as make it better."""
    for way in (step, -step):
        start = best
        while (other := tried(best.powers + way)).loss < best.loss:
            best = other
        if best is not start:
            break
    return best


def encoded(weights: SlowWeights, spec: LearnerSpec, fitted: tuple[FittedFeature, ...], log: Log) -> Events:
    """Events of one partition, as the adapter encodes them; users and items are numbered among them."""
    content = EncodingCache(FeatureReader(fitted, "item"), weights.feature_vector)
    prior = EncodingCache(FeatureReader(fitted, "user"), weights.user_vector)
    hashes, item = np.unique(log.items, return_inverse=True)
    at = np.minimum(np.searchsorted(weights.item_hash, hashes), len(weights.item_hash) - 1)
    known = np.where(weights.item_hash[at] == hashes, at, len(weights.item_hash))
    pointers, rows, row_weights = event_pairs(FeatureReader(fitted, "event"), log.features)
    content_index, prior_index = content.index(log.features), prior.index(log.features)
    return Events(
        user=np.unique(log.users, return_inverse=True)[1],
        item=item,
        partition=np.zeros(len(log), np.int32),
        known=known[item],
        window=np.arange(len(log)) // spec.window,
        time_ms=log.times_ms,
        level=log.levels,
        content=content_index,
        content_vectors=content.vectors,
        prior=prior_index,
        prior_vectors=prior.vectors + weights.prior_mean,
        pointers=pointers,
        rows=rows,
        weights=row_weights,
        event_hash=np.zeros(len(log), np.uint32),  # nothing is screened in a rehearsal
    )


def _linear(weights: SlowWeights, spec: LearnerSpec, events: Events) -> tuple[Tensor, Tensor]:
    """z and v + v_item `[n]` of every event before it was learned, all users and items at their start."""
    model = served(weights, msgspec.structs.replace(spec, calibrator="none"))
    logits, variance = heard(model, first_users(model, int(events.user.max()) + 1), events)
    alpha, kappa, beta = weights.readout.tolist()
    return (logits - beta) * torch.sqrt(1.0 + kappa * variance) / alpha, variance


def served(weights: SlowWeights, spec: LearnerSpec) -> Model:
    """A model of these weights, for the rule alone."""
    return Model(Manifest(MODEL_FORMAT, "", 0, "", spec, ()), weights)


def first_users(model: Model, number: int) -> Array:
    """Rows of users before their first event."""
    rule = find(model.spec.rule)
    users = np.zeros(number, rule.user_layout(model.spec).dtype)
    for name, value in rule.first_user(model).items():
        users[name] = value
    return users


def first_items(model: Model, events: Events) -> Array:
    """Rows of the items of these events, before them."""
    weights = model.weights
    items = np.zeros(int(events.item.max(initial=-1)) + 1, find(model.spec.rule).item_layout(model.spec).dtype)
    seen = np.zeros(len(items))
    seen[events.item] = np.append(weights.item_events, 0.0)[events.known] / np.float64(weights.noise[0])
    bias_variance, offset_variance = weights.item_variance.astype(np.float64)
    items["c_var"], items["delta_var"] = 1 / (1 / bias_variance + seen), (1 / (1 / offset_variance + seen))[:, None]
    return items


def rehearsed(model: Model, users: Array, events: Events) -> tuple[Array, Scores]:
    """Rows of the events' items after the rule went over them, and what it said; `users` learn, items start here."""
    items, said = first_items(model, events), Scores.empty(len(events.user))
    find(model.spec.rule).compiled(model)(users, items, events, said)
    return items, said


def heard(model: Model, users: Array, events: Events) -> tuple[Tensor, Tensor]:
    """Logits of the scores and v + v_item `[n]` of events that the rule goes over; `users` learn, items start here."""
    _, said = rehearsed(model, users, events)
    return torch.logit(torch.from_numpy(said.score), eps=1e-12), torch.from_numpy(said.uncertainty).square()


def _readout(
    z: Tensor, variance: Tensor, targets: Tensor, trained: npt.NDArray[np.float32]
) -> tuple[tuple[float, float, float], float]:
    """Factors on α and κ and what to add to β; and the loss of all events, with what the prior adds."""
    start = torch.from_numpy(trained.astype(np.float64))  # [3]
    moved = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # log α, log κ, β
    scale = torch.tensor(PRIOR[1:], dtype=torch.float64)
    optimiser = torch.optim.LBFGS([moved], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        alpha, kappa, beta = start[0] * moved[0].exp(), start[1] * moved[1].exp(), start[2] + moved[2]
        logits = alpha * z * torch.rsqrt(1.0 + kappa * variance) + beta  # [n]
        return binary_cross_entropy_with_logits(logits, targets, reduction="sum") + 0.5 * (moved / scale).square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss() / len(z)
        torch.autograd.backward(value)
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    alpha, kappa, beta = moved.detach().tolist()
    return (float(np.exp(alpha)), float(np.exp(kappa)), beta), float(loss().detach())
