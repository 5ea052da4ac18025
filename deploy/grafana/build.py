"""The dashboard, as Grafana is given it: `python deploy/grafana/build.py` writes dashboards/stream-adapt.json.

Expressions are those of `stream_adapt.metrics.EXPRESSIONS` where there is one. `$job` chooses the application, and
`$window` is the time that figures of quality are taken over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
)

from stream_adapt.metrics import EXPRESSIONS

FILE = Path(__file__).parent / "dashboards" / "stream-adapt.json"
UID = "stream-adapt"
_SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
_WIDTH, _HEIGHT = 8, 8
_QUALITY = {expression.name: expression.promql for expression in EXPRESSIONS}


@dataclass(frozen=True)
class Query:
    """An expression and what its series are called; `instance` and others in double braces."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Graph:
    """One panel: a graph over time or, with `number`, the last value large; red from `alarm` on.

    `alerts` are those that lead here: their annotation `dashboard` shows this panel.
    """

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    number: bool = False
    alarm: float | None = None
    alerts: tuple[str, ...] = ()


def quality(name: str) -> str:
    """One of the metrics' own expressions, over `$window`."""
    return _QUALITY[name].replace("[1h]", "[$window]")


def speed(name: str) -> str:
    """One of the metrics' own expressions, over as little time as the resolution allows."""
    return _QUALITY[name].replace("[1h]", "[$__rate_interval]")


def of_job(promql: str) -> str:
    """The expression for the chosen application alone: every metric gets a matcher of `job`."""

    def chosen(found: re.Match[str]) -> str:
        name, more = found.groups()
        return f'{name}{{job=~"$job"' + (", " if more else "}")

    return re.sub(r"\b((?:stream_adapt|process)_\w+)(\{)?", chosen, promql)


def rate(counter: str, by: str = "") -> str:
    """A counter a second, summed over members."""
    return f"sum{f' by ({by})' if by else ''} (rate({counter}[$__rate_interval]))"


ROWS: dict[str, tuple[Graph, ...]] = {
    "Is it healthy": (
        Graph("Members that answer", "short", "Of all that Prometheus knows.",
              (Query('sum(up{job=~"$job"})', "up"), Query('count(up{job=~"$job"})', "known")), number=True,
              alerts=("Absent", "Down")),
        Graph("Alerts that fire", "short", "Each has its section in the README.",
              (Query('count(ALERTS{alertname=~"StreamAdapt.*", alertstate="firing"}) or vector(0)', "firing"),),
              number=True, alarm=1),
        Graph("Since the loop's last turn", "s", "What /healthz judges by: it grows where the loop stands still.",
              (Query("time() - max by (instance) (stream_adapt_last_turn_timestamp_seconds)", "{{instance}}"),),
              alerts=("Stalled",)),
        Graph("Without any broker", "s", "How long no broker has been connected.",
              (Query("max by (instance) (stream_adapt_unreachable_seconds)", "{{instance}}"),),
              alerts=("BrokerUnreachable",)),
        Graph("Transactions a second", "ops", "By outcome. Aborted ones are done again.",
              (Query(rate("stream_adapt_transactions_total", "outcome"), "{{outcome}}"),), alerts=("Aborting",)),
        Graph("Kafka client errors a second", "ops", "By kind; the log has them with broker and reason.",
              (Query(rate("stream_adapt_client_errors_total", "kind"), "{{kind}}"),), alerts=("Fenced",)),
        Graph("Dead letters a second", "ops", "By reason. `stream-adapt dead-letters list` shows them.",
              (Query(rate("stream_adapt_dead_letters_total", "reason") + " > 0", "{{reason}}"),
               Query(rate("stream_adapt_dead_letters_total"), "all")), alerts=("DeadLetters",)),
        Graph("Rebalances", "short", "Partitions given and taken, by member, over $window.",
              (Query("sum by (instance, kind) (increase(stream_adapt_rebalances_total[$window]))",
                     "{{instance}} {{kind}}"),)),
        Graph("Rows to be restored", "short", "Changelog offsets that are still to be read, by member.",
              (Query("sum by (instance) (stream_adapt_restore_remaining_records)", "{{instance}}"),),
              alerts=("RestoreStalled",)),
    ),
    "Is it keeping up": (
        Graph("Events a second", "ops",
              "Committed, and read: what is read and not committed is done again. Without a score: of before "
              "output.emit_from.",
              (Query(speed("events per second"), "committed"),
               Query(rate("stream_adapt_polled_records_total"), "read"),
               Query(rate("stream_adapt_withheld_scores_total"), "committed without a score"))),
        Graph("Lag in records", "short", "By partition.",
              (Query("max by (partition) (stream_adapt_lag_records)", "{{partition}}"),), alerts=("NotProgressing",)),
        Graph("Lag in seconds", "s", "By partition: age of the last committed event while others wait.",
              (Query("max by (partition) (stream_adapt_lag_seconds)", "{{partition}}"),), alerts=("Lag",)),
        Graph("From event to commit", "s", "Quantiles; they mean little while old events are replayed.",
              tuple(Query(speed("end-to-end seconds, 99 %").replace("0.99", q), f"{float(q):.0%}")
                    for q in ("0.5", "0.95", "0.99"))),
        Graph("Size of batches", "short", "Large under load, small when there is little to do.",
              (Query("histogram_quantile(0.5, sum by (le) (rate(stream_adapt_batch_records_bucket[$__rate_interval])))",
                     "half are below"),
               Query(f"{rate('stream_adapt_batch_records_sum')} / {rate('stream_adapt_batch_records_count')}",
                     "mean"))),
        Graph("Seconds an event, by stage", "s", "poll includes waiting.",
              (Query(speed("seconds per event, by stage"), "{{stage}}"),)),
    ),
    "Is it learning": (
        Graph("Log-loss", "none", "Less is better. frozen: the same model without adaptation.",
              (Query(quality("log-loss"), "{{which}}"),)),
        Graph("Lift", "none", "Log-loss, frozen less adapted: below 0 adaptation does harm.",
              (Query(quality("log-loss lift"), "lift"),), alerts=("NoLift",)),
        Graph("AUC", "none", "From histograms of scores that add up over members; good to 0.005.",
              (Query(quality("AUC"), "{{which}}"), Query(quality("AUC lift"), "lift"))),
        Graph("Lift by which of its user's events", "none", "What adaptation gains a newcomer, and how soon.",
              (Query(quality("cold-start lift"), "event {{nth}}"),)),
        Graph("Calibration", "none", "Mean score over mean target: above 1 it promises too much.",
              (Query(quality("calibration"), "{{which}}"),)),
        Graph("Calibration error", "none", "Expected calibration error, by bucket.",
              (Query(quality("calibration error"), "{{which}}"),)),
        Graph("How far an event moves its own score", "percentunit", "Mean, up or down.",
              (Query("sum(rate(stream_adapt_score_change_sum[$window]))"
                     " / sum(rate(stream_adapt_score_change_count[$window]))", "change"),)),
        Graph("Flags a second", "ops", "nan_undone: updates that were not finite, and were undone.",
              (Query(rate("stream_adapt_flagged_scores_total", "flag"), "{{flag}}"),), alerts=("NotFinite",)),
    ),
    "Is the world moving": (
        Graph("Drift", "none", "Mean of each signal over the last groups of events, and what it was in the reference.",
              (Query("max by (signal, domain) (stream_adapt_drift_statistic)", "{{signal}} {{domain}}"),
               Query("max by (signal, domain) (stream_adapt_drift_reference)", "{{signal}} {{domain}}, reference"))),
        Graph("Since the last drift alarm", "s", "By signal, as the one who leads saw it.",
              (Query("time() - max by (signal) (stream_adapt_drift_alarm_timestamp_seconds)", "{{signal}}"),),
              alerts=("ModelStale",)),
        Graph("State of the refresh", "s", "Which one it is in, and for how long.",
              (Query("time() - max by (state) (stream_adapt_refresh_state_timestamp_seconds)", "{{state}}"),)),
        Graph("Since the last refresh ended", "s", "By how it ended. `stream-adapt models show` says why.",
              (Query("time() - max by (outcome) (stream_adapt_refresh_decision_timestamp_seconds)", "{{outcome}}"),),
              alerts=("RefreshFailed",)),
        Graph("Since the refresh told where it is", "s", "It does so every two seconds while somebody leads.",
              (Query("time() - max(stream_adapt_refresh_told_timestamp_seconds > 0)", "told"),
               Query("sum(stream_adapt_refresh_leader)", "leaders")), alerts=("RefreshSilent",)),
        Graph("Models taken into service", "short", "By member, over $window.",
              (Query("sum by (instance) (increase(stream_adapt_model_swaps_total[$window]))", "{{instance}}"),)),
        Graph("Models served", "short", "Members by version of the model.",
              (Query("count by (version) (stream_adapt_model_info)", "{{version}}"),), alerts=("VersionsDiffer",)),
        Graph("Models not served", "short",
              "Members to which another model is announced; looks at it that failed, over $window.",
              (Query("sum by (instance) (stream_adapt_model_outdated)", "{{instance}}"),
               Query("sum by (reason) (increase(stream_adapt_models_refused_total[$window]))", "{{reason}}")),
              alerts=("ModelOutdated",)),
    ),
    "What is it made of": (
        Graph("Releases", "short", "Members by release, Python and librdkafka.",
              (Query("count by (version, python, librdkafka) (stream_adapt_build_info)",
                     "{{version}}, Python {{python}}, librdkafka {{librdkafka}}"),)),
        Graph("Partitions", "short", "By member.",
              (Query("sum by (instance) (stream_adapt_assigned_partitions)", "{{instance}}"),)),
        Graph("Rows", "short", "Of users and items; and those dropped because they were idle, over $window.",
              (Query("sum by (kind) (stream_adapt_rows)", "{{kind}}"),
               Query("sum by (kind) (increase(stream_adapt_expired_rows_total[$window]))", "{{kind}}, expired"))),
        Graph("Memory", "bytes", "Of the process; of rows and index, which may lie in state.dir; of the GPU.",
              (Query("sum by (instance) (process_resident_memory_bytes)", "{{instance}}"),
               Query("sum by (instance) (stream_adapt_slab_bytes + stream_adapt_index_bytes)", "{{instance}}, rows"),
               Query("sum by (instance) (stream_adapt_gpu_memory_bytes)", "{{instance}}, GPU"))),
        Graph("Processor", "short", "Cores in use, by member.",
              (Query("sum by (instance) (rate(process_cpu_seconds_total[$__rate_interval]))", "{{instance}}"),)),
        Graph("Changelog", "Bps", "Bytes a second of rows that changed, before compression.",
              (Query(rate("stream_adapt_changelog_bytes_total", "instance"), "{{instance}}"),)),
        Graph("Restoring", "ops", "Changelog records read a second, by member.",
              (Query(rate("stream_adapt_restore_records_total", "instance"), "{{instance}}"),)),
        Graph("Rows refused", "short", "Damaged changelog records left out since each member's start.",
              (Query("sum by (instance, reason) (stream_adapt_rows_refused_total)", "{{instance}} {{reason}}"),),
              alerts=("RowsRefused",)),
    ),
}  # fmt: skip


def built() -> str:
    """The dashboard as JSON."""
    board = (
        dashboard.Dashboard("stream-adapt")
        .uid(UID)
        .tags(["stream-adapt", "kafka"])
        .time("now-3h", "now")
        .refresh("30s")
        .readonly()
        .link(_link("Alerts", "/alerting/list?search=StreamAdapt"))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("job")
            .label("Application")
            .datasource(_SOURCE)
            .query("label_values(stream_adapt_build_info, job)")
            .multi(True)
            .include_all(True)
            .current(VariableOption(text="All", value="$__all", selected=True))
        )
        .with_variable(
            dashboard.CustomVariable("window")
            .label("Quality over")
            .values("5m,15m,1h,6h,1d")
            .current(VariableOption(text="1h", value="1h", selected=True))
        )
    )
    for number, one in numbered():
        if isinstance(one, str):
            board = board.with_row(dashboard.Row(one).id(number))
        else:
            board = board.with_panel(_panel(one).id(number))
    return str(JSONEncoder(sort_keys=True, indent=2).encode(board.build())) + "\n"


def numbered() -> Iterator[tuple[int, str | Graph]]:
    """Rows, by title, and panels in their order, with their ids."""
    yield from enumerate(chain.from_iterable((title, *graphs) for title, graphs in ROWS.items()), 1)


def links() -> dict[str, str]:
    """Alert → where it is seen: the annotation `dashboard` of its rule."""
    return {
        f"StreamAdapt{alert}": f"/d/{UID}?viewPanel={number}"
        for number, one in numbered()
        if isinstance(one, Graph)
        for alert in one.alerts
    }


def _link(title: str, url: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).type(DashboardLinkType.LINK).url(url)


def _panel(graph: Graph) -> stat.Panel | timeseries.Panel:
    panel = _last_value() if graph.number else _lines()
    panel = panel.title(graph.title).description(graph.description).unit(graph.unit).datasource(_SOURCE)
    panel = panel.span(_WIDTH).height(_HEIGHT).thresholds(_thresholds(graph.alarm))
    for name, query in zip(ascii_uppercase, graph.queries, strict=False):
        target = prometheus.Dataquery().ref_id(name).expr(of_job(query.expr)).legend_format(query.legend).range()
        panel = panel.with_target(target)
    return panel


def _last_value() -> stat.Panel:
    return stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _lines() -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).display_mode(models.LegendDisplayMode.LIST)
    legend = legend.placement(models.LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI)
    return timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).fill_opacity(8)


def _thresholds(alarm: float | None) -> dashboard.ThresholdsConfig:
    steps = [Threshold(value=None, color="green")]
    if alarm is not None:
        steps.append(Threshold(value=alarm, color="red"))
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


if __name__ == "__main__":
    FILE.write_text(built(), encoding="utf-8")
