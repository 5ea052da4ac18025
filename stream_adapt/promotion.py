"""`stream-adapt models …`: which versions there are, which one is served, and what an operator decides about it.

What is promoted is checked like a member checks it, then announced; members that run serve it by themselves.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stream_adapt.announcements import Announcement, Announcements, announce
from stream_adapt.config import Config
from stream_adapt.errors import ConfigError, ModelError, ModelUnfit
from stream_adapt.models import (
    Decision,
    Manifest,
    Model,
    Registry,
    RowMode,
    check_successor,
    read_model,
    record_decision,
)
from stream_adapt.service import as_configured, served_model

log = structlog.get_logger(__name__)

_BY_HAND = "stream-adapt models"


class Listed(msgspec.Struct):
    """A version, in a line."""

    version: str
    served: bool  # announced last; where nothing was announced, what the configuration names
    created: str | None = None  # ISO 8601, UTC
    parent: str | None = None
    events: int | None = None  # that it was trained on
    figures: dict[str, float] = {}
    decision: str | None = None  # promoted, rejected or rolled_back
    announced: str | None = None  # when, ISO 8601, UTC
    problem: str | None = None  # why its manifest cannot be read


class Shown(msgspec.Struct):
    """All that is known of a version."""

    served: bool
    manifest: Manifest
    announcement: Announcement | None


class Promoted(msgspec.Struct):
    """What was announced."""

    topic: str
    announcement: Announcement


def listed(config: Config) -> list[Listed]:
    """Every version of the registry, oldest first, and any that was announced and is not in it.

    Raises:
        KafkaRefused: the models topic cannot be read.
    """
    registry, announced = Registry(config.model.path), _announced(config)
    served = _served(config, announced)
    said = {one.version: one for one in announced}
    return [_line(registry, v, v == served, said.get(v)) for v in sorted({*registry.versions(), *said})]


def shown(config: Config, version: str | None) -> Shown:
    """A version, or the one that is served.

    Raises:
        ConfigError: there is no such version, or its manifest cannot be read.
        KafkaRefused: the models topic cannot be read.
    """
    announced = _announced(config)
    served = _served(config, announced)
    wanted = version or served
    if wanted is None:
        raise ConfigError(f"{config.model.path}: no model is served; make one with `stream-adapt pretrain`")
    newest = {one.version: one for one in announced}.get(wanted)
    return Shown(wanted == served, Registry(config.model.path).manifest(wanted), newest)


def promote(config: Config, version: str, reason: str, rows: RowMode | None = None) -> Promoted:
    """Announces a version: every member serves it from then on.

    Args:
        config: of the application.
        version: in the registry of `model.path`.
        reason: why; kept in the announcement.
        rows: what becomes of rows; as the version's manifest says, or else they are carried.

    Raises:
        ConfigError: it is served already, cannot be read, or cannot take the place of the one that is served.
        KafkaRefused: it could not be announced.
    """
    announced = _announced(config)
    served = _served(config, announced)
    if version == served:
        raise ConfigError(f"{version} is served already")
    return _announce(config, announced, version, served, reason, rows)


def rollback(config: Config, reason: str) -> Promoted:
    """Announces the version that was served before; rows go back the way they came.

    Raises:
        ConfigError: there is none, or it cannot be served; says what to do.
        KafkaRefused: it could not be announced.
    """
    announced = _announced(config)
    if not announced or announced[-1].previous is None:
        raise ConfigError(
            f"{config.topic('models')}: no version took the place of another one: there is nothing to go back to"
        )
    newest, previous = announced[-1], announced[-1].previous
    before = next((one for one in announced if one.version == previous), None)
    if before is not None and before.previous == newest.version:
        raise ConfigError(
            f"{newest.version} took the place of {previous}, which had taken its: to go back would be to serve "
            f"{previous} again. To do: `stream-adapt models promote VERSION`, with the version that you want"
        )
    promoted = _announce(config, announced, previous, newest.version, reason, newest.rows)
    _note(config, newest.version, Decision("rolled_back", reason, promoted.announcement.decided_ms, _BY_HAND))
    return promoted


def _announce(
    config: Config,
    announced: list[Announcement],
    version: str,
    served: str | None,
    reason: str,
    rows: RowMode | None,
) -> Promoted:
    model = _read(config, version)
    served = _check(config, announced, served, model)
    manifest, now_ms = model.manifest, time.time_ns() // 1_000_000
    figures = dict(manifest.decision.figures) if manifest.decision else {}
    one = Announcement(
        version, manifest.sha256, served, rows or manifest.rows or "carry", reason, now_ms, figures, _BY_HAND
    )
    announce(config, one)
    _note(config, version, Decision("promoted", reason, now_ms, _BY_HAND, figures))
    return Promoted(config.topic("models"), one)


def _check(config: Config, announced: list[Announcement], served: str | None, model: Model) -> str | None:
    """Checks a model against the one that members serve; returns that one's version, None if it cannot be told.

    Members serve what was announced last, unless they refused it: then what they served before.

    Raises:
        ModelUnfit: it cannot take its place.
    """
    try:
        if served is not None:
            check_successor(_read(config, served), model)
        return served
    except ModelError as error:
        old = _not_refused(config, announced)
        if old is None or old.version == served:
            if isinstance(error, ModelUnfit):
                raise
            log.warning("not compared with a model that cannot be read here", model=served, error=str(error))
            return served
        check_successor(old, model)
        return old.version


def _not_refused(config: Config, announced: list[Announcement]) -> Model | None:
    """What members serve after all of these announcements, each of which they may have refused."""
    served: Model | None = None
    try:
        served = _read(config, announced[0].previous or "") if announced else None
    except ModelError:
        with suppress(ConfigError):
            served = served_model(config)
    for one in announced:
        try:
            model = _read(config, one.version)
            if model.manifest.sha256 == one.sha256:
                if served is not None:
                    check_successor(served, model)
                served = model
        except ModelError:
            continue
    return served


def _read(config: Config, version: str) -> Model:
    return as_configured(config, Registry(config.model.path).read(version))


def _note(config: Config, version: str, decision: Decision) -> None:
    """The announcement counts; that the manifest says so, too, is for people."""
    try:
        record_decision(Registry(config.model.path).folder(version), decision)
    except ModelError as error:
        log.warning("the decision is not in the version's manifest", model=version, error=str(error))


def _announced(config: Config) -> list[Announcement]:
    with closing(Announcements(config)) as announced:
        announced.read_to_end()
        return announced.history()


def _served(config: Config, announced: list[Announcement]) -> str | None:
    if announced:
        return announced[-1].version
    try:
        return read_model(config.model.path).version
    except ModelError:
        return None


def _line(registry: Registry, version: str, served: bool, said: Announcement | None) -> Listed:
    line = Listed(version, served, announced=_time(said.decided_ms) if said else None)
    try:
        manifest = registry.manifest(version)
    except ModelError as error:
        line.problem = str(error)
        return line
    events = manifest.window.events if manifest.window else manifest.trained_on.get("events")
    line.created, line.parent, line.figures = _time(manifest.created_ms), manifest.parent, manifest.figures
    line.events = events if isinstance(events, int) else None
    line.decision = manifest.decision.outcome if manifest.decision else None
    return line


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")


# For people


def list_table(versions: list[Listed]) -> RenderableType:
    """Versions, oldest first; the one that is served has a star."""
    table = Table()
    for name in ("", "version", "parent", "log-loss", "AUC", "decision"):
        table.add_column(name, no_wrap=name != "parent", overflow="fold")
    for one in versions:
        figures = [f"{one.figures[name]:.4f}" if name in one.figures else "" for name in ("log_loss", "auc")]
        told = one.decision or ("" if one.problem is None else "cannot be read")
        table.add_row("*" if one.served else "", Text(one.version), Text(one.parent or ""), *figures, told)
    problems = [Text(f"{one.version}: {one.problem}") for one in versions if one.problem]
    return Group(table, *problems)


def show_table(shown: Shown) -> RenderableType:
    """All of a manifest but the features, and what was decided."""
    manifest = shown.manifest
    about = Table(
        show_header=False, title=f"{manifest.version}{', served' if shown.served else ''}", title_justify="left"
    )
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
    for name, value in _about(manifest).items():
        about.add_row(name, Text(str(value)))
    parts: list[RenderableType] = [about, _figures("figures of training", manifest.figures)]
    if manifest.decision is not None:
        parts += _decided(manifest.decision.outcome, manifest.decision)
    if shown.announcement is not None:
        one = shown.announcement
        parts += _decided(f"announced, in the place of {one.previous or 'none'}, rows: {one.rows}", one)
    return Group(*parts)


def _about(manifest: Manifest) -> dict[str, Any]:
    about: dict[str, Any] = {
        "created": _time(manifest.created_ms),
        "sha256": manifest.sha256,
        "parent": manifest.parent or "none",
    }
    if window := manifest.window:
        times = f"{_time(window.first_ms)} to {_time(window.last_ms)}"
        about["window"] = f"{window.events:,} events of {window.source}, {times}"
    about |= {f"trained on: {name}": value for name, value in manifest.trained_on.items()}
    about["rows"] = manifest.rows or "not said"
    spec = msgspec.structs.asdict(manifest.spec)
    spec["features"] = ", ".join(manifest.spec.features) or "none"
    spec["feedback"] = f"{', '.join(manifest.spec.feedback.levels)}; target {manifest.spec.feedback.target}"
    return about | {f"spec: {name}": value for name, value in spec.items()}


def _decided(what: str, by: Decision | Announcement) -> list[RenderableType]:
    return [
        Text(f"{what}: {by.reason} ({by.decided_by}, {_time(by.decided_ms)})"),
        *([_figures("decided by", by.figures)] if by.figures else []),
    ]


def _figures(title: str, figures: dict[str, float]) -> Table:
    table = Table(show_header=False, title=f"{title:<32}", title_justify="left", min_width=34)
    for name, value in figures.items():
        table.add_row(Text(name), f"{value:.6g}")
    return table
