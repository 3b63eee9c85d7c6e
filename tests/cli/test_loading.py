"""What the commands load a model onto, and what they say of it."""

from __future__ import annotations

import logging

import pytest
import torch

from offramp.cli.loading import choose_device


@pytest.mark.parametrize(
    ("gpu", "asked", "is_tiny", "device", "said"),
    [
        (True, "auto", False, "cuda", "this machine has a GPU"),
        (True, "auto", True, "cpu", "a tiny model is faster there"),
        (True, "cpu", False, "cpu", "as asked"),
        (False, "auto", False, "cpu", None),
        (False, "cpu", False, "cpu", None),
    ],
)
def test_with_a_gpu_the_device_is_said_and_why(
    gpu: bool,
    asked: str,
    is_tiny: bool,
    device: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(logging.INFO):
        assert choose_device(asked, is_tiny=is_tiny) == device
    assert (said in caplog.text) if said else not caplog.text
