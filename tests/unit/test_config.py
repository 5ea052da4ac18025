"""Configuration: what wins, where each value came from, what is refused, and that no secret is ever shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_adapt.config import OWNED_PROPERTIES, Config, Loaded, effective, load, resolve_secrets
from stream_adapt.errors import ConfigError
from stream_adapt.kafka import properties
from stream_adapt.record import Flag
from stream_adapt.service import screen_of

CANARY = "canary-4711"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a configuration file from YAML text or a tree."""

    def write(content: str | dict[str, Any]) -> Path:
        path = tmp_path / "stream-adapt.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def shown(loaded: Loaded) -> dict[str, tuple[Any, str]]:
    """What check-config shows: key → value, source."""
    return {key: (value, source) for key, value, source in effective(loaded)}


# What wins


def test_defaults_alone_are_a_configuration() -> None:
    loaded = load(None, {})
    assert loaded.config == Config(app=loaded.config.app)
    assert {"default", "default, from app.name"} == {source for _, source in shown(loaded).values()}


def test_names_that_follow_from_the_app_are_shown_as_they_are() -> None:
    found = shown(load(None, {}, app__name="films", topics__scores="ratings"))
    assert ("films.events", "default, from app.name") == found["topics.events"]
    assert ("films", "default, from app.name") == found["kafka.group_id"]
    assert ("ratings", "command line") == found["topics.scores"]


def test_command_line_wins_over_environment_over_file_over_defaults(write: Any) -> None:
    path = write({"input": {"max_batch": 1, "max_bytes": 1_000, "latency_ms": 10}})
    environment = {"STREAM_ADAPT_INPUT_MAX_BYTES": "2000", "STREAM_ADAPT_INPUT_LATENCY_MS": "20"}
    found = shown(load(path, environment, input__latency_ms=30))
    assert found["input.max_future_s"] == (86_400, "default")
    assert found["input.max_batch"] == (1, str(path))
    assert found["input.max_bytes"] == (2_000, "environment STREAM_ADAPT_INPUT_MAX_BYTES")
    assert found["input.latency_ms"] == (30, "command line")


def test_an_override_of_none_overrides_nothing(write: Any) -> None:
    found = shown(load(write({"delivery": "at_least_once"}), {}, delivery=None))
    assert found["delivery"][0] == "at_least_once"


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n"])
def test_an_empty_file_is_all_defaults(write: Any, content: str) -> None:
    assert load(write(content), {}).config == load(None, {}).config


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("APP_INSTANCE", "7", "app.instance", "7"),
        ("KAFKA_GROUP_ID", "on", "kafka.group_id", "on"),
        ("DELIVERY", "at_least_once", "delivery", "at_least_once"),
        ("METRICS_ENABLED", "false", "metrics.enabled", False),
        ("MODEL_PATH", "elsewhere", "model.path", "elsewhere"),
    ],
)
def test_a_variable_is_read_as_the_type_of_its_key(name: str, text: str, key: str, value: Any) -> None:
    assert shown(load(None, {f"STREAM_ADAPT_{name}": text}))[key][0] == value


def test_properties_know_their_source_one_by_one(write: Any) -> None:
    path = write({"kafka": {"properties": {"client.rack": "a", "security.protocol": "SSL"}}})
    found = shown(load(path, {}))
    assert found["kafka.properties.client.rack"] == ("a", str(path))
    assert found["kafka.properties.security.protocol"] == ("SSL", str(path))


def test_properties_of_the_environment_take_the_place_of_the_files(write: Any) -> None:
    path = write({"kafka": {"properties": {"client.rack": "a", "linger.ms": 5}}})
    found = shown(load(path, {"STREAM_ADAPT_KAFKA_PROPERTIES": "{client.rack: b}"}))
    assert found["kafka.properties.client.rack"] == ("b", "environment STREAM_ADAPT_KAFKA_PROPERTIES")
    assert "kafka.properties.linger.ms" not in found


def test_names_follow_from_the_app_unless_given() -> None:
    config = load(None, {}, app__name="shop", app__instance="a", topics__scores="elsewhere").config
    assert ("shop.events", "elsewhere", "shop.dead-letters") == (
        config.topic_names.events,
        config.topic_names.scores,
        config.topic_names.dead_letters,
    )
    assert ("shop", "shop.a") == (config.group_id, config.transactional_id)


# What is refused, and how


def refusal(path: Path | None, environment: dict[str, str] | None = None, **overrides: Any) -> str:
    """The message of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as raised:
        load(path, environment or {}, **overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"inputs": {}}, "inputs"),
        ({"input": {"max_bach": 3}}, "input.max_bach"),
        ({"kafka": {"acks": 1}}, "kafka.acks"),
    ],
)
def test_unknown_keys_are_refused_with_key_and_file(write: Any, tree: dict[str, Any], key: str) -> None:
    path = write(tree)
    message = refusal(path)
    assert message.startswith(key)
    assert str(path) in message


def test_unknown_variables_are_refused_and_others_are_not_looked_at() -> None:
    assert "STREAM_ADAPT_INPUT_MAX_BACH" in refusal(None, {"STREAM_ADAPT_INPUT_MAX_BACH": "3"})
    others = {"PATH": "x", "STREAM_ADAPT_CACHE_DIR": "x", "STREAM_ADAPT_TEST_BOOTSTRAP": "x"}
    assert load(None, others).config == load(None, {}).config


def test_a_wrong_value_is_named_with_its_source(write: Any) -> None:
    path = write({"input": {"max_batch": 0}, "delivery": "exactly-once"})
    lines = refusal(path, {"STREAM_ADAPT_METRICS_PORT": "70000"}).splitlines()
    assert len(lines) == 3
    assert any(line.startswith(f"input.max_batch=0 ({path}): ") for line in lines)
    assert any(line.startswith(f"delivery='exactly-once' ({path}): ") for line in lines)
    assert any(line.startswith("metrics.port=70000 (environment STREAM_ADAPT_METRICS_PORT): ") for line in lines)


@pytest.mark.parametrize("content", ["app: [", "- app", "just words", b"\xff\xfe".decode("latin-1") + "app: *x"])
def test_files_that_are_no_sections_are_refused(write: Any, content: str) -> None:
    path = write(content)
    assert refusal(path).startswith(str(path))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert "cannot be read" in refusal(path)
    path.write_bytes(b"app: \xff")
    assert "not YAML" in refusal(path)


def test_a_variable_that_is_not_yaml_is_refused() -> None:
    assert refusal(None, {"STREAM_ADAPT_INPUT_FEEDBACK": "{levels: ["}).startswith("environment STREAM_ADAPT_INPUT_F")


def test_a_section_that_is_a_value_is_refused(write: Any) -> None:
    path = write("kafka: 7")
    assert "kafka (" in refusal(path)
    assert "expected a section" in refusal(path, {"STREAM_ADAPT_KAFKA_GROUP_ID": "g"})


@pytest.mark.parametrize("section", ["properties", "consumer", "producer"])
@pytest.mark.parametrize("name", OWNED_PROPERTIES)
def test_properties_that_the_loop_owns_are_refused_with_the_reason(write: Any, section: str, name: str) -> None:
    message = refusal(write({"kafka": {section: {name: "x"}}}))
    assert f"{name} is not yours to set here: {OWNED_PROPERTIES[name]}" in message


def test_what_the_clients_are_given_beyond_the_operators_word_is_owned() -> None:
    config = load(None, {}).config
    fixed = {**properties.consumer(config), **properties.producer(config)}
    ours_to_tune = {"client.id", "socket.timeout.ms", "queued.max.messages.kbytes", "fetch.queue.backoff.ms"}
    ours_to_tune |= {"max.poll.interval.ms"}
    ours_to_tune |= {"linger.ms", "queue.buffering.max.messages", "queue.buffering.max.kbytes", "partitioner"}
    assert set(fixed) - ours_to_tune <= set(OWNED_PROPERTIES)


def test_the_operators_properties_reach_the_clients(write: Any) -> None:
    tree = {"properties": {"client.rack": "a"}, "consumer": {"fetch.min.bytes": 7}, "producer": {"linger.ms": 50}}
    config = load(write({"kafka": tree}), {}).config
    assert {"client.rack": "a", "fetch.min.bytes": 7}.items() <= properties.consumer(config).items()
    assert {"client.rack": "a", "linger.ms": 50}.items() <= properties.producer(config).items()
    assert "fetch.min.bytes" not in properties.producer(config)


def test_timeouts_must_agree() -> None:
    close = {"kafka__session_timeout_ms": 10_000, "kafka__transaction_timeout_ms": 10_000}
    assert "must be below" in refusal(None, **close)
    load(None, {}, kafka__group_protocol="consumer", **close)  # its session timeout is the broker's business
    assert "far below" in refusal(None, input__latency_ms=2_000, kafka__transaction_timeout_ms=4_000)


@pytest.mark.parametrize(
    "written",
    [
        "2026-07-01T00:00:00Z",
        "'2026-07-01T00:00:00Z'",
        "2026-07-01T02:00:00+02:00",
        "'2026-07-01T02:00+02:00'",
        "1782864000000",
    ],
)
def test_a_moment_is_read_with_its_zone_or_in_ms(written: str) -> None:
    assert 1_782_864_000_000 == load(None, {"STREAM_ADAPT_OUTPUT_EMIT_FROM": written}).config.output.emit_from


@pytest.mark.parametrize(
    "written", ["2026-07-01", "2026-07-01T00:00:00", "'2026-07-01'", "yesterday", "-1", "1.5", "1782864000"]
)
def test_what_is_no_moment_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.emit_from"):
        load(None, {"STREAM_ADAPT_OUTPUT_EMIT_FROM": written})


def test_idle_users_are_not_forgotten_sooner_than_clocks_may_be_wrong() -> None:
    said = refusal(None, state__ttl_s=3600)
    assert "state.ttl_s=3600.0 must be above input.max_future_s=86400" in said
    assert 3600 == load(None, {}, state__ttl_s=3600, input__max_future_s=60).config.state.ttl_s


# Secrets


def test_secrets_are_read_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{CANARY}\n")
    monkeypatch.setenv("MY_SECRET", CANARY)
    given = {"sasl.password": {"env": "MY_SECRET"}, "ssl.key.password": {"file": str(file)}, "linger.ms": 5}
    assert {"sasl.password": CANARY, "ssl.key.password": CANARY, "linger.ms": 5} == resolve_secrets(given)


@pytest.mark.parametrize("reference", [{"env": "NOT_THERE"}, {"file": "not-there"}])
def test_a_reference_to_nothing_names_property_and_place(reference: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"sasl\.password refers to .*(NOT_THERE|not-there)"):
        resolve_secrets({"sasl.password": reference})


def test_references_are_shown_and_what_they_refer_to_is_not(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", CANARY)
    loaded = load(write({"kafka": {"properties": {"sasl.password": {"env": "MY_SECRET"}}}}), {})
    assert shown(loaded)["kafka.properties.sasl.password"][0] == {"env": "MY_SECRET"}
    assert CANARY not in str(shown(loaded))


def test_a_secret_that_got_in_all_the_same_is_hidden() -> None:
    unchecked = Config.model_construct(**dict(load(None, {}).config))
    kafka = unchecked.kafka.model_copy(update={"properties": {"sasl.password": CANARY, "sasl.username": "me"}})
    found = shown(Loaded(unchecked.model_copy(update={"kafka": kafka}), {}))
    assert found["kafka.properties.sasl.password"][0] == "(hidden)"
    assert found["kafka.properties.sasl.username"][0] == "me"


@pytest.mark.parametrize(
    "name",
    ["sasl.password", "ssl.key.password", "ssl.keystore.password", "ssl.key.pem", "sasl.oauthbearer.client.secret",
     "sasl.oauthbearer.config", "sasl.oauthbearer.assertion.private.key.passphrase"],
)  # fmt: skip
@pytest.mark.parametrize("section", ["properties", "consumer", "producer"])
def test_secrets_in_plain_text_are_refused_and_not_repeated(write: Any, section: str, name: str) -> None:
    message = refusal(write({"kafka": {section: {name: CANARY, "sasl.username": "me"}}}))
    assert f"{name} is a secret: give it as {{env: NAME}} or {{file: PATH}}" in message
    assert CANARY not in message


def test_what_only_sounds_like_a_secret_may_be_given_as_it_is(write: Any) -> None:
    given = {"ssl.key.location": "key.pem", "ssl.keystore.location": "s", "sasl.oauthbearer.token.endpoint.url": "u"}
    assert load(write({"kafka": {"properties": given}}), {}).config.kafka.properties == given


@pytest.mark.parametrize(
    "content",
    [
        f"kafka: {{properties: {{sasl.password: {CANARY}}}}}",
        f"kafka: {{properties: {{sasl.password: {CANARY}, group.id: x}}}}",
        f"kafka: {{properties: {{sasl.password: [{CANARY}]}}}}",
        f"kafka: {{properties: {{sasl.password: {{value: {CANARY}}}}}}}",
        f"kafka: {{properties: {{sasl.password: {{env: [{CANARY}]}}}}}}",
        f"kafka: {{properties: sasl.password={CANARY}}}",
        f"kafka: {{property: {{sasl.password: {CANARY}}}}}",
        f"kafka: {{sasl.password: {CANARY}}}",
        f"kafka: sasl.password={CANARY}",
        f"sasl.password: {CANARY}",
        f"kafka: {{properties: {{sasl.password: *{CANARY}}}}}",
        f"kafka: {{properties: {{sasl.password: !{CANARY} x}}}}",
        f'kafka: {{properties: {{sasl.password: "{CANARY}}}}}',
        f"kafka:\n  sasl.password: {CANARY}: x\n",
    ],
)
def test_no_message_repeats_a_secret(write: Any, content: str) -> None:
    path = write(content)
    assert CANARY not in refusal(path)
    assert CANARY not in refusal(path, {"STREAM_ADAPT_KAFKA_GROUP_ID": "g"})


@pytest.mark.parametrize("text", [f"{{sasl.password: {CANARY}}}", CANARY, f"[{CANARY}", f"{{a: *{CANARY}}}"])
def test_no_message_repeats_a_secret_of_the_environment(text: str) -> None:
    assert CANARY not in refusal(None, {"STREAM_ADAPT_KAFKA_PROPERTIES": text})


def test_a_member_keeps_its_state_in_a_folder_of_its_own_unless_told_where() -> None:
    default = load(None, {}, app__name="films", app__instance="films-0").config
    assert Path("var/films.films-0") == default.state_dir
    assert Path("elsewhere") == load(None, {"STREAM_ADAPT_STATE_DIR": "elsewhere"}).config.state_dir


@pytest.mark.parametrize(
    ("keys", "late_after_ms", "barred"),
    [
        ({}, 0, 0),
        ({"input__deduplicate": True}, 0, int(Flag.DUPLICATE)),
        ({"input__late": "score_only", "input__late_after_s": 1.5}, 1500, int(Flag.LATE)),
        ({"input__late": "dead_letter", "input__deduplicate": True}, 0, int(Flag.LATE | Flag.DUPLICATE)),
    ],
)
def test_what_teaches_nothing_is_what_the_input_section_says(
    keys: dict[str, Any], late_after_ms: int, barred: int
) -> None:
    assert (late_after_ms, barred) == screen_of(load(None, {}, **keys).config)
