"""Models: the slow weights θ as safetensors, and a manifest that says what they are and what their hash is.

A model is a folder `<registry>/<version>/` with `model.safetensors` and `manifest.json`. It is written to a
temporary name and renamed, so that a half-written model is never seen; it is read only if the hash is right, the
shapes fit the manifest, and every number is finite. Nothing here can execute code.

A version that was trained from another one names it as its `parent`. It is served only when it is announced
(`announcements.py`); `check_successor` says whether it can follow another one in a running loop.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stream_adapt.errors import ModelError, ModelMissing, ModelUnfit
from stream_adapt.learner.encoder import Feature, FittedFeature
from stream_adapt.learner.feedback import Feedback

#: Raised by one when the meaning of a manifest or of an array changes. 3: parent, window, rows and decision.
MODEL_FORMAT = 3
#: What this release reads.
_READABLE = (2, 3)
#: What a version may be called: it names a folder, and comes from a topic.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

#: No number of `implicit_item` is beyond it: 2³¹ events of such items add up to what a row can hold.
LARGEST_IMPLICIT = 1e6

Floats32 = npt.NDArray[np.float32]
RuleName = Literal["kalman", "gradient"]
Covariance = Literal["diagonal", "full"]
Calibrator = Literal["none", "linear"]
#: What a linear calibrator adds to the logit, in the order of its coefficients; see the README of the rules.
CALIBRATOR_TERMS = ("one", "logit", "bend", "missed", "lately", "item_mean", "uncertainty", "gap")
#: What becomes of rows when a model takes another one's place. carry: they stay as they are, byte for byte.
#: restart_items: those of users do; items start anew, as the new model has them.
RowMode = Literal["carry", "restart_items"]


class LearnerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is learned and how: part of a model, because θ only means something with it."""

    features: dict[str, Feature] = {}
    feedback: Feedback = Feedback()
    rule: RuleName = "kalman"
    covariance: Covariance = "diagonal"  # of the Kalman rule
    normalized: bool = True  # the gradient rule's steps
    dimension: int = 16  # D
    window: int = 256  # W: offsets of a partition between two changes of an item's values
    ring: int = 16  # N: recent events a row remembers
    implicit: int = 7  # H: numbers of a user's implicit state; 0: none
    calibrator: Calibrator = "none"  # of the scores; linear: rows of users keep what its terms need

    @property
    def calibrator_terms(self) -> int:
        """K, coefficients of the calibrator: 0 without one."""
        return len(CALIBRATOR_TERMS) if self.calibrator == "linear" else 0

    @property
    def leak_shape(self) -> tuple[int, ...]:
        """Shape of a, b in θ: asked when a file is checked, before any rule is imported, so it asks the rule's name."""
        return (2,) if self.rule == "kalman" else (2, self.dimension + 1)


class DataWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The events that a model was trained on."""

    source: str  # a topic, or a data set
    events: int
    first_ms: int  # times of the first and the last event
    last_ms: int
    offsets: dict[int, tuple[int, int]] = {}  # of a topic, by partition: first offset, and last offset + 1


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a model went live, and why."""

    outcome: Literal["promoted", "rejected", "rolled_back"]
    reason: str
    decided_ms: int
    decided_by: str
    figures: dict[str, float] = {}  # what it was decided by


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model file holds, where it came from, and how well it did."""

    format: int
    version: str
    created_ms: int
    sha256: str
    spec: LearnerSpec
    fitted: tuple[FittedFeature, ...]
    trained_on: dict[str, Any] = {}  # source, events, first and last timestamp
    figures: dict[str, float] = {}  # validation figures of training
    parent: str | None = None  # version that training started from; None: from nothing
    window: DataWindow | None = None
    rows: RowMode | None = None  # how it was judged, and is to take its parent's place; None: nobody said
    decision: Decision | None = None  # the last one
    # Whether θ has these: releases that know of none must not read the model.
    level_noise: bool = False
    outcome_weight: bool = False


def _nothing() -> Floats32:
    return np.zeros(0, np.float32)


class SlowWeights(msgspec.Struct, frozen=True):
    """θ. D dimensions, n known items, F rows of item and event features, A rows of user features, L levels.

    The last column, index D, of an array `[·, D+1]` is the bias.
    """

    item_hash: npt.NDArray[np.uint64]  # [n] xxh3-64 of the item id, ascending
    item_vector: Floats32  # [n, D+1] what the id itself adds to x̃, and the item's bias
    item_events: Floats32  # [n] events in pretraining
    feature_vector: Floats32  # [F, D+1]
    user_vector: Floats32  # [A, D+1] what user attributes add to the prior mean
    prior_mean: Floats32  # [D+1] m₀
    prior_variance: Floats32  # [D+1] diagonal of P₀; in its place the gradient rule has its rates α
    implicit_item: Floats32  # [n, H] f: what an event with the item adds to a user's implicit state
    implicit_map: Floats32  # [H, D+1] Bᵀ: what the implicit state adds to the prior mean
    level_scores: Floats32  # [L] s; of the gradient rule the logits of its targets
    bias: Floats32  # [1] b
    noise: Floats32  # [1] σ²
    leak: Floats32  # [2] a, b of γ = exp(−(a + b·log(1 + Δt/1 h))); of the gradient rule [2, D+1]
    readout: Floats32  # [3] α, κ, β of p = σ(α z/√(1 + κ v) + β)
    item_variance: Floats32  # [2] V₀ of an item's bias and of each coordinate of its offset
    # Empty, as a model is made without it: ones, and not in its file.
    level_noise: Floats32 = msgspec.field(default_factory=_nothing)  # [L] factors on σ² by the level of what is seen
    outcome_weight: Floats32 = msgspec.field(default_factory=_nothing)  # [1] λ of the Kalman rule; empty, likewise: 0
    # Only of a model with a calibrator; else empty, and not in its file.
    calibrator: Floats32 = msgspec.field(default_factory=_nothing)  # [K] a
    item_mean: Floats32 = msgspec.field(default_factory=_nothing)  # [n] share at the target less that of all, shrunk

    def __post_init__(self) -> None:
        if not len(self.level_noise):
            msgspec.structs.force_setattr(self, "level_noise", np.ones(len(self.level_scores), np.float32))
        if not len(self.outcome_weight):
            msgspec.structs.force_setattr(self, "outcome_weight", np.zeros(1, np.float32))

    def expected_shapes(self, spec: LearnerSpec) -> dict[str, tuple[int, ...]]:
        """The shapes that the manifest's spec asks for."""
        n, width, levels = len(self.item_hash), spec.dimension + 1, len(spec.feedback.levels)
        features, attributes = len(self.feature_vector), len(self.user_vector)
        calibrated = {"calibrator": (spec.calibrator_terms,), "item_mean": (n,)} if spec.calibrator_terms else {}
        return {
            "item_hash": (n,),
            "item_vector": (n, width),
            "item_events": (n,),
            "feature_vector": (features, width),
            "user_vector": (attributes, width),
            "prior_mean": (width,),
            "prior_variance": (width,),
            "implicit_item": (n, spec.implicit),
            "implicit_map": (spec.implicit, width),
            "level_scores": (levels,),
            "bias": (1,),
            "noise": (1,),
            "leak": spec.leak_shape,
            "readout": (3,),
            "item_variance": (2,),
            "level_noise": (levels,),
            "outcome_weight": (1,),
            **calibrated,
        }


class Model(msgspec.Struct, frozen=True):
    """A loaded model: manifest and slow weights."""

    manifest: Manifest
    weights: SlowWeights

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def spec(self) -> LearnerSpec:
        return self.manifest.spec


def write_model(
    registry: Path,
    weights: SlowWeights,
    spec: LearnerSpec,
    fitted: tuple[FittedFeature, ...],
    *,
    trained_on: Mapping[str, Any] | None = None,
    figures: Mapping[str, float] | None = None,
    parent: str | None = None,
    window: DataWindow | None = None,
    rows: RowMode | None = None,
) -> Path:
    """Writes a new version below `registry` and returns its folder.

    The version is the time of creation and the first digits of the hash of the weights. One with a `parent` is served
    only when it is announced.

    Raises:
        ModelError: the weights are not finite or their shapes do not fit the spec.
    """
    _check(weights, spec, fitted, where=str(registry))
    arrays = {name: np.ascontiguousarray(getattr(weights, name)) for name in weights.expected_shapes(spec)}
    differs, weighs = bool(np.any(weights.level_noise != 1.0)), bool(weights.outcome_weight[0] > 0.0)
    for name, there in (("level_noise", differs), ("outcome_weight", weighs)):
        if not there:
            del arrays[name]
    content = save(arrays)
    digest = hashlib.sha256(content).hexdigest()
    now = time.time()
    version = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + "-" + digest[:8]
    manifest = Manifest(
        format=MODEL_FORMAT,
        version=version,
        created_ms=int(now * 1000),
        sha256=digest,
        spec=spec,
        fitted=fitted,
        trained_on=dict(trained_on or {}),
        figures=dict(figures or {}),
        parent=parent,
        window=window,
        rows=rows,
        level_noise=differs,
        outcome_weight=weighs,
    )
    return _publish(registry / version, content, _as_json(manifest))


def record_decision(folder: Path, decision: Decision) -> Manifest:
    """Writes a decision into a version's manifest, in the place of an earlier one; θ and its hash stay.

    Raises:
        ModelError: the manifest cannot be read or written.
    """
    path = folder / "manifest.json"
    manifest = msgspec.structs.replace(_read_manifest(path), format=MODEL_FORMAT, decision=decision)
    partial = folder / f".manifest.{os.getpid()}"
    try:
        partial.write_bytes(_as_json(manifest))
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: the decision cannot be written: {error.strerror}") from error
    return manifest


def _as_json(manifest: Manifest) -> bytes:
    told = msgspec.to_builtins(manifest, str_keys=True)
    # What a model has not is left out: as releases wrote it that knew of none, and read it.
    if manifest.spec.calibrator == "none":
        del told["spec"]["calibrator"]
    for name in ("level_noise", "outcome_weight"):
        if not told[name]:
            del told[name]
    return msgspec.json.format(msgspec.json.encode(told), indent=2)


def _publish(folder: Path, content: bytes, manifest: bytes) -> Path:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(content)
    (partial / "manifest.json").write_bytes(manifest)
    if folder.exists():  # the same weights were written within the same second
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def read_model(folder: Path) -> Model:
    """Reads and verifies a model folder; `folder` may also be a registry, then its newest version without a parent.

    Raises:
        ModelMissing: there is no such folder, or not all of its files.
        ModelError: says which file, what is wrong with it, and what to do.
    """
    return _read(folder if (folder / "manifest.json").exists() else Registry(folder).newest())


def _read(folder: Path) -> Model:
    manifest = _read_manifest(folder / "manifest.json")
    path = folder / "model.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        kind = ModelMissing if isinstance(error, FileNotFoundError) else ModelError
        raise kind(f"{path}: cannot be read ({error.strerror}); write the model again with `pretrain`") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.sha256:
        raise ModelError(f"{path}: its SHA-256 is {digest}, the manifest says {manifest.sha256}: damaged or replaced")
    try:
        weights = msgspec.convert(load(content), SlowWeights, dec_hook=_same_array)
    except (SafetensorError, msgspec.ValidationError) as error:
        raise ModelError(f"{path}: not the arrays of a stream-adapt model: {error}") from error
    _check(weights, manifest.spec, manifest.fitted, where=str(path))
    return Model(manifest, weights)


def _same_array(_: type, value: Any) -> Any:
    return value


class Registry:
    """Versions of models: a folder with a folder for each."""

    def __init__(self, path: Path) -> None:
        """Opens the registry.

        Args:
            path: the registry, or one version's folder in it.
        """
        self.path = path.parent if (path / "manifest.json").exists() else path

    def versions(self) -> list[str]:
        """Names of all versions that have a manifest, as they were made, oldest first."""
        return sorted(p.parent.name for p in self.path.glob("[!.]*/manifest.json"))

    def folder(self, version: str) -> Path:
        """Folder of a version, whether it is there or not.

        Raises:
            ModelError: no version is called that.
        """
        if not _VERSION.fullmatch(version):
            raise ModelError(
                f"{self.path}: {version[:200]!r} is no version: letters, digits, dots, dashes, underscores"
            )
        return self.path / version

    def manifest(self, version: str) -> Manifest:
        """What a version says of itself; θ is not looked at.

        Raises:
            ModelMissing, ModelError: as `read`.
        """
        return _read_manifest(self.folder(version) / "manifest.json")

    def read(self, version: str) -> Model:
        """A version, verified.

        Raises:
            ModelMissing: it is not in the registry, or not all of its files are.
            ModelError: says which file, what is wrong with it, and what to do.
        """
        model = _read(self.folder(version))
        if model.version != version:
            raise ModelError(f"{self.folder(version)}: its manifest says version {model.version}: renamed or replaced")
        return model

    def newest(self) -> Path:
        """Folder of the newest version without a parent: one that has is a refresh's, and served when announced.

        Raises:
            ModelMissing: there is none.
        """
        versions = self.versions()
        for version in reversed(versions):
            if self.manifest(version).parent is None:
                return self.path / version
        if versions:
            raise ModelMissing(
                f"{self.path}: all of its {len(versions)} versions have a parent, and none is announced. To do: "
                "`stream-adapt models promote`, or set model.path to the folder of a version"
            )
        raise ModelMissing(f"{self.path}: no model here (no manifest.json); make one with `stream-adapt pretrain`")


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelMissing(f"{path}: not there. To do: copy the version into the registry") from error
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found not in _READABLE:
        newer = isinstance(found, int) and found > MODEL_FORMAT
        hint = "run the release that wrote it, or a newer one" if newer else "pretrain again"
        raise ModelError(
            f"{path}: format={found!r}, this release reads {', '.join(map(str, _READABLE))}. To do: {hint}"
        )
    try:
        return msgspec.convert(raw, Manifest, str_keys=True)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}") from error


def check_successor(served: Model, successor: Model) -> None:
    """Whether a model can take another one's place while rows live on.

    Rows of users are carried, by every row mode: they hold deviations from θ's prior, and the sum of f(item) over what
    the user has met. So what rows are made of must be the same, and f must be kept for items that both models know.

    Args:
        served: the model that rows are of.
        successor: what is to be served.

    Raises:
        ModelUnfit: says what differs.
    """
    different = [
        f"{name}={getattr(successor.spec, name)!r} and not {getattr(served.spec, name)!r}"
        for name in LearnerSpec.__struct_fields__
        if getattr(successor.spec, name) != getattr(served.spec, name)
    ]
    if different:
        raise ModelUnfit(
            f"{successor.version} cannot take the place of {served.version}, which rows are of: "
            f"{'; '.join(different)}. To do: train it with the same settings; or stop all members, `stream-adapt state "
            "reset`, and set model.path"
        )
    moved, both = _moved_f(served.weights, successor.weights)
    if moved:
        raise ModelUnfit(
            f"{successor.version} cannot take the place of {served.version}: implicit_item differs for {moved} of the "
            f"{both} items that both know, and users' rows hold sums of it. To do: train it from {served.version} with "
            "implicit_item held; or stop all members, `stream-adapt state reset`, and set model.path"
        )


def _moved_f(old: SlowWeights, new: SlowWeights) -> tuple[int, int]:
    """How many of the items that both know have another f, and how many both know."""
    _, at_old, at_new = np.intersect1d(old.item_hash, new.item_hash, assume_unique=True, return_indices=True)
    moved = (old.implicit_item[at_old] != new.implicit_item[at_new]).any(axis=1)
    return int(np.count_nonzero(moved)), len(at_old)


def _check(weights: SlowWeights, spec: LearnerSpec, fitted: tuple[FittedFeature, ...], where: str) -> None:
    for name, shape in weights.expected_shapes(spec).items():
        array = getattr(weights, name)
        if array.shape != shape:
            raise ModelError(f"{where}: {name} has shape {array.shape}, the spec asks for {shape}")
        if not np.all(np.isfinite(array)):
            raise ModelError(f"{where}: {name} holds numbers that are not finite")
    for name in ("noise", "prior_variance", "item_variance", "level_noise"):
        if np.any(getattr(weights, name) <= 0):
            found = getattr(weights, name).tolist()
            raise ModelError(f"{where}: {name}={found} must be above 0: a variance, or a factor on one")
    if not 0 <= weights.outcome_weight[0] <= 1:
        raise ModelError(f"{where}: outcome_weight={weights.outcome_weight.tolist()} must be a share, from 0 to 1")
    if weights.readout[1] < 0:
        raise ModelError(f"{where}: readout κ={weights.readout[1]} must not be negative")
    if min(spec.dimension, spec.window, spec.ring) < 1 or spec.implicit < 0:
        raise ModelError(f"{where}: dimension, window and ring must be at least 1, implicit at least 0: {spec}")
    if np.any(np.abs(weights.implicit_item) > LARGEST_IMPLICIT):
        raise ModelError(
            f"{where}: implicit_item holds numbers beyond {LARGEST_IMPLICIT:g}: sums of them would not fit into rows"
        )
    rows = {"user": len(weights.user_vector), "x": len(weights.feature_vector)}
    for one in fitted:
        table = "user" if one.feature.of == "user" else "x"
        if one.start + one.width > rows[table]:
            raise ModelError(f"{where}: feature {one.name} needs rows up to {one.start + one.width} of {rows[table]}")
