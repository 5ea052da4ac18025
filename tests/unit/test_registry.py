"""Versions of models: what a manifest says, what is refused, and which model can take another one's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from learner_streams import random_model
from safetensors.numpy import load_file

from stream_adapt.errors import ModelError, ModelMissing, ModelUnfit
from stream_adapt.models import (
    DataWindow,
    Decision,
    Model,
    Registry,
    check_successor,
    read_model,
    record_decision,
    write_model,
)

WINDOW = DataWindow("shop.events", 1000, 5, 99, {0: (3, 503), 1: (0, 500)})
DECISION = Decision("promoted", "log-loss is lower", 17, "refresh", {"gain": 0.01})


def write(registry: Path, seed: int = 0, **about: Any) -> Path:
    model = random_model(seed=seed)
    return write_model(registry, model.weights, model.spec, model.manifest.fitted, **about)


def renamed(folder: Path, version: str) -> Path:
    """The same model as another version: versions made within one second are in no order."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"version": version}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.rename(folder.with_name(version))


def changed(model: Model, **weights: Any) -> Model:
    return msgspec.structs.replace(model, weights=msgspec.structs.replace(model.weights, **weights))


def test_a_manifest_keeps_where_a_version_came_from_and_what_was_decided(tmp_path: Path) -> None:
    folder = write(tmp_path, parent="v0", window=WINDOW, rows="restart_items", figures={"logloss": 0.5})
    record_decision(folder, DECISION)
    manifest = Registry(tmp_path).read(folder.name).manifest
    assert ("v0", WINDOW, "restart_items") == (manifest.parent, manifest.window, manifest.rows)
    assert (DECISION, {"logloss": 0.5}) == (manifest.decision, manifest.figures)
    assert ["manifest.json", "model.safetensors"] == sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "nothing", "wrongs"),
    [
        ("level_noise", [1.0] * 5, {"above 0": [1, 1, 0, 1, 1], "shape": [1, 1, 1, 1]}),
        ("outcome_weight", [0.0], {"from 0 to 1": [1.5], "shape": [0.1, 0.2]}),
    ],
)
def test_what_earlier_releases_know_not_is_said_in_the_manifest_and_left_out_where_there_is_none(
    name: str, nothing: list[float], wrongs: dict[str, list[float]], tmp_path: Path
) -> None:
    """Releases that know of none read what has none, and refuse what has: their manifests know no such field."""
    model = random_model()
    none = msgspec.structs.replace(model.weights, **{name: np.zeros(0, np.float32)})
    for weights, there in ((model.weights, True), (none, False)):
        folder = write_model(tmp_path, weights, model.spec, model.manifest.fitted)
        assert there == json.loads((folder / "manifest.json").read_text()).get(name, False)
        assert there == (name in load_file(folder / "model.safetensors"))
        np.testing.assert_array_equal(getattr(weights, name), getattr(read_model(folder).weights, name))
    assert nothing == getattr(none, name).tolist()
    for why, wrong in wrongs.items():
        weights = msgspec.structs.replace(none, **{name: np.array(wrong, np.float32)})
        with pytest.raises(ModelError, match=f"{name}.*{why}"):
            write_model(tmp_path, weights, model.spec, model.manifest.fitted)


def test_a_manifest_of_format_2_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path)
    old = {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k not in
           ("parent", "window", "rows", "decision")} | {"format": 2}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(old))
    manifest = read_model(folder).manifest
    assert (2, None, None, None, None) == (
        manifest.format, manifest.parent, manifest.window, manifest.rows, manifest.decision
    )  # fmt: skip
    assert (3, DECISION) == (record_decision(folder, DECISION).format, read_model(folder).manifest.decision)


def test_the_newest_version_without_a_parent_is_served_until_another_one_is_announced(tmp_path: Path) -> None:
    for version, parent in (("v1", None), ("v2", None), ("v3", "v2")):
        renamed(write(tmp_path, parent=parent), version)
    assert read_model(tmp_path).version == "v2"
    assert Registry(tmp_path / "v1").versions() == ["v1", "v2", "v3"]
    assert read_model(tmp_path / "v3").version == "v3"
    (tmp_path / "v1").rename(tmp_path / ".v1")
    (tmp_path / "v2").rename(tmp_path / ".v2")
    with pytest.raises(ModelMissing, match="all of its 1 versions have a parent, and none is announced"):
        read_model(tmp_path)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


def not_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 3')


def newer(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 9}')


def older(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1}')


def rename(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace(folder.name, "other"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "its SHA-256 is"),
        (flip, "its SHA-256 is"),
        (not_json, "cannot be read as JSON"),
        (newer, "format=9, this release reads 2, 3. To do: run the release that wrote it"),
        (older, "format=1, this release reads 2, 3. To do: pretrain again"),
        (rename, "its manifest says version other"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_version_is_refused_with_what_is_wrong(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write(tmp_path)
    damage(folder)
    with pytest.raises(ModelError, match=message) as raised:
        Registry(tmp_path).read(folder.name)
    assert not isinstance(raised.value, ModelMissing)


@pytest.mark.parametrize("missing", ["manifest.json", "model.safetensors"])
def test_a_version_that_is_not_all_there_is_missing(tmp_path: Path, missing: str) -> None:
    folder = write(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ModelMissing, match=missing):
        Registry(tmp_path).read(folder.name)


@pytest.mark.parametrize("name", ["../v1", "", ".hidden", "a/b", "x" * 101, "v1\n"])
def test_a_version_is_a_name_and_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is no version"):
        Registry(tmp_path).read(name)


def test_a_model_of_the_same_form_that_keeps_f_can_take_anothers_place() -> None:
    served, other = random_model(seed=0), random_model(seed=1)
    check_successor(served, changed(other, implicit_item=served.weights.implicit_item))


def test_items_that_only_one_of_two_models_knows_may_have_any_f() -> None:
    served = random_model()
    weights = served.weights
    keep = np.arange(1, len(weights.item_hash))
    tables = {
        name: getattr(weights, name)[keep] for name in ("item_hash", "item_vector", "item_events", "implicit_item")
    }
    check_successor(served, changed(served, **tables))
    check_successor(changed(served, **tables), served)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 5}, "dimension=5 and not 6"),
        ({"window": 32}, "window=32 and not 16"),
        ({"covariance": "full"}, "covariance='full' and not 'diagonal'"),
        ({"rule": "gradient"}, "rule='gradient' and not 'kalman'"),
        ({"implicit": 4}, "implicit=4 and not 3"),
        ({"features": True}, r"features=\{'genres'"),
        ({"seed": 1}, "implicit_item differs for 40 of the 40 items"),
    ],
)
def test_what_rows_are_made_of_must_be_the_same(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelUnfit, match=message):
        check_successor(random_model(), random_model(**changes))
