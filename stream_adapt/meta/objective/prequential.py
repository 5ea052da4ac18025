"""What production pays: the loss of every event, predicted from the user's earlier events alone.

Dawid, "Statistical theory: the prequential approach", JRSS A 1984. A rule with a closed form is differentiated through
that; any other, event by event through its updates.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stream_adapt.meta.objective.contract import Judged, Problem, unroll


@dataclass(frozen=True, slots=True)
class Prequential:
    """Σ_t ℓ(y_t, f_θ(x_t; w_{t−1})), w unrolled through the rule."""

    truncate: int = 0  # > 0: unrolled in any case, and gradients reach back so many events at most; see `predict`

    def judge(self, problem: Problem) -> Judged:
        return Judged(problem.losses(predict(problem, self.truncate)), problem.seen.real)


#: How far back gradients reach where the rule has no closed form and nobody says: what an update does for later events
#: is known by then.
TRUNCATE = 64


def predict(problem: Problem, truncate: int = 0) -> Tensor:
    """Logits `[B, T]` of every event, learned from those before it.

    Args:
        problem: the sequences and the rule.
        truncate: gradients reach back so many events; 0: to the first by the rule's closed form, or, if it has none,
            TRUNCATE events.
    """
    said = None if truncate else problem.rule.closed_form(problem.seen)
    return unroll(problem, problem.seen.real, truncate or TRUNCATE)[0] if said is None else said
