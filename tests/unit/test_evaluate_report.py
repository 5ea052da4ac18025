"""The report: whole in one file, with every method and what was run, and safe with any name."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from stream_adapt.datasets import Source, synthetic
from stream_adapt.errors import ConfigError
from stream_adapt.evaluate import metrics, report
from stream_adapt.evaluate.replay import Replay, ReplayOptions, replay
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.model import random_model

#: Elements that have no end tag.
VOID = {"meta", "br", "link", "img"}


class Outline(HTMLParser):
    """Collects headings, text and whatever would be fetched; fails on tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        names = ("src", "href", "xlink:href")
        self.fetched += [value for name, value in attrs if name in names and value and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    source: Source = synthetic.source(synthetic.Synthetic(events=1200, users=60, items=40))
    model = random_model(tmp_path_factory.mktemp("models"), LearnerSpec(source.features, source.feedback))
    options = ReplayOptions(model=model, baselines="item_mean,frozen", partitions=2)
    return replay(source, options, Progress(disable=True))


@pytest.fixture(scope="module")
def page(run: Replay) -> str:
    return report.page(run)


def test_the_report_is_one_file_that_fetches_nothing(page: str) -> None:
    assert read(page).fetched == []
    assert not re.search(r"<script|@import|url\((?!#)", page)
    assert read(page).count["svg"] == 3


def test_the_report_says_what_was_found_and_what_was_run(run: Replay, page: str) -> None:
    said = read(page).text
    result = run.result()
    assert f"{result.auc:.4f}" in said
    assert f"{result.baselines['item_mean'].gauc:.4f}" in said
    assert {"adapted", "frozen", "item mean"} <= set(said)
    assert said.count("frozen") == 2, "once in either table: it was asked for, and is there in any case"
    assert result.model_version in said
    assert any(run.halves.second.digest in text for text in said)


def test_names_are_text_and_never_markup(run: Replay, tmp_path: Path) -> None:
    named = replace(run, source=replace(run.source, name="<script>alert(1)</script>"))
    path = report.write(named, tmp_path / "deep" / "folder")
    assert [path] == list(path.parent.iterdir())
    assert "<script" not in path.read_text()


def test_windows_end_with_the_stream_and_hold_its_last_events() -> None:
    random = np.random.default_rng(0)
    probabilities, targets = random.random(1000), random.integers(0, 2, 1000)
    ends, auc, loss = report.windowed(probabilities, targets, 300)
    assert (300, 1000) == (ends[0], ends[-1])
    assert metrics.auc(probabilities[-300:], targets[-300:]) == auc[-1]
    assert metrics.log_loss(probabilities[:300], targets[:300]) == loss[0]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'stream-adapt\[evaluate\]'"):
        report.check()
