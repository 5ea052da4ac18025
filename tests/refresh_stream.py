"""A small synthetic stream whose items are renumbered at a known event, and a model of the world before."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from stream_adapt.datasets.synthetic import Synthetic, source
from stream_adapt.meta import trainer
from stream_adapt.meta.trainer import Trained, TrainSettings
from stream_adapt.models import LearnerSpec, Model, read_model, write_model
from stream_adapt.record import UserEvent

#: Events that pretraining sees, and after which the items are renumbered.
PRETRAINED, DRIFT_AT, EVENTS = 6_000, 11_000, 40_000
PARAMETERS = Synthetic(
    seed=4, events=EVENTS, drift="permute", drift_at=DRIFT_AT, users=2_000, items=50, dimensions=4, noise=0.3
)
#: How many times the events that it saw a model takes its items to have had: it is as sure as after a long past.
SURE = 20
SPEC = LearnerSpec({}, source(PARAMETERS).feedback, dimension=4, window=128)


@cache
def stream() -> list[UserEvent]:
    """The events without features, so that an id is all there is to know an item by."""
    return [msgspec.structs.replace(event, features={}) for event in source(PARAMETERS).events()]


@cache
def pretrained() -> Trained:
    """θ of the first events."""
    settings = TrainSettings(epochs=2, validation_share=0.0, cooccurrence=0)
    return trainer.pretrain(stream()[:PRETRAINED], SPEC, settings, "cpu")


def write_champion(registry: Path) -> Model:
    """Writes it as a model that needs a refresh after the drift, however slowly or fast events come.

    One that is less sure learns the new world in its items' rows: then a challenger that comes late is rightly refused.
    """
    trained = pretrained()
    weights = msgspec.structs.replace(trained.weights, item_events=SURE * trained.weights.item_events)
    return read_model(write_model(registry, weights, SPEC, trained.fitted))
