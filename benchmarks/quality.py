"""Makes the tables of quality.md: `python benchmarks/quality.py --sets movielens-100k,movielens-1m --seeds 3`.

For each set, feedback and seed one training on the first half, served with either covariance, with and without a
calibrator, users warm or cold, and in 16 partitions; the figures are those of `stream-adapt replay` with the same
options. Peers are warmed on the first half, too. What was measured is kept in quality.json, and is not measured again
unless it is removed there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.progress import Progress

from stream_adapt.datasets import open_source
from stream_adapt.evaluate import baselines
from stream_adapt.evaluate.figures import Figures, best_threshold, figures
from stream_adapt.evaluate.halves import Halves, cut, two_levels
from stream_adapt.evaluate.replay import Levels, Replay, ReplayOptions, serve
from stream_adapt.meta.trainer import TrainSettings, pretrain_each
from stream_adapt.models import LearnerSpec, read_model, write_model

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "quality.json", HERE / "quality.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
#: By name, what of a spec is the learner's. Those with a calibrator are served with warm users and all levels.
LEARNERS: dict[str, dict[str, Any]] = {
    "full": {"covariance": "full"},
    "diagonal": {"covariance": "diagonal"},
    "full + calibrator": {"covariance": "full", "calibrator": "linear"},
    "diagonal + calibrator": {"covariance": "diagonal", "calibrator": "linear"},
}
#: Baselines of the learner's own encoder: `frozen` is a row already, `direct` is in objectives.py.
OURS = (baselines.FROZEN, baselines.DIRECT)
SHOWN = ("auc", "logloss", "gauc", "ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", default="movielens-100k,movielens-1m")
    parser.add_argument("--levels", default="all,two")
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--peers", default=",".join(n for n in baselines.NAMES if n not in OURS))
    parser.add_argument("--threads", default=1, type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name, levels in ((n, lv) for n in given.sets.split(",") for lv in given.levels.split(",")):
        for key, found in measured(name, levels, given.seeds, given.peers.split(","), kept):
            kept[key] = found
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
            print(key, " ".join(f"{n}={found[n]:.4f}" for n in SHOWN), flush=True)
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + tables(kept) + END + rest.partition(END)[2])


def measured(
    name: str, levels: Levels, seeds: int, peers: Sequence[str], kept: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows that are not kept yet: set|learner|feedback|users|seed → figures."""
    views = [("warm", 1), ("cold", 1), *([("warm", 16)] if levels == "all" else [])]
    asked = [
        (users, partitions, learner, seed, f"{name}|{learner}, {partitions}|{levels}|{users}|{seed}")
        for users, partitions in views
        for learner in (LEARNERS if partitions == 1 else ("diagonal",))
        for seed in range(seeds)
        if "calibrator" not in LEARNERS[learner] or (levels, users) == ("all", "warm")
    ]
    missing = [row for row in asked if row[-1] not in kept]
    wanted = [peer for peer in peers if peer and levels == "all" and f"{name}|{peer}|{levels}|warm|0" not in kept]
    if not missing and not wanted:
        return
    source = open_source(name)
    feedback = two_levels(source.feedback) if levels == "two" else source.feedback
    specs = {learner: LearnerSpec(source.features, feedback, **own) for learner, own in LEARNERS.items()}
    spec = specs["full"]
    halves = cut(source, spec, 1, warm=True)
    with tempfile.TemporaryDirectory() as folder, Progress(disable=True) as bar:
        models = trained(halves, specs, sorted({row[3] for row in missing}), Path(folder))
        for users, partitions in views:
            rows = [row for row in missing if row[:2] == (users, partitions)]
            if rows and (users, partitions) != ("warm", 1):
                halves = cut(source, spec, partitions, warm=users == "warm")
            for *_, learner, seed, key in rows:
                model, seconds = models[learner, seed]
                options = ReplayOptions(name, levels=levels, partitions=partitions, warm=users == "warm")
                run = Replay(options, source, model.spec, halves)
                serve(run, model, seconds, bar)
                yield key, msgspec.to_builtins(run.adapted[0].figures)
                if (users, partitions, learner) == ("warm", 1, "full"):
                    yield f"{name}|frozen|{levels}|warm|{seed}", msgspec.to_builtins(run.frozen[0].figures)
    for peer in wanted:
        said = baselines.measure(peer, source.features, halves)
        threshold = best_threshold(said.earlier, halves.first.targets)
        one = figures(said.later, halves.outcomes, threshold, said.train_s, said.events_per_s)
        yield f"{name}|{peer}|{levels}|warm|0", msgspec.to_builtins(one)


def trained(halves: Halves, specs: dict[str, LearnerSpec], seeds: list[int], folder: Path) -> dict[Any, Any]:
    """(learner, seed) → the model as service reads it, and the processor's seconds that its training took."""
    models = {}
    for seed in seeds:
        started = time.process_time()
        made = pretrain_each(halves.first.events, list(specs.values()), TrainSettings(seed=seed), "cpu")
        seconds = time.process_time() - started
        for (learner, spec), one in zip(specs.items(), made, strict=True):
            model = read_model(write_model(folder, one.weights, spec, one.fitted))
            models[learner, seed] = model, seconds
    return models


def tables(kept: dict[str, dict[str, Any]]) -> str:
    """Both tables in Markdown: all rows, and the cold-start curve."""
    groups: dict[str, list[Figures]] = {}
    for key, found in kept.items():
        groups.setdefault(key.rpartition("|")[0], []).append(msgspec.convert(found, Figures))
    lines = ["| set | method | feedback | users | seeds | AUC | log-loss | GAUC | ECE | training s |"]
    lines.append("|---" * 10 + "|")
    for group, runs in sorted(groups.items(), key=lambda pair: _order(*pair)):
        cells = [_mean([getattr(run, n) for run in runs]) for n in SHOWN]
        seconds = [run.train_s for run in runs if run.train_s is not None]
        spent = f"{sum(seconds) / len(seconds):.0f}" if seconds else "–"
        lines.append(f"| {_named(group)} | {len(runs)} | {' | '.join(cells)} | {spent} |")
    lines += ["", "Log-loss by a user's n-th event, counted over both halves:", ""]
    first = next(iter(kept.values()))["cold_start"]
    lines.append("| set | method | feedback | users | " + " | ".join(map(_bucket, first)) + " |")
    lines.append("|---" * (4 + len(first)) + "|")
    for group, runs in sorted(groups.items(), key=lambda pair: _order(*pair)):
        values = [[bucket.logloss for bucket in run.cold_start] for run in runs]
        lines.append(
            f"| {_named(group)} | " + " | ".join(f"{sum(v) / len(v):.4f}" for v in zip(*values, strict=True)) + " |"
        )
    return "\n".join(lines) + "\n"


def _named(group: str) -> str:
    name, method, levels, users = group.split("|")
    shown = method.replace(", 16", ", 16 partitions").removesuffix(", 1").replace("_", " ")
    return f"{name.removeprefix('movielens-').upper()} | {shown} | {levels} | {users}"


def _order(group: str, runs: Sequence[Figures]) -> tuple[str, bool, float]:
    """By set, all levels before two, best log-loss first."""
    name, _, levels, _ = group.split("|")
    return name, levels == "two", sum(run.logloss for run in runs) / len(runs)


def _mean(values: Sequence[float]) -> str:
    spread = (max(values) - min(values)) / 2
    return f"{sum(values) / len(values):.4f}" + (f" ± {spread:.4f}" if len(values) > 1 else "")


def _bucket(bucket: dict[str, Any]) -> str:
    first, last = bucket["n_from"], bucket["n_to"]
    return f"{first}+" if last is None else str(first) if first == last else f"{first}–{last}"


if __name__ == "__main__":
    main()
