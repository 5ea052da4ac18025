"""Refreshing a model: θ starts at the champion's, and what it is trained on are the newest events alone.

The challenger keeps the champion's spec, its layout and its axes, so that rows, which are deviations from θ, go on
meaning what they meant. Known items start at their vectors, and decay pulls them back there; new items start at what
their content says, and are added to the table. What a user's implicit state is summed from, f of known items, stays;
so do the rates of the rule and the readout, which the champion's pretraining fitted to service: under them rows go on.

Where the world moved within the window, events before are of another world. So there are three candidates:

| name | trained on | items start | rows of items |
|---|---|---|---|
| `all` | the whole window | where the champion has them | are carried |
| `newer` | what came since the world moved | where the champion has them | start anew |
| `anew` | the same | from nothing, as in pretraining | start anew |

The newest slice, which none of them has seen, says which is best, and whether it is better than the champion at all.
The best one is then trained again, with that slice. Items of the last two count as known from the events since alone,
so that service goes on learning them quickly. What users are like is the champion's to begin with in all three.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_adapt.errors import DataError
from stream_adapt.meta import calibrator, sequences, trainer
from stream_adapt.meta.pace import Clock, held_out
from stream_adapt.meta.sequences import Log, Vocabulary
from stream_adapt.meta.trainer import Parameters, Progress, Steps, Trained, TrainSettings
from stream_adapt.models import Model, RowMode, SlowWeights

Bools = npt.NDArray[np.bool_]

#: How a challenger is trained, but for time and seed. Without co-occurrence: its features would be of other axes.
SETTINGS = TrainSettings(epochs=5, rate=0.02, cooccurrence=0, validation_share=0.1)
#: With fewer events before the newest slice a candidate is not worth its training.
FEWEST_EVENTS = 500
#: The newest slice has at least so many events where the world moved, if that leaves three quarters to learn from: of
#: fewer nobody can say which model is better.
FEWEST_JUDGED = 1_000
#: Parameters that stay as the champion has them.
KEPT = ("log_prior_variance", "level_scores", "log_noise", "log_leak", "log_readout", "readout_bias")


class NoBetter(DataError):
    """No candidate does better on the newest slice than the champion; `figures` say how well they do."""

    def __init__(self, message: str, figures: dict[str, float]) -> None:
        super().__init__(message)
        self.figures = figures


class Refreshed(Trained, frozen=True):
    """A challenger, and what becomes of rows when it takes the champion's place."""

    rows: RowMode = "carry"


class Candidate(NamedTuple):
    """What a challenger may be trained on, and how."""

    chosen: Bools  # [n] events before the newest slice
    rows: RowMode
    anew: bool = False  # items start from nothing


class Refined(Parameters):
    """θ of a champion, and what is learned on top of it. The vocabulary holds all items that the champion knows."""

    def __init__(self, vocabulary: Vocabulary, *given: Any, champion: SlowWeights, anew: bool) -> None:
        super().__init__(vocabulary, *given)
        at = vocabulary.index(champion.item_hash)  # [n]
        items = torch.zeros(len(vocabulary.item_hash) + 1, self.id_vector.shape[1] + 1)  # [I+1, D+1]
        implicit = torch.zeros(len(items), champion.implicit_item.shape[1])  # [I+1, H]
        new = torch.ones(len(items), 1)  # [I+1, 1]
        items[at], implicit[at] = _tensor(champion.item_vector), _tensor(champion.implicit_item)
        new[at], new[-1] = 0.0, 0.0
        self.known: Tensor
        self.known_implicit: Tensor
        self.new: Tensor
        self.register_buffer("known", items)
        self.register_buffer("known_implicit", implicit)
        self.register_buffer("new", new)
        started = _started(champion)
        if anew:
            items.zero_()
            del started["feature_vector"]
        for name, value in started.items():
            getattr(self, name).data.copy_(value)
        # Anew, small random vectors of the items that are met, as in pretraining: at 0 a covariance tells no way.
        met = torch.from_numpy(vocabulary.item_events > 0) if anew else torch.zeros(len(vocabulary.item_hash))
        self.id_vector.data.mul_(met[:, None])
        for name in ("id_bias", "implicit_id"):
            getattr(self, name).data.zero_()
        for name in KEPT:
            getattr(self, name).requires_grad_(False)

    def decays(self, settings: TrainSettings) -> dict[str, float | Tensor]:
        """Items are pulled to where the champion has them, all alike; nothing pulls its other parameters to 0."""
        decays = {name: decay for name, decay in super().decays(settings).items() if name != "implicit_map"}
        return {**decays, "id_vector": settings.item_decay}

    def item_content(self) -> Tensor:
        """The champion's vectors `[I+1, D+1]`; zeros for items that it does not know."""
        return self.known

    def implicit_item(self) -> Tensor:
        """f `[I+1, H]`: as it was for known items, learned for new ones."""
        return self.known_implicit + self.new * nn.functional.pad(self.implicit_id, (0, 0, 0, 1))


def _started(champion: SlowWeights) -> dict[str, Tensor]:
    """Where parameters start, by name."""
    alpha, kappa, beta = champion.readout.tolist()
    return {
        "feature_vector": _tensor(champion.feature_vector),
        "user_vector": _tensor(champion.user_vector),
        "prior_mean": _tensor(champion.prior_mean),
        "log_prior_variance": _tensor(champion.prior_variance).log(),
        "level_scores": _tensor(champion.level_scores),
        "bias": _tensor(champion.bias),
        "log_noise": _tensor(champion.noise)[0].log(),
        "log_leak": _tensor(champion.leak).clamp_min(1e-12).log(),
        "log_readout": torch.tensor([alpha, max(kappa, 1e-12)]).log(),
        "readout_bias": torch.tensor([beta]),
        "implicit_map": _tensor(champion.implicit_map),
    }


def _tensor(values: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))


def refine(
    log: Log,
    champion: Model,
    settings: TrainSettings = SETTINGS,
    device: str = "auto",
    *,
    newer: Bools | None = None,
    progress: Progress | None = None,
    clock: Clock = time.monotonic,
) -> Refreshed:
    """Trains a challenger.

    Args:
        log: the newest events, in the order in which service learned them.
        champion: what it starts from.
        settings: how to train; `seconds` bounds all of it.
        device: auto, cpu or cuda.
        newer: which events `[n]` came after the world moved, if it is known to have.
        progress: told of every step.
        clock: that the time is measured by.

    Raises:
        DataError: there is too little to learn from. NoBetter: nothing was learned that helps.
        ConfigError: the device is absent. ModelError: training diverged.
    """
    return _Refinement(log, champion, settings, device, newer, progress, clock).run()


class _Refinement:
    def __init__(
        self,
        log: Log,
        champion: Model,
        settings: TrainSettings,
        device: str,
        newer: Bools | None,
        progress: Progress | None,
        clock: Clock,
    ) -> None:
        trainer.check_log(log, champion.spec)
        self._log, self._champion, self._settings, self._clock = log, champion, settings, clock
        self._where = trainer.torch_device(device)
        self._progress = progress
        self._vocabulary = vocabulary(log, champion, settings.max_items)
        self._columns = sequences.encode(log, self._vocabulary).to(self._where)
        self._newer, self._held = newer, newest(log, newer, settings)  # [n] each

    def run(self) -> Refreshed:
        candidates = self._candidates()
        steps = Steps(self._progress, trainings=len(candidates) + 1)
        share = msgspec.structs.replace(self._settings, seconds=self._settings.seconds / steps.left)
        figures = {f"slice_{name}_champion": value for name, value in self._figures(self._untrained()).items()}
        losses = {}
        for name, candidate in candidates.items():
            judged = self._figures(self._trained(candidate, share, steps)[0])
            losses[name] = judged["log_loss"]
            figures |= {f"slice_{key}_{name}": value for key, value in judged.items() if key != "events"}
        best = min(losses, key=losses.__getitem__)
        if not losses[best] < figures["slice_log_loss_champion"]:
            raise NoBetter(
                f"on the newest {figures['slice_events_champion']:.0f} events the best candidate, {best}, has a "
                f"log-loss of {losses[best]:.4f}, and the champion {figures['slice_log_loss_champion']:.4f}: nothing "
                "was learned that helps",
                figures,
            )
        chosen = candidates[best].chosen | self._held
        final, known = self._trained(candidates[best]._replace(chosen=chosen), share, steps)
        about = {"events": int(chosen.sum()), "trained_on": best}
        return Refreshed(self._folded(final, known), known.fitted, figures, about, candidates[best].rows)

    def _candidates(self) -> dict[str, Candidate]:
        """By name; see the module."""
        before, newer = ~self._held, self._newer
        found = {"all": Candidate(before, "carry")}
        if newer is not None and (before & newer).sum() >= FEWEST_EVENTS:
            found["newer"] = Candidate(before & newer, "restart_items")
            found["anew"] = Candidate(before & newer, "restart_items", anew=True)
        return found

    def _trained(self, candidate: Candidate, settings: TrainSettings, steps: Steps) -> tuple[Parameters, Vocabulary]:
        log, known = self._log.where(candidate.chosen), self._vocabulary
        if candidate.rows == "restart_items":
            means = sequences.item_means(log, known.item_hash, self._champion.spec.feedback.target_level)
            known = replace(known, item_events=counted(log, known.item_hash), item_mean=means)
        return trainer.train(
            log,
            self._champion.spec,
            settings,
            self._where,
            steps,
            clock=self._clock,
            kind=partial(self._make, anew=candidate.anew),
            vocabulary=known,
        )

    def _make(self, *given: Any, anew: bool = False) -> Refined:
        return Refined(*given, champion=self._champion.weights, anew=anew)

    def _untrained(self) -> Parameters:
        generator = torch.Generator().manual_seed(self._settings.seed)
        nothing = torch.zeros(len(self._vocabulary.item_hash) + 1, 0)
        return self._make(self._vocabulary, nothing, self._columns.levels.cpu(), self._champion.spec, generator).to(
            self._where
        )

    def _figures(self, parameters: Parameters) -> dict[str, float]:
        return trainer.figures_of(parameters, self._columns, self._held, self._settings)

    def _folded(self, parameters: Parameters, known: Vocabulary) -> SlowWeights:
        """θ as service reads it. What stays is the champion's to the bit: exp(log x) is not always x."""
        old, weights = self._champion.weights, trainer.fold(parameters, known, self._settings)
        weights = calibrator.without(weights, self._champion.spec, known.item_mean)
        kept = ["prior_variance", "level_scores", "noise", "level_noise", "leak", "readout"]
        kept += ["item_variance", "outcome_weight", "calibrator"]
        return msgspec.structs.replace(weights, **{name: getattr(old, name) for name in kept})


def newest(log: Log, newer: Bools | None, settings: TrainSettings) -> Bools:
    """Which events `[n]` candidates are judged by: the last ones, of the world as it is now."""
    if newer is None or not newer.any():
        return held_out(log, "later", trainer.set_aside(settings, len(log)), settings.seed)
    count = int(newer.sum())
    judged = max(round(trainer.set_aside(settings, len(log)) * count), min(FEWEST_JUDGED, count // 4))
    return newer & (np.cumsum(newer) > count - judged)


def counted(log: Log, items: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Events `[I]` of a log with each of the items, which ascend."""
    at = np.searchsorted(items, log.items)
    at = at[np.append(items, np.uint64(0))[at] == log.items]
    return np.bincount(at, minlength=len(items))[: len(items)].astype(np.float32)


def vocabulary(log: Log, champion: Model, max_items: int) -> Vocabulary:
    """All items that the champion knows, and the most frequent new ones up to `max_items` in all; its features.

    An item counts as known from as many events as the champion learned it from, or as the log has, if those are more.
    """
    old = champion.weights
    hashes, counts = np.unique(log.items, return_counts=True)
    is_new = ~np.isin(hashes, old.item_hash)
    room = max(max_items - len(old.item_hash), 0)
    order = np.lexsort((hashes[is_new], -counts[is_new]))[:room]
    items = np.sort(np.concatenate([old.item_hash, hashes[is_new][order]]))
    events = np.zeros(len(items), np.float32)
    events[np.searchsorted(items, old.item_hash)] = old.item_events
    seen = np.isin(hashes, items)
    at = np.searchsorted(items, hashes[seen])
    events[at] = np.maximum(events[at], counts[seen])
    means = sequences.item_means(log, items, champion.spec.feedback.target_level)
    if champion.spec.calibrator_terms:  # what was learned from more events stays
        learned_before = events[np.searchsorted(items, old.item_hash)] == old.item_events
        means[np.searchsorted(items, old.item_hash[learned_before])] = old.item_mean[learned_before]
    return Vocabulary(items, events, champion.manifest.fitted, means)
