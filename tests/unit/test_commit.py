"""What each error at each step of a commit leads to; producers are scripts, errors are data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from stream_adapt.commit import AtLeastOnce, ExactlyOnce, Outcome
from stream_adapt.errors import Fenced, KafkaRefused
from stream_adapt.kafka.consumer import Positions
from stream_adapt.kafka.producer import Abort, FencedOff, Lost, ProducerError, Undeliverable
from stream_adapt.record import NO_SOURCE, Outputs

Script = dict[str, ProducerError]
OFFSETS = {0: 10, 1: 20}
OUTPUTS = [Outputs("scores", [b"u"], [b"{}"], None, [0], [9])]


@dataclass
class ScriptedProducer:
    """Raises what the script says at the step it names; writes down every call."""

    script: Script
    calls: list[str] = field(default_factory=list)
    careful: bool = False
    suspect: bool = False

    @property
    def needs_replacement(self) -> bool:
        return self.suspect

    def _step(self, name: str) -> None:
        self.calls.append(name)
        if name in self.script:
            raise self.script[name]

    def begin(self) -> None:
        self._step("begin")

    def send(self, _: Outputs) -> None:
        self._step("send")

    def send_offsets(self, *_: object) -> None:
        self._step("send_offsets")

    def commit(self) -> None:
        self._step("commit")

    def abort(self) -> None:
        self._step("abort")

    def flush(self) -> None:
        self._step("flush")

    def poll(self) -> None:
        self._step("poll")

    def close(self) -> None:
        self.calls.append("close")


@dataclass
class ScriptedGroup:
    """A group whose committed offsets and generation are given."""

    after_loss: Mapping[int, int] = field(default_factory=dict)
    generation: int = 3
    topic: str = "events"
    commits: list[dict[int, int]] = field(default_factory=list)
    positions: Positions = field(default_factory=Positions)  # before the batch

    def group_metadata(self) -> bytes:
        return b"CGMDv2:" + self.generation.to_bytes(4, "little", signed=True) + b"group\0"

    def committed(self, partitions: Collection[int]) -> dict[int, int]:
        return {p: self.after_loss.get(p, -1001) for p in partitions}

    def commit(self, next_offsets: Mapping[int, int]) -> None:
        self.commits.append(dict(next_offsets))


def test_a_transaction_that_moves_no_offset_is_done_again_because_offsets_cannot_tell() -> None:
    """A swap of the model alone: its offsets were committed before."""
    group = ScriptedGroup(after_loss={0: 10}, positions=Positions({0: 10}))
    delivery, _ = _delivery(group, {"commit": Lost("no answer")}, {})
    assert Outcome.ABORTED is delivery.commit([], {0: 10})
    new = ScriptedGroup(after_loss={0: 10}, positions=Positions({0: 10}, {0}))
    delivery, _ = _delivery(new, {"commit": Lost("no answer")}, {})
    assert Outcome.RECOVERED is delivery.commit([], {0: 10})


def _delivery(group: ScriptedGroup, *scripts: Script) -> tuple[ExactlyOnce, list[ScriptedProducer]]:
    """A delivery whose k-th producer follows the k-th script; further ones do as they are told."""
    built: list[ScriptedProducer] = []
    remaining: Iterator[Script] = iter(scripts)

    def make() -> ScriptedProducer:
        script = next(remaining, {})
        if "init" in script:
            raise script["init"]
        built.append(ScriptedProducer(script))
        return built[-1]

    delivery = ExactlyOnce(make, group, transactional_id="app.0", fence_window_s=45)  # type: ignore[arg-type]
    return delivery, built


def _commit(delivery: ExactlyOnce, outputs: Sequence[Outputs] = OUTPUTS) -> Outcome:
    return delivery.commit(outputs, OFFSETS)


def test_a_calm_commit_takes_its_steps_in_order() -> None:
    delivery, producers = _delivery(ScriptedGroup())
    assert _commit(delivery) is Outcome.COMMITTED
    assert producers[0].calls == ["begin", "send", "send_offsets", "commit"]


@pytest.mark.parametrize("step", ["send", "send_offsets", "commit"])
def test_an_abortable_error_aborts_and_keeps_the_producer(step: str) -> None:
    delivery, producers = _delivery(ScriptedGroup(), {step: Abort("rebalance")})
    assert _commit(delivery) is Outcome.ABORTED
    assert producers[0].calls[-1] == "abort"
    assert len(producers) == 1


@pytest.mark.parametrize("step", ["begin", "send", "send_offsets", "commit"])
@pytest.mark.parametrize(
    ("committed", "outcome"), [({0: 10, 1: 20}, Outcome.RECOVERED), ({0: 5, 1: 20 - 1}, Outcome.ABORTED)]
)
def test_after_a_lost_producer_the_committed_offsets_decide(
    step: str, committed: dict[int, int], outcome: Outcome
) -> None:
    delivery, producers = _delivery(ScriptedGroup(committed), {step: Lost("timed out")})
    assert _commit(delivery) is outcome
    assert producers[0].calls[-1] == "close"
    assert len(producers) == 2


def test_offsets_of_which_only_some_were_reached_were_moved_by_another_member() -> None:
    """We stood still, lost our partitions, and were fenced; the next owner of one of them has gone on."""
    delivery, _ = _delivery(ScriptedGroup({0: 10, 1: 5}), {"commit": FencedOff("−144")})
    assert _commit(delivery) is Outcome.ABORTED


def test_fenced_once_is_survived_and_twice_is_not() -> None:
    delivery, _ = _delivery(ScriptedGroup({0: 5, 1: 5}), {"commit": FencedOff("−144")}, {"commit": FencedOff("−144")})
    assert _commit(delivery) is Outcome.ABORTED
    with pytest.raises(Fenced, match=r"'app\.0' was taken twice within 45 s"):
        _commit(delivery)


def test_a_transaction_that_the_broker_gave_up_is_no_fencing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the epoch along, and every call then says that the producer is fenced."""
    now = iter(range(0, 1000, 16))
    monkeypatch.setattr("stream_adapt.commit.time.monotonic", lambda: next(now))
    scripts: list[Script] = [{"commit": FencedOff("−144")} for _ in range(4)]
    built = iter(ScriptedProducer(script) for script in scripts)
    delivery = ExactlyOnce(
        lambda: next(built),  # type: ignore[arg-type,return-value]
        ScriptedGroup(),
        transactional_id="app.0",
        fence_window_s=45,
        transaction_timeout_s=15,
    )
    assert [_commit(delivery) for _ in range(3)] == [Outcome.ABORTED] * 3


@pytest.mark.parametrize(
    ("committed", "expected"), [({0: 5, 1: 5}, Outcome.ABORTED), (OFFSETS, Outcome.RECOVERED)], ids=["not done", "done"]
)
def test_an_abort_that_fails_ends_with_a_new_producer_and_a_look(committed: dict[int, int], expected: Outcome) -> None:
    """EndTxn was answered with an error that asks for an abort; the broker may have done it all the same."""
    script: Script = {"commit": Abort("request timed out"), "abort": Lost("invalid transaction state")}
    delivery, producers = _delivery(ScriptedGroup(committed), script)
    assert _commit(delivery) is expected
    assert len(producers) == 2


def test_without_a_generation_nothing_is_committed() -> None:
    delivery, producers = _delivery(ScriptedGroup(generation=-1))
    assert _commit(delivery) is Outcome.ABORTED
    assert "commit" not in producers[0].calls
    assert "send_offsets" not in producers[0].calls


def test_a_suspect_producer_is_replaced_before_the_next_transaction_begins() -> None:
    delivery, producers = _delivery(ScriptedGroup())
    producers[0].suspect = True
    assert _commit(delivery) is Outcome.COMMITTED
    assert [p.calls for p in producers] == [["close"], ["begin", "send", "send_offsets", "commit"]]


def test_an_undeliverable_output_is_sought_with_care_and_then_named() -> None:
    """First the failure has no source; the next try is careful and names it; then it is somebody's dead letter."""
    unnamed, named = Undeliverable("too large", frozenset()), Undeliverable("too large", frozenset({(0, 9)}))
    delivery, producers = _delivery(ScriptedGroup(), {"commit": unnamed}, {"commit": named})

    assert _commit(delivery) is Outcome.ABORTED
    assert (producers[1].careful, delivery.undeliverable) == (True, {})
    assert _commit(delivery) is Outcome.ABORTED
    assert delivery.undeliverable == {(0, 9): 1}
    assert _commit(delivery) is Outcome.COMMITTED
    assert (delivery.undeliverable, producers[-1].careful) == ({}, False)


def test_a_row_that_the_changelog_refuses_for_good_ends_the_loop_with_what_to_do() -> None:
    row = Undeliverable("too large", frozenset({(3, NO_SOURCE)}))
    delivery, _ = _delivery(ScriptedGroup(), {"commit": row})
    with pytest.raises(KafkaRefused, match=r"a row of partition 3.*too large.*max\.message\.bytes"):
        _commit(delivery)


def test_no_producer_at_all_says_what_to_do() -> None:
    with pytest.raises(KafkaRefused, match="check that the brokers are up"):
        _delivery(ScriptedGroup(), {"init": Lost("timed out")})


def test_at_least_once_commits_offsets_after_the_outputs_were_delivered() -> None:
    group, producer = ScriptedGroup(), ScriptedProducer({})
    delivery = AtLeastOnce(lambda: producer, group)  # type: ignore[arg-type,return-value]
    assert delivery.commit(OUTPUTS, OFFSETS) is Outcome.COMMITTED
    assert (producer.calls, group.commits) == (["send", "flush"], [OFFSETS])


@pytest.mark.parametrize("step", ["send", "flush"])
def test_at_least_once_commits_nothing_when_delivery_fails(step: str) -> None:
    group, producer = ScriptedGroup(), ScriptedProducer({step: Abort("gone")})
    delivery = AtLeastOnce(lambda: producer, group)  # type: ignore[arg-type,return-value]
    assert delivery.commit(OUTPUTS, OFFSETS) is Outcome.ABORTED
    assert group.commits == []


def test_at_least_once_replaces_a_producer_that_fails_while_idle() -> None:
    producers = [ScriptedProducer({"poll": Lost("fatal")}), ScriptedProducer({})]
    remaining = iter(producers)
    delivery = AtLeastOnce(lambda: next(remaining), ScriptedGroup())  # type: ignore[arg-type,return-value]
    delivery.idle()
    assert delivery.commit(OUTPUTS, OFFSETS) is Outcome.COMMITTED
    assert [["poll", "close"], ["send", "flush"]] == [producer.calls for producer in producers]
