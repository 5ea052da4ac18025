"""What lies in deploy/: rules, dashboard, image, compose file and chart are sound, and speak of what there is."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_adapt import config
from stream_adapt.kafka.embedded import KAFKA_VERSION
from stream_adapt.metrics import FAMILIES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
CHART = DEPLOY / "helm" / "stream-adapt"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "stream-adapt.json"
#: Beside our own: of Prometheus, and of prometheus_client in every Python process.
OTHERS = {"up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}
#: Every optional part of the chart, and what values refer to.
EVERYTHING = (
    "serviceMonitor.enabled=true,prometheusRule.enabled=true,dashboard.enabled=true,secretFiles={kafka-tls},"
    "secretEnv.SASL_PASSWORD.secret=kafka,secretEnv.SASL_PASSWORD.key=password,gpu.nvidia\\.com/gpu=1,"
    "refresh.enabled=true,refresh.imageTag=cuda,refresh.gpu.nvidia\\.com/gpu=1"
)
#: Of the Prometheus operator; kubernetes-validate has no schemas of it.
OPERATORS = {"ServiceMonitor", "PrometheusRule"}


def ran(*command: str, cwd: Path = ROOT) -> str:
    """Runs a tool; what it printed on stdout. Skips without the tool: `.ci/run` installs it where it can."""
    tool = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([tool, *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A program of deploy/ as a module."""
    path = DEPLOY / name
    monkeypatch.syspath_prepend(str(path.parent))
    return importlib.import_module(path.stem)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


# Rules


def test_promtool_finds_no_fault_in_the_rules() -> None:
    ran("promtool", "check", "rules", str(RULES))


def test_each_alert_is_raised_when_it_is_due_and_not_before() -> None:
    tested = yaml.safe_load((RULES.parent / "rules_test.yaml").read_text())["tests"]
    raised = {a["alertname"] for test in tested for a in test.get("alert_rule_test", ()) if a.get("exp_alerts")}
    raised |= {re.findall(r"StreamAdapt\w+", e["expr"])[0] for t in tested for e in t.get("promql_expr_test", ())
               if "StreamAdapt" in e["expr"]}  # fmt: skip

    assert {rule["alert"] for rule in rules() if "alert" in rule} == raised
    ran("promtool", "test", "rules", str(RULES.parent / "rules_test.yaml"))


def test_every_alert_has_its_section_in_the_readme_and_its_panel_and_says_how_bad_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = script(monkeypatch, "grafana/build.py").links()
    panels = {panel["id"]: panel for panel in json.loads(DASHBOARD.read_text())["panels"]}
    headings = set(re.findall(r"^#+ (StreamAdapt\w+)$", (ROOT / "README.md").read_text(), re.MULTILINE))
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}

    assert alerts.keys() == headings == links.keys()
    for name, rule in alerts.items():
        assert f"README.md#{name.lower()}" == rule["annotations"]["runbook"]
        assert links[name] == rule["annotations"]["dashboard"]
        assert "row" != panels[int(links[name].partition("viewPanel=")[2])]["type"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"].endswith(".")


def test_rules_and_panels_ask_only_for_what_there_is_with_labels_that_it_has() -> None:
    exposed = {f.name + s: set(f.labels) for f in FAMILIES for s in ("", "_bucket", "_sum", "_count")}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for expression in expressions():
        for name, matchers in re.findall(r"(?<![:\w])((?:stream_adapt|process)_\w+)(\{[^}]*\})?", expression):
            assert name in exposed.keys() | OTHERS, expression
            labels = set(re.findall(r'(\w+)\s*[!=]~?="?|(\w+)=~', matchers))
            named = {label for pair in labels for label in pair if label}
            assert named <= exposed.get(name, set()) | {"job", "le"}, expression
        assert set(re.findall(r"\b\w+:stream_adapt_\w+:\w+", expression)) <= recorded, expression


def test_the_check_knows_every_window_and_threshold_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    shortened = script(monkeypatch, "observe/check.py").shortened(RULES.read_text())

    short = [rule for group in yaml.safe_load(shortened)["groups"] for rule in group["rules"]]
    assert [rule.keys() for rule in rules()] == [rule.keys() for rule in short]
    assert [] == [rule["expr"] for rule in short if re.search(r"(\[|offset )\d+[mhd]", rule["expr"])]


# Dashboard


def test_the_dashboard_is_what_its_builder_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert script(monkeypatch, "grafana/build.py").built() == DASHBOARD.read_text(), "run `make dashboard`"


def test_every_panel_says_what_it_shows_and_judges_the_chosen_application_alone() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert 5 == sum(panel["type"] == "row" for panel in panels)
    for panel in panels:
        for target in panel.get("targets", ()):
            names = re.findall(r"\b(?:stream_adapt|process)_\w+(\{[^}]*\})?", target["expr"])
            assert all('job=~"$job"' in matchers for matchers in names), target["expr"]
            assert target["legendFormat"]
        assert panel["type"] == "row" or panel["description"].endswith(".")


# Containers


def test_hadolint_finds_no_fault_in_the_dockerfile() -> None:
    ran("hadolint", "deploy/Dockerfile")


def test_the_image_runs_as_nobody_in_particular() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]

    runtime = next(stage for stage in stages if " AS runtime" in stage)
    assert re.search(r"^USER 10001:10001$", runtime, re.MULTILINE)
    for target in ("cpu", "cuda"):
        assert any(stage.startswith(f"runtime AS {target}\n") for stage in stages)
        assert not any("USER root" in stage for stage in stages)


def test_the_compose_file_is_one() -> None:
    ran("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")


def test_the_compose_file_sets_keys_that_there_are_and_mounts_what_lies_here() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    keys = {row[0] for row in config.effective(config.load(None, {}))}
    names = {f"STREAM_ADAPT_{key.replace('.', '_').upper()}" for key in keys}
    services = compose["services"]

    assert set(services["stream-adapt"]["environment"]) <= names
    assert f"apache/kafka:{KAFKA_VERSION}" == services["kafka"]["image"]
    for service in services.values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], mount


def test_the_compose_files_commands_are_commands() -> None:
    from click.testing import CliRunner

    from stream_adapt.cli import cli

    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    commands = [services[name]["command"] for name in ("topics", "stream-adapt", "load")]
    commands.append(services["pretrain"]["command"][0].partition("stream-adapt ")[2].split())
    for command in commands:
        shown = CliRunner().invoke(cli, [*command, "--help"])
        assert 0 == shown.exit_code, (command, shown.output)


def test_prometheus_finds_the_members_of_the_compose_file_under_a_job_that_the_rules_know() -> None:
    ran("promtool", "check", "config", "deploy/prometheus/prometheus.yaml")
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]

    assert "stream-adapt" in scrape["job_name"]


# Kubernetes


def rendered(*more: str) -> list[dict[str, Any]]:
    text = ran("helm", "template", "films", str(CHART), "--kube-version", "1.31.0", *more)
    return [document for document in yaml.safe_load_all(text) if document]


def test_helm_finds_no_fault_in_the_chart() -> None:
    ran("helm", "lint", "--strict", str(CHART))


@pytest.mark.parametrize("more", [(), ("--set", EVERYTHING)], ids=["as it is", "with everything"])
def test_what_the_chart_renders_is_valid(tmp_path: Path, more: tuple[str, ...]) -> None:
    found = rendered(*more)
    known = [document for document in found if document["kind"] not in OPERATORS]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(known))
    ran("kubernetes-validate", "--strict", "-k", "1.31", str(tmp_path / "all.yaml"))

    kinds = {document["kind"] for document in found}
    assert {"StatefulSet", "Service", "ConfigMap", "PodDisruptionBudget"} <= kinds
    assert (OPERATORS <= kinds) == bool(more)


def test_pods_have_stable_names_secrets_by_reference_and_nothing_to_write_but_volumes() -> None:
    found = rendered("--set", EVERYTHING)
    pod = next(d for d in found if d["kind"] == "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["valueFrom"] for one in container["env"]}

    assert "metadata.name" == environment["STREAM_ADAPT_APP_INSTANCE"]["fieldRef"]["fieldPath"]
    assert {"name": "kafka", "key": "password"} == environment["SASL_PASSWORD"]["secretKeyRef"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "/healthz" == container["livenessProbe"]["httpGet"]["path"]
    assert "/readyz" == container["readinessProbe"]["httpGet"]["path"]
    assert 1 == container["resources"]["limits"]["nvidia.com/gpu"]
    assert not [d for d in found if d["kind"] == "Secret"]


def test_the_refresh_is_a_workload_of_its_own_with_a_gpu_and_members_have_nothing_to_write_models_with() -> None:
    found = rendered("--set", EVERYTHING)
    refresh = next(d for d in found if d["kind"] == "Deployment")
    members = next(d for d in found if d["kind"] == "StatefulSet")
    (container,) = refresh["spec"]["template"]["spec"]["containers"]
    labels = refresh["spec"]["template"]["metadata"]["labels"]
    service = next(d for d in found if d["kind"] == "Service")

    assert ["refresh", "--follow"] == container["args"][:2]
    assert container["image"].endswith(":cuda")
    assert 1 == container["resources"]["limits"]["nvidia.com/gpu"]
    assert [False, True] == [_models_are_read_only(one) for one in (refresh, members)]
    assert not service["spec"]["selector"].items() <= labels.items(), "nobody scrapes it as a member"
    assert not [d for d in rendered() if d["kind"] == "Deployment"], "unless it is asked for"


def _models_are_read_only(workload: dict[str, Any]) -> bool:
    pod = workload["spec"]["template"]["spec"]
    (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "models")
    return bool(mount.get("readOnly"))


def test_the_chart_ships_the_rules_and_the_dashboard_as_they_are() -> None:
    found = rendered("--set", EVERYTHING)
    rule = next(d for d in found if d["kind"] == "PrometheusRule")
    board = next(d for d in found if d["metadata"]["name"].endswith("-dashboard"))

    assert yaml.safe_load(RULES.read_text()) == rule["spec"]
    assert DASHBOARD.read_text().rstrip() == board["data"]["stream-adapt.json"].rstrip()


def test_the_charts_configuration_is_one(tmp_path: Path) -> None:
    path = tmp_path / "stream-adapt.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((CHART / "values.yaml").read_text())["config"]))

    assert "films" == config.load(path, {}).config.app.name
