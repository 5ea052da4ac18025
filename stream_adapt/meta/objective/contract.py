"""What an objective is given, and what it gives back.

    θ, padded user sequences ──▶ Problem ──objective──▶ Judged: a loss for every event that counts

    objective.judge(problem).mean().backward()      a step's gradient is in θ's `.grad`

A `Problem` is a batch of users' sequences read under one θ, with the update rule under the same θ. An objective
chooses which events the rule learns from, which are judged, and through what the gradient flows; what the rule's
equations are it does not know. `Rule` is what it needs of one: rows that a sequence begins with, and a step, both
differentiable in θ; and, where the rule has one, a closed form for a whole sequence.

Capital letters: B sequences, T events of the longest, D dimensions, L levels. m events of different sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

#: Rows of m sequences: a named tuple of tensors `[m, …]`, the rule's own.
Rows = tuple[Tensor, ...]

#: Weight of the other thresholds' losses beside the target's: what the target alone says of the levels is coarse.
ORDINAL_WEIGHT = 0.5
MS_PER_HOUR = 3_600_000.0
#: The level of an event that nothing is learned from.
UNTAUGHT = -1


@dataclass(frozen=True, slots=True)
class Sequences:
    """B users' sequences, padded at their ends; what a padded event holds counts for nothing."""

    x: Tensor  # [B, T, D+1] x̃
    prior: Tensor  # [B, T] b + c + ⟨w₀, x̃⟩
    scores: Tensor  # [B, T] s_ℓ
    gaps: Tensor  # [B, T] hours since the sequence's event before; 0 at the first
    real: Tensor  # [B, T] bool

    @property
    def lengths(self) -> Tensor:
        """Events `[B]` of each sequence."""
        return self.real.sum(1)


class Events(NamedTuple):
    """m events of m different sequences, as a rule reads them."""

    x: Tensor  # [m, D+1] x̃
    prior: Tensor  # [m] b + c + ⟨w₀, x̃⟩
    time_ms: Tensor  # [m] int64, since the sequence's first event
    level: Tensor  # [m] int64; UNTAUGHT: nothing is learned


class Rule(Protocol):
    """An update rule under one θ; everything is differentiable in θ and in what was seen.

    Rows keep a sequence's deviation from the prior, w − w₀: an objective that detaches them leaves ∂w/∂w₀ = I.
    """

    def init(self, m: int) -> Rows:
        """Rows of m sequences before their first event."""

    def read(self, rows: Rows, events: Events) -> Tensor:
        """Logits `[m]` of the target, before anything is learned of these events."""

    def step(self, rows: Rows, events: Events) -> tuple[Tensor, Rows]:
        """What `read` says, and the rows after the events; the row of an UNTAUGHT event stays as it was."""

    def frozen(self, seen: Sequences) -> Tensor:
        """Logits `[B, T]` of the prior alone: the same model without adaptation."""

    def closed_form(self, seen: Sequences) -> Tensor | None:
        """Logits `[B, T]` of every event, learned from those before it; None where the rule has no closed form."""

    def closed_rows(self, seen: Sequences, learned: Tensor, clock_ms: Tensor) -> Rows | None:
        """Rows of B sequences after the first `learned` `[B]` events of each, at `clock_ms` `[B, T]`; None alike."""


class Judged(NamedTuple):
    """Losses of a batch's events, and which of them count."""

    losses: Tensor  # [B, T]
    judged: Tensor  # [B, T] bool

    def mean(self) -> Tensor:
        """Mean loss per event that counts: its gradient is what the outer optimiser steps along."""
        return self.losses[self.judged].mean()


@dataclass(frozen=True)
class Problem:
    """A batch of users' sequences under one θ. Each sequence begins cold: a task."""

    rule: Rule
    seen: Sequences
    levels: Tensor  # [B, T] what was said
    thresholds: Tensor  # [L−1] see `loss`
    target: int

    def losses(self, logits: Tensor) -> Tensor:
        """Losses of events under logits, both `[B, T]`."""
        return loss(logits, self.levels, self.thresholds, self.target)

    def moved(self, offsets: Tensor) -> Problem:
        """The same with a prior mean of its own for each sequence: w₀ + `offsets` `[B, D+1]`."""
        prior = self.seen.prior + (self.seen.x * offsets[:, None]).sum(-1)  # [B, T]
        return replace(self, seen=replace(self.seen, prior=prior))

    @cached_property
    def clock_ms(self) -> Tensor:
        """Time of every event `[B, T]` int64 since its sequence's first; it never goes back, as in service."""
        return (self.seen.gaps.double() * MS_PER_HOUR).round().long().cumsum(1)

    def events(self, at: tuple[Any, ...], taught: Tensor) -> Events:
        """The m events at an index into `[B, T]`; learned from where `taught` `[m]`."""
        levels = torch.where(taught, self.levels[at], UNTAUGHT)  # [m]
        return Events(self.seen.x[at], self.seen.prior[at], self.clock_ms[at], levels)


class Objective(Protocol):
    """What the outer loop minimises."""

    def judge(self, problem: Problem) -> Judged:
        """Losses of the events that count. No event's loss depends on feedback that came later."""


def unroll(problem: Problem, learn: Tensor, truncate: int = 0) -> tuple[Tensor, Rows]:
    """Takes the rule through sequences event by event: the loop that service runs, differentiable.

    Args:
        problem: the sequences and the rule.
        learn: `[B, t]` bool, which of the first t ≤ T events the rule learns from; the others it only scores.
        truncate: gradients reach back so many events at most, counted from fixed places (truncated back-propagation
            through time: Williams and Peng 1990); 0: to the first.

    Returns:
        Logits `[B, t]`, each said before its event was learned, and the rows after all of them.
    """
    sequences, events = learn.shape
    rows, logits = problem.rule.init(sequences), []
    levels = torch.where(learn, problem.levels[:, :events], UNTAUGHT)  # [B, t]
    columns = (problem.seen.x, problem.seen.prior, problem.clock_ms)
    # unbind: the gradient of a slice would be as large as what it was cut from, for each of t events.
    each = zip(*(c[:, :events].unbind(1) for c in columns), levels.unbind(1), strict=True)
    for t, seen in enumerate(each):
        if truncate and t and t % truncate == 0:
            rows = detached(rows)
        said, rows = problem.rule.step(rows, Events(*seen))
        logits.append(said)
    return torch.stack(logits, 1) if logits else problem.seen.prior[:, :0], rows


def detached(rows: Rows) -> Rows:
    """Rows as numbers, without how they came about."""
    return _like(rows, [t.detach() for t in rows])


def taken(rows: Rows, at: Tensor) -> Rows:
    """Rows at `at` `[m]`."""
    return _like(rows, [t[at] for t in rows])


def _like(rows: Rows, tensors: list[Tensor]) -> Rows:
    made: Rows = type(rows)._make(tensors)  # type: ignore[attr-defined]  # named tuples
    return made


def loss(logits: Tensor, levels: Tensor, thresholds: Tensor, target: int) -> Tensor:
    """Cross-entropy `[…]` of the target, plus ORDINAL_WEIGHT times that of the other thresholds.

    Args:
        logits: `[…]` of the target, `level >= target`.
        levels: `[…]` what was said.
        thresholds: `[L−1]` what to add to the logit for `level >= 1`, …, `level >= L−1`; 0 at the target.
        target: the first level whose target is 1.
    """
    cuts = torch.arange(1, len(thresholds) + 1, device=levels.device)  # [L-1]
    said = (levels[..., None] >= cuts).to(logits.dtype)  # [..., L-1]
    each = binary_cross_entropy_with_logits(logits[..., None] + thresholds, said, reduction="none")  # [..., L-1]
    weights = torch.where(cuts == target, 1.0, ORDINAL_WEIGHT)  # [L-1]
    return each @ weights.to(each.dtype)  # [...]
