"""No meta-learning: every event's loss under the prior alone, as any supervised model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from stream_adapt.meta.objective.contract import Judged, Problem


@dataclass(frozen=True, slots=True)
class Direct:
    """The prior is the logit; the rule takes no part."""

    def judge(self, problem: Problem) -> Judged:
        return Judged(problem.losses(problem.seen.prior), problem.seen.real)
