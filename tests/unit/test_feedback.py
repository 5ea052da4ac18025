"""Declared feedback: what is refused, and how labels and event types become levels."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from stream_adapt.errors import ConfigError
from stream_adapt.learner.feedback import MOST_LEVELS, Feedback
from stream_adapt.record import NO_LEVEL

STARS = {"levels": ["1", "2", "3"], "target": "3", "label": {"range": [1, 3], "cuts": [2, 3]}}


def declared(**changes: Any) -> Feedback:
    return msgspec.convert({**STARS, **changes}, Feedback)


def evenly(levels: int) -> dict[str, Any]:
    cuts = np.linspace(0, 1, levels + 1)[1:-1].tolist()
    return {"levels": [str(k) for k in range(levels)], "target": "1", "label": {"range": [0, 1], "cuts": cuts}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"levels": ["3"]}, "two or more"),
        ({"levels": ["1", "3", "3"]}, "different names"),
        ({"target": "1"}, "target='1' must be one of"),
        ({"target": "4"}, "target='4' must be one of"),
        ({"event_types": {"skip": "0"}}, "event_types.skip='0' is not one of"),
        ({"label": None}, "nothing would be learned"),
        ({"label": {"range": [3, 1], "cuts": [2, 3]}}, "the lower first"),
        ({"label": {"range": [1, 3], "cuts": [2]}}, "3 levels need one fewer"),
        ({"label": {"range": [1, 3], "cuts": [3, 2]}}, "must rise"),
        ({"label": {"range": [1, 3], "cuts": [2, 4]}}, "lie inside"),
        (evenly(MOST_LEVELS + 1), "129 levels are more than 128: cut the label less finely"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(changes: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, msgspec.ValidationError), match=told):
        declared(**changes)


def test_a_label_counts_the_cuts_that_it_reaches_and_goes_before_the_event_type() -> None:
    feedback = declared(event_types={"skip": "1"})
    levels = feedback.level_of([1.0, 1.99, 2.0, 3.0, None, None], ["", "", "", "skip", "skip", "view"])
    assert levels.tolist() == [0, 0, 1, 2, 0, NO_LEVEL]


def test_the_most_levels_there_can_be_are_told_apart() -> None:
    feedback = declared(**evenly(MOST_LEVELS))
    labels = (np.arange(MOST_LEVELS) + 0.5) / MOST_LEVELS
    assert feedback.level_of(labels.tolist(), [""] * MOST_LEVELS).tolist() == list(range(MOST_LEVELS))
