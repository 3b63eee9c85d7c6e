"""What deploy/vllm starts is a server that vLLM and the plug-in understand."""

from __future__ import annotations

from pathlib import Path

import yaml

from offramp_vllm.settings import wanted

MANIFEST = Path(__file__).parents[2] / "deploy" / "vllm" / "kserve.yaml"


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
