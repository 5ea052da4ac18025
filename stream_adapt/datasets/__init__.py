"""Data sets: where events come from when no topic holds them yet. Every source gives event v1 in the order of time.

| source | what it is |
|---|---|
| `movielens-100k`, `movielens-1m` | ratings of real films by real people (`movielens.py`) |
| `synthetic` | users with tastes, items with content, and a drift at a known event (`synthetic.py`) |
| a path | any CSV or JSONL log, described by a mapping file (`log.py`) |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stream_adapt.datasets import log, movielens, synthetic
from stream_adapt.datasets.source import Source, ties_drawn
from stream_adapt.errors import ConfigError, DataError

__all__ = ["NAMES", "Source", "open_source", "ties_drawn"]

_BUNDLED: dict[str, Callable[[Path | None], Source]] = {
    **{name: movielens.opener(name) for name in movielens.COUNTS},
    "synthetic": lambda _: synthetic.source(),
}

#: Sources that need no path.
NAMES = tuple(_BUNDLED)


def open_source(source: str, *, mapping: Path | None = None, cache_dir: Path | None = None) -> Source:
    """Opens a data set by name, or a log by path.

    Args:
        source: one of `NAMES`, or the path of a CSV or JSONL file, plain or gzipped.
        mapping: the log's mapping file; only with a path.
        cache_dir: where downloads are kept; by default `source.cache_folder()`.

    Raises:
        ConfigError: a mapping file is missing, not wanted, or wrong.
        DataError: the source is unknown, or its data could not be had or verified.
    """
    if source in _BUNDLED:
        if mapping is not None:
            raise ConfigError(
                f"mapping={mapping}: {source} is described already; a mapping file goes with a log's path"
            )
        return _BUNDLED[source](cache_dir)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"source={source!r}: not one of {', '.join(NAMES)}, and not a file either; "
            "give one of these names, or the path of a CSV or JSONL log together with its mapping file"
        )
    if mapping is None:
        raise ConfigError(f"source={source!r}: a log needs a mapping file that says which column is what")
    return log.open_log(path, mapping)
