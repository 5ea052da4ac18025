"""Every bad record of which we know, with the reason why it is refused; and what a good one looks like."""

from __future__ import annotations

import json
from typing import Any

from stream_adapt.learner.encoder import Bag, Categorical, Numeric, Vector
from stream_adapt.learner.feedback import Feedback, LabelCuts

#: Before the clock of any machine that runs this.
NOW_MS = 1_700_000_000_000
TEN_YEARS_MS = 315_360_000_000
FEATURES = {"genres": Bag(), "year": Numeric(), "embedding": Vector(length=2), "country": Categorical()}
THREE_STARS = Feedback(("1", "2", "3"), "2", LabelCuts((1, 3), (2, 3)), {"click": "2"})

GOOD: dict[str, Any] = {
    "event_id": "e1",
    "user_id": "u",
    "item_id": "i",
    "event_type": "rating",
    "timestamp": NOW_MS,
    "label": 2,
}


def good_event(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def _without(name: str) -> bytes:
    return json.dumps({k: v for k, v in GOOD.items() if k != name}).encode()


def _features(**features: Any) -> bytes:
    return good_event(features=features)


#: Values longer than this are refused in the tests.
MAX_BYTES = 150_000

#: name, value, reason
BAD_VALUES: list[tuple[str, bytes | None, str]] = [
    ("tombstone", None, "null_value"),
    ("empty", b"", "not_json"),
    ("text", b"nope", "not_json"),
    ("array", b"[1]", "wrong_type"),
    ("two objects", good_event() + good_event(), "not_json"),
    ("truncated", good_event()[:-5], "not_json"),
    ("not UTF-8", b"\xff\xfe{}", "not_utf8"),
    ("string not UTF-8", good_event().replace(b'"i"', b'"\xc3"'), "not_utf8"),
    ("no user", _without("user_id"), "missing_field"),
    ("no item", _without("item_id"), "missing_field"),
    ("no time", _without("timestamp"), "missing_field"),
    ("no event id", _without("event_id"), "missing_field"),
    ("empty user", good_event(user_id=""), "empty_id"),
    ("long item", good_event(item_id="i" * 1025), "too_large"),
    ("user is a number", good_event(user_id=5), "wrong_type"),
    ("time is a string", good_event(timestamp="now"), "wrong_type"),
    ("time is a fraction", good_event(timestamp=1.5), "wrong_type"),
    ("negative time", good_event(timestamp=-1), "bad_timestamp"),
    ("far future", good_event(timestamp=NOW_MS + TEN_YEARS_MS + 86_400_001), "future_timestamp"),
    ("beyond 64 bits", good_event(timestamp=10**30), "future_timestamp"),
    ("label too high", good_event(label=3.5), "label_out_of_range"),
    ("label too low", good_event(label=0), "label_out_of_range"),
    ("label 1e308", good_event(label=1e308), "label_out_of_range"),
    ("label a string", good_event(label="2"), "wrong_type"),
    ("label NaN", good_event(label=float("nan")), "not_finite"),
    ("label Infinity", good_event(label=float("-inf")), "not_finite"),
    ("label 1e400", good_event(label=0).replace(b'"label": 0', b'"label": 1e400'), "not_finite"),
    ("feature NaN", _features(year=float("nan")), "not_finite"),
    ("feature 1e308", _features(year=1e308), "out_of_range"),
    ("vector 1e308", _features(embedding=[1, -1e308]), "out_of_range"),
    ("short vector", _features(embedding=[1]), "vector_length"),
    ("long vector", _features(embedding=[1, 2, 3]), "vector_length"),
    ("bag of numbers", _features(genres=[1]), "wrong_type"),
    ("too many in a bag", _features(genres=["g"] * 1001), "too_large"),
    ("features an array", good_event(features=[1]), "wrong_type"),
    ("deep", good_event(x=0).replace(b'"x": 0', b'"x": ' + b"[" * 50_000 + b"]" * 50_000), "too_deep"),
    ("too large", good_event(x="y" * 200_000), "too_large"),
]
