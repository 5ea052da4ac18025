"""Chunks of two records: batches of a few have several, as large ones do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Of the loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stream_adapt.runner.CHUNK", 2)
        yield
