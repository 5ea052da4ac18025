"""Metrics: every family in one table, from which what is exposed and what is documented both derive.

The loop's thread adds to one flat array — each family owns a stretch of it — and publishes a copy once a turn; a
scrape reads the newest copy. So nothing is locked, a scrape never holds up the loop, and all figures of one scrape
belong together: events = scores + dead letters + receipts + withheld scores in every one of them.

Nothing here is done event by event. A batch of n events is counted by NumPy in well under 0.1 µs an event.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, Protocol

import confluent_kafka
import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from stream_adapt.commit import Outcome
from stream_adapt.decode import REASONS
from stream_adapt.follow import REFUSALS, Standing
from stream_adapt.kafka.connections import KINDS, Connections
from stream_adapt.record import NO_LEVEL, Adapted, Batch, Flag, Floats, Longs, Work
from stream_adapt.restore import Slice
from stream_adapt.state.row import DAMAGES, ControlRow, Kind
from stream_adapt.state.table import Table

FamilyType = Literal["counter", "gauge", "histogram", "summary", "info"]

#: In place of a label's values: they are known only at run time (partitions owned, versions).
OPEN: tuple[str, ...] = ()

#: The parts of a turn that are timed.
STAGES = ("poll", "decode", "adapt", "emit", "changelog", "commit")
#: The two probabilities of every event: with the user's fast weights, and with the slow weights alone.
WHICH = ("adapted", "frozen")
TARGETS = ("0", "1")


def _bound(edge: float) -> str:
    """The text of an upper bound, as in `le`."""
    return str(floatToGoString(edge))  # type: ignore[no-untyped-call]


_TAIL = [n / scale for scale in (10_000, 1_000) for n in (10, 12, 15, 18, 22, 27, 33, 39, 47, 56, 68, 82)]
_MIDDLE = [n / 40 for n in range(4, 37)]
#: Upper bounds of the probability buckets; a last one without bound follows. Steps of 0.025 from 0.1 to 0.9; beyond,
#: the E12 preferred numbers and their mirror image. So no bucket between is wider than 0.26 in logits, and AUC from
#: buckets is good to 0.005 also where the target is rare and every score small: equal steps would make that one bucket.
SCORE_EDGES = (*_TAIL, *_MIDDLE, *(round(1 - p, 4) for p in reversed(_TAIL)))
SCORE_BUCKETS = tuple(_bound(edge) for edge in (*SCORE_EDGES, np.inf))

#: 1 ms to 1 h: from a transaction of its own to a backlog.
END_TO_END_EDGES_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0),
)
BATCH_EDGES = tuple(4.0**power for power in range(11))

#: Which of its user's events one is: the first event of each bucket → its label.
COLD_START = {1: "1", 2: "2", 3: "3-4", 5: "5-8", 9: "9-16", 17: "17-32", 33: "33-64", 65: "65+"}

#: Lag and rows are looked at no more often than this: asking a thousand partitions takes milliseconds.
SAMPLE_PERIOD_S = 1.0
#: Scores are written with seven decimals, so that a probability of exactly 0 or 1 is only rounding.
_PROBABILITY_FLOOR = 1e-7


@dataclass(frozen=True)
class Family:
    """One metric family: what is exposed under a name, and what it means.

    `labels` maps each label to every value that it may take, so that the number of series can be read off, or to
    `OPEN`. `edges` are the upper bounds of a histogram's buckets, without the last one.
    """

    name: str
    type: FamilyType
    unit: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    edges: tuple[float, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether label values are known only at run time."""
        return OPEN in self.labels.values()

    @property
    def width(self) -> int:
        """Numbers kept for one combination of label values: histogram: buckets, sum; summary: count, sum."""
        return {"histogram": len(self.edges) + 2, "summary": 2}.get(self.type, 1)

    def combinations(self) -> list[tuple[str, ...]]:
        """Every combination of label values, in the order of the labels; none if open."""
        return list(product(*self.labels.values()))

    def metric(self) -> Any:
        """A collector's family of this name, without samples."""
        kinds: dict[str, type[Metric]] = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
            "summary": SummaryMetricFamily,
            "info": InfoMetricFamily,
        }
        name = self.name.removesuffix("_info") if self.type == "info" else self.name
        labels = [] if self.type == "info" else list(self.labels)
        return kinds[self.type](name, self.help, labels=labels)  # type: ignore[call-arg]


#: Families with one series for each owned partition, which end with the ownership.
_OF_PARTITIONS = ("stream_adapt_lag_records", "stream_adapt_lag_seconds", "stream_adapt_next_offset")
_PARTITION = {"partition": OPEN}
_ROW_KINDS = {"kind": tuple(kind.name.lower() for kind in (Kind.USER, Kind.ITEM))}

#: Every metric there is.
FAMILIES: tuple[Family, ...] = (
    # The loop
    Family(
        "stream_adapt_events_total",
        "counter",
        "records",
        "Input records whose outcome is committed: always scores plus dead letters plus receipts plus withheld scores.",
    ),
    Family("stream_adapt_scores_total", "counter", "records", "Scores committed."),
    Family(
        "stream_adapt_withheld_scores_total",
        "counter",
        "records",
        "Events from before output.emit_from committed: learned from, and no score written.",
    ),
    Family("stream_adapt_receipts_total", "counter", "records", "Receipts of erasures committed."),
    Family(
        "stream_adapt_dead_letters_total",
        "counter",
        "records",
        "Dead letters committed, by the reason in their header.",
        {"reason": tuple(REASONS)},
    ),
    Family(
        "stream_adapt_polled_records_total",
        "counter",
        "records",
        "Input records handed to the pipeline; what exceeds the events was aborted and is done again.",
    ),
    Family("stream_adapt_batch_records", "histogram", "records", "Size of committed batches.", {}, BATCH_EDGES),
    Family(
        "stream_adapt_stage_seconds_total",
        "counter",
        "seconds",
        "Time spent in each stage; poll includes waiting for records.",
        {"stage": STAGES},
    ),
    Family("stream_adapt_stage_runs_total", "counter", "runs", "Times each stage ran.", {"stage": STAGES}),
    Family(
        "stream_adapt_end_to_end_seconds",
        "histogram",
        "seconds",
        "From an event's own timestamp to the commit of its score; means little while old events are replayed.",
        {},
        END_TO_END_EDGES_S,
    ),
    Family(
        "stream_adapt_last_turn_timestamp_seconds",
        "gauge",
        "seconds since the epoch",
        "Time of the loop's last turn; of the start, until there is one. What /healthz judges by.",
    ),
    # Kafka
    Family(
        "stream_adapt_transactions_total",
        "counter",
        "transactions",
        "Commits by outcome; recovered: the producer was lost, and the broker said that it had committed.",
        {"outcome": tuple(outcome.value for outcome in Outcome)},
    ),
    Family(
        "stream_adapt_last_commit_timestamp_seconds",
        "gauge",
        "seconds since the epoch",
        "Time of the last commit; of the start, until there is one.",
    ),
    Family("stream_adapt_assigned_partitions", "gauge", "partitions", "Input partitions that this member owns."),
    Family(
        "stream_adapt_lag_records",
        "gauge",
        "records",
        "Records between the committed position and the partition's end, as far as fetching has seen.",
        _PARTITION,
    ),
    Family(
        "stream_adapt_lag_seconds",
        "gauge",
        "seconds",
        "While records wait: the age of the last committed event, but no more than since nothing waited; else 0. Not "
        "there before the first commit.",
        _PARTITION,
    ),
    Family(
        "stream_adapt_next_offset",
        "gauge",
        "offset",
        "First input offset whose outcome is not committed.",
        _PARTITION,
    ),
    Family(
        "stream_adapt_rebalances_total",
        "counter",
        "rebalances",
        "Times partitions were given to this member or taken from it.",
        {"kind": ("assigned", "revoked")},
    ),
    Family(
        "stream_adapt_client_errors_total",
        "counter",
        "errors",
        "Errors that Kafka clients called back; fenced: another producer took this member's transactional id.",
        {"kind": tuple(KINDS)},
    ),
    Family(
        "stream_adapt_unreachable_seconds",
        "gauge",
        "seconds",
        "How long no broker has been connected; 0 while one is.",
    ),
    # State
    Family("stream_adapt_rows", "gauge", "rows", "Rows held, of all owned partitions.", _ROW_KINDS),
    Family(
        "stream_adapt_slab_bytes",
        "gauge",
        "bytes",
        "What the rows' slab takes, in memory or in state.dir, disk taken ahead included.",
        _ROW_KINDS,
    ),
    Family(
        "stream_adapt_index_bytes",
        "gauge",
        "bytes",
        "Memory of ids, index and what else is kept by row; an estimate.",
        _ROW_KINDS,
    ),
    Family(
        "stream_adapt_expired_rows_total",
        "counter",
        "rows",
        "Rows dropped because they were idle for longer than state.ttl_s; items never are.",
        _ROW_KINDS,
    ),
    Family(
        "stream_adapt_changelog_records_total",
        "counter",
        "records",
        "Changelog records committed: rows that changed, tombstones, and where shards stand.",
    ),
    Family("stream_adapt_changelog_bytes_total", "counter", "bytes", "Their values' bytes, before compression."),
    Family(
        "stream_adapt_restore_records_total",
        "counter",
        "records",
        "Changelog records read to bring rows back.",
    ),
    Family("stream_adapt_restore_seconds_total", "counter", "seconds", "Time spent on bringing rows back."),
    Family(
        "stream_adapt_restore_remaining_records",
        "gauge",
        "offsets",
        "Changelog offsets between what was read and the end, of partitions whose rows are being brought back.",
        _PARTITION,
    ),
    Family(
        "stream_adapt_rows_refused_total",
        "counter",
        "records",
        "Damaged changelog records that were left out of a restore; the rows' last good versions stand.",
        {"reason": DAMAGES},
    ),
    # Learning
    Family(
        "stream_adapt_flagged_scores_total",
        "counter",
        "records",
        "Scores that carry a flag: score_only (nothing to learn), nan_undone (the update was not finite), late, "
        "duplicate.",
        {"flag": tuple(flag.name.lower() for flag in Flag if flag.name)},
    ),
    Family(
        "stream_adapt_log_loss",
        "summary",
        "nats",
        "Log-loss of the scores of events that have a target, before they were learned from.",
        {"which": WHICH},
    ),
    Family(
        "stream_adapt_score",
        "histogram",
        "probability",
        "Scores of events that have a target, by that target.",
        {"which": WHICH, "target": TARGETS},
        SCORE_EDGES,
    ),
    Family(
        "stream_adapt_bucket_scores_total",
        "counter",
        "records",
        "The buckets of stream_adapt_score, each by itself and not cumulative; `bucket` is the histogram's `le`.",
        {"which": WHICH, "target": TARGETS, "bucket": SCORE_BUCKETS},
    ),
    Family(
        "stream_adapt_bucket_probability_total",
        "counter",
        "probability",
        "Sum of the scores in each bucket: how many of its targets should be 1.",
        {"which": WHICH, "bucket": SCORE_BUCKETS},
    ),
    Family(
        "stream_adapt_cold_start_log_loss",
        "summary",
        "nats",
        "The same log-loss by which of its user's events each was: what adaptation gains a newcomer, and how soon.",
        {"which": WHICH, "nth": tuple(COLD_START.values())},
    ),
    Family(
        "stream_adapt_score_change",
        "summary",
        "probability",
        "How far learning from an event that has a target moved its own score, up or down.",
    ),
    # Drift and refresh, as the controller beside this member tells, if it leads
    Family("stream_adapt_refresh_leader", "gauge", "", "1 while this member's controller leads."),
    Family(
        "stream_adapt_refresh_told_timestamp_seconds",
        "gauge",
        "seconds",
        "When it last told where it is, since 1970; 0: it never led.",
    ),
    Family(
        "stream_adapt_refresh_state_timestamp_seconds",
        "gauge",
        "seconds",
        "The state that the refresh is in, and since when, since 1970.",
        {"state": OPEN},
    ),
    Family(
        "stream_adapt_refresh_decision_timestamp_seconds",
        "gauge",
        "seconds",
        "How the last refresh ended (promoted, rejected, rolled_back, failed), and when, since 1970.",
        {"outcome": OPEN},
    ),
    Family(
        "stream_adapt_drift_statistic",
        "gauge",
        "",
        "Mean of a drift signal over the last groups; domain is empty for all events.",
        {"signal": OPEN, "domain": OPEN},
    ),
    Family(
        "stream_adapt_drift_reference",
        "gauge",
        "",
        "What the same signal was in the reference; not there while that is being gathered.",
        {"signal": OPEN, "domain": OPEN},
    ),
    Family(
        "stream_adapt_drift_alarm_timestamp_seconds",
        "gauge",
        "seconds",
        "When a signal last gave an alarm to this leader, since 1970.",
        {"signal": OPEN},
    ),
    # What runs
    Family(
        "stream_adapt_gpu_memory_bytes",
        "gauge",
        "bytes",
        "GPU memory that PyTorch has reserved; not there where the rule runs on the CPU.",
        {"device": OPEN},
    ),
    Family("stream_adapt_model_info", "info", "", "The model that is served.", {"version": OPEN}),
    Family("stream_adapt_model_swaps_total", "counter", "swaps", "Times another model was taken into service."),
    Family(
        "stream_adapt_models_refused_total",
        "counter",
        "refusals",
        "Times an announced model was looked at and not served: missing, damaged, or unfit for the rows.",
        {"reason": tuple(REFUSALS)},
    ),
    Family(
        "stream_adapt_model_outdated",
        "gauge",
        "",
        "1 while another model is announced than the one that is served.",
    ),
    Family(
        "stream_adapt_model_waiting_partitions",
        "gauge",
        "partitions",
        "Partitions that are not read because their rows are of a model that this member does not serve yet.",
    ),
    Family(
        "stream_adapt_build_info",
        "info",
        "",
        "The release, and what it runs on.",
        {"version": OPEN, "python": OPEN, "librdkafka": OPEN},
    ),
)


@dataclass(frozen=True)
class Expression:
    """A PromQL expression that sums over members, and what it says."""

    name: str
    promql: str
    meaning: str


def _selector(which: str | None, *more: str) -> str:
    matchers = [f'which="{which}"', *more] if which else more
    return f"{{{','.join(matchers)}}}[1h]" if matchers else "[1h]"


def _log_loss(which: str | None = None) -> str:
    over = _selector(which)
    return f"""\
sum by (which) (rate(stream_adapt_log_loss_sum{over}))
/ sum by (which) (rate(stream_adapt_log_loss_count{over}))"""


def _auc(which: str | None = None) -> str:
    """Σ over buckets of positives there × (negatives up to there − half of those there), over all pairs."""
    positive, negative = _selector(which, 'target="1"'), _selector(which, 'target="0"')
    return f"""\
sum by (which) (
  sum by (which, bucket) (rate(stream_adapt_bucket_scores_total{positive}))
  * (
    sum by (which, bucket) (
      label_replace(rate(stream_adapt_score_bucket{negative}), "bucket", "$1", "le", "(.+)")
    )
    - sum by (which, bucket) (rate(stream_adapt_bucket_scores_total{negative})) / 2
  )
)
/ sum by (which) (rate(stream_adapt_score_count{positive}))
/ sum by (which) (rate(stream_adapt_score_count{negative}))"""


def _cold_start(which: str) -> str:
    over = _selector(which)
    return f"""\
sum by (nth) (rate(stream_adapt_cold_start_log_loss_sum{over}))
/ sum by (nth) (rate(stream_adapt_cold_start_log_loss_count{over}))"""


def _less(minuend: str, subtrahend: str) -> str:
    return f"sum(\n{minuend}\n)\n- sum(\n{subtrahend}\n)"


#: What to ask Prometheus; `[1h]` is the window. Each adds up over members by itself.
EXPRESSIONS: tuple[Expression, ...] = (
    Expression("log-loss", _log_loss(), "adapted and frozen; less is better"),
    Expression(
        "log-loss lift",
        _less(_log_loss("frozen"), _log_loss("adapted")),
        "what adaptation gains; above 0 or it does harm",
    ),
    Expression("AUC", _auc(), "adapted and frozen, from buckets; within 0.005 of the exact figure"),
    Expression(
        "AUC lift",
        _less(_auc("adapted"), _auc("frozen")),
        "what adaptation gains",
    ),
    Expression(
        "calibration",
        "sum by (which) (rate(stream_adapt_score_sum[1h]))\n"
        '/ sum by (which) (rate(stream_adapt_score_count{target="1"}[1h]))',
        "mean score over mean target: above 1 it promises too much",
    ),
    Expression(
        "calibration error",
        "sum by (which) (abs(\n"
        "  sum by (which, bucket) (rate(stream_adapt_bucket_probability_total[1h]))\n"
        '  - sum by (which, bucket) (rate(stream_adapt_bucket_scores_total{target="1"}[1h]))\n'
        "))\n"
        "/ sum by (which) (rate(stream_adapt_score_count[1h]))",
        "expected calibration error: mean distance between promised and seen share, by bucket",
    ),
    Expression("events per second", "sum(rate(stream_adapt_events_total[1h]))", "input records committed"),
    Expression(
        "dead-letter share",
        "sum(rate(stream_adapt_dead_letters_total[1h])) / sum(rate(stream_adapt_events_total[1h]))",
        "how much of the input is refused",
    ),
    Expression(
        "end-to-end seconds, 99 %",
        "histogram_quantile(0.99, sum by (le) (rate(stream_adapt_end_to_end_seconds_bucket[1h])))",
        "event timestamp to commit",
    ),
    Expression("lag", "sum(stream_adapt_lag_records)", "records waiting"),
    Expression("lag in seconds", "max(stream_adapt_lag_seconds)", "how far the last partition is behind"),
    Expression(
        "cold-start lift",
        _cold_start("frozen") + "\n- " + _cold_start("adapted"),
        "what adaptation gains in log-loss, by which of its user's events",
    ),
    Expression(
        "changelog bytes per event",
        "sum(rate(stream_adapt_changelog_bytes_total[1h])) / sum(rate(stream_adapt_events_total[1h]))",
        "what durable state costs",
    ),
    Expression(
        "seconds per event, by stage",
        "sum by (stage) (rate(stream_adapt_stage_seconds_total[1h]))\n"
        "/ ignoring (stage) group_left () sum(rate(stream_adapt_events_total[1h]))",
        "where the time goes; poll includes waiting",
    ),
)


def auc_from_buckets(negatives: npt.ArrayLike, positives: npt.ArrayLike) -> float:
    """Area under the ROC curve from scores counted in buckets `[n]`, least first; ties within one count half.

    NaN where there are no negatives or no positives.
    """
    negative, positive = np.asarray(negatives, dtype=np.float64), np.asarray(positives, dtype=np.float64)
    pairs = negative.sum() * positive.sum()
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / pairs) if pairs else float("nan")


def calibration_error_from_buckets(
    negatives: npt.ArrayLike, positives: npt.ArrayLike, probabilities: npt.ArrayLike
) -> float:
    """Expected calibration error from buckets `[n]`: counts by target, and the sum of the scores in each.

    NaN where there are no scores.
    """
    positive = np.asarray(positives, dtype=np.float64)
    count = float(np.sum(negatives) + positive.sum())
    return float(np.abs(np.asarray(probabilities) - positive).sum() / count) if count else float("nan")


def reference() -> str:
    """Every family as a Markdown table, and the expressions to ask Prometheus with."""
    lines = ["| metric | type | labels | unit | meaning |", "|---|---|---|---|---|"]
    lines += [f"| `{f.name}` | {f.type} | {_labels_in_words(f)} | {f.unit or '–'} | {f.help} |" for f in FAMILIES]
    for expression in EXPRESSIONS:
        lines += ["", f"**{expression.name}** ({expression.meaning})", "```promql", expression.promql, "```"]
    return "\n".join(lines) + "\n"


def _labels_in_words(family: Family) -> str:
    shown = []
    for label, values in family.labels.items():
        some = "" if values is OPEN else f": {len(values)} values" if len(values) > 5 else f": {', '.join(values)}"
        shown.append(f"`{label}`{some}")
    return "; ".join(shown) or "–"


class Consumer(Protocol):
    """What the metrics look at in the consumer."""

    def lag(self) -> dict[int, int]: ...


#: Samples of the open families: by family name, label values → value.
_OpenSamples = dict[str, dict[tuple[str, ...], float]]


class _Slab:
    """The numbers of every family that is not open, in one flat array."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._starts: dict[str, int] = {}
        self._slots: dict[tuple[str, ...], int] = {}
        end = 0
        for family in families:
            self._starts[family.name] = end
            for combination in family.combinations():
                self._slots[family.name, *combination] = end
                end += family.width
        self.values: Floats = np.zeros(end)

    def add(self, name: str, *labels: str, value: float = 1.0) -> None:
        """Counts one series on; labels in the table's order."""
        self.values[self._slots[name, *labels]] += value

    def put(self, name: str, *labels: str, value: float) -> None:
        """Sets a gauge."""
        self.values[self._slots[name, *labels]] = value

    def slot(self, name: str, *labels: str) -> int:
        """Where the numbers of one series start."""
        return self._slots[name, *labels]

    def view(self, family: Family) -> Floats:
        """A family's numbers `[…, width]`, one axis for each label; writing to it changes them."""
        start = self._starts[family.name]
        shape = (*(len(values) for values in family.labels.values()), family.width)
        return self.values[start : start + int(np.prod(shape))].reshape(shape)


class Metrics(Collector):
    """Counts what the loop does, and exposes it: an observer of the loop and a collector of a registry.

    All methods but `collect` are for the loop's thread.
    """

    _END_TO_END_EDGES = np.array(END_TO_END_EDGES_S)

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_version: str,
        target_level: int,
        tables: Mapping[Kind, Table],
        connections: Connections | None = None,
        refresh: Callable[[], Mapping[str, Mapping[tuple[str, ...], float]]] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Registers every family.

        Args:
            registry: where the families are exposed.
            model_version: version of the model that is served.
            target_level: from this level on the target is 1.
            tables: the rows of users and items.
            connections: what the Kafka clients say.
            refresh: asked for the samples of drift and refresh, by family.
            clock: seconds since the epoch.
        """
        self._clock = clock
        self._connections = connections or Connections()
        self._refresh = refresh
        self._delay = _Delay()
        self._slab = _Slab([family for family in FAMILIES if not family.is_open])
        self._open: _OpenSamples = {family.name: {} for family in FAMILIES if family.is_open}
        self._open["stream_adapt_build_info"] = {_build(): 1.0}
        self._sampled_at = -np.inf
        self._scores = _ScoreCounts(self._slab)
        self._batch_sizes = self._slab.view(_family("stream_adapt_batch_records"))
        self._end_to_end = self._slab.view(_family("stream_adapt_end_to_end_seconds"))
        for name in ("stream_adapt_last_commit_timestamp_seconds", "stream_adapt_last_turn_timestamp_seconds"):
            self._slab.put(name, value=clock())
        self._target_level = target_level
        self._tables = dict(tables)
        self._open["stream_adapt_model_info"] = {(model_version,): 1.0}
        self._sample_rows()
        self._publish()
        registry.register(self)

    # What the loop tells

    def tick(self, consumer: Consumer, shards: Mapping[int, ControlRow]) -> None:
        """A turn of the loop is over."""
        now = self._clock()
        self._slab.put("stream_adapt_last_turn_timestamp_seconds", value=now)
        if abs(now - self._sampled_at) >= SAMPLE_PERIOD_S:
            self._sampled_at = now
            self._sample_rows()
            lags = consumer.lag()
            behind_s = self._delay.seconds(lags, now)
            self._slab.put("stream_adapt_assigned_partitions", value=len(shards))
            self._open["stream_adapt_lag_records"] = {(str(p),): lag for p, lag in lags.items()}
            self._open["stream_adapt_lag_seconds"] = {(str(p),): late for p, late in behind_s.items()}
            self._open["stream_adapt_next_offset"] = {(str(p),): row.next_offset for p, row in shards.items()}
            self._sample_refresh()
            self._open["stream_adapt_gpu_memory_bytes"] = {(device,): b for device, b in _gpu_memory().items()}
        self._publish()

    def stage(self, name: str, seconds: float) -> None:
        """One of `STAGES` took so long; shown from the next tick on."""
        self._slab.add("stream_adapt_stage_seconds_total", name, value=seconds)
        self._slab.add("stream_adapt_stage_runs_total", name)

    def polled(self, records: int) -> None:
        """So many records go into the pipeline; shown from the next tick on."""
        self._slab.add("stream_adapt_polled_records_total", value=records)

    def committed(self, work: Work, outcome: Outcome) -> None:
        """All that a batch led to is visible: only now it counts."""
        now = self._clock()
        scores, records = len(work.batch), work.records
        self._slab.add("stream_adapt_transactions_total", outcome.value)
        self._slab.put("stream_adapt_last_commit_timestamp_seconds", value=now)
        self._slab.add("stream_adapt_events_total", value=records)
        self._slab.add("stream_adapt_scores_total", value=scores - work.withheld)
        self._slab.add("stream_adapt_withheld_scores_total", value=work.withheld)
        self._slab.add("stream_adapt_receipts_total", value=len(work.batch.erasures))
        for reason, count in Counter(letter.reason for letter in work.dead_letters).items():
            self._slab.add("stream_adapt_dead_letters_total", reason, value=count)
        self._batch_sizes[bisect_left(BATCH_EDGES, records)] += 1
        self._batch_sizes[-1] += records
        for block in work.rows:
            self._slab.add("stream_adapt_changelog_records_total", value=len(block))
            self._slab.add("stream_adapt_changelog_bytes_total", value=sum(map(len, filter(None, block.values))))
        if scores:
            self._delay.committed(work.batch)
            self._count_ages(now - work.batch.timestamps_ms * 0.001)
            self._count_flags(work.adapted)
            self._scores.add(work.batch, work.adapted, self._target_level)
        self._publish()

    def aborted(self) -> None:
        """A batch was put back, and will be done again."""
        self._slab.add("stream_adapt_transactions_total", Outcome.ABORTED.value)
        self._publish()

    def rebalanced(self, kind: str, partitions: Collection[int]) -> None:
        """Partitions were `assigned` or `revoked`; the series of revoked ones end at once."""
        self._slab.add("stream_adapt_rebalances_total", kind)
        if kind == "revoked":
            gone = {(str(partition),) for partition in partitions}
            self._delay.forget(partitions)
            for name in _OF_PARTITIONS:
                self._open[name] = {labels: v for labels, v in self._open[name].items() if labels not in gone}
        self._sampled_at = -np.inf
        self._publish()

    def restoring(self, done: Slice) -> None:
        """Changelog records were read, or need not be any more."""
        self._slab.add("stream_adapt_restore_records_total", value=done.records)
        self._slab.add("stream_adapt_restore_seconds_total", value=done.seconds)
        for reason, count in done.refused.items():
            self._slab.add("stream_adapt_rows_refused_total", reason, value=count)
        self._open["stream_adapt_restore_remaining_records"] = {(str(p),): n for p, n in done.remaining.items()}
        self._publish()

    def following(self, standing: Standing, waiting: Mapping[int, str]) -> None:
        """Another model is served, announced or refused; partitions wait for one."""
        self._open["stream_adapt_model_info"] = {(standing.served,): 1.0}
        self._slab.put("stream_adapt_model_swaps_total", value=standing.swaps)
        for reason, count in standing.refusals.items():
            self._slab.put("stream_adapt_models_refused_total", reason, value=count)
        self._slab.put("stream_adapt_model_outdated", value=float(standing.announced is not None))
        self._slab.put("stream_adapt_model_waiting_partitions", value=len(waiting))
        self._publish()

    # What a scrape reads, in whatever thread

    def collect(self) -> Iterator[Metric]:
        """Every family, as of the last publication; but connections as of now, when a loop that waits for a broker
        publishes nothing.
        """
        values, open_samples = self._published
        values = values.copy()
        values[self._slab.slot("stream_adapt_unreachable_seconds")] = self._connections.unreachable_s
        for kind, count in self._connections.errors.items():
            values[self._slab.slot("stream_adapt_client_errors_total", kind)] = count
        for family in FAMILIES:
            samples = open_samples[family.name].items() if family.is_open else self._read(family, values)
            metric = family.metric()
            for labels, numbers in samples:
                _ADD[family.type](metric, family, labels, numbers)
            yield metric

    def _read(self, family: Family, values: Floats) -> Iterator[tuple[tuple[str, ...], Floats]]:
        for labels in family.combinations():
            start = self._slab.slot(family.name, *labels)
            yield labels, values[start : start + family.width]

    def _publish(self) -> None:
        self._published = (self._slab.values.copy(), self._open.copy())

    def _sample_rows(self) -> None:
        for kind, table in self._tables.items():
            label = kind.name.lower()
            self._slab.put("stream_adapt_rows", label, value=len(table))
            self._slab.put("stream_adapt_slab_bytes", label, value=table.slab_bytes)
            self._slab.put("stream_adapt_index_bytes", label, value=table.index_bytes)
            self._slab.put("stream_adapt_expired_rows_total", label, value=table.expired)

    def _sample_refresh(self) -> None:
        for name, samples in self._refresh().items():
            if name in self._open:
                self._open[name] = dict(samples)
            else:
                self._slab.put(name, value=samples[()])

    def _count_ages(self, ages_s: npt.NDArray[np.floating[Any]]) -> None:
        """Ages `[n]` of events at their commit; a clock that is behind the producer's makes none negative."""
        ages_s = np.maximum(ages_s, 0.0)
        buckets = np.searchsorted(self._END_TO_END_EDGES, ages_s)  # an age at an edge belongs below it
        self._end_to_end[:-1] += np.bincount(buckets, minlength=len(END_TO_END_EDGES_S) + 1)
        self._end_to_end[-1] += ages_s.sum()

    def _count_flags(self, adapted: Adapted) -> None:
        if not adapted.flags.any():
            return
        for flag in Flag:
            count = int(np.count_nonzero(adapted.flags & flag.value))
            self._slab.add("stream_adapt_flagged_scores_total", str(flag.name).lower(), value=count)


class _Delay:
    """How far behind partitions are, in seconds."""

    def __init__(self) -> None:
        self._latest_ms: Longs = np.zeros(0, dtype=np.int64)  # by partition: of the last committed event; 0: none
        self._nothing_waited_s: dict[int, float] = {}  # by partition, when that was last seen

    def committed(self, batch: Batch) -> None:
        """These events are done."""
        most = int(batch.partitions.max())
        if most >= len(self._latest_ms):
            self._latest_ms = np.append(self._latest_ms, np.zeros(most + 1 - len(self._latest_ms), dtype=np.int64))
        self._latest_ms[batch.partitions] = batch.timestamps_ms  # of several the last one stays

    def forget(self, partitions: Collection[int]) -> None:
        """Another member has these now."""
        for partition in partitions:
            self._nothing_waited_s.pop(partition, None)
            if partition < len(self._latest_ms):
                self._latest_ms[partition] = 0

    def seconds(self, lags: Mapping[int, int], now_s: float) -> dict[int, float]:
        """By partition; those of which nothing is known yet are not among them."""
        self._nothing_waited_s |= {partition: now_s for partition, lag in lags.items() if not lag}
        known = {p: float(ms) * 0.001 for p in lags if p < len(self._latest_ms) and (ms := self._latest_ms[p])}
        since = {p: max(known.get(p, -np.inf), self._nothing_waited_s.get(p, -np.inf)) for p in lags}
        return {p: max(now_s - then, 0.0) if lags[p] else 0.0 for p, then in since.items() if then > -np.inf}


class _ScoreCounts:
    """How good the scores of events with a target are: log-loss, and counts by bucket."""

    #: Every edge is a multiple of 1/_GRID, so that a score's bucket is found by looking it up, and not by searching.
    _GRID = 10_000
    _BUCKET = np.searchsorted(SCORE_EDGES, np.arange(_GRID + 1) / _GRID - 1e-9)
    #: By which of its user's events one is, up to the first of the last bucket: its bucket.
    _NTH = np.maximum(np.searchsorted([*COLD_START], np.arange(max(COLD_START) + 1), side="right") - 1, 0)

    def __init__(self, slab: _Slab) -> None:
        self._histogram = slab.view(_family("stream_adapt_score"))
        self._counts = slab.view(_family("stream_adapt_bucket_scores_total"))
        self._probability = slab.view(_family("stream_adapt_bucket_probability_total"))
        self._log_loss = slab.view(_family("stream_adapt_log_loss"))
        self._cold_start = slab.view(_family("stream_adapt_cold_start_log_loss"))
        self._change = slab.view(_family("stream_adapt_score_change"))

    def add(self, batch: Batch, adapted: Adapted, target_level: int) -> None:
        """Counts n events; those without a level have no target and are left out."""
        levels, nth = batch.levels, adapted.adaptations
        score, frozen, updated = adapted.score, adapted.frozen_score, adapted.updated_score
        usable = (levels != NO_LEVEL) & np.isfinite(score) & np.isfinite(frozen)
        if not usable.all():
            levels, nth, score, frozen, updated = (c[usable] for c in (levels, nth, score, frozen, updated))
        target = levels >= target_level
        nth = self._NTH.take(nth, mode="clip")
        for which, column in enumerate((score, frozen)):
            self._add_column(which, column, target, nth)
        self._change += (len(score), np.nansum(np.abs(updated - score)))

    def _add_column(self, which: int, score: Floats, target: npt.NDArray[np.bool_], nth: Longs) -> None:
        buckets = len(SCORE_BUCKETS)
        # Less a little, because 0.29 × 10,000 is more than 2,900: a score at an edge belongs below it.
        bucket = self._BUCKET.take(np.ceil(score * self._GRID - 1e-6).astype(np.int64), mode="clip")
        bucket += buckets * target
        counts = np.bincount(bucket, minlength=2 * buckets).reshape(2, buckets)
        sums = np.bincount(bucket, score, 2 * buckets).reshape(2, buckets)
        self._counts[which, :, :, 0] += counts
        self._histogram[which, :, :-1] += counts
        self._histogram[which, :, -1] += sums.sum(axis=1)
        self._probability[which, :, 0] += sums.sum(axis=0)
        of_what_happened = np.where(target, score, 1.0 - score)
        log_loss = -np.log(np.maximum(of_what_happened, _PROBABILITY_FLOOR))
        self._log_loss[which] += (len(score), log_loss.sum())
        self._cold_start[which, :, 0] += np.bincount(nth, minlength=len(COLD_START))
        self._cold_start[which, :, 1] += np.bincount(nth, log_loss, len(COLD_START))


def _add_histogram(metric: HistogramMetricFamily, family: Family, labels: Iterable[str], numbers: Floats) -> None:
    bounds = (_bound(edge) for edge in (*family.edges, np.inf))
    cumulative = np.cumsum(numbers[:-1]).tolist()
    metric.add_metric(list(labels), list(zip(bounds, cumulative, strict=True)), sum_value=float(numbers[-1]))


def _add_summary(metric: SummaryMetricFamily, _: Family, labels: Iterable[str], numbers: Floats) -> None:
    metric.add_metric(list(labels), count_value=numbers[0], sum_value=float(numbers[1]))


def _add_info(metric: InfoMetricFamily, family: Family, labels: Iterable[str], _: float) -> None:
    metric.add_metric([], dict(zip(family.labels, labels, strict=True)))


def _add_number(metric: CounterMetricFamily | GaugeMetricFamily, _: Family, labels: Iterable[str], value: Any) -> None:
    metric.add_metric(list(labels), float(np.squeeze(value)))


#: How a series of each type joins its family.
_ADD: Mapping[FamilyType, Callable[..., None]] = {
    "counter": _add_number,
    "gauge": _add_number,
    "histogram": _add_histogram,
    "summary": _add_summary,
    "info": _add_info,
}


def _gpu_memory() -> dict[str, float]:
    """Bytes that PyTorch has reserved, by device; importing it only for this would take seconds."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {str(device): float(torch.cuda.memory_reserved(device)) for device in range(torch.cuda.device_count())}


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def _build() -> tuple[str, str, str]:
    """Release, Python, librdkafka."""
    try:
        release = importlib.metadata.version("stream-adapt")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        release = "unknown"
    return release, platform.python_version(), confluent_kafka.libversion()[0]
