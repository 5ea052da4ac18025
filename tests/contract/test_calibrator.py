"""What a calibrator promises under every rule and variant: it corrects scores, and nothing that is learned."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from learner_streams import (
    CALIBRATED,
    VARIANTS,
    adapt_all,
    assert_said_equal,
    cut,
    model_of,
    random_stream,
    state_of,
)

from stream_adapt.adapt import Adapter
from stream_adapt.learner import rules
from stream_adapt.models import CALIBRATOR_TERMS, LearnerSpec, Model, RuleName
from stream_adapt.record import Adapted

pytestmark = pytest.mark.parametrize(("rule", "variant"), [one for one in VARIANTS if one[1].endswith(CALIBRATED)])
both_devices = pytest.mark.parametrize("device", ("cpu", "torch-cpu"))

Rows = dict[tuple[int, str], dict[str, Any]]


def with_coefficients(model: Model, coefficients: Any) -> Model:
    weights = msgspec.structs.replace(model.weights, calibrator=np.array(coefficients, np.float32))
    return msgspec.structs.replace(model, weights=weights)


def silent(model: Model) -> Model:
    """The model with a calibrator that changes nothing."""
    return with_coefficients(model, np.zeros(len(CALIBRATOR_TERMS)))


def learned(model: Model, device: str) -> tuple[Adapted, Rows, dict[tuple[int, str], bytes]]:
    """What is said of a stream, and the rows after it, those of users without what a calibrator asked for."""
    adapter = Adapter(model, device)
    said = adapt_all(adapter, cut(random_stream(300), 100))
    users, items = state_of(adapter)
    layout = adapter.users.layout
    rows = {key: layout.from_bytes(row) for key, row in users.items()}
    fields = [f.name for f in layout.fields if f.name != "missed"]
    return said, {key: {name: row[name].tolist() for name in fields} for key, row in rows.items()}, items


@both_devices
def test_scores_change_and_nothing_that_is_learned(rule: RuleName, variant: str, device: str) -> None:
    model = model_of(rule, variant)
    plain, users, items = learned(model_of(rule, variant.removesuffix(CALIBRATED)), device)
    for other in (silent(model), model):
        said, *rows = learned(other, device)
        assert [users, items] == rows
        for name in ("frozen_score", "uncertainty", "adaptations", "flags"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(said, name), err_msg=name)
    assert np.all(plain.score != said.score)
    assert np.all(plain.updated_score != said.updated_score)


@both_devices
def test_one_with_coefficients_of_zero_is_none(rule: RuleName, variant: str, device: str) -> None:
    plain, _, _ = learned(model_of(rule, variant.removesuffix(CALIBRATED)), device)
    said, _, _ = learned(silent(model_of(rule, variant)), device)
    assert_said_equal(plain, said)


@both_devices
def test_each_coefficient_is_heard(rule: RuleName, variant: str, device: str) -> None:
    model = silent(model_of(rule, variant))
    rows = [np.zeros(len(CALIBRATOR_TERMS)), *(0.1 * np.eye(len(CALIBRATOR_TERMS)))]
    scores = [learned(with_coefficients(model, row), device)[0].score for row in rows]
    assert len(rows) == len({said.tobytes() for said in scores})


def test_rows_grow_by_one_number(rule: RuleName, variant: str) -> None:
    settings = rules.find(rule).variants[variant.removesuffix(CALIBRATED)]
    plain = rules.user_layout(LearnerSpec(rule=rule, **settings))
    calibrated = rules.user_layout(LearnerSpec(rule=rule, calibrator="linear", **settings))
    assert {f.name for f in plain.fields} | {"missed"} == {f.name for f in calibrated.fields}
    assert calibrated.row_bytes <= plain.row_bytes + 8  # rows are multiples of eight bytes
    spec = LearnerSpec(rule=rule, **settings)
    assert rules.item_layout(spec) == rules.item_layout(msgspec.structs.replace(spec, calibrator="linear"))
