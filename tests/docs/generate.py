"""Writes the generated parts of README.md anew from the code: `make docs`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- /generated -->`; what each holds is in `blocks`.
`tests/docs/test_readme.py` fails when the README differs from what this would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stream_adapt import errors, metrics
from stream_adapt.cli import cli
from stream_adapt.config import OWNED_PROPERTIES, Config
from stream_adapt.decode import REASONS
from stream_adapt.kafka.permissions import RESOURCES, of_commands, of_member, operation_name
from stream_adapt.kafka.topics import product_topics
from stream_adapt.learner.rules.kalman.layout import user_layout
from stream_adapt.learner.rules.layout import item_layout
from stream_adapt.models import LearnerSpec
from stream_adapt.record import TopicNames

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

_BLOCK = re.compile(r"(<!-- generated: ([a-z0-9-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)

#: What the tables cannot take from the code.
_TOPIC_MEANINGS = (
    "event v1, yours: what users do. Key: the user id.",
    "score v1, one for each event since `output.emit_from`; receipt v1, one for each erasure. Key: the user id.",
    "refused records, bytes unchanged, the reason in the headers. Key: the record's.",
    "rows: the last version of each, and where their shard stands. Key: the kind of row and the id.",
    "learning v1, one or more for each transaction with events: how well they were predicted, as sums. No key.",
    "alarm v1: what moved, since when, and how much.",
    "which model is served: the newest record. Key: the version.",
    "where a refresh of the model is, and what was last asked of it. Keys: `state`, `request`.",
)
_COMPUTED_DEFAULTS = {"app.instance": "the host's name"}


def blocks() -> dict[str, str]:
    """Name of each generated part → its Markdown."""
    table, _, expressions = metrics.reference().partition("\n\n")
    return {
        "commands": commands(),
        "configuration": configuration(),
        "owned-properties": _table(("property", "instead"), ((f"`{n}`", w) for n, w in OWNED_PROPERTIES.items())),
        "permissions": permissions(),
        "command-permissions": command_permissions(),
        "topics": topics(),
        "event-v1": schema("event-v1"),
        "score-v1": schema("score-v1"),
        "erase-v1": schema("erase-v1"),
        "receipt-v1": schema("receipt-v1"),
        "dead-letter-v1": schema("dead-letter-v1", but=("stream-adapt.reason",)),
        "reasons": _table(("reason", "what is wrong"), ((f"`{reason}`", text) for reason, text in REASONS.items())),
        "exit-codes": exit_codes(),
        "row-sizes": row_sizes(),
        "metrics": table,
        "expressions": expressions.rstrip("\n"),
    }


def rewritten(text: str) -> str:
    """The README with every generated part as the code says."""
    new = blocks()
    return _BLOCK.sub(lambda found: f"{found[1]}\n{new[found[2]]}\n\n{found[3]}", text)


def names(text: str) -> list[str]:
    """Names of the generated parts of a text, in order."""
    return [found[2] for found in _BLOCK.finditer(text)]


def leaves(group: click.Group = cli, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


def commands() -> str:
    """Every command, its arguments and options."""
    parts = []
    for name, command in leaves():
        rows = [_parameter(p) for p in command.params if "--json" not in p.opts]
        parts += [f"**`stream-adapt {name}`** {_first_sentence(command.help or '')}", ""]
        parts += [_table(("option", "default", "meaning"), rows), ""]
    return "\n".join(parts).rstrip()


def _parameter(parameter: click.Parameter) -> tuple[str, str, str]:
    if isinstance(parameter, click.Argument):
        metavar = f"`{parameter.make_metavar(click.Context(cli))}`"
        if parameter.required:
            return metavar, "–", "Required."
        return metavar, f"`{parameter.default}`", "What to read."
    assert isinstance(parameter, click.Option)
    opts = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if isinstance(parameter.type, click.Choice):
        opts += f" {' or '.join(parameter.type.choices)}"
    return opts, "–" if not parameter.show_default else _value(parameter.default), parameter.help or ""


def _first_sentence(text: str) -> str:
    paragraph = text.replace("\b", "").split("\n\n")[0]
    return " ".join(paragraph.split())


def config_keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every configuration key."""
    for section, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield from ((f"{section}.{name}", inner) for name, inner in model.model_fields.items())
        else:
            yield section, field


def default_of(key: str, field: FieldInfo) -> str:
    """A key's default as the README shows it."""
    if key in _COMPUTED_DEFAULTS:
        return _COMPUTED_DEFAULTS[key]
    return _value(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def configuration() -> str:
    """Every key with default and meaning."""
    rows = (
        (f"`{key}`", default_of(key, field), f"{field.description}{_choices(field)}") for key, field in config_keys()
    )
    return _table(("key", "default", "meaning"), rows)


def _choices(field: FieldInfo) -> str:
    """The values of a key that has only a few."""
    asked = [field.annotation, *get_args(field.annotation)]
    values = [value for one in asked if get_origin(one) is Literal for value in get_args(one)]
    return f" ({', '.join(f'`{value}`' for value in values)})" if values else ""


def topics() -> str:
    """The topics of an app."""
    specs = zip(
        product_topics("APP", 1),
        ("`topics.partitions`", "`topics.partitions`", "1", "`topics.partitions`", "1", "1", "1", "1"),
        strict=True,
    )
    rows = (
        (f"`{spec.name.replace('APP', '<app>')}`", partitions, spec.config["cleanup.policy"], meaning)
        for (spec, partitions), meaning in zip(specs, _TOPIC_MEANINGS, strict=True)
    )
    return _table(("topic", "partitions", "cleanup", "what is in it"), rows)


def schema(name: str, but: tuple[str, ...] = ()) -> str:
    """Every field of a schema."""
    described = json.loads((ROOT / "schemas" / f"{name}.json").read_text(encoding="utf-8"))
    required = described["required"]
    rows = (
        (f"`{field}`", "yes" if field in required else "", _cell(about["description"]))
        for field, about in described["properties"].items()
        if field not in but
    )
    return _table(("field" if not but else "header", "always there", "meaning"), rows)


def permissions() -> str:
    """What a member's principal must be allowed to do."""
    names = TopicNames.of("<app>")
    needed = of_member(names, "<group>", "<app>.<instance>")
    rows = ((RESOURCES[p.resource], f"`{p.name}`", operation_name(p.operation), p.why) for p in needed)
    return _table(("resource", "name", "operation", "why"), rows)


def command_permissions() -> str:
    """What other commands need on top of it."""
    rows = (
        (f"`{command}`", RESOURCES[p.resource], f"`{p.name}`", operation_name(p.operation))
        for command, needed in of_commands("<app>", TopicNames.of("<app>"), "<group>").items()
        for p in needed
    )
    return _table(("command", "resource", "name", "operation"), rows)


def exit_codes() -> str:
    """Exit codes and the errors that lead to them."""
    raised: dict[int, list[type[errors.StreamAdaptError]]] = {}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.StreamAdaptError):
            raised.setdefault(error.exit_code, []).append(error)
    rows = [("0", "", "Done, or stopped by one SIGTERM or Ctrl-C.")]
    for code, kinds in sorted(raised.items()):
        texts = [_cell(_first_sentence(kind.__doc__ or "")) for kind in kinds]
        if code == 1:
            texts = ["A bug, or a promise of the demo that was not kept."]
        rows.append((str(code), ", ".join(f"`{kind.__name__}`" for kind in kinds), " ".join(texts)))
    rows.append(("130, 143", "", "Ended by a signal: a second SIGINT or SIGTERM, or the first one outside the loop."))
    return _table(("code", "error", "meaning"), rows)


def row_sizes() -> str:
    """Bytes of a row for the sizes that pretraining uses unless told otherwise."""
    spec = LearnerSpec()
    full = LearnerSpec(covariance="full")
    rows = (
        ("user, `diagonal`", str(user_layout(spec).row_bytes)),
        ("user, `full`", str(user_layout(full).row_bytes)),
        ("item", str(item_layout(spec).row_bytes)),
    )
    return _table((f"row (D = {spec.dimension})", "bytes"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
