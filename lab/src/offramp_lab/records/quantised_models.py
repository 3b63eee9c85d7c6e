"""Exits beside quantised backbones, scheme by scheme: load, train, calibrate, save, load, decode.

    python -m offramp_lab.records.quantised_models                # the tiny OPT, every scheme
    python -m offramp_lab.records.quantised_models --photo        # the photo model, int8 and int4
    python -m offramp_lab.pages.readme                            # the tables of the pages

Photographs are read from --data. A scheme whose package is missing, or that does not run on this
machine, is a row that says so.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm.rows import read_photographs

from offramp.adapter import Adapter
from offramp.answers import full_model_answers
from offramp.calibration.calibrate import calibrate
from offramp.data.example import Example
from offramp.data.scenes.tasks import captions
from offramp.engine.policy import ExitPolicy
from offramp.engine.self_check import check_decoding
from offramp.engine.teacher_forcing import Answered, record
from offramp.errors import InputError, OfframpError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.hub import load_processor
from offramp.models.input_processor import InputProcessor
from offramp.models.photo.build import built_folder
from offramp.models.quantized.weights import scheme
from offramp.models.shipped import tiny_folder
from offramp.storage import write_json
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import train
from offramp_lab.records.record import Record, asked

RECORD = Record("quantised-models")
PACKAGES = (
    "torch", "transformers", "torchao", "bitsandbytes", "optimum-quanto", "compressed-tensors",
    "gptqmodel", "hqq",
)  # fmt: skip
TRAIN = TrainConfig(
    exit_kind="layer",
    steps=40,
    batch_size=4,
    evaluate_every=20,
    max_new_tokens=12,
    validation_fraction=0.25,
    **FREE,
)
"""Few steps: that every tensor learns is asked here, not how well."""
MODES = {"full": "plain", "early_exit": "exits", "lossless": "lossless"}
"""Modes, and what part 3 of the self-check calls them."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
IMAGES, PROMPTS = 24, 8
"""Images to train on and as many to calibrate on; answers that are held side by side."""


# -- schemes ---------------------------------------------------------------------------------------


def _torchao(name: str, **options: Any) -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    config = getattr(torchao.quantization, name)(**options)
    torchao.quantization.quantize_(torch.nn.Linear(64, 64), config)  # says which kernels it lacks
    return TorchAoConfig(config)


def _transformers(name: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**options)


def _needs(package: str) -> bool:
    if _version(package) is None:
        raise InputError(f"needs the package {package}, which is not installed", "Install it.")
    return True


def _compressed(bits: int) -> Path:
    """A checkpoint of the tiny model as compressed-tensors packs it, rounded to the nearest."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, apply_quantization_config
    from compressed_tensors.quantization import QuantizationConfig as Config
    from compressed_tensors.quantization import QuantizationScheme as Scheme

    out = Path(tempfile.mkdtemp())
    model: Any = Backbone.from_pretrained(tiny_folder("opt"), dtype=torch.float32).model
    weights = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=True)
    groups = {"all": Scheme(targets=["Linear"], weights=weights)}
    apply_quantization_config(model, Config(config_groups=groups, ignore=["re:.*lm_head"]))
    for part in model.modules():
        if hasattr(part, "weight_scale"):
            part.weight_scale.data = part.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    load_processor(tiny_folder("opt")).save_pretrained(out)
    return out


_INT4: Any = getattr(torch, "int4")  # noqa: B009  (torch names it late)
_SKIP = {"llm_int8_skip_modules": ["model.vision_tower", "lm_head"]}
"""The photo model's tower has torch's own transformer layers, which read weights as they lie."""
_NF4 = {**_SKIP, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
SCHEMES: dict[str, Callable[[], Any]] = {
    "quantize=int8": lambda: "int8",
    "quantize=int4": lambda: "int4",
    "torchao int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao int4": lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=_INT4),
    "torchao int4, packed": lambda: _torchao("Int4WeightOnlyConfig", group_size=32),
    "torchao float8": lambda: _torchao("Float8WeightOnlyConfig"),
    "torchao int8, activations too": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes 8 bit": lambda: _transformers("BitsAndBytesConfig", load_in_8bit=True, **_SKIP),
    "bitsandbytes 4 bit": lambda: _transformers("BitsAndBytesConfig", load_in_4bit=True, **_NF4),
    "quanto int8": lambda: _transformers("QuantoConfig", weights="int8"),
    "quanto int4": lambda: _transformers("QuantoConfig", weights="int4"),
    "quanto float8": lambda: _transformers("QuantoConfig", weights="float8"),
    "compressed-tensors 8 bit": lambda: _compressed(8),
    "compressed-tensors 4 bit": lambda: _compressed(4),
    "HQQ 4 bit": lambda: _transformers("HqqConfig", nbits=4, group_size=64),
    "GPTQ 4 bit": lambda: _needs("gptqmodel") and _transformers("GPTQConfig", bits=4),
    "AWQ 4 bit": lambda: _needs("gptqmodel") and _transformers("AwqConfig", bits=4),
    "FP8, blocks": lambda: _transformers("FineGrainedFP8Config"),
}
"""Configurations of transformers, or checkpoints, made when they are asked for."""
ON_PHOTOGRAPHS = (
    "torchao int8",
    "torchao int4",
    "quanto int8",
    "bitsandbytes 8 bit",
    "bitsandbytes 4 bit",
)


# -- models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What a scheme is tried on, and images of its world."""

    folder: Path
    examples: Sequence[Example]

    def load(self, config: Any = None) -> tuple[Backbone, InputProcessor]:
        """In float32, or quantised: by our own word, as `config` says, or from a checkpoint."""
        folder = config if isinstance(config, Path) else self.folder
        if isinstance(config, str):
            backbone = Backbone.from_pretrained(folder, quantize=config)
        else:
            more = {} if config is None or folder is config else {"quantization_config": config}
            backbone = Backbone.from_pretrained(folder, dtype=torch.float32, **more)
        return backbone, InputProcessor(backbone, load_processor(self.folder))


def _model(kind: str, data: Path) -> Model:
    """The tiny one, or that of photographs."""
    if kind == "tiny":
        return Model(tiny_folder("opt"), captions("calibration", 2 * IMAGES).examples)
    found = {example.group: example for example in read_photographs(data)["captions_val"]}
    return Model(built_folder(), [*found.values()][: 2 * IMAGES])


# -- one scheme ------------------------------------------------------------------------------------


def tried(
    make: Callable[[], Any], model: Model, plain: Backbone, told: Sequence[Answered]
) -> dict[str, Any]:
    """What came of a scheme.

    plain: the float model. told: its own answers.
    """
    try:
        config = make()
        backbone, encoder = model.load(config)
    except Exception as error:  # of a package that is missing, or that does not run here
        return {"refused": _reason(error)}
    found = {"scheme": scheme(backbone.layers), "agreement": agreement(backbone, encoder, told)}
    with tempfile.TemporaryDirectory() as folder:
        out, float_out = Path(folder) / "exits", Path(folder) / "float"
        adapter = train(backbone, encoder.processor, model.examples[:IMAGES], TRAIN, out)
        depths = adapter.exits.depths
        found["unmoved"] = _alike(adapter.exits.modules, Exits(backbone, depths))
        found["exits"] = adapter.metrics["agreement"]
        policy = ExitPolicy(dict.fromkeys(depths, 0.8))
        calibration = calibrate(
            adapter, encoder, model.examples[IMAGES:], policy, target=0.5, **OPTIONS
        )
        found["calibrated"] = calibration.n
        again, _ = model.load(make())
        loaded = Adapter.load(out, again)
        found["tensors"] = len(loaded.exits.modules.state_dict())
        found["kept"] = _alike(adapter.exits.modules, loaded.exits.modules)
        found |= _decoded(loaded.with_policy(policy), encoder, model.examples[IMAGES:])
        Adapter(plain, ExitSet(Exits(plain, depths)), policy).save(float_out)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            Adapter.load(float_out, again)
        found["beside"] = any("calibrate again" in str(w.message) for w in said)
    return found


def _reason(error: Exception) -> str:
    """Why a scheme is not to be had here, in a line."""
    text = error.problem if isinstance(error, OfframpError) else _first(error)
    return " ".join(text.split())[:200]


def _first(error: BaseException) -> str:
    return str(error) if error.__cause__ is None else _first(error.__cause__)


def agreement(backbone: Backbone, encoder: InputProcessor, told: Sequence[Answered]) -> float:
    """Share of the float model's tokens that this one would write as well, behind the same text."""
    same = total = 0
    for row in told:
        batch = record(encoder, [row], (1,))
        said = backbone.logits(batch.teacher[batch.mask]).argmax(-1)
        same += int((said == batch.targets[batch.mask]).sum())
        total += len(said)
    return same / total


def _alike(one: Exits, other: Exits) -> int:
    """How many tensors are the same in both."""
    state = other.state_dict()
    return sum(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def _decoded(
    adapter: Adapter, encoder: InputProcessor, examples: Sequence[Example]
) -> dict[str, Any]:
    """The modes beside the quantised model's own `generate`: its logits, and its answers."""
    backbone = adapter.backbone
    check = check_decoding(backbone, encoder.prompts(examples[:2]), depths=adapter.exits.depths)
    same: dict[str, int] = dict.fromkeys(MODES, 0)
    early: list[int] = []
    for example in examples[:PROMPTS]:
        inputs = encoder.prompts([example])
        own = backbone.model.generate(**inputs, **OPTIONS)
        for mode in MODES:
            made = adapter.generate(inputs, mode=mode, **OPTIONS)
            same[mode] += torch.equal(made.sequences, own)
            if mode == "early_exit":
                early += made.depths[0].tolist()
    return {
        "logits": {mode: getattr(check, column) for mode, column in MODES.items()},
        "allowed": check.allowed,
        "answers": {**same, "of": PROMPTS},
        "early": sum(depth < backbone.depth for depth in early) / len(early),
    }


# -- all of them -----------------------------------------------------------------------------------


def main() -> None:
    arguments = asked(
        str(__doc__).splitlines()[0],
        photo=False,
        more=lambda parser: parser.add_argument("schemes", nargs="*", help="run these alone"),
    )
    warnings.filterwarnings("ignore")
    kind, usual = ("photo", ON_PHOTOGRAPHS) if arguments.photo else ("tiny", (*SCHEMES,))
    model = _model(kind, arguments.data)
    plain, encoder = model.load()
    some = model.examples[IMAGES:][:PROMPTS]
    told = full_model_answers(
        encoder, some, batch_size=32, max_new_tokens=OPTIONS["max_new_tokens"]
    )
    kept = RECORD.read()
    rows: dict[str, Any] = kept.setdefault(kind, {})
    for name in arguments.schemes or usual:
        rows[name] = tried(SCHEMES[name], model, plain, told)
        kept[kind] = {n: rows[n] for n in SCHEMES if n in rows}
        here = {package: v for package in PACKAGES if (v := _version(package))}
        kept["versions"] = kept.get("versions", {}) | here
        write_json(RECORD.path, kept)
        print(name, rows[name], file=sys.stderr, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
