"""Exits learn by distillation; FREE's adversary is asked for, with all that is to be said of it."""

from __future__ import annotations

import pytest

from offramp import cli
from offramp.cli.command_line import build_parser
from offramp.cli.commands.train import _config
from offramp.training.config import ADVERSARY, FREE, TrainConfig

ASKED = ("train", "--backbone", "tiny-opt", "--data", "none.jsonl", "--out", "none")


def config(*more: str) -> TrainConfig:
    found: TrainConfig = _config(build_parser().parse_args([*ASKED, *more]))
    return found


def test_the_command_trains_what_the_library_does() -> None:
    assert config() == TrainConfig() and not config().has_discriminator
    assert config("--objective", "free") == TrainConfig(**FREE)
    assert config("--objective", "free").has_discriminator


def test_free_takes_what_is_said_of_its_adversary() -> None:
    asked = config("--objective", "free", "--adversarial", "0.1", "--no-conditional")
    assert asked == TrainConfig(adversarial=0.1, conditional=False)
    assert config("--spectral-norm", "--objective", "free").spectral_norm


def test_without_it_that_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ASKED, "--judged", "sequence"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and "--judged" in said[0] and "--objective free" in said[1]


@pytest.mark.parametrize("objective, shown", [("distillation", 0), ("free", len(ADVERSARY))])
def test_help_shows_the_adversary_with_free_alone(
    objective: str, shown: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--objective", objective, "--help"])
    lines = capsys.readouterr().out.splitlines()
    flags = [f"--{name.replace('_', '-')}" for name in ADVERSARY]
    assert sum(any(line.strip().startswith(f"{f} ") or line.strip().startswith(f"{f},")
                   for line in lines) for f in flags) == shown  # fmt: skip
