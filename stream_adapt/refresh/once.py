"""`stream-adapt refresh`: asks for a refresh, and waits for how it ends. Leads it, if nobody else does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import msgspec

from stream_adapt.config import Config
from stream_adapt.refresh.controller import Controller
from stream_adapt.refresh.journal import Tail, ask
from stream_adapt.refresh.record import Decision, RefreshState
from stream_adapt.refresh.states import RESTING
from stream_adapt.shutdown import Shutdown


class Refreshed(msgspec.Struct):
    """How it stands: with a decision, or as far as it was when the command was told to stop."""

    state: str
    champion: str
    decision: Decision | None


def refresh_once(
    config: Config, shutdown: Shutdown, detail: str = "", tell: Callable[[RefreshState], None] = lambda _state: None
) -> Refreshed:
    """Asks for a refresh and waits until it has ended, or a stop is asked for.

    Raises:
        KafkaRefused, ConfigError, StateMismatch: each says what to do.
    """
    with closing(Tail(config)) as tail:  # says at once when the topic is missing
        request = ask(config, detail)
        told: RefreshState | None = None

        def ended() -> bool:
            nonlocal told
            tail.poll()
            state = tail.state
            if state is None or state.request != request.id:
                return False
            if told is None or told.state != state.state:
                told = state
                tell(state)
            return state.state in RESTING and state.pending is None

        Controller(config).run(shutdown, ended)
        state = told or tail.state or RefreshState()
        mine = state.last if state.request == request.id and state.state in RESTING else None
    return Refreshed(state.state, state.champion, mine)
