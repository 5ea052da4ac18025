"""The last word on items: the rule goes over the log once, and part of what it learns of them goes into θ.

Training pulls items towards what their content says, or rare ones would be overfitted, and it predicts with items at
rest and the covariance in full. So the rule that will serve finds something left to learn of each item even in the
events that θ is from: the deviations Δc and δ that rows of items would have after them. A share of these is added.
How sure θ is of an item stays: they are the same events. Every partition starts from this θ, while what service
learns of an item stays with the partition that learned it: the more partitions, the more it is worth.
"""

from __future__ import annotations

import msgspec
import numpy as np

from stream_adapt.learner.encoder import FittedFeature
from stream_adapt.learner.rules.layout import applied
from stream_adapt.meta import readout
from stream_adapt.meta.sequences import Log
from stream_adapt.models import LearnerSpec, SlowWeights


def settled(
    weights: SlowWeights, spec: LearnerSpec, fitted: tuple[FittedFeature, ...], log: Log, share: float
) -> SlowWeights:
    """θ with a share of what the rule learns of the items that θ knows; users begin cold, all in one partition.

    Args:
        weights: θ, with all that is fitted.
        spec: says which rule.
        fitted: features that θ reads.
        log: what θ was trained on, in the order in which service would learn it.
        share: of Δc and δ; at 0 nothing is done.
    """
    if share == 0.0:
        return weights
    events, model = readout.encoded(weights, spec, fitted, log), readout.served(weights, spec)
    items, _ = readout.rehearsed(model, readout.first_users(model, int(events.user.max()) + 1), events)
    c, _, delta, _ = applied(items)
    at = np.empty(len(items), np.int64)  # rows in θ's item table
    at[events.item] = events.known
    known = at < len(weights.item_hash)
    vectors = weights.item_vector.astype(np.float64)
    vectors[at[known]] += share * np.column_stack([delta, c])[known]
    return msgspec.structs.replace(weights, item_vector=vectors.astype(np.float32))
