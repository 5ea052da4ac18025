"""The learner as an estimator of River: `FastWeightClassifier`, a binary classifier with weights for every user.

With a model it is the product's learner, and says of a stream what `stream-adapt replay` says of it. Without one it
starts from nothing and learns, by the same update, what all users share, too:

    z = ⟨w + d_u, x̃⟩ + c_i      q = σ(z)      h = q(1 − q)      v = x̃ᵀP x̃ + Σ V_u x̃² + V_i
    w += P x̃ (y − q)/N          d_u += V_u x̃ (y − q)/N          c_i += V_i (y − q)/N          N = 1 + h v
    P −= P x̃ x̃ᵀP h/N            V_u −= (V_u x̃)² h/N             V_i −= V_i² h/N

This is the extended Kalman filter of a logistic observation, with a covariance for each of the three blocks and none
between them: w, of everybody, has a full one, a user's d_u a diagonal one, an item's c_i a variance. Probabilities are
averaged over what is not known, σ(z/√(1 + πv/8)) (MacKay 1992). With neither users nor items it is online Bayesian
logistic regression.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from river import base

from stream_adapt.adapt import Adapter
from stream_adapt.learner.encoder import features_struct
from stream_adapt.models import read_model
from stream_adapt.record import NO_LEVEL, Batch, ItemId, UserId

if TYPE_CHECKING:
    import pandas as pd

#: One event as River has it: names → values.
Event = Mapping[Any, Any]
Vector = npt.NDArray[np.float64]
_User = tuple[Vector, Vector]  # d_u, V_u
_Item = tuple[float, float]  # c_i, V_i

#: Prior variance of a weight of everybody, for features of about unit size.
SHARED_VARIANCE = 1.0
#: Prior variances of a user's deviation from it, and of an item's bias. Log-loss and AUC of River's
#: progressive_val_score on the first 20,000 events of MovieLens-100K (years scaled, four stars or more, ROCAUC with 200
#: thresholds), users' × items':
#:
#:            0.1             0.3             1.0             3.0
#:    0.01    0.6011 0.7316   0.5939 0.7406   0.5925 0.7406
#:    0.03    0.5891 0.7443   0.5820 0.7532   0.5801 0.7545
#:    0.1     0.5819 0.7508   0.5747 0.7596   0.5721 0.7625   0.5770 0.7581
#:    0.3     0.5823 0.7499   0.5750 0.7586   0.5715 0.7630   0.5754 0.7600
USER_VARIANCE, ITEM_VARIANCE = 0.3, 1.0


class FastWeightClassifier(base.MiniBatchClassifier):
    """Binary classification with fast weights for every user, adapted by a Kalman update after each event.

    Parameters
    ----------
    user
        Name of the feature that says whose event it is. Events without it share the weights of everybody.
    item
        Name of the feature that says what the event is about; it may be absent.
    timestamp
        Name of the feature with the time in ms since the epoch. Only a model reads it; without it no time passes.
    label
        Name of the feature with the label itself (stars, say), for a model that learns from more than two levels. Only
        `learn_one` and `learn_many` of such a model read it, predictions never do; `y` is then what metrics see.
    model
        Folder of a model, or of a registry, that `stream-adapt pretrain` wrote. The features that it declares are read
        under their names; others are ignored.
    dimension
        Without a model: coordinates for features. A number has one under its name, a string one for each value, a list
        of strings one for each member; they are given out as features appear and, when none is left, shared by hash.
        The memory of a user is `2·(dimension + 1)` numbers, whatever happens.

    Notes
    -----
    `y` is true or false; with a model probabilities are of its target.

    Numbers want to be of about unit size: put a `preprocessing.StandardScaler` before it. `learn_many` learns row by
    row, as `learn_one` does; it is quicker only with a model.

    Of River's own checks for classifiers all apply but those for more than two classes.

    Examples
    --------
    >>> from river import datasets, evaluate, metrics
    >>> from stream_adapt.river import FastWeightClassifier
    >>> evaluate.progressive_val_score(datasets.Phishing(), FastWeightClassifier(), metrics.ROCAUC())
    ROCAUC: 95.57%

    """

    def __init__(
        self,
        user: str = "user_id",
        item: str = "item_id",
        timestamp: str = "timestamp",
        label: str = "label",
        model: str | None = None,
        dimension: int = 64,
    ) -> None:
        self.user = user
        self.item = item
        self.timestamp = timestamp
        self.label = label
        self.model = model
        self.dimension = dimension
        names = _Names(user, item, timestamp, label)
        self._learner: _Scratch | _Pretrained = (
            _Scratch(dimension, names) if model is None else _Pretrained(model, names)
        )

    def learn_one(self, x: Event, y: Any) -> None:
        """Learns one event."""
        self._learner.learn([x], [y])

    def predict_proba_one(self, x: Event, **_: Any) -> dict[bool | str | int, float]:
        """Probabilities of both labels; changes nothing."""
        yes = self._learner.score([x])[0]
        return {False: 1.0 - yes, True: yes}

    def learn_many(self, X: pd.DataFrame, y: pd.Series) -> None:  # noqa: N803 - River's names
        """Learns n events in their order."""
        self._learner.learn(X.to_dict("records"), y.tolist())

    def predict_proba_many(self, X: pd.DataFrame) -> pd.DataFrame:  # noqa: N803 - River's names
        """Probabilities of both labels for n events, as all of them stand before any is learned."""
        import pandas as pd  # River's mini-batches need it, River itself does not

        yes = np.array(self._learner.score(X.to_dict("records")))
        return pd.DataFrame({False: 1.0 - yes, True: yes}, index=X.index)


#: All events are taken to come through one partition.
_PARTITION = 0


class _Names(NamedTuple):
    """Names in an event that are no features."""

    user: str
    item: str
    timestamp: str
    label: str


class _Pretrained:
    """The product's learner, fed with one event or a batch; one partition, offsets counted from 0."""

    def __init__(self, path: str, names: _Names) -> None:
        model = read_model(Path(path))
        self._path = path
        self._names = names
        self._feedback = model.spec.feedback
        self._features = features_struct(model.spec.features)
        self._adapter = Adapter(model)
        self._offset = 0

    def score(self, xs: Sequence[Event]) -> list[float]:
        here = np.full(len(xs), self._offset)  # where the next event will be, whichever it is
        said = self._adapter.adapt(self._batch(xs, np.full(len(xs), NO_LEVEL, np.int8), here))
        self._adapter.abort()  # rows of users and items that were never seen
        return [float(score) for score in said.score]

    def learn(self, xs: Sequence[Event], ys: Sequence[Any]) -> None:
        labels = [x.get(self._names.label, y) for x, y in zip(xs, ys, strict=True)]
        self._adapter.adapt(self._batch(xs, self._levels(labels), self._offset + np.arange(len(xs))))
        self._adapter.commit()
        self._offset += len(xs)

    def _levels(self, labels: Sequence[Any]) -> npt.NDArray[np.int8]:
        if not all(isinstance(label, bool | np.bool_) for label in labels):
            return self._feedback.level_of([float(label) for label in labels], [""] * len(labels))
        if len(self._feedback.levels) > 2:
            raise ValueError(
                f"y={labels[0]}: this model learns from {len(self._feedback.levels)} levels, {self._feedback.levels}, "
                f"and true or false does not say which; put the label itself under {self._names.label!r}"
            )
        return np.array(labels, np.int8)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the path of the model, which must still be there, and the rows."""
        tables = (self._adapter.users, self._adapter.items)
        rows = [{i: t.layout.to_bytes(t.rows[slot]) for i, slot in t.items(_PARTITION)} for t in tables]
        return _unpickled, (self._path, self._names, self._offset, rows)

    def restore(self, offset: int, rows: Sequence[Mapping[str, bytes]]) -> None:
        """Takes over what `__reduce__` wrote."""
        self._offset = offset
        for table, contents in zip((self._adapter.users, self._adapter.items), rows, strict=True):
            slots = table.slots([_PARTITION] * len(contents), list(contents)) if contents else ()
            for slot, content in zip(slots, contents.values(), strict=True):
                table.rows[slot] = table.layout.from_bytes(content)[0]
        self._adapter.commit()

    def _batch(self, xs: Sequence[Event], levels: npt.NDArray[np.int8], offsets: npt.NDArray[np.int64]) -> Batch:
        for x in xs:
            if self._names.user not in x or self._names.item not in x:
                raise ValueError(f"event {dict(x)!r:.200}: needs {self._names.user!r} and {self._names.item!r}")
        return Batch(
            event_ids=[""] * len(xs),
            user_ids=[UserId(str(x[self._names.user])) for x in xs],
            item_ids=[ItemId(str(x[self._names.item])) for x in xs],
            features=[msgspec.convert(x, self._features) for x in xs],
            timestamps_ms=np.array([int(x.get(self._names.timestamp, 0)) for x in xs], np.int64),
            levels=levels,
            partitions=np.full(len(xs), _PARTITION, np.int32),
            offsets=offsets,
        )


def _unpickled(path: str, names: _Names, offset: int, rows: Sequence[Mapping[str, bytes]]) -> _Pretrained:
    learner = _Pretrained(path, names)
    learner.restore(offset, rows)
    return learner


class _Scratch:
    """The update of the module's docstring, from broad priors. D = `dimension`; coordinate D is 1 in every event."""

    def __init__(self, dimension: int, names: _Names) -> None:
        if dimension < 1:
            raise ValueError(f"dimension={dimension} must be at least 1")
        self._dimension = dimension
        self._names = names
        self._user, self._item = names.user, names.item
        self._coordinates: dict[str, int] = {}
        self._w = np.zeros(dimension + 1)
        self._P = np.eye(dimension + 1) * SHARED_VARIANCE
        self._users: dict[Any, _User] = {}
        self._items: dict[Any, _Item] = {}

    def score(self, xs: Sequence[Event]) -> list[float]:
        said = []
        for x in xs:
            z, v, *_ = self._read(x, self._encode(x))
            said.append(_sigmoid(z / math.sqrt(1.0 + math.pi / 8.0 * v)))
        return said

    def learn(self, xs: Sequence[Event], ys: Sequence[Any]) -> None:
        for x, y in zip(xs, ys, strict=True):
            self._know(x)
            self._learn_one(x, float(bool(y)))

    def _learn_one(self, x: Event, y: float) -> None:
        vector = self._encode(x)
        z, v, g, (d, variance), (c, item_variance) = self._read(x, vector)
        q = _sigmoid(z)
        h = q * (1.0 - q)
        gain, shrink = (y - q) / (1.0 + h * v), h / (1.0 + h * v)
        self._w += gain * g
        self._P -= shrink * np.outer(g, g)
        if self._user in x:
            moved = variance * vector
            self._users[x[self._user]] = d + gain * moved, variance - shrink * moved**2
        if self._item in x:
            self._items[x[self._item]] = c + gain * item_variance, item_variance - shrink * item_variance**2

    def _read(self, x: Event, vector: Vector) -> tuple[float, float, Vector, _User, _Item]:
        """z, v, P x̃, and what is known of the event's user and item; 0 and no variance where it has none."""
        g = self._P @ vector  # [D+1]
        nothing = np.zeros_like(vector)
        user, item = (nothing, nothing), (0.0, 0.0)
        if self._user in x:
            user = self._users.get(x[self._user]) or (nothing, np.full_like(vector, USER_VARIANCE))
        if self._item in x:
            item = self._items.get(x[self._item], (0.0, ITEM_VARIANCE))
        z = float((self._w + user[0]) @ vector + item[0])
        return z, float(g @ vector + user[1] @ vector**2 + item[1]), g, user, item

    def _encode(self, x: Event) -> Vector:
        """x̃ `[D+1]`; features that were never learned from add nothing while there are coordinates left."""
        vector = np.zeros(self._dimension + 1)
        vector[-1] = 1.0
        for key, value in self._pairs(x):
            at = self._coordinates.get(key)
            if at is not None:
                vector[at] += value
            elif len(self._coordinates) == self._dimension:
                vector[xxhash.xxh3_64_intdigest(key.encode()) % self._dimension] += value
        return vector

    def _know(self, x: Event) -> None:
        """Gives coordinates to new features while there are any; sorted, so that their order in x does not matter."""
        for key, _ in sorted(self._pairs(x)):
            if len(self._coordinates) < self._dimension:
                self._coordinates.setdefault(key, len(self._coordinates))

    def _pairs(self, x: Event) -> Iterable[tuple[str, float]]:
        """Names of coordinates and their values."""
        for name, value in x.items():
            if name in self._names:
                continue
            if isinstance(value, str):
                yield f"{name}={value}", 1.0
            elif isinstance(value, list | tuple | set | frozenset):
                for member in value:
                    yield f"{name}={member}", 1.0 / math.sqrt(len(value))
            elif value is not None and math.isfinite(value):
                yield f"{name}", float(value)


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
