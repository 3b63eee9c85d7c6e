"""vLLM with exits and without, and offramp's own engines, on the same prompts; rewrites vllm.json.

    python vllm/benchmarks/record_vllm.py --vllm .venv-vllm/bin/python

Captions of photographs by the photo model's decoder, 1, 8 and 24 at once, greedy, in one thread.
Image features are given, so no vision tower is in the CPU seconds. --vllm: of the environment that
`make test-vllm` makes. Parts: prompts; by load what vLLM and what offramp take; a random model of
three billion weights, which takes 12 GB; one of nearly none, for the host's share; and what is
promised by trust inside vLLM, calibrated on the choosing half with the vision tower. EAGLE-3 is
measured too where side_by_side has trained its drafter. Parts that are not asked for stay as the
record has them.
What vLLM took is kept in runs/vllm by the exits' digest, so that a run that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm.rows import read_photographs
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.storage import digest_file, digest_rows, read_json
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_cache import VisionCache
from offramp.promises.guarantee import SCALES
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.experiment import same
from offramp_lab.places import ROOT, RUNS
from offramp_lab.records.photographs.opened import THRESHOLDS, policy_of
from offramp_lab.records.record import Record, Some, asked
from offramp_lab.records.subjects import halves, load_photo
from offramp_llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf
from offramp_vllm.exports.serving import PYTHON
from offramp_vllm.exports.vllm import PROMPTS, _language_model, export_vllm

RECORD = Record("vllm", "vllm/benchmarks/record_vllm.py")
DRAFTER = RUNS / "side_by_side" / "drafter"
LOADS = (1, 8, 24)
PROMISED = 0.0625
"""CIDEr that may be lost."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
SPEED, FORCED = (Path(__file__).with_name(f"{name}.py") for name in ("speed", "forced"))
SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
EXIT = 8
TINY: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""Computes next to nothing: what a step takes is the host's share."""
FORMAT = "q8_0"
FULL = "full depth"
OTHERS = ("trust 0.4", THRESHOLDS, "thresholds 0.4, 0.7")
"""Policies beside the one that ships."""
WAYS = {
    FULL: "",
    "full depth, compiled": "",
    "lossless": "exits",
    "early exit": "exits",
    **{f"early exit, {name}": name for name in OTHERS},
    "EAGLE-3": "",
    "n-grams": "",
}
"""Of vLLM, with the folder of the exits."""
MODES = {"full depth": "full", "lossless": "lossless", "early exit": "early_exit"}


def main() -> None:
    loads = (f"{who} {load}" for load in LOADS for who in ("vllm", "offramp"))
    arguments = asked(
        __doc__,
        photo=True,
        vllm=None,
        photographs=100,
        parts=Some(("shape", "host", "promised", "prompts", *loads)),
    )
    made: dict[str, Callable[[], Any]] = {
        "shape": partial(shape, arguments, "shape", SHAPE, EXIT),
        "host": partial(shape, arguments, "host", TINY, 1),
        "promised": partial(promised, arguments),
        "prompts": partial(prompts, arguments),
        **{f"vllm {load}": partial(in_vllm, arguments, load) for load in LOADS},
        **{f"offramp {load}": partial(in_offramp, arguments, load) for load in LOADS},
    }
    RECORD.parts(made, arguments.parts)


def shape(arguments: Any, name: str, config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """A random model in bfloat16, every token of which leaves at an exit; predicted: by the bytes
    of weights that a token reads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = RUNS / RECORD.name / name
    if not (folder / "exits").is_dir():
        torch.set_default_dtype(torch.bfloat16)
        with no_init_weights():
            model: Any = Qwen2ForCausalLM(Qwen2Config(**config))
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.uniform_(-0.02, 0.02)
        model.save_pretrained(folder / "model")
        backbone = Backbone.of(model.eval())
        exits = ExitSet(Exits(backbone, [depth]).requires_grad_(False))
        leaving = ExitPolicy({depth: 0.0})
        export_vllm(Adapter(backbone, exits, leaving), folder / "exits", [range(5, 95, 7)])
        del model, backbone, exits
    out, ways = folder / "seconds.json", []
    for more in ([], ["exits"]):  # each in a process of its own: two would not fit
        run(arguments.vllm, FORCED, folder, out, *more)
        ways += json.loads(out.read_text())
    if any(way["depths"] != [depth] for way in ways if way["exits"]):
        raise SystemExit("Not every token left at the exit: the check at start switched it off.")
    wide, inner, words = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = config["num_key_value_heads"] / config["num_attention_heads"]
    layer, head = wide * wide * (2 + 2 * heads) + 3 * wide * inner, wide * words
    predicted = (config["num_hidden_layers"] * layer + head) / ((depth + 1) * layer + head)
    return {**config, "exit": depth, "predicted": predicted, "ways": ways}


def promised(arguments: Any) -> dict[str, Any]:
    """What `offramp calibrate` finds of captions, by the CIDEr that they may lose."""
    out, scale = RUNS / RECORD.name / "promised", SCALES["cider_drop"]
    files = {
        "held": halves(arguments.data)[0],
        "train": read_photographs(arguments.data)["captions"],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, examples in files.items():
        rows = [{"image": str(e.image), "prompt": e.prompt, "answers": e.answers} for e in examples]
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = (
        *("calibrate", "photo", "--engine", "vllm", "--dtype", "float32", "--json"),
        *("--data", out / "held.jsonl", "--frequencies", out / "train.jsonl"),
        *("--risk", "cider_drop", "--target", PROMISED / scale, "--out", out / "exits"),
        *("--max-new-tokens", OPTIONS["max_new_tokens"]),
    )
    environment = {**os.environ, PYTHON: str(arguments.vllm.absolute())}
    done = subprocess.run(
        [sys.executable, "-m", "offramp", *map(str, command)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )
    found = json.loads(done.stdout)
    return {
        "target": PROMISED,
        "measured": scale * found["measured"],
        "bound": scale * found["bound"],
        **{name: found["policy"].get(name) for name in ("trust", "thresholds")},
        **{name: found[name] for name in ("n", "attempt", "confidence", "reason", "ways")},
    }


def run(python: Path, script: Path, *words: Any) -> None:
    """Run a script of this folder, which imports nothing of offramp's own."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python.absolute()), str(script), *map(str, words)]
    subprocess.run(command, check=True, env=env)


def loaded(arguments: Any) -> tuple[Adapter, InputProcessor, list[Mapping[str, Any]]]:
    """The photo model, its encoder, and the photographs' prompts, none of which chose a
    threshold."""
    adapter, encoder = load_photo(arguments.adapter)
    measuring = halves(arguments.data)[1][: arguments.photographs]
    return adapter, encoder, [encoder.prompts([example]) for example in measuring]


def policies(adapter: Adapter) -> dict[str, ExitPolicy]:
    """Return the policies by folder: as the exits ship, and `OTHERS`."""
    return {"exits": adapter.policy, **{name: policy_of(adapter, name) for name in OTHERS}}


def prompts(arguments: Any) -> dict[str, Any]:
    """Write what vLLM reads: the decoder as a plain Llama, exits by policy, and embeddings of each
    prompt [T, D], the image's among them, with its ids; and answer in PyTorch."""
    adapter, encoder, inputs = loaded(arguments)
    out = RUNS / RECORD.name
    texts = [encoder.tokenizer(text)["input_ids"] for text in PROMPTS]
    for name, policy in policies(adapter).items():
        export_vllm(Adapter(adapter.backbone, adapter.exits, policy), out / name, texts)
    decoder = _language_model(adapter.backbone)
    decoder.config.tie_word_embeddings = True
    decoder.save_pretrained(out / "decoder")
    encoder.tokenizer.save_pretrained(out / "decoder")
    embeds: dict[str, Tensor] = {}
    said: dict[str, list[list[int]]] = {name: [] for name in ("full", *policies(adapter))}
    for place, one in enumerate(inputs):
        with entering(adapter.backbone) as seen:
            for name, policy in policies(adapter).items():
                made = adapter.generate(dict(one), policy=policy, mode="early_exit", **OPTIONS)
                said[name].append(made.new_tokens[0].tolist())
            made = adapter.generate(dict(one), mode="full", **OPTIONS)
            said["full"].append(made.new_tokens[0].tolist())
        embeds[f"{place:03}"] = seen[0][0].contiguous()
    save_file(embeds, out / "prompts.safetensors")
    (out / "said.json").write_text(json.dumps(said))
    ids = [one["input_ids"][0].tolist() for one in inputs]
    (out / "ids.json").write_text(json.dumps(ids))
    tokens = {name: sum(map(len, rows)) for name, rows in said.items()}
    exits = {
        name: {
            "digest": digest_file(out / name / "exits.safetensors"),
            "thresholds": policy.thresholds,
            "first": policy.first,
            "drafts": policy.drafts,
            "trust": policy.trust,
        }
        for name, policy in policies(adapter).items()
    }
    return {"photographs": len(inputs), "tokens": tokens, **OPTIONS, "exits": exits}


@contextmanager
def entering(backbone: Any) -> Iterator[list[Tensor]]:
    """The states [1, T, D] that enter the first layer over a prompt."""
    seen: list[Tensor] = []

    def hook(module: Any, args: Any, kw: Any) -> None:
        if not seen:
            seen.append((args[0] if args else kw["hidden_states"]).detach().clone())

    handle = backbone.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def in_vllm(arguments: Any, load: int) -> list[dict[str, Any]]:
    """vLLM's ways, anew unless exits, plug-in and ways are those of a run before; EAGLE-3 as the
    record has it where its drafter is not there."""
    out = RUNS / RECORD.name
    drafter = DRAFTER / "model.safetensors"
    ways = [way for way in WAYS if way != "EAGLE-3" or drafter.is_file()]
    code = [SPEED, *sorted((ROOT / "vllm" / "src").rglob("*.py"))]
    exits = exits_of(out)
    files = [out / "said.json", *(out / name / "vllm.json" for name in exits), *code]
    key = digest_rows(map(digest_file, files))
    file = out / f"seconds-{load}-{key[:12]}-{'-'.join(str([*WAYS].index(w)) for w in ways)}.jsonl"
    run(arguments.vllm, SPEED, out, load, file, *ways)
    said = json.loads((out / "said.json").read_text())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows.sort(key=lambda row: row["group"])
    by_way = {name: [row for row in rows if row["way"] == name] for name in ways}
    made = {row["way"]: row for row in RECORD.read().get(f"vllm {load}", ())}
    for name, found in by_way.items():
        tokens = [one for row in found for one in row["tokens"]]
        rounds, kept = (sum(row["rounds"][part] for row in found) for part in (0, 1))
        made[name] = {
            **way("vLLM", name, [row["seconds"] for row in found], tokens, said, WAYS[name]),
            "exits": exits.get(WAYS[name]),
            "drafter": digest_file(drafter) if name == "EAGLE-3" else None,
            "tokens_a_round": 1 + kept / rounds if rounds else None,
        }
    return [made[name] for name in WAYS if name in made]


def exits_of(out: Path) -> dict[str, Any]:
    """By folder: the digest of the exits, and their thresholds."""
    found: dict[str, Any] = read_json(out / "prompts.json")["exits"]
    return found


def way(
    engine: str, name: str, seconds: Sequence[float], tokens: Any, said: Any, of: str
) -> dict[str, Any]:
    """What was measured of a way. of: the exits, whose answers it should give, as PyTorch alone
    does; without exits, or where drafts are verified, the full model's."""
    of = of if "early" in name else "full"
    return {
        "engine": engine,
        "way": name,
        "seconds": [round(s, 4) for s in seconds],
        "same_answers": same(tokens, said[of]),
        "full_answers": same(tokens, said["full"]),
        "answers": len(tokens),
    }


def in_offramp(arguments: Any, load: int) -> list[dict[str, Any]]:
    """The batch engine in PyTorch and inside llama.cpp; what the tower sees is kept from a first
    pass."""
    adapter, _, inputs = loaded(arguments)
    out = RUNS / RECORD.name
    if not (out / FORMAT).is_dir():
        export_gguf(adapter, out / FORMAT, FORMAT)
    sizes = EngineOptions(context=128, sequences=load)
    runtime = LlamaCppRuntime(adapter, out / FORMAT, engine=sizes)
    config, cache = EngineConfig(slots=load, limit=128), VisionCache()
    cores = {
        "offramp, PyTorch": EngineCore(
            adapter.backbone, adapter.exits, adapter.policy, config, vision_cache=cache
        ),
        "offramp, llama.cpp": EngineCore(
            adapter.backbone,
            adapter.exits,
            adapter.policy,
            config,
            host=runtime.host(adapter.policy, cache),
        ),
    }
    groups = [inputs[start : start + load] for start in range(0, len(inputs), load)]
    seconds: dict[tuple[str, str], list[float]] = {(e, m): [] for e in cores for m in MODES}
    tokens: dict[tuple[str, str], list[list[int]]] = {key: [] for key in seconds}
    for group in groups:
        answer(cores["offramp, PyTorch"], group, "early_exit")
        for (name, mode), spent in seconds.items():
            begin = time.process_time()
            said = answer(cores[name], group, MODES[mode])
            spent.append(time.process_time() - begin)
            tokens[name, mode] += said
    alone, exits = json.loads((out / "said.json").read_text()), exits_of(out)["exits"]
    return [
        {
            **way(
                f"{name}{', ' + FORMAT if 'llama' in name else ''}",
                mode,
                spent,
                tokens[name, mode],
                alone,
                "exits",
            ),
            "exits": None if mode == FULL else exits,
        }
        for (name, mode), spent in seconds.items()
    ]


def answer(core: EngineCore, group: Sequence[Mapping[str, Any]], mode: str) -> list[list[int]]:
    handles = [core.add(Request(dict(one), mode, options=OPTIONS)) for one in group]
    core.run()
    return [handle.result().output.new_tokens[0].tolist() for handle in handles]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
