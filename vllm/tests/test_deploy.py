"""What deploy/vllm starts is a server that vLLM and the plug-in understand."""

from __future__ import annotations

from pathlib import Path

import yaml

from offramp_vllm.settings import wanted

DEPLOY = Path(__file__).parents[2] / "deploy" / "vllm"
MANIFEST = DEPLOY / "kserve.yaml"


def test_kserve_starts_and_probes_a_server_with_exits() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    [container] = yaml.safe_load(MANIFEST.read_text())["spec"]["predictor"]["containers"]
    made = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
    entry = wanted(made.additional_config)
    assert entry is not None and Path(entry["exits"]).parent == Path(made.model).parent
    assert container["name"] == "kserve-container"  # the one that KServe sends requests to
    ports = {one["containerPort"] for one in container["ports"]}
    assert ports == {made.port, container["readinessProbe"]["httpGet"]["port"]}


def test_nothing_runs_as_root_or_answers_strangers() -> None:
    [container] = yaml.safe_load(MANIFEST.read_text())["spec"]["predictor"]["containers"]
    rules = container["securityContext"]
    assert rules["runAsNonRoot"] and not rules["allowPrivilegeEscalation"]
    assert any(
        one["name"] == "VLLM_API_KEY" and "secretKeyRef" in one["valueFrom"]
        for one in container["env"]
    )
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    [user] = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert int(user) == rules["runAsUser"]
    ray = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text())
    assert ray["http_options"]["host"] == "127.0.0.1"


def test_the_image_for_gpus_does_not_ask_for_processors() -> None:
    stages = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")[1:]
    of = {stage.split("\n")[0].split(" AS ")[-1]: stage for stage in stages}
    assert [*of] == ["cpu", "gpu", "${DEVICE}"]
    assert [name for name, stage in of.items() if "VLLM_TARGET_DEVICE" in stage] == ["cpu"]
