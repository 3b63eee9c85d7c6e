"""Exits learn by distillation; FREE's adversary is asked for."""

from __future__ import annotations

import pytest

from offramp import cli
from offramp.cli.command_line import build_parser
from offramp.cli.commands.train import _config
from offramp.training.config import FREE, TrainConfig

ASKED = ("train", "--backbone", "tiny-opt", "--data", "none.jsonl", "--out", "none")


def config(*more: str) -> TrainConfig:
    found: TrainConfig = _config(build_parser().parse_args([*ASKED, *more]))
    return found


def test_the_command_trains_what_the_library_does() -> None:
    assert config() == TrainConfig() and not config().has_discriminator
    free = config("--losses", "adversarial=0.003")
    assert free == TrainConfig(**FREE) and free.has_discriminator


def test_a_weight_is_of_the_loss_that_it_names() -> None:
    asked = config("--losses", "cross_entropy=0.5,mine=0.1")
    assert asked == TrainConfig(cross_entropy=0.5, losses={"mine": 0.1})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--adversary", "hinge"), ("'--adversary' is not known", "--help")),
        (("--initial-layer", "closest"), ("'--initial-layer' is not known", "--help")),
        (("--objective", "free"), ("'--objective' is not known", "--help")),
        (("--regime", "mixed"), ("--regime 'mixed' is not known", "supervised")),
        (("--losses", "cross_entropy=-1"), ("cross_entropy must not be negative", "options")),
    ],
)
def test_what_is_no_objective_is_said_in_two_lines(
    asked: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ASKED, *asked]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all(word in "\n".join(said) for word in words)
