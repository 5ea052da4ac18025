"""What a team would run instead: methods that score and learn the same events in the same order as the learner.

| name | what it is | package |
|---|---|---|
| `frozen` | the pretrained model without adapting | |
| `direct` | the learner trained without meta-learning, its rates tuned on the first half: `direct.py` | |
| `item_mean` | an item's running share of yes, shrunk to that of all | |
| `running_bias` | the same plus each user's running deviation from it | |
| `matrix_factorisation` | logistic, by stochastic gradient; rates and size tuned on the first half | |
| `river_logistic` | River's LogisticRegression on user, item and what is said of them | river |
| `river_ftrl` | River's FTRL-Proximal on the same and user × what is said of the item; rate tuned likewise | river |
| `vowpal_wabbit` | `-q ug -q ui`: user × what is said of the item, user × item | vowpalwabbit |

`frozen` and `direct` are served as the learner is. Each of the others is warmed on the first half, event by event, and
goes on learning in the second. Categorical features and bags count as "what is said"; numbers and vectors do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from numba import njit

from stream_adapt.errors import ConfigError
from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.halves import Half, Halves
from stream_adapt.evaluate.metrics import Floats, Longs
from stream_adapt.learner.encoder import Bag, Categorical, Feature
from stream_adapt.record import UserEvent

#: Events that an average is shrunk by: as if so many with the mean of all had been seen before.
_ITEM_SHRINK, _USER_SHRINK = 8.0, 4.0
#: Averages are kept this far from 0 and 1.
_MARGIN = 0.02
#: Rate of River's plain gradient, and those of its FTRL that are tried.
_SGD_RATE, _FTRL_RATES = 0.05, (0.05, 0.1, 0.2, 0.4)
#: Events of the first half, its first ones, that FTRL's rate is chosen on: each is scored before it is learned.
_FTRL_TUNED_ON = 50_000
_VOWPAL_WABBIT = "--loss_function logistic --link logistic -q ug -q ui -b 22 --quiet"


class Baseline(ABC):
    """A method that scores an event, and then learns it."""

    @abstractmethod
    def score(self, event: UserEvent) -> float:
        """The probability that the target is 1. Neither the event's label nor later events may be looked at."""

    @abstractmethod
    def learn(self, event: UserEvent, target: int) -> None:
        """Learns what became of an event that was scored."""

    def revisit(self, half: Half) -> None:  # noqa: B027 - most have no use for it
        """Called when the first half was scored and learned once: whoever wants more passes over it makes them."""


class ItemMean(Baseline):
    """(Σ y + k ȳ)/(n + k) of each item."""

    def __init__(self) -> None:
        self._yes, self._all = 1.0, 2.0
        self._of_item: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @property
    def overall(self) -> float:
        """ȳ, the share of yes so far."""
        return self._yes / self._all

    def score(self, event: UserEvent) -> float:
        total, count = self._of_item[event.item_id]
        return (total + _ITEM_SHRINK * self.overall) / (count + _ITEM_SHRINK)

    def learn(self, event: UserEvent, target: int) -> None:
        self._yes += target
        self._all += 1
        sums = self._of_item[event.item_id]
        sums[0] += target
        sums[1] += 1


class RunningBias(Baseline):
    """The item's mean plus Σ (y − item's mean)/(n + k) of each user."""

    def __init__(self) -> None:
        self._items = ItemMean()
        self._of_user: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def score(self, event: UserEvent) -> float:
        total, count = self._of_user[event.user_id]
        return min(max(self._items.score(event) + total / (count + _USER_SHRINK), _MARGIN), 1.0 - _MARGIN)

    def learn(self, event: UserEvent, target: int) -> None:
        sums = self._of_user[event.user_id]
        sums[0] += target - self._items.score(event)
        sums[1] += 1
        self._items.learn(event, target)


class Said:
    """What is said of users and items in words: `genres=Drama`."""

    def __init__(self, features: Mapping[str, Feature]) -> None:
        words = {name: feature for name, feature in features.items() if isinstance(feature, Categorical | Bag)}
        self._of_item = tuple(name for name, feature in words.items() if feature.of == "item")
        self._of_others = tuple(name for name, feature in words.items() if feature.of != "item")

    def of_item(self, event: UserEvent) -> list[str]:
        """Of the item."""
        return _words(event, self._of_item)

    def of_others(self, event: UserEvent) -> list[str]:
        """Of the user, and of the event."""
        return _words(event, self._of_others)


def _words(event: UserEvent, names: Iterable[str]) -> list[str]:
    words = []
    for name in names:
        value = event.features.get(name)
        if isinstance(value, str):
            words.append(f"{name}={value}")
        elif isinstance(value, list):
            words += [f"{name}={part}" for part in value]
    return words


class RiverLinear(Baseline):
    """One of River's linear models on words, each a feature of value 1.

    With `ftrl_rate` by FTRL-Proximal, and also on user × each word that is said of the item.
    """

    def __init__(self, features: Mapping[str, Feature], *, ftrl_rate: float | None = None) -> None:
        from river.linear_model import LogisticRegression
        from river.optim import SGD, FTRLProximal

        self._said, self._crosses = Said(features), ftrl_rate is not None
        optimiser = SGD(_SGD_RATE) if ftrl_rate is None else FTRLProximal(alpha=ftrl_rate)
        self._model: Any = LogisticRegression(optimiser)

    @classmethod
    def tuned(cls, features: Mapping[str, Feature], first: Half) -> RiverLinear:
        """FTRL with the rate that has the lowest log-loss on the first events of the first half."""
        places = first.taught[:_FTRL_TUNED_ON].tolist()
        targets = first.targets[:_FTRL_TUNED_ON]

        def loss(rate: float) -> float:
            model, said = cls(features, ftrl_rate=rate), np.empty(len(places))
            for k, place in enumerate(places):
                said[k] = model.score(first.events[place])
                model.learn(first.events[place], int(targets[k]))
            return metrics.log_loss(said, targets)

        return cls(features, ftrl_rate=min(_FTRL_RATES, key=loss))

    def score(self, event: UserEvent) -> float:
        return float(self._model.predict_proba_one(self._x(event)).get(True, 0.5))

    def learn(self, event: UserEvent, target: int) -> None:
        self._model.learn_one(self._x(event), bool(target))

    def _x(self, event: UserEvent) -> dict[str, float]:
        item = self._said.of_item(event)
        words = [f"user {event.user_id}", f"item {event.item_id}", *item, *self._said.of_others(event)]
        if self._crosses:
            words += [f"user {event.user_id} {word}" for word in item]
        return dict.fromkeys(words, 1.0)


class VowpalWabbit(Baseline):
    """Vowpal Wabbit: namespaces u (user), i (item), g (what is said of the item)."""

    def __init__(self, features: Mapping[str, Feature]) -> None:
        self._said = Said(features)
        self._workspace = importlib.import_module("vowpalwabbit").Workspace(_VOWPAL_WABBIT)

    def score(self, event: UserEvent) -> float:
        return float(self._workspace.predict(self._line(event)))

    def learn(self, event: UserEvent, target: int) -> None:
        self._workspace.learn(f"{1 if target else -1} {self._line(event)}")

    def _line(self, event: UserEvent) -> str:
        words = " ".join(map(_quoted, self._said.of_item(event)))
        return f"|u {_quoted(event.user_id)} |i {_quoted(event.item_id)} |g {words}"


@lru_cache(maxsize=100_000)
def _quoted(word: str) -> str:
    """A word without what separates words, weights and namespaces; never a number, which would be a place."""
    return f"w{quote(word, safe='')}"


class Rates(NamedTuple):
    """What matrix factorisation is tuned over."""

    dimensions: int
    rate: float
    decay: float
    passes: int  # over the first half


#: Every combination is tried on the first part of the first half, and judged on the rest.
GRID = tuple(itertools.starmap(Rates, itertools.product((8, 24), (0.02, 0.05, 0.1, 0.2), (0.02, 0.05, 0.1), (1, 8))))
_TUNED_ON = 0.8
#: Standard deviation of a vector's coordinates before anything is learned.
_INITIAL = 0.1


class Factors(NamedTuple):
    """Parameters of z = b + b_u + b_i + p_u·q_i; K dimensions, the last column of a row is its bias."""

    users: Floats  # [users, K+1]
    items: Floats  # [items, K+1]
    bias: Floats  # [1]


class MatrixFactorisation(Baseline):
    """Logistic matrix factorisation by stochastic gradient, every event once as it comes.

    Koren, Bell and Volinsky, "Matrix factorization techniques for recommender systems", Computer 42 (8), 2009.
    """

    def __init__(self, first: Half) -> None:
        self._numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self.rates = tuned(*self._columns(first))
        self._numbers = ({}, {})
        self._factors = _start(self.rates, 1024, 1024)

    def score(self, event: UserEvent) -> float:
        return float(_sigmoid(_logit(*self._factors, *self._places(event))))

    def learn(self, event: UserEvent, target: int) -> None:
        _learn(*self._factors, *self._places(event), target, self.rates.rate, self.rates.decay)

    def revisit(self, half: Half) -> None:
        users, items, targets = self._columns(half)
        for _ in range(self.rates.passes - 1):
            _stream(*self._factors, users, items, targets, self.rates.rate, self.rates.decay)

    def _places(self, event: UserEvent) -> tuple[int, int]:
        users, items = self._numbers
        user = users.setdefault(event.user_id, len(users))
        item = items.setdefault(event.item_id, len(items))
        if user >= len(self._factors.users) or item >= len(self._factors.items):
            self._grow()
        return user, item

    def _grow(self) -> None:
        """Twice the room; rows that are there stay as they are."""
        more = _start(self.rates, 2 * len(self._factors.users), 2 * len(self._factors.items))
        more.users[: len(self._factors.users)] = self._factors.users
        more.items[: len(self._factors.items)] = self._factors.items
        self._factors = Factors(more.users, more.items, self._factors.bias)

    def _columns(self, half: Half) -> tuple[Longs, Longs, Longs]:
        """Numbers of users and of items, and targets `[m]` of the events with feedback."""
        users, items = self._numbers
        events = [half.events[place] for place in half.taught.tolist()]
        user: Longs = np.array([users.setdefault(event.user_id, len(users)) for event in events], dtype=np.int64)
        item: Longs = np.array([items.setdefault(event.item_id, len(items)) for event in events], dtype=np.int64)
        return user, item, half.targets


def tuned(users: Longs, items: Longs, targets: Longs) -> Rates:
    """The combination with the lowest log-loss on the last events of a stream `[m]`, learned from those before."""
    cut = int(_TUNED_ON * len(targets))
    head, tail = (users[:cut], items[:cut], targets[:cut]), (users[cut:], items[cut:], targets[cut:])
    if not len(tail[0]):
        return GRID[0]

    def loss(rates: Rates) -> float:
        factors = _start(rates, int(users.max()) + 1, int(items.max()) + 1)
        for _ in range(rates.passes):
            _stream(*factors, *head, rates.rate, rates.decay)
        return metrics.log_loss(_stream(*factors, *tail, rates.rate, rates.decay), tail[2])

    return min(GRID, key=loss)


def _start(rates: Rates, users: int, items: int) -> Factors:
    random = np.random.default_rng(0)

    def table(rows: int) -> Floats:
        values = random.normal(0.0, _INITIAL, (rows, rates.dimensions + 1))
        values[:, -1] = 0.0
        return values

    return Factors(table(users), table(items), np.zeros(1))


@njit(cache=True)
def _sigmoid(z):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    return 1.0 / (1.0 + np.exp(-z))


@njit(cache=True)
def _logit(users, items, bias, user, item):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    last = users.shape[1] - 1
    z = bias[0] + users[user, last] + items[item, last]
    for k in range(last):
        z += users[user, k] * items[item, k]
    return z


@njit(cache=True)
def _learn(users, items, bias, user, item, target, rate, decay):  # type: ignore[no-untyped-def]  # pragma: no cover
    """One step of the gradient of the event's log-loss; returns the probability before it."""
    p = _sigmoid(_logit(users, items, bias, user, item))
    e = target - p
    last = users.shape[1] - 1
    bias[0] += 0.1 * rate * e
    users[user, last] += rate * (e - 0.2 * decay * users[user, last])
    items[item, last] += rate * (e - 0.2 * decay * items[item, last])
    for k in range(last):
        was = users[user, k]
        users[user, k] += rate * (e * items[item, k] - decay * was)
        items[item, k] += rate * (e * was - decay * items[item, k])
    return p


@njit(cache=True)
def _stream(users, items, bias, user, item, target, rate, decay):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Learns m events in order; probabilities `[m]`, each said before its event was learned."""
    said = np.empty(user.shape[0])
    for i in range(user.shape[0]):
        said[i] = _learn(users, items, bias, user[i], item[i], target[i], rate, decay)
    return said


# ---- by name


@dataclass(frozen=True)
class _Kind:
    make: Callable[[Mapping[str, Feature], Half], Baseline]
    package: str | None = None


_KINDS = {
    "item_mean": _Kind(lambda _, __: ItemMean()),
    "running_bias": _Kind(lambda _, __: RunningBias()),
    "matrix_factorisation": _Kind(lambda _, first: MatrixFactorisation(first)),
    "river_logistic": _Kind(lambda features, _: RiverLinear(features), "river"),
    "river_ftrl": _Kind(RiverLinear.tuned, "river"),
    "vowpal_wabbit": _Kind(lambda features, _: VowpalWabbit(features), "vowpalwabbit"),
}
#: The model itself without adapting: replay has it in any case.
FROZEN = "frozen"
#: A model of its own, served by the learner's code.
DIRECT = "direct"
#: What can be asked for.
NAMES = (FROZEN, DIRECT, *_KINDS)


@dataclass(frozen=True)
class Measured:
    """What a baseline said of the events with feedback, each before it was learned."""

    earlier: Floats  # [m] of the first half
    later: Floats  # [m'] of the second half
    train_s: float  # tuning and the first half
    events_per_s: float  # of the second half, scored and learned


def chosen(names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The baselines of a list with commas, or `all` whose packages are installed; and what `all` had to leave out.

    Raises:
        ConfigError: there is no such baseline, or its package is missing.
    """
    if names == "all":
        return tuple(n for n in NAMES if not _missing(n)), tuple(n for n in NAMES if _missing(n))
    asked = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in asked:
        if name not in NAMES:
            raise ConfigError(f"baselines: {name!r} is not one of {', '.join(NAMES)}, all")
        if package := _missing(name):
            raise ConfigError(f"baselines: {name} needs the package {package}: pip install {package}")
    return asked, ()


def package_of(name: str) -> str | None:
    """The package that a baseline needs."""
    return _KINDS[name].package if name in _KINDS else None


def measure(
    name: str,
    features: Mapping[str, Feature],
    halves: Halves,
    track: Callable[[Sequence[int], str], Iterable[int]] = lambda places, _: places,
) -> Measured:
    """Warms a baseline on the first half, then scores and learns the second; `track` sees places go by."""
    started = time.perf_counter()
    baseline = _KINDS[name].make(features, halves.first)
    earlier = _said(baseline, halves.first, track, f"{name}, first half")
    baseline.revisit(halves.first)
    half_way = time.perf_counter()
    later = _said(baseline, halves.second, track, f"{name}, second half")
    seconds = time.perf_counter() - half_way
    return Measured(earlier, later, half_way - started, len(later) / seconds)


def _said(
    baseline: Baseline, half: Half, track: Callable[[Sequence[int], str], Iterable[int]], name: str
) -> npt.NDArray[np.float64]:
    events, targets = half.events, half.targets.tolist()
    said = np.empty(len(targets))
    places = half.taught.tolist()
    for i in track(range(len(places)), name):
        event = events[places[i]]
        said[i] = baseline.score(event)
        baseline.learn(event, targets[i])
    return said


def _missing(name: str) -> str | None:
    """The package that a baseline needs and that is not installed."""
    package = package_of(name)
    return package if package is not None and importlib.util.find_spec(package) is None else None
