"""What comes with a model is data: its code runs only where that is asked for."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.hub import check_device, load_processor
from offramp.core.storage import read_json, write_json

CODE = """
from pathlib import Path
from transformers import LlavaConfig, LlavaForConditionalGeneration
Path({mark!r}).touch()

class OddConfig(LlavaConfig):
    model_type = "odd_vlm"

class OddModel(LlavaForConditionalGeneration):
    config_class = OddConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder whose model brings its classes, and the mark that running them leaves."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "odd", tmp_path / "it-ran"
    families.build("llava").save_pretrained(folder, save_original_format=False)
    config = read_json(folder / "config.json")
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForImageTextToText": "odd.OddModel"}
    write_json(folder / "processor_config.json", {"auto_map": {"AutoProcessor": "odd.OddConfig"}})
    write_json(folder / "config.json", {**config, "model_type": "odd_vlm", "auto_map": classes})
    (folder / "odd.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    return folder, mark


def test_a_model_whose_files_lack_weights_is_refused(tmp_path: Path) -> None:
    """transformers would draw them, and say so in a warning."""
    families.build("llava").save_pretrained(tmp_path)
    assert Backbone.from_pretrained(tmp_path).depth
    config = read_json(tmp_path / "config.json")
    config["text_config"]["num_hidden_layers"] += 1
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="are not in its files") as caught:
        Backbone.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("device", ["hpu", "cuda:99", "meta", "kpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        check_device(device)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(with_code: tuple[Path, Path]) -> None:
    folder, mark = with_code
    for load in (Backbone.from_pretrained, load_processor):
        with pytest.raises(InputError, match="code of its own, which was not run") as caught:
            load(folder)
        assert len(str(caught.value).splitlines()) == 2 and not mark.exists()
    assert Backbone.from_pretrained(folder, trust_remote_code=True).family.discovered
    assert mark.exists()
