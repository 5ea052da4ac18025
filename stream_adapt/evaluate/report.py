"""The report of a replay: one HTML file with its styles and plots inside, which opens without a network.

Tables and the cold-start curve hold means over seeds; curves over time and the calibration plot are of the first seed.
"""

from __future__ import annotations

import importlib.util
import io
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stream_adapt import __version__
from stream_adapt.errors import ConfigError
from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.figures import CALIBRATION_BINS, NAMES, ColdStart, Figures
from stream_adapt.evaluate.metrics import Floats, Longs
from stream_adapt.learner import rules
from stream_adapt.models import LearnerSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stream_adapt.evaluate.replay import Replay, ReplayResult

_T = TypeVar("_T")

#: Events of a window, at most; a shorter stream is given a tenth of it, but not fewer than the smallest.
WINDOW, SMALLEST_WINDOW, SHARE_OF_STREAM = 5_000, 200, 0.1
#: Points of a curve over time.
POINTS = 120
#: Bins of the calibration plot with fewer events than this are not drawn.
_FEWEST_IN_BIN = 20

#: Okabe and Ito's colours, which differ for everybody: ours, the frozen model, the baselines.
_OURS, _FROZEN = "#0072b2", "#8c8c8c"
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
_ADAPTED = "adapted"
#: What the columns of the table of figures are called, and whether more is better.
_COLUMNS = {
    "auc": ("AUC", True),
    "logloss": ("log-loss", False),
    "ece": ("ECE", False),
    "gauc": ("GAUC", True),
    "accuracy": ("accuracy", True),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "f1": ("F1", True),
}
#: Packages whose version can change a figure.
_PACKAGES = ("numpy", "numba", "torch", "river", "vowpalwabbit")


def check() -> None:
    """Refuses to begin where the report could not be drawn in the end.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "matplotlib, which draws the report's plots, is missing: pip install 'stream-adapt[evaluate]'"
        )


def write(run: Replay, folder: Path) -> Path:
    """Writes the report into a folder, which is made where it is missing; returns the file."""
    name = re.sub(r"[^\w.-]+", "-", Path(run.source.name).name)
    path = folder / f"replay-{name}.html"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: Replay) -> str:
    """The report as HTML."""
    result = run.result()
    means = {_ADAPTED: result, "frozen": result.frozen, **_without_frozen(result.baselines)}
    columns = {_ADAPTED: run.adapted[0].probabilities, "frozen": run.frozen[0].probabilities}
    columns |= {name: said.probabilities for name, said in _without_frozen(run.baselines).items()}
    window = _window(len(run.outcomes))
    return _PAGE.substitute(
        title=escape(f"Replay of {run.source.name}"),
        summary=escape(_summary(result)),
        figures=_figures_table(means, result),
        notes=escape(_notes(result)),
        over_time=_svg(_over_time(columns, run.outcomes.targets, window)),
        window=f"{window:,}",
        cold_start=_svg(_cold_start(means)),
        cold_start_table=_cold_start_table(means),
        calibration=_svg(_calibration(columns, run.outcomes.targets)),
        setting=_table(["what", "value"], _what_was_run(run, result)),
    )


def _without_frozen(baselines: dict[str, _T]) -> dict[str, _T]:
    return {name: value for name, value in baselines.items() if name != "frozen"}


# ---- words and tables


def _summary(result: ReplayResult) -> str:
    return (
        f"{result.events:,} events of the second half, each scored before its outcome was known and then learned. "
        f"Adapting to each user: AUC {result.auc:.4f}, log-loss {result.logloss:.4f}; "
        f"the same model frozen: {result.frozen.auc:.4f}, {result.frozen.logloss:.4f}."
    )


def _notes(result: ReplayResult) -> str:
    seeds = "one seed" if result.seeds == 1 else f"mean of {result.seeds} seeds, ± half of largest less smallest"
    return (
        f"Adapted: {seeds}. ECE: expected calibration error, {CALIBRATION_BINS} bins. GAUC: AUC within each user, "
        "weighted by events. Accuracy, precision, recall and F1 call a yes what is at or above a threshold: the one "
        "with the highest F1 on the first half. Bold: the best of a column."
    )


def _figures_table(means: dict[str, Figures], result: ReplayResult) -> str:
    best = {name: _best([getattr(one, name) for one in means.values()], _COLUMNS[name][1]) for name in NAMES}
    rows = []
    for method, one in means.items():
        cells = [_cell(getattr(one, name), best[name], _spread(method, name, result)) for name in NAMES]
        rows.append([escape(_title(method)), *cells, _number(one.train_s, ".1f"), _number(one.events_per_s, ",.0f")])
    heads = [title for title, _ in _COLUMNS.values()]
    return _table(["method", *heads, "training s", "events/s"], rows, raw=True)


def _best(values: Sequence[float], more_is_better: bool) -> float:
    known = [value for value in values if not math.isnan(value)]
    return (max(known) if more_is_better else min(known)) if known else math.nan


def _cell(value: float, best: float, spread: float) -> str:
    text = _number(value, ".4f") + (f"<small>± {spread / 2:.4f}</small>" if spread else "")
    return f"<b>{text}</b>" if value == best else text


def _spread(method: str, name: str, result: ReplayResult) -> float:
    return result.spread[name] if method == _ADAPTED else 0.0


def _cold_start_table(means: dict[str, Figures]) -> str:
    buckets = next(iter(means.values())).cold_start
    rows = []
    for place, bucket in enumerate(buckets):
        mine = [one.cold_start[place] for one in means.values()]
        best = _best([one.logloss for one in mine], False)
        cells = [f"{_cell(one.logloss, best, 0.0)}<small>{_number(one.auc, '.4f')}</small>" for one in mine]
        rows.append([_bucket_name(bucket), f"{bucket.events:,}", *cells])
    return _table(["n-th event", "events", *(_title(method) for method in means)], rows, raw=True)


def _bucket_name(bucket: ColdStart) -> str:
    if bucket.n_to is None:
        return f"{bucket.n_from}+"
    return str(bucket.n_from) if bucket.n_from == bucket.n_to else f"{bucket.n_from}–{bucket.n_to}"


def _what_was_run(run: Replay, result: ReplayResult) -> list[list[str]]:
    first, second = run.halves.first, run.halves.second
    packages = [f"{package} {found}" for package in _PACKAGES if (found := _version(package))]
    users = "keep what the first half taught" if result.warm else "are cold at the half"
    return [
        ["source", run.source.name],
        ["first half", f"{len(first):,} events, xxh3 {first.digest}"],
        ["second half", f"{len(second):,} events, xxh3 {second.digest}; {result.events:,} with feedback"],
        ["refused events", f"{result.refused:,}"],
        ["events with one time", "in the source's order" if result.ties == "kept" else "in an order that is drawn"],
        ["users", f"{users}; the n-th event of a user is counted from the first half on"],
        ["model", run.version or "pretrained on the first half"],
        ["seeds", str(result.seeds)],
        ["feedback", f"{', '.join(run.spec.feedback.levels)}; a yes is {run.spec.feedback.target} or more"],
        ["rule", f"{_rule(run.spec)}, D = {run.spec.dimension}"],
        ["partitions", str(result.partitions)],
        ["memory", "; ".join(f"{n:,} {kind} rows of {run.row_bytes[kind]} bytes" for kind, n in run.rows.items())],
        ["thresholds", f"adapted {result.threshold:.3f}, frozen {result.frozen.threshold:.3f}"],
        ["software", f"stream-adapt {__version__}, Python {platform.python_version()}, {', '.join(packages)}"],
        ["made", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())],
    ]


def _rule(spec: LearnerSpec) -> str:
    variants = rules.find(spec.rule).variants.items()
    own = next(n for n, own in variants if all(getattr(spec, k) == own[k] for k in own))
    return f"{spec.rule}, {own}" + (f", calibrator {spec.calibrator}" if spec.calibrator_terms else "")


def _version(package: str) -> str | None:
    return version(package) if importlib.util.find_spec(package) else None


def _title(method: str) -> str:
    return method.replace("_", " ")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], *, raw: bool = False) -> str:
    """A table; cells are escaped unless they are HTML themselves."""
    shown: Callable[[str], str] = str if raw else escape
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# ---- plots


def _window(events: int) -> int:
    return int(min(WINDOW, max(SMALLEST_WINDOW, events * SHARE_OF_STREAM), events))


def windowed(probabilities: Floats, targets: Longs, window: int) -> tuple[Longs, Floats, Floats]:
    """Where windows of the last `window` events end `[m]`, and their AUC and log-loss `[m]` each."""
    ends = np.unique(np.linspace(window, len(targets), POINTS).astype(np.int64))
    parts = [slice(end - window, end) for end in ends.tolist()]
    auc = np.array([metrics.auc(probabilities[part], targets[part]) for part in parts])
    loss = np.array([metrics.log_loss(probabilities[part], targets[part]) for part in parts])
    return ends, auc, loss


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an element of HTML."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _colours(methods: Iterable[str]) -> dict[str, str]:
    others = [method for method in methods if method not in (_ADAPTED, "frozen")]
    chosen = {method: _OTHERS[place % len(_OTHERS)] for place, method in enumerate(others)}
    return {_ADAPTED: _OURS, "frozen": _FROZEN, **chosen}


def _over_time(columns: dict[str, Floats], targets: Longs, window: int) -> Figure:
    figure, colours = _figure(11, 4.3), _colours(columns)
    both = figure.subplots(1, 2)
    for method, probabilities in columns.items():
        ends, auc, loss = windowed(probabilities, targets, window)
        for axes, values in zip(both, (auc, loss), strict=True):
            axes.plot(ends, values, color=colours[method], **_weight(method), label=_title(method))
    for axes, what in zip(both, ("AUC", "log-loss"), strict=True):
        axes.set_title(what, fontsize="medium")
        axes.set_xlabel("events of the second half")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _tidy(axes)
    _legend(figure)
    return figure


def _cold_start(means: dict[str, Figures]) -> Figure:
    figure, colours = _figure(11, 4.5), _colours(means)
    axes = figure.subplots()
    for method, one in means.items():
        values = [bucket.logloss for bucket in one.cold_start]
        axes.plot(values, "o-", color=colours[method], markersize=4, **_weight(method), label=_title(method))
    buckets = next(iter(means.values())).cold_start
    labels = [f"{_bucket_name(bucket)}\n{bucket.events:,} events" for bucket in buckets]
    axes.set_xticks(range(len(buckets)), labels)
    axes.set_ylabel("log-loss")
    _tidy(axes)
    _legend(figure)
    return figure


def _calibration(columns: dict[str, Floats], targets: Longs) -> Figure:
    figure, colours = _figure(6, 5.2), _colours(columns)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle="--")
    for method, probabilities in columns.items():
        where = np.minimum((probabilities * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)  # [m]
        counts = np.bincount(where, minlength=CALIBRATION_BINS)  # [bins]
        shown = counts >= _FEWEST_IN_BIN
        said, happened = (
            np.bincount(where, weights=values, minlength=CALIBRATION_BINS)[shown] / counts[shown]
            for values in (probabilities, targets)
        )
        axes.plot(said, happened, color=colours[method], **_weight(method), label=_title(method))
    axes.set_xlabel("probability said")
    axes.set_ylabel("share of yes")
    _tidy(axes)
    _legend(figure)
    return figure


def _weight(method: str) -> dict[str, Any]:
    return {"linewidth": 2.2, "zorder": 3} if method == _ADAPTED else {"linewidth": 1.2}


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """One for all axes, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), int(figure.get_figwidth() / 1.3))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.note { color: #555; font-size: .9rem; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .5rem; vertical-align: top; text-align: right; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #999; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
small { color: #777; font-weight: 400; display: block; }
.setting td, .setting th { text-align: left; white-space: normal; }
svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<h2>Figures</h2>
$figures
<p class="note">$notes</p>
<h2>Over time</h2>
<p class="note">Of the last $window events.</p>
$over_time
<h2>Cold start</h2>
<p class="note">Log-loss by a user's n-th event; in the table the AUC is below it. Buckets differ in difficulty: compare
along a row.</p>
$cold_start
$cold_start_table
<h2>Calibration</h2>
$calibration
<h2>What was run</h2>
<div class="setting">$setting</div>
</body>
</html>
""")
