"""The network between members and broker: faults of `stream_adapt.testing.proxy`, for one member, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from stream_adapt.chaos.members import Troubles
from stream_adapt.chaos.schedule import Fault, Timeouts
from stream_adapt.testing import proxy
from stream_adapt.testing.proxy import Api, Cut, Drop, FaultProxy, HalfOpen, Hold, Injected, Match, Trickle

#: Of a connection that crawls: heartbeats get through, batches hardly.
_CRAWL_BYTES_PER_S = 2_000.0


def kinds(timeouts: Timeouts) -> tuple[Fault, ...]:
    """What can be done to a member's connections, and for how long."""
    past_transaction = (timeouts.transaction_s * 1.1, timeouts.transaction_s * 1.4)
    return (
        Fault("hold a commit", 0.5, 4.0),
        Fault("hold a commit past the transaction", *past_transaction),
        Fault("lose a commit", *past_transaction),
        Fault("lose the answer to a commit", *past_transaction),
        Fault("hold offsets", 0.5, 4.0),
        Fault("lose offsets", *past_transaction),
        Fault("lose the answer to a produce", 0.5, 4.0),
        Fault("cut", 0.0, 0.0),
        Fault("reset", 0.0, 0.0),
        Fault("half open", 1.0, timeouts.session_s * 1.2),
        Fault("crawl", 1.0, timeouts.session_s),
    )


def _faults(client_id: str) -> dict[str, proxy.Fault]:
    """Name of a fault → the proxy's."""

    def one(api: Api) -> Match:
        return Match(api, client_id, count=1)

    return {
        "hold a commit": Hold(one(Api.END_TXN)),
        "hold a commit past the transaction": Hold(one(Api.END_TXN)),
        "lose a commit": Drop(one(Api.END_TXN)),
        "lose the answer to a commit": Drop(one(Api.END_TXN), at="response"),
        "hold offsets": Hold(one(Api.TXN_OFFSET_COMMIT)),
        "lose offsets": Drop(one(Api.TXN_OFFSET_COMMIT)),
        "lose the answer to a produce": Drop(one(Api.PRODUCE), at="response"),
        "cut": Cut(client_id),
        "reset": Cut(client_id, reset=True),
        "half open": HalfOpen(client_id),
        "crawl": Trickle(client_id, _CRAWL_BYTES_PER_S),
    }


class Network:
    """Sets faults and lifts them when their time is over.

    Args:
        through: the proxies that all members go through, one for each broker.
        client_id_of: a member's name → its client id.
        troubles: told of every fault.
    """

    def __init__(self, through: Sequence[FaultProxy], client_id_of: Callable[[str], str], troubles: Troubles) -> None:
        self._proxies = through
        self._client_id_of = client_id_of
        self._troubles = troubles
        self._at_work: list[tuple[float, Injected]] = []

    def inject(self, fault: str, member: str, seconds: float) -> None:
        """Does it to one member's connections."""
        now = time.monotonic()
        made = _faults(self._client_id_of(member))[fault]
        self._at_work += [(now + seconds, proxy.inject(made)) for proxy in self._proxies]
        self._troubles.cut.setdefault(member, []).append((now, now + seconds))

    def tend(self) -> None:
        """Lifts what has lasted long enough."""
        now = time.monotonic()
        for until, injected in self._at_work:
            if now >= until:
                injected.lift()
        self._at_work = [(until, injected) for until, injected in self._at_work if now < until]

    def settle(self) -> None:
        """No faults any more."""
        for _, injected in self._at_work:
            injected.lift()
        self._at_work.clear()
