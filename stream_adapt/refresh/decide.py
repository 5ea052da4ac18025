"""Whether a challenger is better than the champion, or only luckier: a paired test, users as clusters.

Both models score the same n events. With d the champion's log-loss less the challenger's, the gain is the mean of d.
Losses of one user are correlated, so it is users that are counted, not events: with S_u the sum of d over user u's n_u
events, the gain is ΣS_u/Σn_u, a ratio of two sums over users, and its variance is that of a cluster sample (Cochran,
Sampling Techniques, 3rd ed., 1977, §6.3 and §9A.1; the same as cluster-robust least squares: Cameron and Miller, A
Practitioner's Guide to Cluster-Robust Inference, J. Human Resources 50, 2015):

    V = G/(G−1) · Σ_u (S_u − gain·n_u)² / n²            t = gain/√V, Student's with G − 1 degrees of freedom

A comparison may look more than once at a growing sample; every look then has its part of the error (Bonferroni).
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from stream_adapt.evaluate.metrics import auc

Floats = npt.NDArray[np.float64]

#: With fewer users Student's distribution is not to be relied on: clusters differ in size.
FEWEST_USERS = 20
#: Probabilities are kept this far from 0 and 1, so that one event cannot decide.
_EPSILON = 1e-6


class Comparison(msgspec.Struct, frozen=True):
    """Two models on the same events. A gain above 0 says that the second, the challenger, is better."""

    events: int
    users: int
    log_loss_champion: float
    log_loss_challenger: float
    auc_champion: float
    auc_challenger: float
    gain: float  # log-loss per event
    standard_error: float  # of the gain
    t: float

    def beyond(self, margin: float, error: float) -> bool:
        """Whether the challenger is better by at least `margin`, with a chance of at most `error` that it is not."""
        return self.gain >= margin and self.t > self._quantile(error)

    def short_of(self, margin: float, error: float) -> bool:
        """Whether it is worse by at least `margin`, with a chance of at most `error` that it is not."""
        return self.gain <= -margin and self.t < -self._quantile(error)

    def _quantile(self, error: float) -> float:
        """What Student's t exceeds with chance `error`; infinite with too few users."""
        if self.users < FEWEST_USERS:
            return math.inf
        return float(student.ppf(1.0 - error, self.users - 1))

    def figures(self) -> dict[str, float]:
        """All of it, by name; what is not finite is left out."""
        return {name: float(value) for name, value in msgspec.structs.asdict(self).items() if math.isfinite(value)}


def compare(
    users: npt.NDArray[np.int64], targets: npt.NDArray[np.bool_], champion: Floats, challenger: Floats
) -> Comparison:
    """Compares probabilities that the target is met, for n events.

    Args:
        users: `[n]` number of each event's user.
        targets: `[n]` whether it was met.
        champion: `[n]` what the model in service said.
        challenger: `[n]` what the candidate said; where it is not a number the candidate counts as wrong.
    """
    n = len(users)
    if not n:
        nan = math.nan
        return Comparison(0, 0, nan, nan, nan, nan, 0.0, math.inf, 0.0)
    loss_champion, loss_challenger = _losses(champion, targets), _losses(challenger, targets)  # [n]
    _, cluster, sizes = np.unique(users, return_inverse=True, return_counts=True)
    difference = loss_champion - loss_challenger  # [n]
    sums = np.bincount(cluster, difference)  # [G]
    gain, count = float(difference.mean()), len(sizes)
    squares = float(np.square(sums - gain * sizes).sum())
    error = math.sqrt(squares * count / max(count - 1, 1)) / n
    return Comparison(
        events=n,
        users=count,
        log_loss_champion=float(loss_champion.mean()),
        log_loss_challenger=float(loss_challenger.mean()),
        auc_champion=auc(champion, targets),
        auc_challenger=auc(challenger, targets),
        gain=gain,
        standard_error=error,
        t=gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0,
    )


def _losses(probabilities: Floats, targets: npt.NDArray[np.bool_]) -> Floats:
    wrong = np.where(targets, 0.0, 1.0)
    said = np.clip(np.where(np.isfinite(probabilities), probabilities, wrong), _EPSILON, 1.0 - _EPSILON)
    return -np.log(np.where(targets, said, 1.0 - said))
