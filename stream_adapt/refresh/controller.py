"""The controller: reads the learning summaries, and takes the model through the states of a refresh.

Every member, and whoever runs `stream-adapt refresh --follow`, may run one. The group `<app>.refresh` gives the one
partition of the learning topic to one of them: that one leads, the others wait. A leader opens the journal, which
fences the one before, reads the state, and does what is done in it from the beginning. So whoever leads may die at any
moment, and nothing but time is lost; when something of Kafka fails, a leader steps down by itself and begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from stream_adapt.config import Config
from stream_adapt.errors import DataError, KafkaRefused, RegistryUnreachable
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.errors import describe
from stream_adapt.learning import Summary, decode
from stream_adapt.models import Registry
from stream_adapt.refresh import status
from stream_adapt.refresh.journal import Deposed
from stream_adapt.refresh.leader import Leader
from stream_adapt.refresh.parts import Training
from stream_adapt.refresh.record import RefreshState
from stream_adapt.refresh.training import Job
from stream_adapt.refresh.worker import Worker
from stream_adapt.shutdown import Shutdown

log = structlog.get_logger(__name__)

#: Longest wait for summaries in a turn, when there is something else to do and when there is not.
_BUSY_S, _CALM_S = 0.05, 0.5
_MOST_RECORDS = 500
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Controller:
    """Leads, or waits to."""

    def __init__(
        self,
        config: Config,
        *,
        train: Callable[[Config, Job], Training] = Worker,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Joins the group; nothing is waited for."""
        self._config, self._settings = config, config.refresh
        self._train, self._clock, self._sleep = train, clock, sleep
        self._registry = Registry(config.model.path)
        self._lead: Leader | None = None
        self._owns = False
        self._pause_s = _FIRST_PAUSE_S
        self._consumer = clients.consumer(properties.learning_reader(config))
        self._topic = config.topic("learning")
        self._consumer.subscribe(
            [self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
        )

    @property
    def leads(self) -> bool:
        """Whether this one leads."""
        return self._lead is not None

    @property
    def state(self) -> RefreshState | None:
        """Where the refresh is, if this one leads."""
        return self._lead.state if self._lead else None

    def run(self, shutdown: Shutdown, until: Callable[[], bool] = lambda: False) -> None:
        """Until it is told to stop, or `until` says so.

        Raises:
            ConfigError, KafkaRefused, StateMismatch: what no later try would mend.
        """
        try:
            while not shutdown.asked and not until():
                self.turn()
        finally:
            self.close()

    def turn(self) -> None:
        """Takes in summaries, and does a piece of what is to be done."""
        try:
            self._turn()
        except (Deposed, KafkaRefused, RegistryUnreachable, KafkaException) as error:
            log.warning("the refresh begins anew where it was", problem=str(error), pause_s=self._pause_s)
            self._step_down()
            self._sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Leaves the group; a training that is under way is ended, and begun again by the next leader."""
        self._step_down()
        self._consumer.close()

    def _turn(self) -> None:
        summaries, end = self._summaries(_BUSY_S if self._lead is not None and self._lead.busy else _CALM_S)
        if not self._owns:
            self._step_down()
            return
        if self._lead is None:
            self._take_the_lead()
            return
        self._lead.turn(summaries, end)
        self._pause_s = _FIRST_PAUSE_S

    def _take_the_lead(self) -> None:
        self._lead = Leader(self._config, self._registry, self._train, self._clock)
        offset = self._lead.state.learning_offset
        place = TopicPartition(self._topic, 0, offset)
        low, high = self._consumer.get_watermark_offsets(place, timeout=10.0)
        place.offset = min(max(offset, low), high)
        self._consumer.resume([place])
        self._consumer.seek(place)
        log.info("leads the refresh", state=self._lead.state.state, champion=self._lead.state.champion)

    def _step_down(self) -> None:
        if self._lead is None:
            return
        lead, self._lead = self._lead, None
        status.write(self._config.state_dir, msgspec.structs.replace(lead.status(), leader=False))
        lead.close()
        if self._owns:
            self._consumer.pause([TopicPartition(self._topic, 0)])

    def _summaries(self, timeout_s: float) -> tuple[list[Summary], int | None]:
        """What came in, and the offset behind it."""
        summaries: list[Summary] = []
        end: int | None = None
        for message in self._consumer.consume(_MOST_RECORDS, timeout_s):
            error = message.error()
            if error is not None:
                if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED):
                    raise KafkaRefused(
                        f"{self._topic}: {describe(error)}. To do: `stream-adapt topics create -c FILE`, or check the "
                        "principal's rights"
                    )
                if error.code() != KafkaError._PARTITION_EOF:
                    log.warning("learning topic", topic=self._topic, error=describe(error))
                continue
            end = (message.offset() or 0) + 1
            try:
                summaries += decode(message.value() or b"").summaries
            except DataError as problem:
                log.warning("left out", topic=self._topic, offset=message.offset(), problem=str(problem))
        return summaries, end

    def _assigned(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        if partitions:
            consumer.pause(partitions)  # read from where the state says, once it is known
            self._owns = True

    def _revoked(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        consumer.incremental_unassign(partitions)
        self._owns = self._owns and not partitions
