"""The calibrator's coefficients, fitted to what the rule says of events that θ was not trained on.

As for the readout, a training that stopped early is judged on the events that follow. Here users come warm, as in
service: the rule first goes over the events that the training saw, then items start anew, because θ holds what those
events said of them. What each term is for an event is heard from the compiled rule itself: a score with a small
coefficient less the score without. A few events move the coefficients little: 0 is the model without a calibrator.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stream_adapt.learner.encoder import FittedFeature
from stream_adapt.meta import readout
from stream_adapt.meta.sequences import Log
from stream_adapt.models import Floats32, LearnerSpec, SlowWeights

#: Precision of each coefficient but the first around 0, its term having a standard deviation of 1: as much as 40 events
#: with p = ½ say. On MovieLens 1 and 50 did as well.
PRIOR = 10.0
#: Coefficient with which a term is heard: scores stay far from 0 and 1, where they have no digits left.
_HEARD = 0.01
#: Terms vary at least so much, or they are the same for all events.
_LEAST_SPREAD = 1e-3
_ITERATIONS = 100


def without(weights: SlowWeights, spec: LearnerSpec, item_mean: Floats32) -> SlowWeights:
    """θ with a calibrator that changes nothing, if the spec has one."""
    if not spec.calibrator_terms:
        return weights
    return msgspec.structs.replace(weights, calibrator=np.zeros(spec.calibrator_terms, np.float32), item_mean=item_mean)


def fit(weights: SlowWeights, spec: LearnerSpec, fitted: tuple[FittedFeature, ...], earlier: Log, log: Log) -> Floats32:
    """The most likely coefficients `[K]`.

    Args:
        weights: θ, with the readout that is served.
        spec: says which rule, and that there is a calibrator.
        fitted: features that θ reads.
        earlier: what θ was trained on. Users have the same numbers in both.
        log: events that it was not trained on, in the order of time.
    """
    model = readout.served(weights, spec)
    number = 1 + max(log.users.max(initial=0), earlier.users.max(initial=0))
    users = readout.first_users(model, int(number))
    before, events = (readout.encoded(weights, spec, fitted, part)._replace(user=part.users) for part in (earlier, log))
    readout.rehearsed(model, users, before)

    def said(coefficients: npt.NDArray[np.float64]) -> Tensor:
        heard = msgspec.structs.replace(weights, calibrator=coefficients.astype(np.float32))
        return readout.heard(readout.served(heard, spec), users.copy(), events)[0]

    logits = said(np.zeros(spec.calibrator_terms))  # [n]
    terms = torch.stack([(said(row) - logits) / _HEARD for row in _HEARD * np.eye(spec.calibrator_terms)], 1)  # [n, K]
    targets = torch.from_numpy((log.levels >= spec.feedback.target_level).astype(np.float64))  # [n]
    return _most_likely(logits, terms, targets)


def _most_likely(logits: Tensor, terms: Tensor, targets: Tensor) -> Floats32:
    """Coefficients `[K]` of terms `[n, K]` that are added to the logits `[n]`; the first term is 1."""
    spread = terms.std(0, correction=0).clamp_min(_LEAST_SPREAD)  # [K]
    spread[0] = 1.0
    moved = torch.zeros(terms.shape[1], dtype=torch.float64, requires_grad=True)  # [K]
    optimiser = torch.optim.LBFGS([moved], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(logits + (terms / spread) @ moved, targets, reduction="sum")
        value = (loss + 0.5 * PRIOR * moved[1:].square().sum()) / len(logits)
        torch.autograd.backward(value)
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    coefficients: Floats32 = (moved.detach() / spread).numpy().astype(np.float32)
    return coefficients
