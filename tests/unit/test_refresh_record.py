"""The state of the controller as a record."""

from __future__ import annotations

import msgspec
import pytest

from stream_adapt.errors import StateMismatch
from stream_adapt.refresh.record import FORMAT, Decision, RefreshState, Trigger
from stream_adapt.refresh.states import State

TRIGGER = Trigger("alarm", 5, "excess_loss", {0: 7, 3: 11})
STATE = RefreshState(
    state=State.SHADOW,
    since_ms=9,
    champion="v1",
    challenger="v2",
    trigger=TRIGGER,
    started_ms=(1, 2),
    trained_until={0: 100},
    figures={"shadow_gain": 0.01},
    last=Decision("rejected", 4, "no better", TRIGGER, "v1", "v0", {"t": 0.3}),
    request="r",
    learning_offset=42,
)


def test_a_state_is_read_as_it_was_written() -> None:
    assert STATE == RefreshState.decode(STATE.encode(), "here")


def test_fields_of_a_later_release_are_skipped() -> None:
    more = msgspec.json.encode({**msgspec.to_builtins(STATE, str_keys=True), "mood": "good"})
    assert STATE == RefreshState.decode(more, "here")


@pytest.mark.parametrize("content", [b"", b"{", b"7", b'{"state": "happy"}', b'{"since_ms": "soon"}'])
def test_what_is_no_state_is_refused_with_the_place_and_what_to_do(content: bytes) -> None:
    with pytest.raises(StateMismatch, match=r"app\.refresh@3: not the state of a refresh.*tombstone"):
        RefreshState.decode(content, "app.refresh@3")


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(StateMismatch, match=f"format {FORMAT + 1}, this release reads up to {FORMAT}"):
        RefreshState.decode(STATE.changed(format=FORMAT + 1).encode(), "here")
