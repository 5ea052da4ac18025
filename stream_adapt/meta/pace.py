"""When a training ends: after its steps, when its time is up, or when what was set aside gets no better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from stream_adapt.errors import ConfigError, DataError
from stream_adapt.meta.sequences import Log

Clock = Callable[[], float]
Validate = Literal["later", "users"]


class Pace:
    """How far a training is, in steps: by those done or, with a time budget, by the clock where that is further.

    The schedule of the rate follows it, so that a training that ends by the clock has come down as any other.
    """

    def __init__(self, steps: int, seconds: float, clock: Clock = time.monotonic, started: float | None = None) -> None:
        """`seconds` from `started` (now, if not given) are the budget; 0: none."""
        self.steps, self.done, self.at = steps, 0, 0.0
        self._seconds, self._clock = seconds, clock
        self._started = clock() if started is None else started

    def advance(self) -> None:
        """A step is done."""
        self.done += 1
        spent = (self._clock() - self._started) / self._seconds if self._seconds else 0.0
        self.at = max(float(self.done), spent * self.steps)

    @property
    def over(self) -> bool:
        """Whether that was the last step."""
        return self.at >= self.steps

    @property
    def shown(self) -> int:
        """The step for a progress bar, at most the last."""
        return min(int(self.at), self.steps)


def held_out(log: Log, validate: Validate, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which events `[n]` are set aside: the last ones, or all events of some users, drawn by the seed.

    Raises:
        ConfigError: the share or what it is of makes no sense.
        DataError: nothing would be left to learn from.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"validation_share={share}: give a number from 0 to below 1")
    if validate == "later":
        return np.arange(len(log)) >= len(log) - round(share * len(log))
    if validate != "users":
        raise ConfigError(f"validate={validate!r} must be later or users")
    counts = np.bincount(log.users)
    order = np.random.default_rng(seed).permutation(len(counts))
    aside = np.zeros(len(counts), dtype=bool)
    aside[order] = np.cumsum(counts[order]) - counts[order] < share * len(log)
    if aside.all():
        raise DataError(
            f"{len(counts)} users are too few to set {share:.0%} of the events aside; validate later events"
        )
    held: npt.NDArray[np.bool_] = aside[log.users]
    return held


class Watch:
    """Early stopping: judges what was set aside after every epoch, and keeps the best epoch's weights."""

    def __init__(
        self, judge: Callable[[Any, Any], float], patience: int, told: Callable[[int, float], None] | None = None
    ) -> None:
        """`judge` gives a loss, `told` hears of it; `patience` epochs without a better one end it (0: none do)."""
        self._judge, self._patience, self._told = judge, patience, told
        self._best, self._kept = math.inf, {}  # type: float, dict[str, Any]
        self.epochs = 0  # that the best weights had seen

    def enough(self, epoch: int, parameters: nn.Module, vocabulary: Any) -> bool:
        """Whether to stop after this epoch, from 0."""
        if not self._patience and self._told is None:
            return False
        loss = self._judge(parameters, vocabulary)
        if self._told is not None:
            self._told(epoch, loss)
        if loss < self._best:
            self._best, self.epochs = loss, epoch + 1
            self._kept = deepcopy(parameters.state_dict()) if self._patience else {}
        return 0 < self._patience <= epoch + 1 - self.epochs

    def restore(self, parameters: nn.Module) -> None:
        """Puts the best epoch's weights back."""
        if self._kept:
            parameters.load_state_dict(self._kept)
