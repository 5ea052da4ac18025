"""Update rules: how a row and an event become a score and a new row. Each is a package that declares a `RULE`.

`LearnerSpec.rule` names one, `find` gives it, and nothing else in the product asks which it is. `tests/contract/` runs
over every package found here, with every variant that it declares.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.learner.rules.events import Events, Scores
from stream_adapt.models import LearnerSpec, Model
from stream_adapt.state.row import Layout

#: Learns a batch: slab of users, slab of items, events, scores to fill in.
AdaptRows = Callable[[npt.NDArray[Any], npt.NDArray[Any], Events, Scores], None]


@dataclass(frozen=True)
class Rule:
    """What a rule offers to whoever serves, tests or measures it."""

    #: Settings of `LearnerSpec` under which it is a different rule, by the name of the variant.
    variants: Mapping[str, Mapping[str, Any]]
    user_layout: Callable[[LearnerSpec], Layout]
    item_layout: Callable[[LearnerSpec], Layout]
    #: Fields of a new user's row that are not zero.
    first_user: Callable[[Model], Mapping[str, npt.NDArray[np.float32]]]
    #: `step`, for the CPU.
    compiled: Callable[[Model], AdaptRows]
    #: `batched`, on a device that torch knows. Raises ConfigError: torch cannot use it.
    batched: Callable[[Model, str], AdaptRows]


def names() -> tuple[str, ...]:
    """Every rule there is."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def find(name: str) -> Rule:
    """The rule of that name."""
    rule: Rule = import_module(f"{__name__}.{name}").RULE
    return rule


def user_layout(spec: LearnerSpec) -> Layout:
    """Row of a user under the rule that `spec` names."""
    return find(spec.rule).user_layout(spec)


def item_layout(spec: LearnerSpec) -> Layout:
    """Row of an item under the rule that `spec` names."""
    return find(spec.rule).item_layout(spec)
