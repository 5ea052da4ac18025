"""The command line. Every command has `--json`: one object on stdout, everything else on stderr.

Exit codes: 0 done · 1 bug · 2 usage or configuration · 3 refused by Kafka · 4 fenced by another instance.
Heavy packages (torch, numba, matplotlib) are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from stream_adapt import __version__
from stream_adapt.errors import KafkaRefused, StreamAdaptError

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
    from stream_adapt import config, logs, service
    from stream_adapt.runner import Shutdown, StopAtOnce

    settings = config.load(config_path).config
    logs.configure(settings.log)
    with Shutdown().installed() as shutdown:
        try:
            _print(service.run(settings, shutdown, stop_after), as_json)
        except StopAtOnce:
            click.echo("stream-adapt: stopped at once; what is not committed will be done again", err=True)
            sys.exit(128 + shutdown.signals[-1])


@cli.command("check-config")
@_config_option
@_json_option
def check_config(config_path: Path | None, as_json: bool) -> None:
    """Show every setting in force, its value and where it came from; secrets are hidden.

    Environment variables named STREAM_ADAPT_<SECTION>_<KEY> override the file. Nothing is connected to.
    """
    from stream_adapt import config

    loaded = config.load(config_path)
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
    from stream_adapt import config
    from stream_adapt.kafka import properties
    from stream_adapt.kafka.topics import create_topics
    from stream_adapt.service import topic_specs

    settings = config.load(config_path).config
    outcomes = create_topics(properties.common(settings), topic_specs(settings))
    if as_json:
        found = {o.spec.name: {"status": str(o.status), "partitions": o.partitions} for o in outcomes}
        _print(found, as_json)
    for outcome in outcomes:
        click.echo(str(outcome), err=as_json)
    if not all(outcome.ok for outcome in outcomes):
        sys.exit(KafkaRefused.exit_code)


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


@cli.command()
@_source_options
@click.option("--fast", is_flag=True, help="As fast as the loop goes, instead of a pace that a person can watch.")
@click.option("--seconds", default=30.0, show_default=True, help="With a pace: all events in so many seconds.")
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
    read from the output topics by a consumer of its own; that every event has exactly one output is checked by id.
    With --json it runs fast and prints one object. Leaves nothing behind but the plot and the caches.
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
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the events; a tested number if not given.")
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
    "--partitions",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Items learn in each partition by itself, as in service.",
)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Trainings; means are given.")
@click.option("--warm", is_flag=True, help="Users keep the rows that the first half gave them.")
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Of the training."
)
@click.option("--baselines", default="", metavar="NAMES", help="Compare with these, comma-separated, or with all.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for a report in HTML.")
@_json_option
def replay(as_json: bool, **options: Any) -> None:
    """Judge the learner on a data set without a broker: score each event, then learn from it, in the order of time.

    The first half is for pretraining; figures are of the second half. The code that scores is the one that serves.
    Baselines: item_mean, running_bias, matrix_factorisation, river_logistic, river_ftrl, vowpal_wabbit, frozen.
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


@bench.command("step")
@_json_option
def bench_step(as_json: bool) -> None:
    """Microseconds that scoring and adapting cost an event, and the bytes of a row, for each rule and its variants."""
    from stream_adapt.bench import step_cost

    costs = step_cost()
    _print(costs, as_json)
    if not as_json:
        for rule, cost in costs.items():
            click.echo(f"{rule:<20} {cost.us_per_event:.2f} us an event, {cost.row_bytes} bytes a user's row")


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(value).decode())


def main() -> None:
    """Entry point: errors that we raise on purpose become one clear message and their exit code."""
    try:
        sys.exit(cli(standalone_mode=False))
    except StreamAdaptError as error:
        click.echo(f"stream-adapt: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
