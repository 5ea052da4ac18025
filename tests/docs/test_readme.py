"""The documentation says what the code says: commands, keys, metrics, reasons, exit codes, topics, links, examples."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import generate
import pytest

import stream_adapt
from stream_adapt import config, errors, metrics
from stream_adapt.cli import cli
from stream_adapt.datasets.log import read_mapping
from stream_adapt.decode import REASONS
from stream_adapt.health import State
from stream_adapt.kafka.topics import product_topics
from stream_adapt.learner import encoder
from stream_adapt.record import Flag

ROOT = generate.ROOT
README = generate.README.read_text(encoding="utf-8")
DOCUMENTS = sorted(p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
COMMANDS = dict(generate.leaves())
KEYS = dict(generate.config_keys())

_LINK = re.compile(r"(?<!!)\[[^\]\n]*(?:\\.[^\]\n]*)*\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of one language."""
    return [body for found, body in _FENCED.findall(text) if found == language]


def rows_starting(*cells: str) -> list[str]:
    """Table rows of the README whose first cells are these."""
    return [line for line in README.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    text = _FENCED.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# What is generated


def test_generated_parts_are_what_the_code_generates() -> None:
    assert sorted(generate.blocks()) == sorted(generate.names(README)), "each generated part stands in the README once"
    assert generate.rewritten(README) == README, "run `make docs`"


# What there is, by reflection, whatever the generator does


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    _, found, rest = README.partition(f"**`stream-adapt {name}`**")
    assert found, name
    part = re.split(r"^\*\*`|^<!-- /generated -->", rest, maxsplit=1, flags=re.MULTILINE)[0]
    given = [param for param in COMMANDS[name].params if isinstance(param, click.Option)]
    options = [opt for param in given for opt in (*param.opts, *param.secondary_opts)]
    assert {opt for opt in options if f"`{opt}`" not in part} <= {"--json"}


def test_options_that_every_command_has_are_documented() -> None:
    assert all(f"`{option}`" in README for option in ("-h", "--json"))


@pytest.mark.parametrize(("key", "field"), list(KEYS.items()), ids=list(KEYS))
def test_every_key_is_documented_with_its_default(key: str, field: generate.FieldInfo) -> None:
    (row,) = rows_starting(f"`{key}`", generate.default_of(key, field))
    assert field.description
    assert field.description in row


def test_every_key_is_what_check_config_shows() -> None:
    shown = {key for key, _, _ in config.effective(config.load(None, {}))}
    assert shown == set(KEYS)


@pytest.mark.parametrize("family", metrics.FAMILIES, ids=lambda family: family.name)
def test_every_metric_is_documented(family: metrics.Family) -> None:
    assert len(rows_starting(f"`{family.name}`", family.type)) == 1


@pytest.mark.parametrize("expression", metrics.EXPRESSIONS, ids=lambda expression: expression.name)
def test_every_expression_is_given(expression: metrics.Expression) -> None:
    assert f"{expression.promql}\n" in blocks("promql")


@pytest.mark.parametrize("reason", REASONS)
def test_every_dead_letter_reason_is_documented(reason: str) -> None:
    assert len(rows_starting(f"`{reason}`", REASONS[reason])) == 1


def test_every_exit_code_is_documented() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.StreamAdaptError)]
    for kind in kinds:
        assert any(f"`{kind.__name__}`" in row for row in rows_starting(str(kind.exit_code))), kind
    assert rows_starting("0")


def test_every_topic_flag_state_and_feature_type_is_documented() -> None:
    assert all(f"`<app>.{spec.name.partition('.')[2]}`" in README for spec in product_topics("x", 1))
    assert all(str(flag.name).lower() in README for flag in Flag)
    assert all(f"`{state.value}`" in README for state in State)
    types = [encoder.Categorical, encoder.Bag, encoder.Numeric, encoder.Vector]
    assert set(types) == set(encoder.Feature.__args__)
    assert all(rows_starting(f"`{one.__struct_config__.tag}`") for one in types)


def test_every_variable_is_documented() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "stream_adapt").rglob("*.py"))
    variables = set(re.findall(r"STREAM_ADAPT_(?:CACHE|TEST)_[A-Z]+\b", source))
    told = README + (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert "STREAM_ADAPT_TEST_BROKER" in variables
    assert variables <= set(re.findall(r"STREAM_ADAPT_[A-Z_]+\b", told))


# Examples


def shell_lines() -> Iterator[list[str]]:
    """Words of every line in the bash blocks of all documents."""
    for path in DOCUMENTS:
        for block in blocks("bash", path.read_text(encoding="utf-8")):
            for line in re.sub(r"<<'EOF'.*?^EOF$", "", block, flags=re.DOTALL | re.MULTILINE).splitlines():
                yield shlex.split(line)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_examples_parse(path: Path) -> None:
    for block in blocks("bash", path.read_text(encoding="utf-8")):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)


def test_commands_in_examples_exist_with_these_options() -> None:
    ours = [words[1:] for words in shell_lines() if words[:1] == ["stream-adapt"]]
    assert len(ours) > 5
    for words in ours:
        command: click.Command = cli
        while isinstance(command, click.Group):
            assert words[0] in command.commands, words
            command = command.commands[words.pop(0)]
        command.make_parser(click.Context(command)).parse_args(words)  # raises for what there is not


def test_make_targets_in_examples_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for words in shell_lines() if words[:1] == ["make"] for word in words[1:] if "=" not in word}
    assert {"demo", "test"} <= named <= targets
    for path in DOCUMENTS:
        assert set(re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8"))) <= targets, path


def test_yaml_examples_load(tmp_path: Path) -> None:
    examples = blocks("yaml")
    assert len(examples) >= 3
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example, encoding="utf-8")
        if "columns:" in example:
            encoder.parse_features(read_mapping(path).features)
        else:
            config.load(path, {})


def test_python_examples_are_python() -> None:
    assert len(blocks("python")) >= 2
    for example in blocks("python"):
        ast.parse(example)


# Links, and what no document holds


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target) if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_document_names_a_place_on_one_machine_or_a_registry(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.:~-])/(?:home|root|tmp|usr|var|etc|opt|mnt|srv|work|Users)\b\S*", text) == []
    hosts = (
        r"pypi\.org|pythonhosted|maven\.org|maven\.apache|ghcr\.io|docker\.io|quay\.io|proxy\.golang|npmjs|index-url"
    )
    assert re.findall(hosts, text) == []


def test_the_map_of_the_package_names_what_exists() -> None:
    text = stream_adapt.__doc__ or ""
    path = re.findall(r"^    (\w+)  ", text, re.MULTILINE)
    around = re.findall(r"`(\w+)/?`", text)
    assert {"record", "commit"} <= set(path)
    for name in path + around:
        assert importlib.util.find_spec(f"stream_adapt.{name}"), name
    for name in getattr(stream_adapt, "__all__", ()):
        assert hasattr(stream_adapt, name), name
