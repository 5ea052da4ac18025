"""`state show` and `state export`, over a changelog that a real adapter has filled."""

from __future__ import annotations

import builtins
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from stream_adapt import export, inspection, service
from stream_adapt.adapt import Adapter
from stream_adapt.cli import cli
from stream_adapt.config import Config, load
from stream_adapt.errors import ConfigError, StateMismatch
from stream_adapt.kafka.changelog import Records, Tail
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.models import LearnerSpec, Model, read_model, write_model
from stream_adapt.record import Batch
from stream_adapt.state.row import CONTROL_KEY, PREFIX, ControlRow
from stream_adapt.testing.model import random_weights

STARS = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1, 5), (2, 3, 4, 5)))
START_MS = 1_700_000_000_000
KNOWN = ["a", "b", "c"]


@dataclass
class Changelog:
    """Partitions of records, read a few at a time."""

    partitions: dict[int, list[tuple[bytes, bytes | None]]]
    topic: str = "shop.changelog"
    tails: dict[int, Tail] = field(default_factory=dict)
    chunk: int = 7

    def begin(self, partitions: Collection[int]) -> None:
        self.tails = {p: Tail(0, len(self.partitions[p]), 0, 0.0) for p in partitions}

    def read(self, timeout_s: float) -> dict[int, Records]:
        found = {}
        for partition, tail in self.tails.items():
            part = self.partitions[partition][tail.position : tail.position + self.chunk]
            offsets = list(range(tail.position, tail.position + len(part)))
            if part:
                found[partition] = Records([k for k, _ in part], [v for _, v in part], offsets)
            tail.position += len(part)
        return found

    def finish(self) -> list[int]:
        done = [p for p, tail in self.tails.items() if tail.is_read]
        for partition in done:
            del self.tails[partition]
        return done

    def close(self) -> None:
        pass


@dataclass
class Shop:
    """A model, rows that it has learned, and the changelog they stand in."""

    config: Config
    model: Model
    adapter: Adapter
    changelog: Changelog
    offset: int = 0

    def learn(self, partition: int, user: str, item: str, label: int, later_s: int = 1) -> None:
        """One event; every one has a window of its own."""
        self.offset += self.model.spec.window
        time_ms = START_MS + self.offset * 1000 + later_s
        level = self.model.spec.feedback.level_of([float(label)], [""])
        batch = Batch(
            [f"e{self.offset}"], [user], [item], [None], np.array([time_ms]), level, np.array([partition], np.int32),
            np.array([self.offset]),
        )  # fmt: skip
        self.adapter.adapt(batch)
        self.adapter.commit()

    def write(self) -> None:
        """Every row, as a member writes it; and twice, so that there is an older version."""
        for table, prefix in ((self.adapter.users, b"u:"), (self.adapter.items, b"i:")):
            for partition, records in self.changelog.partitions.items():
                for row_id, slot in sorted(table.items(partition)):
                    old = np.zeros((), table.layout.dtype)
                    records.append((prefix + row_id.encode(), table.layout.to_bytes(old)))
                    records.append((prefix + row_id.encode(), table.layout.to_bytes(table.rows[slot])))
        for partition, records in self.changelog.partitions.items():
            control = ControlRow(partition, 1000 + partition, self.model.version, "t")
            records.append((CONTROL_KEY, control.to_bytes()))

    def row(self, partition: int, user: str) -> Any:
        slot = self.adapter.users.find(partition, user)
        assert slot is not None
        return self.adapter.users.rows[slot]


@pytest.fixture(params=["diagonal", "full", "calibrated"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Two partitions; ann is in both, and more often than her ring is long in the first."""
    form = {"calibrator": "linear"} if request.param == "calibrated" else {"covariance": request.param}
    spec = LearnerSpec(feedback=STARS, dimension=4, ring=5, **form)
    weights = msgspec.structs.replace(random_weights(spec, KNOWN, ()), leak=np.zeros(2, np.float32))
    model = read_model(write_model(tmp_path / "models", weights, spec, ()))
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"app": {"name": "shop"}, "model": {"path": str(tmp_path / "models")}})
    )
    made = Shop(load(tmp_path / "c.yaml", {}).config, model, Adapter(model), Changelog({0: [], 1: [], 2: []}))
    for k in range(7):
        made.learn(0, "ann", [*KNOWN, "new"][k % 4], 1 + k % 5)
    made.learn(1, "ann", "b", 5)
    made.learn(1, "bob", "c", 1)
    made.write()
    monkeypatch.setattr(service, "build_changelog_reader", lambda _config: made.changelog)
    monkeypatch.setattr(service, "champion", service.served_model)
    for module in (inspection, export):
        monkeypatch.setattr(module, "changelog_partitions", lambda _config: list(made.changelog.partitions))
    return made


def test_a_users_row_is_shown_in_every_partition_that_has_it(shop: Shop) -> None:
    shown = inspection.show(shop.config, "ann")
    assert [(0, 7, 1000), (1, 1, 1001)] == [(r.partition, r.count, r.as_of_offset) for r in shown.rows]
    assert (3, shop.model.version, []) == (shown.partitions, shown.model_version, shown.notes)
    assert sum(map(len, shop.changelog.partitions.values())) == shown.records
    row = shop.row(0, "ann")
    assert row["d"].tolist() == pytest.approx(shown.rows[0].deviation, abs=1e-6)
    learned = int(row["count"])
    state = row["implicit"] / np.sqrt((1 + learned) * (1 + learned / 512))
    prior = shop.model.weights.prior_mean + state @ shop.model.weights.implicit_map
    assert (prior + row["d"]).tolist() == pytest.approx(shown.rows[0].weights, abs=1e-6)
    ms = int(row["last_ms"])
    assert shown.rows[0].last_event == str(np.datetime64(ms, "ms")) + "Z"


def test_what_the_calibrator_keeps_is_shown_where_there_is_one(shop: Shop) -> None:
    shown = inspection.show(shop.config, "ann").rows[0].missed
    if shop.model.spec.calibrator == "none":
        assert shown is None
    else:
        assert float(shop.row(0, "ann")["missed"]) == pytest.approx(shown, abs=1e-6)
        assert shown != 0


def test_standard_deviations_are_the_roots_of_the_covariances_diagonal(shop: Shop) -> None:
    row, width = shop.row(0, "ann"), shop.model.spec.dimension + 1
    if shop.model.spec.covariance == "full":
        square = np.zeros((width, width))
        square[np.tril_indices(width)] = row["P"]
        expected = np.sqrt(np.diag(square))
    else:
        expected = np.sqrt(row["P"])
    [shown, _] = inspection.show(shop.config, "ann").rows
    assert expected.tolist() == pytest.approx(shown.deviation_sd, abs=1e-6)
    assert max(shown.deviation_sd) < 0.3**0.5, "seven events tell something"


def test_the_ring_is_shown_from_the_newest_on_with_names_of_items_and_levels(shop: Shop) -> None:
    [shown, _] = inspection.show(shop.config, "ann").rows
    assert ["c", "b", "a", "new", "c"] == [event.item_id for event in shown.events]
    assert ["2", "1", "5", "4", "3"] == [event.level_name for event in shown.events]
    assert [True, True, True, False, True] == [event.known for event in shown.events]
    assert shop.row(0, "ann")["ring_logit"][6 % 5] == pytest.approx(shown.events[0].logit, abs=1e-5)


@pytest.mark.parametrize("item", ["b", "new"])
def test_contributions_add_up_to_the_logit_that_the_rule_gives_next(
    shop: Shop, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_EXPLAINED", 4)
    one = next(c for c in inspection.show(shop.config, "ann").rows[0].contributions if c.item_id == item)
    shop.learn(0, "ann", item, 3)
    row = shop.row(0, "ann")
    assert float(row["ring_logit"][7 % 5]) == pytest.approx(one.z, abs=1e-4)
    parts = (one.bias, one.item_bias, one.item_bias_learned, one.user_bias, one.prior_taste, one.learned_taste)
    assert one.z == pytest.approx(sum(parts), abs=1e-5)
    assert sum(p.adds for p in one.top) == pytest.approx(one.prior_taste + one.learned_taste, abs=1e-4)
    sizes = [abs(p.adds) for p in one.top]
    assert sorted(sizes, reverse=True) == sizes


def test_the_last_three_items_are_explained(shop: Shop) -> None:
    assert ["c", "b", "a"] == [c.item_id for c in inspection.show(shop.config, "ann").rows[0].contributions]


def test_without_a_model_the_row_is_shown_with_less(shop: Shop, tmp_path: Path) -> None:
    config = load(tmp_path / "c.yaml", {}, model__path=str(tmp_path / "nowhere")).config
    shown = inspection.show(config, "ann")
    assert [7, 1] == [row.count for row in shown.rows]
    assert shop.row(0, "ann")["d"].tolist() == pytest.approx(shown.rows[0].deviation, abs=1e-6)
    assert (None, None, []) == (shown.rows[0].weights, shown.rows[0].prior_mean, shown.rows[0].contributions)
    assert ["c", "b", "a", "new", "c"] == [event.item_id for event in shown.rows[0].events]
    assert {None} == {event.level_name for event in shown.rows[0].events}
    assert "no model" in shown.notes[0]


def test_a_tombstone_a_damaged_record_and_strangers_rows(shop: Shop) -> None:
    key = PREFIX[inspection.Kind.USER] + b"ann"
    good = dict(shop.changelog.partitions[0])[key]
    assert good is not None
    shop.changelog.partitions[0].append((key, good[:-1] + bytes([good[-1] ^ 1])))
    shop.changelog.partitions[1].append((key, None))
    shop.changelog.partitions[2].append((b"u:eve", b"rubbish of somebody else"))
    shown = inspection.show(shop.config, "ann")
    assert [(0, 7)] == [(row.partition, row.count) for row in shown.rows]
    assert ["1 damaged records were left out; the last good version is shown"] == shown.notes


def test_a_user_whom_nobody_knows_is_an_answer(shop: Shop, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["state", "show", "nobody", "-c", str(tmp_path / "c.yaml"), "--json"])
    assert (0, []) == (said.exit_code, json.loads(said.stdout)["rows"])
    said = CliRunner().invoke(cli, ["state", "show", "nobody", "-c", str(tmp_path / "c.yaml")])
    assert "no row of this user in 3 partitions" in said.stdout


def test_people_see_tables_and_no_escape_sequences_of_strangers(shop: Shop, tmp_path: Path) -> None:
    shop.learn(2, "ann", "bad\x1b[31mitem", 5)
    shop.changelog.partitions = {p: [] for p in range(3)}
    shop.write()
    said = CliRunner().invoke(cli, ["state", "show", "ann", "-c", str(tmp_path / "c.yaml")], env={"COLUMNS": "200"})
    assert 0 == said.exit_code, said.output
    assert "partition 0: 7 events learned" in said.stdout
    assert "deviation from the prior" in said.stdout
    assert "\x1b" not in said.stdout
    assert "bad\\x1b[31mitem" in said.stdout


def parquet(path: Path) -> Any:
    pytest.importorskip("pyarrow", reason="the extra `export` is not installed")
    from pyarrow import parquet as reader

    return reader.read_table(path)


def test_users_are_exported_as_they_are_in_their_rows(shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "users.parquet"
    said = CliRunner().invoke(cli, ["state", "export", "-c", str(tmp_path / "c.yaml"), "--out", str(out), "--json"])
    assert 0 == said.exit_code, said.output
    assert {"rows": 3, "file": str(out), "bytes": out.stat().st_size}.items() <= json.loads(said.stdout).items()
    table = parquet(out)
    assert shop.model.version.encode() == table.schema.metadata[b"stream_adapt.model_version"]
    rows = table.to_pylist()
    assert [(0, "ann", 7, 1000), (1, "ann", 1, 1001), (1, "bob", 1, 1001)] == [
        (r["partition"], r["id"], r["count"], r["control_offset"]) for r in rows
    ]
    row = shop.row(0, "ann")
    assert row["d"].tolist() == rows[0]["d"]
    assert inspection.diagonal(row["P"], 5).tolist() == pytest.approx(rows[0]["variance"])
    assert row["implicit"].tolist() == rows[0]["implicit"]
    assert (row["missed"] if "missed" in row.dtype.names else None) == rows[0]["missed"]
    assert [row["ring_logit"][k % 5] for k in range(2, 7)] == rows[0]["ring_logit"]
    assert (int(row["last_ms"]), [5, 1]) == (
        rows[0]["last_ms"],
        [len(rows[0]["ring_item"]), len(rows[1]["ring_level"])],
    )
    assert [] == list(tmp_path.glob(".*.partial"))


def test_items_are_exported_with_what_is_pending_applied(shop: Shop, tmp_path: Path) -> None:
    exported = export.export(shop.config, tmp_path / "items.parquet", "items")
    rows = parquet(tmp_path / "items.parquet").to_pylist()
    assert [(0, "a"), (0, "b"), (0, "c"), (0, "new"), (1, "b"), (1, "c")] == [(r["partition"], r["id"]) for r in rows]
    assert 6 == exported.rows
    shop.learn(0, "ann", "b", 3)  # a later window: the rule applies the sums
    slot = shop.adapter.items.find(0, "b")
    item = shop.adapter.items.rows[slot]
    assert float(item["c"]) == pytest.approx(rows[1]["c"], abs=1e-6)
    assert item["delta_var"].tolist() == pytest.approx(rows[1]["delta_var"], abs=1e-6)


def test_rows_of_another_model_are_not_exported(shop: Shop, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(shop.model.spec, dimension=3)
    write_model(tmp_path / "other", random_weights(spec, KNOWN, ()), spec, ())
    config = load(tmp_path / "c.yaml", {}, model__path=str(tmp_path / "other")).config
    with pytest.raises(StateMismatch, match=r"shop.changelog\[0\]@\d+: a row is of another model"):
        export.export(config, tmp_path / "users.parquet", "users")
    assert [] == [*tmp_path.glob("*.parquet"), *tmp_path.glob(".*.partial")]


def test_without_pyarrow_the_extra_is_named(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"stream-adapt\[export\]"):
        export.export(shop.config, tmp_path / "users.parquet", "users")
