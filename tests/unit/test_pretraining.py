"""`pretrain`: what it was told is in the manifest, and what a person sees moves."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from stream_adapt.errors import ConfigError
from stream_adapt.models import read_model
from stream_adapt.pretraining import Request, pretrain_source, progress_bar, told_objective


def test_the_manifest_says_what_was_minimised_and_for_how_long(tmp_path: Path) -> None:
    request = Request("synthetic", tmp_path, share=0.02, epochs=1, objective="maml", support=4.0, seconds=600.0)
    made = pretrain_source(request, Console(file=io.StringIO()))
    assert made.objective == "maml"
    about = read_model(tmp_path).manifest.trained_on
    assert about["objective"] == {"name": "maml", "support": 4.0}
    assert (about["budget_s"], about["epochs"], about["seed"]) == (600.0, 1, 0)


def test_an_objective_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="only maml and fomaml have support events, objective is reptile"):
        told_objective("reptile", 4.0)
    with pytest.raises(ConfigError, match="objective='sgd' is not one of"):
        told_objective("sgd", None)


def test_the_bar_shows_objective_loss_and_validation() -> None:
    shown = io.StringIO()
    with progress_bar(Console(file=shown, force_terminal=True, width=120), "maml") as told:
        told(0, 1, 4, 0.75)
        told.validated(0, 0.5123)
        told(1, 2, 4, 0.7)
    text = shown.getvalue()
    assert "pretraining, maml" in text
    assert "loss 0.700, validation 0.5123" in text
