"""The leader: what happens becomes events of the state machine, and the machine's actions are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import structlog

from stream_adapt import models, service
from stream_adapt.announcements import Announcement, Announcements
from stream_adapt.config import Config
from stream_adapt.drift import Alarm, DriftMonitor, Watched
from stream_adapt.errors import ConfigError, KafkaRefused, ModelError, StreamAdaptError
from stream_adapt.learning import Summary
from stream_adapt.models import Model, Registry, check_successor, read_model
from stream_adapt.refresh import status
from stream_adapt.refresh.decide import Comparison
from stream_adapt.refresh.journal import Journal
from stream_adapt.refresh.pair import LivePair
from stream_adapt.refresh.parts import Pair, Parts, Training
from stream_adapt.refresh.record import Decision, Outcomes, RefreshState, Trigger
from stream_adapt.refresh.states import RESTING, TABLE, Action, Event, State, Transition, follow
from stream_adapt.refresh.training import Job
from stream_adapt.state.row import RowError

log = structlog.get_logger(__name__)

#: A state that was entered so often without leading anywhere is given up: whoever leads dies of it.
_ATTEMPTS = 5
_DAY_MS = 86_400_000
#: Looks at a growing shadow: at once, twice and four times `refresh.shadow_events`.
_LOOKS = (1, 2, 4)
#: Looks of a watch, at equal distances: at all of it so far and, but for the first, at what is new since the last look.
_WATCH_LOOKS = 4
#: Events of the former version, scored since a promotion, before it counts as not served.
_EVENTS_OF_FORMER = 1_000
_STATUS_S = 2.0
#: While nothing happens, what is known of drift is written so often: what members told before may be gone one day.
_KEPT_S = 3_600.0
_DECIDED_BY = "refresh"


@dataclass
class _Counts:
    """What the summaries told since the state was entered."""

    labelled: Counter[str] = field(default_factory=Counter)  # events with feedback, by version
    events: Counter[str] = field(default_factory=Counter)  # by version
    loss: Counter[str] = field(default_factory=Counter)  # log-loss of the scores, by version

    def add(self, summary: Summary) -> None:
        """One more."""
        self.labelled[summary.model_version] += summary.labelled
        self.events[summary.model_version] += summary.events
        self.loss[summary.model_version] += summary.loss  # type: ignore[assignment]


class Leader:
    """What the one who leads does: events of the state machine out of what happens, and its actions."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        train: Callable[[Config, Job], Training],
        clock: Callable[[], float],
        parts: Parts | None = None,
    ) -> None:
        """Opens the journal, and enters the state again in which the one before left it.

        Args:
            config: what is decided, when and how.
            registry: of the models.
            train: starts a training.
            clock: the time, in s.
            parts: what it works with, if that is not Kafka.

        Raises:
            Deposed, KafkaRefused, StateMismatch: it cannot lead.
        """
        self._config, self._settings, self._registry = config, config.refresh, registry
        self._start_training, self._clock = train, clock
        parts = parts or Parts(Journal, Announcements, LivePair)
        self._journal, self._announcements = parts.journal(config), parts.announcements(config)
        self._side_by_side = parts.pair
        self._training: Training | None = None
        self._pair: Pair | None = None
        self._counts = _Counts()
        self._looks = 0
        self._offset = 0
        self._ends: dict[int, int] = {}  # by partition: offset behind the last event that summaries told of
        self._alarms_ms: dict[str, int] = {}
        self._status_s = 0.0
        self._kept_s = clock()
        try:
            self._announcements.read_to_end()
            served = self._served()
            found = self._journal.tail.state
            if found is None or (self._announcements.newest() is None and found.champion != served):
                # Never refreshed, or members begin with another model than before: nothing was announced since.
                found = RefreshState(since_ms=self._now(), champion=served)
                self._journal.write(found)
            self.state = found
            self._offset = self.state.learning_offset
            self._monitor = DriftMonitor(config.drift, watched=self.state.watched)
            self._enter(again=True)
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether there is more to do than to read summaries."""
        return self._pair is not None

    def turn(self, summaries: list[Summary], end: int | None) -> None:
        """Takes in what members told, and goes on with what is done in the state.

        Args:
            summaries: what was read of the learning topic.
            end: the offset behind it; None if nothing was read.
        """
        alarms = self._monitor.add(summaries)
        self._count(summaries)
        self._offset = end if end is not None else self._offset
        if alarms:
            self._alarmed(alarms)
        self._look_around()
        try:
            found = self._go_on()
        except (ConfigError, RowError) as problem:
            found = Event.FAILED, str(problem)
        if found is not None:
            self._happened(*found)
        self._keep()
        self._tell()

    def close(self) -> None:
        """Lets go of everything; what is under way is begun again by the next leader."""
        self._leave()
        self._announcements.close()
        self._journal.close()

    # What may happen from outside.

    def _alarmed(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self._alarms_ms[alarm.signal] = self._now()
            log.warning("drift", **{k: v for k, v in msgspec.structs.asdict(alarm).items() if k not in ("format",)})
        first = alarms[0]
        detail = f"{first.signal} {first.value:.4f}, before {first.reference:.4f}, for {first.events} events"
        trigger = Trigger("alarm", self._now(), detail, dict(first.since))
        self._happened(Event.ALARM, detail, trigger=trigger, alarms=[alarm.to_bytes() for alarm in alarms])

    def _look_around(self) -> None:
        """What others announced, what people ask for, and the schedule."""
        newest = self._announcements.newest()
        if newest is not None and newest.version != self.state.champion:
            self._replaced(newest)
        request = self._journal.poll()
        if request is not None and request.id != self.state.request:
            self.state = self.state.changed(request=request.id)
            trigger = Trigger("asked", self._now(), request.detail)
            self._happened(Event.ASKED, "asked for", trigger=trigger)
        every_s, resting = self._settings.every_s, self.state.state in RESTING
        if resting and every_s is not None and self._now() >= max(self.state.ended_ms, self._first_ms) + every_s * 1000:
            self._happened(Event.SCHEDULE, f"{every_s:g} s passed", trigger=Trigger("schedule", self._now()))
        elif resting and self._has_grown():
            detail = f"{self._since_moved(self._ends)} events of the new world"
            self._happened(Event.GROWN, detail, trigger=Trigger("grown", self._now(), detail))

    @property
    def _first_ms(self) -> int:
        """When the first state began: the schedule of a loop that never refreshed counts from there."""
        return self.state.since_ms if not self.state.ended_ms else 0

    def _has_grown(self) -> bool:
        """Whether there is much more of the new world by now than the last training had."""
        learned, again = self._since_moved(self.state.learned), self._settings.again
        return (
            again > 1
            and 0 < learned < self._settings.window_events
            and self._since_moved(self._ends) >= again * learned
        )

    def _since_moved(self, ends: Mapping[int, int]) -> int:
        """Events from where the world moved up to these offsets by partition."""
        return sum(max(ends.get(p, 0) - start, 0) for p, start in self.state.moved.items())

    def _replaced(self, newest: Announcement) -> None:
        """Another version was announced, not by us. Whoever goes back to an ancestor knows why."""
        if newest.version in self._ancestors(self.state.champion):
            self._happened(Event.REVERTED, newest.reason, champion=newest.version, former=None)
        else:
            former = newest.previous or self.state.champion
            self._happened(Event.REPLACED, newest.reason, champion=newest.version, former=former)

    def _ancestors(self, version: str) -> set[str]:
        found = {self.state.former or ""}
        while version and version not in found:
            try:
                version = self._registry.manifest(version).parent or ""
            except ModelError:
                break
            found.add(version)
        return found - {""}

    # What is done in a state, a piece at a time. Each returns an event once there is one, and why.

    def _go_on(self) -> tuple[Event, str] | None:
        match self.state.state:
            case State.COOLING:
                return self._cool()
            case State.TRAINING:
                return self._watch_training()
            case State.SHADOW:
                return self._compare()
            case State.PROMOTED:
                return self._await_members()
            case State.WATCHING:
                return self._watch()
            case _:
                return self._take_up_pending()

    def _take_up_pending(self) -> tuple[Event, str] | None:
        """A trigger that came while a refresh was under way."""
        pending = self.state.pending
        if pending is not None:
            self.state = self.state.changed(pending=None)
            event = Event(pending.kind)
            self._happened(event, pending.detail, trigger=pending)
        return None

    def _cool(self) -> tuple[Event, str] | None:
        trigger, settings, now = self.state.trigger, self._settings, self._now()
        if trigger is None or trigger.kind == "asked":
            return Event.COOLED, "asked for"
        recent = [at for at in self.state.started_ms if at > now - _DAY_MS]
        if now < self.state.ended_ms + settings.cooldown_s * 1000 or len(recent) >= settings.per_day:
            return None
        if trigger.kind == "alarm" and self._counts.labelled.total() < settings.settle_events:
            return None
        return Event.COOLED, "cooled down"

    def _watch_training(self) -> tuple[Event, str] | None:
        assert self._training is not None
        outcome = self._training.poll()
        if outcome is None:
            return None
        figures = {**self.state.figures, **outcome.figures}
        self.state = self.state.changed(figures=figures)
        if outcome.no_better:
            return Event.NOT_BETTER, outcome.reason
        if outcome.challenger is None:
            return Event.FAILED, outcome.reason or "the training made no challenger and does not say why"
        self.state = self.state.changed(challenger=outcome.challenger, trained_until=outcome.trained_until)
        self._sound(outcome.challenger)
        return Event.TRAINED, f"challenger {outcome.challenger}"

    def _sound(self, version: str) -> tuple[Model, Model]:
        """The champion and a version that could follow it.

        Raises:
            ModelError: the version is missing, damaged, or could not.
        """
        champion, other = self._read(self.state.champion), self._read(version)
        check_successor(champion, other)
        if other.manifest.parent != self.state.champion:
            raise ModelError(f"{version}: its parent is {other.manifest.parent}, the champion {self.state.champion}")
        return champion, other

    def _compare(self) -> tuple[Event, str] | None:
        assert self._pair is not None
        self._pair.step()
        wanted = self._settings.shadow_events * _LOOKS[self._looks]
        waited = self._now() - self.state.since_ms > self._settings.shadow_s * 1000
        if self._pair.models.events < wanted and not waited:
            return None
        found = self._pair.models.compared()
        self._note("shadow", found)
        margin, error = self._settings.margin, self._settings.error / len(_LOOKS)
        told = f"{_told(found)}; wanted: {margin:g} with {1 - error:.2%} certainty"
        if found.beyond(margin, error):
            return Event.BETTER, told
        self._looks += 1
        if waited or self._looks == len(_LOOKS) or found.short_of(margin, error):
            return Event.NOT_BETTER, told
        return None

    def _await_members(self) -> tuple[Event, str] | None:
        served = self._counts.events[self.state.champion]
        if served:
            return Event.SERVED, f"{served} events scored with it"
        late = self._now() - self.state.since_ms > self._settings.serve_s * 1000
        others = self._counts.events.total() - served
        if late and others >= _EVENTS_OF_FORMER:
            return (
                Event.NOT_SERVED,
                f"after {self._settings.serve_s:g} s no member serves it; {others} events by others",
            )
        return None

    def _watch(self) -> tuple[Event, str] | None:
        assert self._pair is not None
        self._pair.step()
        step = max(self._settings.watch_events // _WATCH_LOOKS, 1)
        over = self._now() - self.state.since_ms > self._settings.watch_s * 1000
        if self._pair.models.events < step * (self._looks + 1) and not over:
            return None
        self._looks += 1
        found = self._pair.models.compared()
        self._note("watch", found)
        champion = self.state.champion
        if labelled := self._counts.labelled[champion]:  # what members say of themselves, beside what both would say
            live = {"watch_live_log_loss": self._counts.loss[champion] / labelled}
            self.state = self.state.changed(figures={**self.state.figures, **live})
        margin, error = self._settings.margin, self._settings.error / (2 * _WATCH_LOOKS - 1)
        told = f"against {self.state.former}: {_told(found)}"
        # The pair's champion is the former one.
        if found.short_of(margin, error):
            return Event.REGRESSED, told
        if self._looks > 1:  # the world that it was better in may be gone again
            newest = self._pair.models.compared(step)
            self._note("watch_newest", newest)
            if newest.short_of(margin, error):
                return Event.REGRESSED, f"{told}; of the newest {newest.events} events: {_told(newest)}"
        if over or self._looks >= _WATCH_LOOKS:
            return Event.HELD, told
        return None

    # Transitions.

    def _happened(
        self,
        event: Event,
        reason: str,
        *,
        trigger: Trigger | None = None,
        alarms: list[bytes] | None = None,
        champion: str | None = None,
        former: str | None = None,
    ) -> None:
        """Follows the table: the new state and all that it leads to are written, then it is entered."""
        before, (state, action) = self.state, follow(self.state.state, event)
        now = self._now()
        changed = before.changed(state=state, learning_offset=self._offset)
        announcement = None
        match action:
            case Action.BEGIN:
                changed = changed.changed(trigger=trigger, figures={}, challenger=None, trained_until={})
                if trigger is not None and trigger.kind == "alarm":
                    changed = changed.changed(moved=trigger.since, learned={})
            case Action.REMEMBER:
                changed = changed.changed(pending=before.pending or trigger)
            case Action.ANNOUNCE:
                assert before.challenger is not None
                announcement = self._announcement(before.challenger, before.champion, reason)
                # An alarm that came meanwhile was about the former champion; what holds on is seen anew.
                pending = None if before.pending and before.pending.kind == "alarm" else before.pending
                changed = changed.changed(champion=before.challenger, former=before.champion, pending=pending)
            case Action.RETURN:
                assert before.former is not None
                announcement = self._announcement(before.former, before.champion, reason)
                changed = self._closed(changed, "rolled_back", reason).changed(champion=before.former)
            case Action.CLOSE:
                outcome: Outcomes = "promoted" if before.state is State.WATCHING else "rejected"
                changed = self._closed(changed, outcome, reason, failed=outcome == "rejected" and event is Event.FAILED)
            case Action.YIELD:
                changed = changed.changed(
                    champion=champion,
                    former=former,
                    challenger=None,
                    trigger=None,
                    trained_until={},
                    figures={},
                    moved={},
                )
        moved = state is not before.state or action is Action.YIELD
        if moved:
            changed = changed.changed(since_ms=now, attempts=0)
        same = changed.champion == before.champion
        changed = changed.changed(watched=self._monitor.watched() if same else Watched())
        if state is State.TRAINING and moved:
            recent = tuple(at for at in before.started_ms if at > now - _DAY_MS)
            changed = changed.changed(started_ms=(*recent, now), learned={**before.learned, **self._ends})
        self._journal.write(changed, announcement, alarms or ())
        self.state = changed
        if announcement is not None:
            self._announcements.read_to_end()
        log.info("refresh", what=event, reason=reason, before=before.state, state=state, champion=changed.champion)
        if changed.last is not before.last:
            self._record_decision(changed.last)
        if moved:
            if not same:
                self._monitor.restart("another model is served")
            self._enter()

    def _closed(self, state: RefreshState, outcome: Outcomes, reason: str, *, failed: bool = False) -> RefreshState:
        """A refresh has ended: with a version that was in service, or with a challenger that never was."""
        served = self.state.former is not None
        champion = self.state.former if served else self.state.champion
        challenger = self.state.champion if served else self.state.challenger
        last = Decision(outcome, self._now(), reason, state.trigger, champion or "", challenger, state.figures, failed)
        return state.changed(last=last, ended_ms=self._now(), trigger=None, challenger=None, former=None)

    def _announcement(self, version: str, previous: str, reason: str) -> Announcement:
        manifest = self._registry.manifest(version)
        rows = manifest.rows if manifest.parent == previous and manifest.rows else "carry"
        return Announcement(
            version, manifest.sha256, previous, rows, reason, self._now(), self.state.figures, _DECIDED_BY
        )

    def _record_decision(self, decided: Decision | None) -> None:
        """Into the challenger's manifest, for `models show`; the record in Kafka is what counts."""
        if decided is None or decided.challenger is None:
            return
        told = models.Decision(decided.outcome, decided.reason, decided.at_ms, _DECIDED_BY, decided.figures)
        try:
            models.record_decision(self._registry.folder(decided.challenger), told)
        except ModelError as problem:
            log.warning("the decision is not in the manifest", challenger=decided.challenger, problem=str(problem))

    def _enter(self, again: bool = False) -> None:
        """Begins what is done in the state; after the death of a leader from its beginning."""
        keep = self._pair if self.state.state in (State.PROMOTED, State.WATCHING) else None
        self._leave(keep)
        self._counts = _Counts()
        self._looks = 0
        if again:
            if self.state.state in RESTING:
                return
            self.state = self.state.changed(attempts=self.state.attempts + 1)
            self._journal.write(self.state)
            log.info("goes on where the leader before was", state=self.state.state, attempts=self.state.attempts)
            if self.state.attempts > _ATTEMPTS and Event.FAILED in _possible(self.state.state):
                self._happened(Event.FAILED, f"begun {self.state.attempts} times, and never ended")
                return
        try:
            self._begin()
        except (ConfigError, StreamAdaptError) as problem:
            if isinstance(problem, KafkaRefused) or Event.FAILED not in _possible(self.state.state):
                raise
            self._happened(Event.FAILED, str(problem))

    def _begin(self) -> None:
        state = self.state
        if state.state is State.TRAINING:
            # A window that is all of the new world is one world again.
            filled = self._since_moved(state.learned) >= self._settings.window_events
            newer = {} if filled else state.moved
            job = Job(self._config.model_dump(mode="json"), state.champion, self._now(), newer)
            self._training = self._start_training(self._config, job)
        elif state.state is State.SHADOW:
            champion, challenger = self._sound(state.challenger or "")
            rows = challenger.manifest.rows or "carry"
            self._pair = self._side_by_side(self._config, champion, challenger, rows, state.trained_until)
        elif state.state is State.WATCHING:
            self._begin_watch()

    def _begin_watch(self) -> None:
        """The former champion scores, too. If the shadow's rows are here, they go on; else rows are restored."""
        champion, former = self.state.champion, self.state.former
        pair = self._pair
        if pair is not None and (pair.models.champion, pair.models.other) == (former, champion):
            pair.models.forget()
            return
        if former is None:
            raise ModelError(f"{champion}: there is no former champion to compare with")
        self._leave()
        before, now = self._read(former), self._read(champion)
        check_successor(before, now)
        self._pair = self._side_by_side(self._config, before, now, "carry", {})

    def _leave(self, keep: Pair | None = None) -> None:
        """Ends what is done in a state."""
        if self._training is not None:
            self._training.close()
            self._training = None
        if self._pair is not None and self._pair is not keep:
            self._pair.close()
            self._pair = None

    # Odds and ends.

    def _served(self) -> str:
        """What members serve when nothing was ever decided."""
        newest = self._announcements.newest()
        return newest.version if newest is not None else read_model(self._config.model.path).version

    def _read(self, version: str) -> Model:
        return service.as_configured(self._config, self._registry.read(version))

    def _count(self, summaries: list[Summary]) -> None:
        for summary in summaries:
            self._counts.add(summary)
            self._ends[summary.partition] = summary.last_offset + 1

    def _note(self, when: str, found: Comparison) -> None:
        figures = {f"{when}_{name}": value for name, value in found.figures().items()}
        self.state = self.state.changed(figures={**self.state.figures, **figures})
        log.info(f"refresh {when}", **{name: round(value, 6) for name, value in figures.items()})

    def _keep(self) -> None:
        """Where summaries were read to, and what they told of drift."""
        if self.state.state in RESTING and self._clock() - self._kept_s >= _KEPT_S:
            self._kept_s = self._clock()
            self.state = self.state.changed(learning_offset=self._offset, watched=self._monitor.watched())
            self._journal.write(self.state)

    def _tell(self) -> None:
        if self._clock() - self._status_s >= _STATUS_S:
            self._status_s = self._clock()
            status.write(self._config.state_dir, self.status())

    def status(self) -> status.Status:
        """Where the refresh is."""
        state = self.state
        return status.Status(
            leader=True,
            state=state.state,
            since_ms=state.since_ms,
            champion=state.champion,
            challenger=state.challenger,
            trigger=state.trigger,
            last=state.last,
            progress=self._progress(),
            drift=self._monitor.statistics(),
            alarms_ms=dict(self._alarms_ms),
            written_ms=self._now(),
        )

    def _progress(self) -> dict[str, float]:
        told: dict[str, float] = {"labelled_events": float(self._counts.labelled.total())}
        if self._training is not None and (at := self._training.progress()) is not None and at.steps:
            told |= {"training_share": at.done / at.steps, "training_loss": at.loss or 0.0}
        if self._pair is not None:
            told["compared_events"] = float(self._pair.models.events)
        return told

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _possible(state: State) -> Mapping[Event, Transition]:
    return TABLE[state]


def _told(found: Comparison) -> str:
    return (
        f"log-loss {found.log_loss_champion:.4f} and {found.log_loss_challenger:.4f} with the other model, gain "
        f"{found.gain:+.5f} ± {found.standard_error:.5f} (t = {found.t:.2f}) on {found.events} events of {found.users} "
        "users"
    )
