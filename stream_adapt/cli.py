"""The command line. Every command has `--json`: one object on stdout, everything else on stderr.

Exit codes: 0 done · 1 bug · 2 usage or configuration · 3 refused by Kafka · 4 fenced by another instance ·
5 state and offsets disagree · 6 too much of the input is refused.
Heavy packages (torch, numba, matplotlib) are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec
import structlog

from stream_adapt import __version__
from stream_adapt.errors import KafkaRefused, StreamAdaptError

if TYPE_CHECKING:
    from stream_adapt.config import Config
    from stream_adapt.repair import Plan

#: As in `meta.objective`, which would import torch.
OBJECTIVES = ("prequential", "maml", "fomaml", "reptile")

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

_config_option = click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML configuration; without it, defaults and STREAM_ADAPT_… variables.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="stream-adapt")
def cli() -> None:
    """Personalises scores while users act: a Kafka consumer with per-user fast weights, exactly once.

    \b
    First steps:
      stream-adapt demo                          everything at once, on data of real users
      stream-adapt pretrain movielens-100k       learn the slow weights, write a model
      stream-adapt broker                        a real Apache Kafka in the foreground
      stream-adapt topics create -c FILE         the topics the loop needs
      stream-adapt run -c FILE                   the loop
    """


@cli.command()
@_config_option
@click.option("--stop-after", type=click.IntRange(min=1), help="Stop after so many events are committed.")
@_json_option
def run(config_path: Path | None, stop_after: int | None, as_json: bool) -> None:
    """Run a member of the consumer group: score, adapt and commit until SIGTERM or Ctrl-C.

    The first signal finishes the batch, commits and leaves the group; a second one aborts and exits. With
    `delivery: exactly_once` scores, dead letters and offsets become visible in one Kafka transaction.
    """
    from stream_adapt.shutdown import Shutdown, StopAtOnce

    shutdown = Shutdown()
    try:
        with shutdown.installed():  # from here on: what is imported below takes seconds
            from stream_adapt import service

            _print(service.run(_settings(config_path), shutdown, stop_after), as_json)
    except StopAtOnce:
        from stream_adapt import logs

        logs.note("stopped at once; what is not committed will be done again")
        sys.exit(128 + shutdown.signals[-1])


@cli.command()
@_config_option
@click.option("--follow", is_flag=True, help="Stay, and refresh whenever drift is detected or it is time to.")
@click.option("--reason", default="", help="Is kept with the decision.")
@_json_option
def refresh(config_path: Path | None, follow: bool, reason: str, as_json: bool) -> None:
    """Train a challenger on the newest events, compare it with the champion, and promote it if it is better.

    Waits until it is decided, and has been watched in service: that takes events. Where a controller runs already, it
    does the work, and this command only asks. Stopped earlier, it leaves the refresh where it is to the next
    controller. The champion serves all the time.
    """
    from stream_adapt.shutdown import Shutdown, StopAtOnce

    shutdown = Shutdown()
    try:
        with shutdown.installed():
            from stream_adapt.refresh.controller import Controller
            from stream_adapt.refresh.once import refresh_once

            settings = _settings(config_path)
            if follow:
                Controller(settings).run(shutdown)
                return
            found = refresh_once(settings, shutdown, reason, lambda s: click.echo(f"{s.state}", err=True))
    except StopAtOnce:
        sys.exit(128 + shutdown.signals[-1])
    _print(found, as_json)
    if not as_json:
        decided = found.decision
        click.echo(f"{decided.outcome}: {decided.reason}" if decided else f"not decided yet: {found.state}")
        click.echo(f"champion: {found.champion}")


@cli.command("check-config")
@_config_option
@_json_option
def check_config(config_path: Path | None, as_json: bool) -> None:
    """Show every setting in force, its value and where it came from; secrets are hidden.

    Environment variables named STREAM_ADAPT_<SECTION>_<KEY> override the file. Nothing is connected to.
    """
    from stream_adapt import config

    loaded = config.load(config_path)
    if any(key.startswith("drift.") for key in loaded.sources):  # River takes seconds to import
        from stream_adapt.drift import DriftMonitor

        DriftMonitor(loaded.config.drift)
    rows = list(config.effective(loaded))
    if as_json:
        _print({key: {"value": value, "source": source} for key, value, source in rows}, as_json)
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, source in rows:
        click.echo(f"{key:<{width}}  {value!s:<40}  {source}")


@cli.group()
def topics() -> None:
    """The topics of an application."""


@topics.command("create")
@_config_option
@_json_option
def topics_create(config_path: Path | None, as_json: bool) -> None:
    """Create the topics that the loop needs; those that are there already are left as they are.

    Names come from `app.name` or `topics:`, counts from `topics.partitions` and `topics.replication`. Partitions
    are the unit of scale: at most that many members share the work. Choose generously, they cannot be taken back.
    """
    from stream_adapt.kafka import properties
    from stream_adapt.kafka.topics import create_topics
    from stream_adapt.service import topic_specs

    settings = _settings(config_path)
    outcomes = create_topics(properties.common(settings), topic_specs(settings))
    if as_json:
        found = {o.spec.name: {"status": str(o.status), "partitions": o.partitions} for o in outcomes}
        _print(found, as_json)
    for outcome in outcomes:
        click.echo(str(outcome), err=as_json)
    if not all(outcome.ok for outcome in outcomes):
        sys.exit(KafkaRefused.exit_code)


@topics.command("check")
@_config_option
@_json_option
def topics_check(config_path: Path | None, as_json: bool) -> None:
    """Look at what is on Kafka's side, and say what is not as it should be: topics, settings, permissions, features.

    Changes nothing, and disturbs no member. Each line is ok, a warning or an error, with what to do. Exit code 3 if
    anything is an error. Permissions on transactional ids are not told by brokers: a member finds out when it starts.
    """
    from stream_adapt.kafka.audit import audit
    from stream_adapt.service import topic_specs

    settings = _settings(config_path)
    findings = audit(settings, topic_specs(settings))
    ok = not any(finding.level == "error" for finding in findings)
    _print({"ok": ok, "findings": findings}, as_json)
    for finding in findings:
        click.echo(str(finding), err=as_json)
    if not ok:
        sys.exit(KafkaRefused.exit_code)


@cli.group()
def state() -> None:
    """What members have learned: the rows of users and items."""


_yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@state.command("reset")
@_config_option
@click.option("--partition", "partitions", multiple=True, type=click.IntRange(min=0), help="A shard; all if not given.")
@_yes_option
@_json_option
def state_reset(config_path: Path | None, partitions: tuple[int, ...], yes: bool, as_json: bool) -> None:
    """Forget the rows of some shards: their users and items start anew from the group's committed offsets on.

    Writes a tombstone for every row and a control row at the committed offset, one transaction a shard. Stop all
    members first.
    """
    from stream_adapt import repair

    _carry_out(repair.plan_reset(_settings(config_path), partitions), yes, as_json)


@state.command("accept-offset")
@_config_option
@click.option(
    "--use",
    required=True,
    type=click.Choice(["group", "rows"]),
    help="group: keep the rows, go on at the group's offset. rows: the group goes on where the rows stand.",
)
@_yes_option
@_json_option
def state_accept_offset(config_path: Path | None, use: Literal["group", "rows"], yes: bool, as_json: bool) -> None:
    """Declare that rows and the group's committed offsets belong together.

    With group, events between the two are learned twice, or not at all. With rows, nothing is lost or learned twice,
    as long as the input still holds it; scores in between are written again. Stop all members first.
    """
    from stream_adapt import repair

    _carry_out(repair.plan_accept_offset(_settings(config_path), use), yes, as_json)


def _carry_out(plan: Plan, yes: bool, as_json: bool) -> None:
    for change in plan.changes:
        click.echo(str(change), err=as_json)
    if not yes:
        click.confirm("Do it?", abort=True, err=True)
    plan.apply()
    _print({"changes": plan.changes}, as_json)


@state.command("show")
@click.argument("user")
@_config_option
@_json_option
def state_show(user: str, config_path: Path | None, as_json: bool) -> None:
    """Show what is known of USER: events learned, fast weights, the last events, and what scores are made of.

    Reads the whole changelog, as far as it is committed; members may run. A user whom no partition knows is an answer,
    too: no rows, exit code 0. Item names come from the shard's items, levels and priors from the model.
    """
    from rich.console import Console

    from stream_adapt import inspection

    with _reading() as progress:
        shown = inspection.show(_settings(config_path), user, progress)
    _print(shown, as_json)
    if not as_json:
        Console().print(inspection.tables(shown))


@state.command("export")
@_config_option
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet file; replaced if there."
)
@click.option("--kind", default="users", show_default=True, type=click.Choice(["users", "items"]), help="Whose rows.")
@_json_option
def state_export(config_path: Path | None, out: Path, kind: Literal["users", "items"], as_json: bool) -> None:
    """Write the rows of all users, or items, to a Parquet file. Needs the extra `export`.

    One line for each partition that has a row of the user or item; members may run. Ids stand in it as they are: mind
    who gets the file.
    """
    from stream_adapt.export import export

    with _reading() as progress:
        exported = export(_settings(config_path), out, kind, progress)
    _print(exported, as_json)
    if not as_json:
        click.echo(f"{exported.rows:,} {kind} in {exported.file}, {exported.bytes:,} bytes")


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by offsets read and offsets in all."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the changelog", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@state.command("erase")
@click.argument("user")
@_config_option
@click.option("--wait", is_flag=True, help="Wait for the receipt of every partition.")
@click.option("--timeout", default=60.0, show_default=True, help="Longest wait, in seconds.")
@_json_option
def state_erase(user: str, config_path: Path | None, wait: bool, timeout: float, as_json: bool) -> None:
    """Erase the row of USER: a request to every input partition, in the order of its records.

    What the user's events before the request taught is dropped; events after it start a new row. Receipts go to the
    scores topic. The input log, dead letters, scores and what was learned about items are not touched: see the README.
    """
    from stream_adapt.erasure import erase

    def tell(erased: Any) -> None:
        click.echo(f"receipts: {len(erased.receipts)} of {len(erased.partitions)} partitions", err=True)

    erased = erase(_settings(config_path), user, timeout if wait else None, tell)
    _print(erased, as_json)
    if not as_json:
        click.echo(f"{erased.event_id} is written to {len(erased.partitions)} partitions")
        if wait:
            click.echo(f"all of them have given their receipt; a row was in {erased.had_row or 'none'}")


@cli.group()
def models() -> None:
    """Versions of the slow weights, and which one is served."""


_reason_for = click.option("--reason", required=True, help="Why; kept with the announcement.")


@models.command("list")
@_config_option
@_json_option
def models_list(config_path: Path | None, as_json: bool) -> None:
    """Show every version in the registry of `model.path`, and which one is served: a star."""
    from rich.console import Console

    from stream_adapt import promotion

    found = promotion.listed(_settings(config_path))
    _print({"versions": found}, as_json)
    if not as_json:
        Console().print(promotion.list_table(found))


@models.command("show")
@click.argument("version", required=False, metavar="[VERSION]")
@_config_option
@_json_option
def models_show(version: str | None, config_path: Path | None, as_json: bool) -> None:
    """Show where VERSION came from, its figures, and what was decided about it; the one that is served if not given."""
    from rich.console import Console

    from stream_adapt import promotion

    found = promotion.shown(_settings(config_path), version)
    _print(found, as_json)
    if not as_json:
        Console().print(promotion.show_table(found))


@models.command("promote")
@click.argument("version")
@_config_option
@_reason_for
@click.option(
    "--rows",
    type=click.Choice(["carry", "restart_items"]),
    help="What becomes of rows; as the version's manifest says, or else carry. Users' rows are always carried.",
)
@_json_option
def models_promote(
    version: str,
    config_path: Path | None,
    reason: str,
    rows: Literal["carry", "restart_items"] | None,
    as_json: bool,
) -> None:
    """Announce VERSION: every member that follows the models topic serves it within seconds, between two batches.

    It is read and checked first, also against the version that is served. A member that lacks the file says so on
    /readyz and looks for it; one that finds it damaged or unfit goes on with what it serves.
    """
    from stream_adapt import promotion

    _told(promotion.promote(_settings(config_path), version, reason, rows), as_json)


@models.command("rollback")
@_config_option
@_reason_for
@_json_option
def models_rollback(config_path: Path | None, reason: str, as_json: bool) -> None:
    """Announce the version that was served before the present one; rows go back the way they came."""
    from stream_adapt import promotion

    _told(promotion.rollback(_settings(config_path), reason), as_json)


def _told(promoted: Any, as_json: bool) -> None:
    _print(promoted, as_json)
    if not as_json:
        one = promoted.announcement
        click.echo(f"{one.version} is announced on {promoted.topic}, in the place of {one.previous}; rows: {one.rows}")


@cli.group("dead-letters")
def dead_letters() -> None:
    """Records that were refused."""


_reason_option = click.option("--reason", "reasons", multiple=True, help="Only of this reason; may be given again.")


@dead_letters.command("list")
@_config_option
@_reason_option
@click.option("--since", help="Only those written since: 45s, 30m, 2h, 7d ago, or a time in ISO 8601.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Show the newest so many.")
@_json_option
def dead_letters_list(
    config_path: Path | None, reasons: tuple[str, ...], since: str | None, limit: int, as_json: bool
) -> None:
    """Show refused records: the reason, where each came from, and the beginning of its payload.

    Whatever is not printable is shown as an escape. Keys are user ids: mind who sees the output.
    """
    from datetime import UTC, datetime

    from rich.console import Console

    from stream_adapt import dead_letters as letters

    since_ms = letters.since_ms(since, datetime.now(UTC)) if since else None
    found = letters.list_letters(_settings(config_path), letters.Filter(reasons), since_ms, limit)
    _print(found, as_json)
    if not as_json:
        Console().print(letters.table(found))


@dead_letters.command("replay")
@_config_option
@_reason_option
@click.option("--offset", "offsets", multiple=True, help="Only this one: [PARTITION:]OFFSET of the dead-letters topic.")
@click.option("--from-beginning", is_flag=True, help="Also those that were replayed before.")
@click.option("--dry-run", is_flag=True, help="Say what would be replayed, and write nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json_option
def dead_letters_replay(
    config_path: Path | None,
    reasons: tuple[str, ...],
    offsets: tuple[str, ...],
    from_beginning: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Write refused records to the input again, each once: after the cause is mended.

    Key, bytes and headers are the original ones, and so is the partition; the header stream-adapt.replays counts. What
    was replayed is remembered in Kafka, in the same transaction, so that a second run leaves it out.
    """
    from rich.console import Console
    from rich.progress import Progress

    from stream_adapt import dead_letters as letters

    if as_json and not (yes or dry_run):
        raise click.UsageError("--json asks nothing: give --yes or --dry-run, too")
    wanted = letters.Filter(reasons, [letters.source_of(text) for text in offsets])
    replayer = letters.Replayer(_settings(config_path), wanted, from_beginning=from_beginning)

    progress = Progress(console=Console(stderr=True))

    def agreed(plan: Any) -> bool:
        letters.tell(plan, lambda line: click.echo(line, err=True))
        if dry_run or not plan.selected:
            return False
        if not yes and not click.confirm(f"Write them to {plan.topic}?", err=True):
            return False
        progress.add_task("replaying", total=plan.selected)
        progress.start()
        return True

    try:
        result = replayer.run(agreed, lambda done: progress.update(progress.task_ids[0], completed=done))
    finally:
        progress.stop()
    _print(result, as_json)
    if not as_json:
        click.echo(f"{result.replayed:,} replayed to {result.topic}")


@cli.command()
@click.option("--data", "data_dir", type=click.Path(file_okay=False, path_type=Path), help="Folder for its data; kept.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the broker; any free one if not given.")
@click.option(
    "--kafka-home",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An unpacked Apache Kafka to use instead of fetching one.",
)
@_json_option
def broker(data_dir: Path | None, port: int | None, kafka_home: Path | None, as_json: bool) -> None:
    """Run a real Apache Kafka on this machine, in the foreground, until Ctrl-C.

    One node, loopback only: for trying things out, not for production. Needs no Java, Maven or Docker: the runtime
    and the jars are fetched once. Without --data everything is gone when it stops.
    """
    from stream_adapt.kafka.embedded import serve

    serve(data_dir, port, kafka_home=kafka_home, as_json=as_json)


def _source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--mapping",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Mapping file, when SOURCE is a CSV or JSONL log of your own.",
    )(command)
    return click.argument("source", default="movielens-100k", metavar="[SOURCE]")(command)


def _objective_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--seconds",
        default=0.0,
        show_default="no limit",
        type=click.FloatRange(min=0),
        help="Time for training, if its epochs would take longer. By the clock: equal seeds differ then.",
    )(command)
    command = click.option(
        "--support",
        type=click.FloatRange(min=0),
        help="maml, fomaml: adapt on so many events of a user, or, below 1, on this share; 8 if not given.",
    )(command)
    return click.option(
        "--objective",
        default="prequential",
        show_default=True,
        type=click.Choice(OBJECTIVES),
        help="What training minimises.",
    )(command)


@cli.command()
@_source_options
@click.option("--drift", is_flag=True, help="The world changes on the way, and the model is refreshed.")
@click.option("--fast", is_flag=True, help="As fast as the loop goes, instead of a pace that a person can watch.")
@click.option(
    "--seconds", type=float, default=None, help="With a pace: all events in so many seconds; 30, with --drift 240."
)
@click.option("--partitions", default=4, show_default=True, type=click.IntRange(min=1), help="Of the input topic.")
@click.option("--bootstrap-servers", help="A broker of yours; an embedded Apache Kafka if not given.")
@click.option(
    "--output",
    default=Path("reports"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the plot.",
)
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Port of /metrics; a free one if not given.")
@click.option("--retrain", is_flag=True, help="Pretrain again, even if the model is in the cache.")
@_json_option
def demo(as_json: bool, **options: Any) -> None:
    """Everything at once, on data of real users: watch scores adapt through a real Apache Kafka.

    Fetches SOURCE, pretrains on its first half, starts a broker and `stream-adapt run` as its own process, streams the
    second half in the order of time, and shows how well adapted scores do against frozen ones. All that it shows is
    read from topics by a consumer of its own; that every event has exactly one output is checked by id.
    With --json it runs fast and prints one object. Leaves nothing behind but the plot and the caches.

    With --drift items are taken for one another from a fifth of the stream on. The member detects it, trains a
    challenger beside the loop, and promotes it if it is better; at the end all events are scored once more without
    that. This takes a pace, also with --json: the stream has to last longer than the training.
    """
    from stream_adapt.demo import DemoOptions, run_demo

    _print(run_demo(DemoOptions(as_json=as_json, **options)), as_json)


@cli.command()
@_source_options
@click.option(
    "--out",
    "registry",
    default=Path("models"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Registry: the folder that gets a new version.",
)
@click.option("--share", default=1.0, show_default=True, help="Learn from this share of the events, the first ones.")
@click.option(
    "--rule",
    default="kalman",
    show_default=True,
    type=click.Choice(["kalman", "gradient"]),
    help="The update rule.",
)
@click.option(
    "--covariance",
    default="diagonal",
    show_default=True,
    type=click.Choice(["diagonal", "full"]),
    help="How it is served unless the configuration says otherwise; trained alike.",
)
@click.option(
    "--normalized/--plain",
    default=True,
    show_default=True,
    help="Whether steps of the gradient rule are divided by their own curvature.",
)
@click.option(
    "--dimension", default=16, show_default=True, type=click.IntRange(1, 256), help="Length of a taste vector."
)
@click.option(
    "--calibrator",
    default="none",
    show_default=True,
    type=click.Choice(["none", "linear"]),
    help="linear: scores are corrected by what rows remember of misses; for probabilities, not for ranking.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the events; a tested number if not given.")
@_objective_options
@click.option(
    "--validate",
    default="later",
    show_default=True,
    type=click.Choice(["later", "users"]),
    help="Figures are of events that are set aside: the last ones, or all those of some users.",
)
@click.option(
    "--patience",
    default=0,
    show_default="never",
    type=click.IntRange(min=0),
    help="Stop after so many epochs without a lower log-loss on those.",
)
@click.option(
    "--accumulate",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Batches whose gradients make one step.",
)
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal weights on the CPU.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="auto: the GPU if there is one.",
)
@_json_option
def pretrain(as_json: bool, **request: Any) -> None:
    """Learn the slow weights from a data set and write a model.

    SOURCE is movielens-100k, movielens-1m, synthetic, or the path of a CSV or JSONL log with its --mapping. What is
    learned: representations of items, users' priors, and the rates of the rule that adapts to each user.

    \b
    Objectives, all of them learning to learn:
      prequential  the loss of every event, predicted from the user's earlier ones: what service pays
      maml         adapt on a user's first events, be judged on the rest; gradients through the updates
      fomaml       the same without them: noise and level scores are not learned
      reptile      move the prior to where a few gradient steps on each user lead
    """
    from rich.console import Console

    from stream_adapt.pretraining import Request, pretrain_source

    result = pretrain_source(Request(**request), Console(stderr=True))
    _print(result, as_json)
    if not as_json:
        click.echo(
            f"model {result.version} in {result.folder}, from {result.events:,} events in {result.seconds:.0f} s"
        )
        for name, value in result.figures.items():
            click.echo(f"  {name:<20} {value:.4f}")


@cli.command()
@_source_options
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model to judge; pretrained on the first half if not given.",
)
@click.option(
    "--levels",
    default="all",
    show_default=True,
    type=click.Choice(["two", "all"]),
    help="two: only whether the target is reached is told.",
)
@click.option(
    "--rule",
    default="kalman",
    show_default=True,
    type=click.Choice(["kalman", "gradient"]),
    help="The update rule, if a model is pretrained.",
)
@click.option("--covariance", type=click.Choice(["diagonal", "full"]), help="As the model says if not given.")
@click.option(
    "--normalized/--plain",
    default=True,
    show_default=True,
    help="Whether steps of the gradient rule are divided by their own curvature.",
)
@click.option(
    "--calibrator",
    default="none",
    show_default=True,
    type=click.Choice(["none", "linear"]),
    help="As for `pretrain`, if a model is pretrained.",
)
@click.option(
    "--partitions",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Items learn in each partition by itself, as in service.",
)
@_objective_options
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Trainings; means are given.")
@click.option(
    "--warm/--cold", default=True, show_default=True, help="Users keep the rows that the first half gave them, or not."
)
@click.option(
    "--ties",
    default="kept",
    show_default=True,
    type=click.Choice(["kept", "drawn"]),
    help="Events with the same time: in the order of the source, or in one that is drawn, always the same.",
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Of the training."
)
@click.option("--baselines", default="", metavar="NAMES", help="Compare with these, comma-separated, or with all.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for a report in HTML.")
@_json_option
def replay(as_json: bool, **options: Any) -> None:
    """Judge the learner on a data set without a broker: score each event, then learn from it, in the order of time.

    The first half is for pretraining; figures are of the second half. The code that scores is the one that serves.
    Baselines: item_mean, running_bias, matrix_factorisation, river_logistic, river_ftrl, vowpal_wabbit, frozen, and
    direct: the same encoder trained without meta-learning. Objectives: `stream-adapt pretrain -h` says what they are.
    """
    from rich.console import Console

    from stream_adapt.evaluate.replay import ReplayOptions, run_replay

    result = run_replay(ReplayOptions(**options), Console(stderr=True))
    _print(result, as_json)
    if as_json:
        return
    click.echo(f"{'':<22}{'AUC':>8}{'log-loss':>10}{'GAUC':>8}{'ECE':>8}")
    for name, said in {"adapted": result, "frozen": result.frozen, **result.baselines}.items():
        click.echo(f"{name:<22}{said.auc:>8.4f}{said.logloss:>10.4f}{said.gauc:>8.4f}{said.ece:>8.4f}")
    if result.report is not None:
        click.echo(f"report: {result.report}")


@cli.group()
def bench() -> None:
    """What things cost on this machine, each against a baseline in the same run."""


@bench.command("e2e")
@click.option("--events", default=400_000, show_default=True, type=click.IntRange(min=1000), help="Events of a round.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds; medians are given.")
@click.option("--partitions", default=4, show_default=True, type=click.IntRange(min=1), help="Of the input topic.")
@click.option("--batch", default=16_384, show_default=True, type=click.IntRange(min=1), help="Most events in one.")
@click.option(
    "--delivery",
    default="exactly_once",
    show_default=True,
    type=click.Choice(["exactly_once", "at_least_once"]),
    help="As in the configuration.",
)
@click.option(
    "--covariance",
    default="diagonal",
    show_default=True,
    type=click.Choice(["diagonal", "full"]),
    help="Of the Kalman rule.",
)
@click.option(
    "--users",
    default="movielens-like",
    show_default=True,
    type=click.Choice(["unique", "movielens-like"]),
    help="unique: every event has a user of its own, and so a row to write.",
)
@click.option("--bootstrap-servers", help="A broker of yours; an embedded Apache Kafka if not given.")
@_json_option
def bench_e2e(as_json: bool, **parameters: Any) -> None:
    """Events/s of the real loop against a loop that only carries the same records, on a real broker."""
    from stream_adapt.bench import EndToEnd, end_to_end

    result = end_to_end(EndToEnd(**parameters), lambda line: click.echo(line, err=True))
    _print(result, as_json)
    if not as_json:
        for name, value in msgspec.structs.asdict(result).items():
            click.echo(f"{name:<20} {value}")


@bench.command("restore")
@click.option("--users", default=200_000, show_default=True, type=click.IntRange(min=1000), help="Rows to restore.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds; medians are given.")
@click.option("--partitions", default=4, show_default=True, type=click.IntRange(min=1), help="Of the changelog.")
@click.option("--bootstrap-servers", help="A broker of yours; an embedded Apache Kafka if not given.")
@_json_option
def bench_restore(as_json: bool, **parameters: Any) -> None:
    """Rows/s restored from a changelog with three versions of each, against merely consuming it, and their memory."""
    from stream_adapt.bench import Restore, restore

    result = restore(Restore(**parameters), lambda line: click.echo(line, err=True))
    _print(result, as_json)
    if not as_json:
        for name, value in msgspec.structs.asdict(result).items():
            click.echo(f"{name:<20} {value}")


@bench.command("step")
@_json_option
def bench_step(as_json: bool) -> None:
    """Microseconds that scoring and adapting cost an event, and the bytes of a row, for each rule and its variants."""
    from stream_adapt.bench import step_cost

    costs = step_cost()
    _print(costs, as_json)
    if not as_json:
        for rule, cost in costs.items():
            took = f"{cost.us_per_event:.2f} us an event (least {cost.least_us_per_event:.2f})"
            click.echo(f"{rule:<20} {took}, {cost.row_bytes} bytes a user's row")


@bench.command("formats")
@_json_option
def bench_formats(as_json: bool) -> None:
    """Microseconds that reading an event and writing a score cost in each format. Needs the extra `protobuf`."""
    from stream_adapt.bench_formats import format_cost

    costs = format_cost()
    _print(costs, as_json)
    if not as_json:
        for name, cost in costs.items():
            click.echo(
                f"{name:<8} decode {cost.decode_us:.2f} us, emit {cost.emit_us:.2f} us; "
                f"{cost.event_bytes:.0f} bytes an event, {cost.score_bytes:.0f} a score"
            )


@bench.command("scale")
@click.option("--users", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Rows to start.")
@click.option("--events", default=500_000, show_default=True, type=click.IntRange(min=1), help="Of each traffic.")
@click.option("--partitions", default=4, show_default=True, type=click.IntRange(min=1), help="Of the input topic.")
@click.option(
    "--limit-bytes", type=click.IntRange(min=1), help="Most memory; needs a cgroup of its own, so most often root."
)
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False), help="For the rows; the temporary one if not given."
)
@_json_option
def bench_scale(as_json: bool, **parameters: Any) -> None:
    """Memory and events/s with so many users, their rows in a file: everyone once, at random, and with a hot user."""
    from stream_adapt.bench_scale import Scale, run_scale

    result = run_scale(Scale(**parameters), lambda line: click.echo(line, err=True))
    _print(result, as_json)
    if not as_json:
        for name, value in msgspec.structs.asdict(result).items():
            click.echo(f"{name:<20} {value}")


@bench.command("drift")
@click.option(
    "--sets",
    default="movielens-1m,synthetic",
    show_default=True,
    metavar="NAMES",
    help="Data sets, comma-separated; synthetic-long is three times as long as synthetic.",
)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Models and places of a drift.")
@click.option("--detectors", default="", metavar="NAMES", help="Of River, comma-separated; the default if not given.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="For models and what the streams told; below the cache folder if not given.",
)
@click.option("--recovery/--no-recovery", default=True, show_default=True, help="Simulate refreshes, too: hours.")
@click.option(
    "--scenarios",
    default="",
    metavar="NAMES",
    help="What is simulated, comma-separated: kinds of drift, stationary, planted; all if not given.",
)
@click.option(
    "--rate",
    default=100.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Events/s of that simulation: so many pass while a challenger is trained.",
)
@_json_option
def bench_drift(as_json: bool, **options: Any) -> None:
    """How surely and how soon known drifts are detected, and what refreshes are worth then.

    Each data set's second half, in its real order, as it is and with drifts put in: half of the items' labels turned
    round (flip), items taken for one another (permute), turned bit by bit (gradual), turned and back (recurring), and a
    harmless one, in which only the base rate moves.

    Each of them also with the leader of a refresh beside the member: how soon log-loss is what it was before, with
    refreshes and without; what scheduled ones cost where nothing moved; whether bad challengers are refused.
    """
    from rich.console import Console

    from stream_adapt import logs
    from stream_adapt.bench_drift import DriftBench, run_drift, show
    from stream_adapt.config import LogSection

    logs.configure(LogSection(level="error"))  # a simulated leader has as much to say as a real one
    console = Console(stderr=True)
    result = run_drift(DriftBench(**options), console)
    _print(result, as_json)
    if not as_json:
        show(result, Console())


@bench.command("refresh")
@click.option(
    "--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Refreshes; medians are given."
)
@click.option(
    "--rate", default=1_000.0, show_default=True, type=click.FloatRange(min=1), help="Steady load, events a second."
)
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(min=1), help="Of steady load in each phase."
)
@click.option(
    "--burst", default=200_000, show_default=True, type=click.IntRange(min=2_000), help="Events of a backlog."
)
@click.option(
    "--window", default=300_000, show_default=True, type=click.IntRange(min=2_000), help="Events to train on."
)
@click.option(
    "--training",
    "training_s",
    default=90.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Most seconds of a training, as refresh.training_s.",
)
@click.option("--swaps", default=6, show_default=True, type=click.IntRange(min=1), help="Models announced to a group.")
@click.option("--partitions", default=6, show_default=True, type=click.IntRange(min=3), help="Of the input topic.")
@click.option("--nice", type=click.IntRange(0, 19), help="As refresh.nice; its default if not given.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="As refresh.threads.")
@_json_option
def bench_refresh(as_json: bool, **options: Any) -> None:
    """What a refresh costs the loop beside which it trains, and how soon three members serve what it promotes.

    A member runs with its refresh controller on an embedded Apache Kafka. Each round measures it calm, while a refresh
    trains, and after the swap: p99 from an event's timestamp to its committed score under a steady load, and events/s
    of a backlog. Ratios are to the calm phase of the same round. Then three members follow one announcement after the
    other. Takes about three minutes a round.

    
      p99_ratio                     latency while a refresh trains ÷ calm; wanted: at most 1.5
      throughput_ratio              events/s while a refresh trains ÷ calm; wanted: at least 0.65
      throughput_after_swap_ratio   the same while the new model is watched; wanted: at least 0.7
      max_poll_gap_s                longest time without a poll, against max_poll_interval_s
      swap_s                        from an announcement until every partition is scored by it, the slowest; wanted: 5
    """
    from stream_adapt.bench_refresh import RefreshBench, run_refresh_bench

    result = run_refresh_bench(RefreshBench(**options), lambda line: click.echo(line, err=True))
    _print(result, as_json)
    if not as_json:
        for name, value in msgspec.structs.asdict(result).items():
            click.echo(f"{name:<30} {value}")


@bench.command("takeover")
@click.option(
    "--users", default=200_000, show_default=True, type=click.IntRange(min=1_000), help="Each has a row, three times."
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Kills; medians are given.")
@click.option(
    "--rate", default=1_000.0, show_default=True, type=click.FloatRange(min=1), help="Steady load, events a second."
)
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(min=1), help="Of steady load before a kill."
)
@click.option("--partitions", default=4, show_default=True, type=click.IntRange(min=2), help="Of the input topic.")
@_json_option
def bench_takeover(as_json: bool, **options: Any) -> None:
    """How soon a member has the rows of one that was killed, and what its own partitions feel of it.

    Two members share an embedded Apache Kafka's partitions. One is killed; from the moment at which the group gives its
    partitions to the other it is timed until all of them are live.

    \b
      takeover_s   wanted: at most allowed_s = records ÷ restored_per_s + 2
      p99_ratio    end-to-end latency in the survivor's own partitions, meanwhile ÷ before; wanted: below 2
    """
    from stream_adapt.bench_takeover import TakeoverBench, run_takeover_bench

    result = run_takeover_bench(TakeoverBench(**options), lambda line: click.echo(line, err=True))
    _print(result, as_json)
    if not as_json:
        for name, value in msgspec.structs.asdict(result).items():
            click.echo(f"{name:<16} {value}")


@cli.command()
@_source_options
@_config_option
@click.option(
    "--per-second", default=200.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Events."
)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End after so long.")
@click.option("--events", type=click.IntRange(min=1), help="End after so many.")
@click.option(
    "--skip",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Leave out this share at first: what a model was pretrained on.",
)
@_json_option
def load(config_path: Path | None, as_json: bool, **options: Any) -> None:
    """Write the events of a data set to the input topic at a pace, as if they happened now, until Ctrl-C.

    For trying things out. After the last event it begins again at the first one, with new event ids.
    """
    from stream_adapt.load import Load, run_load
    from stream_adapt.shutdown import Shutdown

    with Shutdown().installed() as shutdown:
        loaded = run_load(_settings(config_path), Load(**options), shutdown)
    _print(loaded, as_json)
    if not as_json:
        click.echo(f"{loaded.events:,} events to {loaded.topic} in {loaded.seconds:.1f} s")


@cli.command()
@click.option("--minutes", default=8.0, show_default=True, type=click.FloatRange(min=0.1), help="How long it goes on.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal schedules and events.")
@click.option("--members", default=3, show_default=True, type=click.IntRange(1, 16), help="One more joins and leaves.")
@click.option("--rate", "per_second", default=300.0, show_default=True, help="Events a second.")
@click.option("--partitions", default=6, show_default=True, type=click.IntRange(min=1), help="Of the input topic.")
@click.option(
    "--brokers",
    default=2,
    show_default=True,
    type=click.IntRange(1, 3),
    help="And replicas. One alone leaves transaction markers out when it is restarted.",
)
@click.option(
    "--protocol",
    default="classic",
    show_default=True,
    type=click.Choice(["classic", "consumer"]),
    help="Of the group, as kafka.group_protocol.",
)
@click.option(
    "--refreshes/--no-refreshes",
    default=True,
    show_default=True,
    help="Refresh the model meanwhile, and kill and stop those who work on that, too.",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="New folder for logs, configuration and Kafka's data; else they are kept only after a failure.",
)
@_json_option
def chaos(as_json: bool, **options: Any) -> None:
    """Kill, stop and restart members and broker at random, under load, and count: nothing lost, nothing twice.

    Starts an Apache Kafka of its own and members as real processes. At the end an independent reader compares inputs
    with outputs, and rows with those of a calm run. Exit code 1 if anything is lost, doubled or different.
    """
    from rich.console import Console

    from stream_adapt.chaos.flow import ChaosOptions, run_chaos
    from stream_adapt.chaos.report import show

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    result = run_chaos(ChaosOptions(**options), console)
    _print(result, as_json)
    show(result, console)
    if not result.ok:
        sys.exit(1)


def _settings(config_path: Path | None) -> Config:
    """The configuration of a command that talks to Kafka, and its log."""
    from stream_adapt import config, logs

    settings = config.load(config_path).config
    logs.configure(settings.log)
    return settings


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(value).decode())


def main() -> None:
    """Entry point: errors that we raise on purpose become one clear message and their exit code."""
    # Until a command configures its log: stdout is for what was asked for.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    try:
        sys.exit(cli(standalone_mode=False))
    except StreamAdaptError as error:
        from stream_adapt import logs

        logs.say(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
