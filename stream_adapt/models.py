"""Models: the slow weights θ as safetensors, and a manifest that says what they are and what their hash is.

A model is a folder `<registry>/<version>/` with `model.safetensors` and `manifest.json`. It is written to a
temporary name and renamed, so that a half-written model is never seen; it is read only if the hash is right, the
shapes fit the manifest, and every number is finite. Nothing here can execute code.
"""

from __future__ import annotations

import hashlib
import os
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

from stream_adapt.errors import ModelError
from stream_adapt.learner.encoder import Feature, FittedFeature
from stream_adapt.learner.feedback import Feedback

#: Raised by one when the meaning of a manifest or of an array changes.
MODEL_FORMAT = 1

Floats32 = npt.NDArray[np.float32]
RuleName = Literal["kalman", "gradient"]
Covariance = Literal["diagonal", "full"]


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

    @property
    def leak_shape(self) -> tuple[int, ...]:
        """Shape of a, b in θ: asked when a file is checked, before any rule is imported, so it asks the rule's name."""
        return (2,) if self.rule == "kalman" else (2, self.dimension + 1)


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
    level_scores: Floats32  # [L] s; of the gradient rule the logits of its targets
    bias: Floats32  # [1] b
    noise: Floats32  # [1] σ²
    leak: Floats32  # [2] a, b of γ = exp(−(a + b·log(1 + Δt/1 h))); of the gradient rule [2, D+1]
    readout: Floats32  # [3] α, κ, β of p = σ(α z/√(1 + κ v) + β)
    item_variance: Floats32  # [2] V₀ of an item's bias and of each coordinate of its offset

    def expected_shapes(self, spec: LearnerSpec) -> dict[str, tuple[int, ...]]:
        """The shapes that the manifest's spec asks for."""
        n, width, levels = len(self.item_hash), spec.dimension + 1, len(spec.feedback.levels)
        features, attributes = len(self.feature_vector), len(self.user_vector)
        return {
            "item_hash": (n,),
            "item_vector": (n, width),
            "item_events": (n,),
            "feature_vector": (features, width),
            "user_vector": (attributes, width),
            "prior_mean": (width,),
            "prior_variance": (width,),
            "level_scores": (levels,),
            "bias": (1,),
            "noise": (1,),
            "leak": spec.leak_shape,
            "readout": (3,),
            "item_variance": (2,),
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
) -> Path:
    """Writes a new version below `registry` and returns its folder.

    The version is the time of creation and the first digits of the hash of the weights.

    Raises:
        ModelError: the weights are not finite or their shapes do not fit the spec.
    """
    _check(weights, spec, fitted, where=str(registry))
    arrays = {name: np.ascontiguousarray(value) for name, value in msgspec.structs.asdict(weights).items()}
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
    )
    return _publish(registry / version, content, msgspec.json.format(msgspec.json.encode(manifest), indent=2))


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
    """Reads and verifies a model folder; `folder` may also be a registry, then its newest version is taken.

    Raises:
        ModelError: says which file, what is wrong with it, and what to do.
    """
    folder = _version_folder(folder)
    manifest = _read_manifest(folder / "manifest.json")
    path = folder / "model.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); write the model again with `pretrain`") from error
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


def _version_folder(folder: Path) -> Path:
    if (folder / "manifest.json").exists():
        return folder
    versions = sorted(p.parent for p in folder.glob("[!.]*/manifest.json")) if folder.is_dir() else []
    if not versions:
        raise ModelError(f"{folder}: no model here (no manifest.json); make one with `stream-adapt pretrain`")
    return versions[-1]


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != MODEL_FORMAT:
        raise ModelError(f"{path}: format={found!r}, this release reads {MODEL_FORMAT}; pretrain again")
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}") from error


def _check(weights: SlowWeights, spec: LearnerSpec, fitted: tuple[FittedFeature, ...], where: str) -> None:
    for name, shape in weights.expected_shapes(spec).items():
        array = getattr(weights, name)
        if array.shape != shape:
            raise ModelError(f"{where}: {name} has shape {array.shape}, the spec asks for {shape}")
        if not np.all(np.isfinite(array)):
            raise ModelError(f"{where}: {name} holds numbers that are not finite")
    for name in ("noise", "prior_variance", "item_variance"):
        if np.any(getattr(weights, name) <= 0):
            raise ModelError(f"{where}: {name}={getattr(weights, name).tolist()} must be above 0: it is a variance")
    if weights.readout[1] < 0:
        raise ModelError(f"{where}: readout κ={weights.readout[1]} must not be negative")
    if min(spec.dimension, spec.window, spec.ring) < 1:
        raise ModelError(f"{where}: dimension, window and ring must be at least 1: {spec}")
    rows = {"user": len(weights.user_vector), "x": len(weights.feature_vector)}
    for one in fitted:
        table = "user" if one.feature.of == "user" else "x"
        if one.start + one.width > rows[table]:
            raise ModelError(f"{where}: feature {one.name} needs rows up to {one.start + one.width} of {rows[table]}")
