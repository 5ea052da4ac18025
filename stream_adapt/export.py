"""`stream-adapt state export`: rows as a Parquet file, one partition after the other, so that memory holds one of them.

Needs pyarrow, the extra `export`. The rows are those that a member would restore: the last good version of each.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from stream_adapt import service
from stream_adapt.config import Config
from stream_adapt.errors import ConfigError, StateMismatch
from stream_adapt.inspection import Progress, changelog_partitions, diagonal, read_through
from stream_adapt.kafka.changelog import ChangelogReader, Records
from stream_adapt.learner import rules
from stream_adapt.learner.rules.layout import applied
from stream_adapt.models import LearnerSpec
from stream_adapt.restore import load
from stream_adapt.state.row import CONTROL_KEY, PREFIX, ControlRow, Kind, RowError
from stream_adapt.state.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

RowKind = Literal["users", "items"]

#: Rows of a row group: some MB.
_GROUP = 16_384


class Exported(msgspec.Struct):
    """What was written."""

    file: str
    kind: RowKind
    rows: int
    bytes: int
    partitions: int
    model_version: str
    damaged: dict[str, int]  # records left out, by reason


def export(config: Config, out: Path, kind: RowKind, progress: Progress = lambda _done, _total: None) -> Exported:
    """Writes what is committed of all users, or items, to a Parquet file; members may run meanwhile.

    Args:
        config: names brokers, topics and the model, whose sizes the rows have.
        out: the file; written beside itself and renamed, so that no half of it is ever there.
        kind: users or items.
        progress: told how far each partition is read.

    Raises:
        ConfigError: pyarrow is missing, or the file cannot be written.
        StateMismatch: rows are of another model or of a newer release.
        KafkaRefused: the changelog cannot be read.
    """
    pyarrow, parquet = _pyarrow()
    model = service.champion(config)
    spec, partitions = model.spec, changelog_partitions(config)
    told = {"stream_adapt.app": config.app.name, "stream_adapt.model_version": model.version}
    schema = _schema(pyarrow, kind).with_metadata({**told, "stream_adapt.covariance": spec.covariance})
    exported = Exported(str(out), kind, 0, 0, len(partitions), model.version, {})
    partial = out.with_name(f".{out.name}.partial")
    reader = service.build_changelog_reader(config)
    try:
        with tempfile.TemporaryDirectory(prefix="stream-adapt-") as folder:
            table = _table(kind, spec, Path(folder))
            with parquet.ParquetWriter(partial, schema) as writer:
                for partition in partitions:
                    control = _restore(reader, table, partition, exported, progress)
                    for columns in _groups(pyarrow, table, partition, control, kind):
                        writer.write_table(pyarrow.table(columns, schema=schema))
                        exported.rows += len(columns["id"])
                    table.drop(partition)
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    finally:
        reader.close()
        partial.unlink(missing_ok=True)
    exported.bytes = out.stat().st_size
    return exported


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"Parquet needs pyarrow ({error}): `pip install 'stream-adapt[export]'`") from error
    return pyarrow, parquet


def _table(kind: RowKind, spec: LearnerSpec, folder: Path) -> Table:
    def nothing(_slab: npt.NDArray[Any], _slots: npt.NDArray[np.int64], _ids: object) -> None:
        """Rows are loaded, never started."""

    return Table(rules.user_layout(spec) if kind == "users" else rules.item_layout(spec), nothing, folder)


def _restore(
    reader: ChangelogReader, table: Table, partition: int, exported: Exported, progress: Progress
) -> ControlRow | None:
    """Loads the partition's rows; returns where they stand."""
    foreign: dict[bytes, tuple[int, RowError]] = {}
    control: ControlRow | None = None
    damaged = Counter(exported.damaged)

    def take(_: int, records: Records) -> None:
        nonlocal control
        loaded = load({table.layout.kind: table}, partition, _of_kind(records, table.layout.kind), foreign)
        control = loaded.control or control
        damaged.update(problem.reason for _, problem in loaded.damaged)

    read_through(reader, [partition], take, progress)
    exported.damaged = dict(damaged)
    for offset, problem in foreign.values():
        raise StateMismatch(
            f"{reader.topic}[{partition}]@{offset}: a row is of another model than {exported.model_version}: "
            f"{problem}. Rows in all: {len(foreign)}. To do: set model.path to the model that the rows are of (control "
            f"row: {control.model_version if control else 'none'})"
        )
    return control


def _of_kind(records: Records, kind: Kind) -> Records:
    """The records of one kind of row, and of the control row."""
    prefix = PREFIX[kind]
    kept = [i for i, key in enumerate(records.keys) if key == CONTROL_KEY or (key or b"").startswith(prefix)]
    columns = (records.keys, records.values, records.offsets)
    return Records(*([column[i] for i in kept] for column in columns))  # type: ignore[arg-type]


def _groups(
    pyarrow: Any, table: Table, partition: int, control: ControlRow | None, kind: RowKind
) -> Iterator[dict[str, Any]]:
    """The partition's rows as columns, by row groups, in the order of their ids."""
    found = sorted(table.items(partition))
    columns: Callable[[Any, npt.NDArray[Any]], dict[str, Any]] = _users if kind == "users" else _items
    for start in range(0, len(found), _GROUP):
        part = found[start : start + _GROUP]
        rows = table.rows[np.array([slot for _, slot in part], dtype=np.int64)]
        yield {
            "partition": np.full(len(part), partition, np.int32),
            "id": [row_id for row_id, _ in part],
            "count": rows["count"],
            **columns(pyarrow, rows),
            "control_offset": pyarrow.array([control.next_offset if control else None] * len(part), pyarrow.int64()),
        }


def _users(pyarrow: Any, rows: npt.NDArray[Any]) -> dict[str, Any]:
    count, ring = rows["count"].astype(np.int64), rows["ring_item"].shape[1]
    kept = np.minimum(count, ring)
    order = (count[:, None] - kept[:, None] + np.arange(ring)) % ring  # the oldest first
    valid = np.arange(ring) < kept[:, None]

    def of_ring(name: str) -> Any:
        ordered = np.take_along_axis(rows[name], order, axis=1)[valid]
        return _lists(pyarrow, ordered, kept)

    width, names = rows["d"].shape[1], rows.dtype.names or ()
    return {
        "last_ms": rows["last_ms"],
        "d": _matrix(pyarrow, rows["d"]),
        "variance": _variances(pyarrow, rows, width),
        "implicit": _matrix(pyarrow, rows["implicit"]),
        "missed": rows["missed"] if "missed" in names else pyarrow.nulls(len(rows), pyarrow.float32()),
        **{name: of_ring(name) for name in ("ring_item", "ring_time_s", "ring_event", "ring_level", "ring_logit")},
    }


def _variances(pyarrow: Any, rows: npt.NDArray[Any], width: int) -> Any:
    """Of each coordinate; null where the rule keeps none."""
    if "P" not in (rows.dtype.names or ()):
        return pyarrow.nulls(len(rows), pyarrow.list_(pyarrow.float32()))
    return _matrix(pyarrow, diagonal(rows["P"], width).astype(np.float32))


def _items(pyarrow: Any, rows: npt.NDArray[Any]) -> dict[str, Any]:
    c, c_var, delta, delta_var = applied(rows)
    return {
        "hash": rows["hash"],
        "c": c.astype(np.float32),
        "c_var": c_var.astype(np.float32),
        "delta": _matrix(pyarrow, delta.astype(np.float32)),
        "delta_var": _matrix(pyarrow, delta_var.astype(np.float32)),
    }


def _matrix(pyarrow: Any, values: npt.NDArray[Any]) -> Any:
    """`[m, k]` → m lists of k."""
    return _lists(pyarrow, values.ravel(), np.full(len(values), values.shape[1]))


def _lists(pyarrow: Any, flat: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> Any:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(ends, pyarrow.array(np.ascontiguousarray(flat)))


def _schema(pyarrow: Any, kind: RowKind) -> pa.Schema:
    f32, lists = pyarrow.float32(), pyarrow.list_
    shared = [("partition", pyarrow.int32()), ("id", pyarrow.string()), ("count", pyarrow.int32())]
    users = [
        ("last_ms", pyarrow.int64()),
        ("d", lists(f32)),
        ("variance", lists(f32)),
        ("implicit", lists(f32)),
        ("missed", f32),
        ("ring_item", lists(pyarrow.uint64())),
        ("ring_time_s", lists(pyarrow.uint32())),
        ("ring_event", lists(pyarrow.uint32())),
        ("ring_level", lists(pyarrow.int8())),
        ("ring_logit", lists(f32)),
    ]
    items = [("hash", pyarrow.uint64()), ("c", f32), ("c_var", f32), ("delta", lists(f32)), ("delta_var", lists(f32))]
    return pyarrow.schema([*shared, *(users if kind == "users" else items), ("control_offset", pyarrow.int64())])
