"""What the scores would be had the model never been refreshed: the same records, and the code that serves.

The records are read from the input topic, so they lie in the partitions and have the offsets that the member saw. Rows
follow from each partition's records in their order, and from nothing else; so up to the swap of the model these scores
have to be those in the topic, and that is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from confluent_kafka import Message

from stream_adapt import service
from stream_adapt.adapt import Adapter
from stream_adapt.config import Config
from stream_adapt.demo.tally import Columns, Floats
from stream_adapt.models import read_model
from stream_adapt.refresh.window import raw_batch

#: Records that are scored together; scores do not depend on it.
_CHUNK = 1_024

#: Of a record: partition and offset.
_Place = tuple[int, int]


def score_alone(config: Config, model: Path, messages: Sequence[Message]) -> dict[_Place, float]:
    """Scores and learns records by one model from beginning to end, each partition in its order.

    Args:
        config: as the member runs it.
        model: folder of the model it began with.
        messages: all records of the input topic, in any order.
    """
    champion = service.as_configured(config, read_model(model))
    decoder = service.build_decoder(config, champion)
    adapter = Adapter(champion, screen=service.screen_of(config), ttl_s=config.state.ttl_s)
    adapter.warm_up()
    found: dict[_Place, float] = {}
    raw = raw_batch(sorted(messages, key=_place))
    decoder.prepare(raw)
    for chunk in raw.chunks(_CHUNK):
        batch, _ = decoder(chunk)
        said = adapter.adapt(batch)
        adapter.passed(chunk.partitions, chunk.offsets)
        adapter.commit()
        places = zip(batch.partitions.tolist(), batch.offsets.tolist(), strict=True)
        found.update(zip(places, said.score.tolist(), strict=True))
    return found


def beside(columns: Columns, alone: Mapping[_Place, float]) -> Floats:
    """The scores `[n]` of the events that `columns` are of; NaN where there is none."""
    places = zip(columns.partition.tolist(), columns.offset.tolist(), strict=True)
    return np.array([alone.get(place, np.nan) for place in places])


def agreement(columns: Columns, unrefreshed: Floats) -> tuple[int, float]:
    """How many events were scored before another model was, and the largest difference of both scores there."""
    before = np.zeros(len(columns.number), dtype=np.bool_)
    for partition in np.unique(columns.partition):
        mine = columns.partition == partition
        swapped = columns.offset[mine & (columns.version != 0)]
        before |= mine & (columns.offset < swapped.min()) if len(swapped) else mine
    difference = np.abs(columns.adapted - unrefreshed)[before]
    return int(before.sum()), float(difference.max(initial=0.0))


def _place(message: Message) -> _Place:
    return message.partition() or 0, message.offset() or 0
