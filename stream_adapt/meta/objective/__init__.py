"""What the outer loop minimises: objectives by name, behind one contract (`contract.Objective`).

| name | adapted on | judged on | the gradient flows through |
|---|---|---|---|
| `prequential` | every event before | every event | the updates: a closed form, or all of them, or the last few |
| `maml` | the first events of a sequence | the rest | the updates on the first |
| `fomaml` | the same | the same | what reads the adapted weights, not what made them |
| `reptile` | every event before, and gradient steps | every event | the updates; the steps' results are constants |

`direct`, which does not adapt at all, is what a baseline is trained with.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from stream_adapt.errors import ConfigError
from stream_adapt.meta.objective.contract import Objective
from stream_adapt.meta.objective.direct import Direct
from stream_adapt.meta.objective.maml import Maml
from stream_adapt.meta.objective.prequential import Prequential
from stream_adapt.meta.objective.reptile import Reptile

__all__ = ["NAMES", "Name", "Objective", "Settings", "make", "told"]

Name = Literal["prequential", "maml", "fomaml", "reptile", "direct"]
NAMES: tuple[Name, ...] = get_args(Name)


#: On events 40–50 k of MovieLens-100K MAML had a log-loss of 0.5632, 0.5615, 0.5626, 0.5656 and 0.5692 with 4, 8, 16,
#: 32 and half of a window's events.
SUPPORT = 8.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which objective, and what each of them can be told; the others' settings are not looked at."""

    name: Name = "prequential"
    truncate: int = 0  # prequential, reptile: gradients reach back so many events; 0: all, by a closed form, or 64
    support: float = SUPPORT  # maml, fomaml: events adapted on, or, below 1, their share of a window
    inner_steps: int = 3  # reptile
    inner_rate: float = 0.1  # reptile


#: What each objective reads of the settings, and the least value that makes sense.
_LEAST: dict[Name, dict[str, float]] = {
    "prequential": {"truncate": 0},
    "maml": {"support": 0},
    "fomaml": {"support": 0},
    "reptile": {"truncate": 0, "inner_steps": 1, "inner_rate": 0},
    "direct": {},
}


def make(settings: Settings) -> Objective:
    """The objective that the settings name.

    Raises:
        ConfigError: there is no such objective, or it cannot work as told.
    """
    if settings.name not in NAMES:
        raise ConfigError(f"objective={settings.name!r} is not one of {', '.join(NAMES)}")
    for name, least in _LEAST[settings.name].items():
        if not getattr(settings, name) >= least:
            raise ConfigError(f"objective.{name}={getattr(settings, name)} must be at least {least:g}")
    made: dict[Name, Objective] = {
        "prequential": Prequential(settings.truncate),
        "maml": Maml(settings.support),
        "fomaml": Maml(settings.support, first_order=True),
        "reptile": Reptile(settings.inner_steps, settings.inner_rate, settings.truncate),
        "direct": Direct(),
    }
    return made[settings.name]


def told(settings: Settings) -> dict[str, Any]:
    """The objective's name and what it was told, for a model's manifest."""
    return {name: getattr(settings, name) for name in ("name", *_LEAST[settings.name])}
