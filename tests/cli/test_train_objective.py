"""Exits learn by distillation; FREE's adversary is asked for, and one option says what it is."""

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
    assert config("--objective", "free") == TrainConfig(**FREE)
    assert config("--objective", "free").has_discriminator


def test_free_takes_what_is_said_of_its_adversary() -> None:
    free = ("--objective", "free")
    asked = config(*free, "--losses", "adversarial=0.1", "--adversary", "conditional=false")
    assert asked == TrainConfig(adversarial=0.1, conditional=False)
    asked = config("--adversary", "hinge,spectral-norm=true,gradient_penalty=0.5", *free)
    assert asked == TrainConfig(**FREE, adversary="hinge", spectral_norm=True, gradient_penalty=0.5)
    assert config("--losses", "feature_matching=1", "--adversary", "hinge").has_discriminator


def test_a_weight_is_of_the_loss_that_it_names() -> None:
    asked = config("--losses", "cross_entropy=0.5,mine=0.1")
    assert asked == TrainConfig(cross_entropy=0.5, losses={"mine": 0.1})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--adversary", "judged=sequence"), ("--adversary", "--objective free")),
        (("--objective", "free", "--adversary", "judged=all"), ("judged: 'all' is not", "token")),
        (("--objective", "free", "--adversary", "judge=token"), ("'judge=token'", "judged")),
        (("--objective", "free", "--adversary", "conditional=2"), ("conditional: '2'", "false")),
        (("--losses", "cross_entropy=-1"), ("cross_entropy must not be negative", "options")),
    ],
)
def test_what_is_not_an_adversary_is_said_in_two_lines(
    asked: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ASKED, *asked]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all(word in "\n".join(said) for word in words)
