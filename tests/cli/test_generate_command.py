"""`offramp generate`: sampling, streaming, several prompts, text alone, colours."""

from __future__ import annotations

import http.server
import io
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapters import trained as adapter_of
from command_line import RunCommand, assert_two_lines, parser_of
from PIL import Image
from smolvlm import save_smolvlm
from transformers import AutoProcessor

from offramp.adapter.shipped import example_picture, tiny_exits
from offramp.cli.command_line import _without_pytorch, build_parser
from offramp.cli.commands import generate
from offramp.core.errors import StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.storage import read_json
from offramp.engines import ENGINES, DecoderEngine
from offramp.engines.loading import load, usual_prompt
from offramp.inputs.image import open_rgb
from offramp.promises.verdict import EXACT, NONE
from offramp_llama_cpp import command_line as edge

NAMES = ("--temperature", 3.0)
UNLIKE = "a prompt unlike the calibrated ones) The full model's words: --mode lossless."


def asked(adapter: Path, photos: Path, *more: object) -> tuple[object, ...]:
    return (
        "generate",
        "--adapter",
        adapter,
        "--image",
        photos / "0.png",
        "--threshold",
        0.5,
        "--max-new-tokens",
        8,
        *more,
    )


def test_a_seed_draws_the_same_and_another_seed_something_else(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    def answer(*more: object) -> str:
        code, out, _ = run(*asked(trained, photos, "--json", *more))
        assert code == 0
        found: str = json.loads(out)["answer"]
        return found

    warm = [answer(*NAMES, "--seed", seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert answer(*NAMES, "--top-k", 1) == answer()
    assert answer("--top-p", 0.001) == answer()


def test_streaming_prints_the_answer_as_text(run: RunCommand, trained: Path, photos: Path) -> None:
    whole = json.loads(run(*asked(trained, photos, "--json"))[1])["answer"]
    code, out, _ = run(*asked(trained, photos, "--stream"))
    assert code == 0 and out.strip() == whole
    assert_two_lines(run(*asked(trained, photos, "--stream", "--json")), "--stream", "--json")


def test_stdout_is_the_answer_alone_and_depths_are_told_on_stderr(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    row = json.loads(run(*asked(trained, photos, "--json"))[1])
    code, out, err = run(*asked(trained, photos, "--depths"))
    assert code == 0 and out == row["answer"] + "\n"
    told = [f"{step['token'].strip()}/{step['depth']}" for step in row["steps"]]
    assert " ".join(told) in err.splitlines()
    assert "/" not in run(*asked(trained, photos, "--quiet"))[2]
    two = ("--image", photos / "0.png", photos / "1.png", "--threshold", 0.5)
    lines = run("generate", trained, *two, "--max-new-tokens", 8)[1].splitlines()
    assert lines[0] == f"{photos / '0.png'}: {row['answer']}" and len(lines) == 2


@pytest.mark.parametrize(
    ("prompts", "asked_for"),
    [
        (None, "Caption:"),
        ([["Question: ", "? Answer:"], ["What color?"]], "Caption:"),
        (
            [["Question: ", "? Answer:"], ["What color?"], ["A caption of this"]],
            "A caption of this",
        ),
    ],
)
def test_without_a_prompt_the_calibrated_caption_is_asked_for(prompts: Any, asked_for: str) -> None:
    calibration = prompts and {"conditions": {"prompts": prompts}}
    adapter: Any = SimpleNamespace(calibration=calibration)
    assert usual_prompt(adapter) == asked_for


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_streamed_answer_that_cannot_be_written_is_two_lines(
    run: RunCommand, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def streamed(stdout: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stdout)
            return run(*asked(trained, photos, "--stream"))

    assert_two_lines(streamed(None), "stdout is closed")
    with open("/dev/full", "w") as full:
        assert_two_lines(streamed(full), "Cannot write to stdout")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_so_it_is_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(StorageError, match="stdout is closed"):
        edge._print_part("a dog")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(StorageError, match="Cannot write to stdout"):
            edge._print_part("a dog")


def test_prompts_are_read_until_an_empty_line(
    run: RunCommand, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = "Question: how many objects? Answer:\nCaption:\n\nCaption:\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(prompts))
    one = ("--image", photos / "0.png", "--max-new-tokens", 8)
    code, out, _ = run("chat", trained, *one)
    answers = out.splitlines()
    assert code == 0 and len(answers) == 2 and answers[0] != answers[1]
    two = ("--image", photos / "0.png", photos / "1.png")
    assert_two_lines(run("chat", trained, *two), "one image")


def test_a_prompt_without_an_image_is_answered_where_the_model_does(
    run: RunCommand, trained: Path, tmp_path: Path
) -> None:
    save_smolvlm(tmp_path / "model")
    backbone = Backbone.from_pretrained(tmp_path / "model")
    adapter_of(backbone).save_pretrained(tmp_path / "exits")
    words = ("--prompt", "What is this?", "--max-new-tokens", 4, "--json")
    code, out, _ = run("generate", "--adapter", tmp_path / "exits", *words)
    row = json.loads(out)
    assert code == 0 and row["image"] is None and len(row["steps"]) == 4
    assert_two_lines(run("generate", "--adapter", trained, *words), "without its image", "--image")


def test_an_image_unlike_the_calibrated_ones_is_told_and_read_once_to_be_looked_at(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    noise, read = tmp_path / "noise.png", list[Path]()
    Image.effect_noise((72, 72), 90).convert("RGB").save(noise)

    def noted(image: Any, *more: Any, **how: Any) -> Any:
        read.extend([image] if isinstance(image, Path) else [])
        return open_rgb(image, *more, **how)

    for module in ("image", "example"):
        monkeypatch.setattr(f"offramp.inputs.{module}.open_rgb", noted)
    assert run("generate", "tiny-opt", "--image", noise)[0] == 0
    assert "Nothing is promised of it. (image or prompt is unlike those calibrated" in caplog.text
    assert "Promised" not in caplog.text
    assert len(read) == 2  # checked before the model is loaded, then answered


def test_what_is_guaranteed_is_told_of_each_prompt(
    run: RunCommand, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Caption:\nCaption:\nWrite a poem.\n\n"))
    image = photos / "0.png"
    assert run("chat", "tiny-opt", "--image", image)[0] == 0
    said = [r.message for r in caplog.records if r.message.startswith(("Promised", NONE))]
    promised = "Promised: at most 0.75% differ, with 95% confidence. More: offramp inspect tiny-opt"
    assert said == [promised, promised, f"{NONE} ({UNLIKE}"]
    assert len(promised.split()) <= 15
    caplog.clear()
    assert run("generate", "tiny-opt", "--image", image, "--mode", "lossless")[0] == 0
    assert EXACT in caplog.text and "Promised" not in caplog.text


@pytest.mark.parametrize(("variable", "painted"), [(None, True), ("", True), ("1", False)])
def test_no_color_is_heeded(
    variable: str | None, painted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr("sys.stderr", type("Terminal", (), {"isatty": lambda _: True})())
    assert ("\033[" in generate.painter()("dog", 2, 12)) is painted


def test_the_longest_answer_is_what_was_calibrated(
    run: RunCommand, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_exits("opt")
    known = read_json(folder / "adapter.json")["calibration"]["conditions"]["longest"]

    def said(*more: object) -> str:
        caplog.clear()
        picture = example_picture("offramp/tiny-opt")
        with caplog.at_level(logging.INFO):
            assert run("generate", "--adapter", folder, "--image", picture, *more)[0] == 0
        return caplog.text

    assert "Promised: at most 0.75% differ, with" in (told := said()) and NONE not in told
    assert f"up to {known + 1} tokens where up to {known}" in said("--max-new-tokens", known + 1)


@pytest.mark.parametrize("words", [("a ball?",), ("--prompt", "a ball?")])
def test_a_question_may_stand_alone(run: RunCommand, photos: Path, words: tuple[str, ...]) -> None:
    image = ("--image", photos / "0.png")
    short = ("--max-new-tokens", 4, "--json")
    answers = [
        run("generate", "tiny-opt", *line)
        for line in ((*image, *short, *words), (*short, *image, *words), (*words, *image, *short))
    ]
    assert {(code, out) for code, out, _ in answers} == {(0, answers[0][1])}
    assert json.loads(answers[0][1])["image"] == str(photos / "0.png")
    two = run("generate", "tiny-opt", *words, *image, *short, "another?")
    assert_two_lines(two, "See offramp generate --help")


@pytest.mark.parametrize("question", ["Balls?", "What colour is no. 1?", "the left ball"])
def test_what_ends_in_a_question_mark_or_has_spaces_is_asked(
    run: RunCommand, photos: Path, question: str
) -> None:
    line = ("generate", "tiny-opt", "--image", photos / "0.png")
    short = ("--max-new-tokens", 4, "--json")
    answers = [run(*line, question, *short), run(*line, "--prompt", question, *short)]
    assert answers[0] == answers[1] and answers[0][0] == 0
    code, _, err = run(*line, photos / "no such.png")
    assert code == 1 and "no such.png does not exist" in err


def test_a_folder_an_address_and_stdin_are_captioned_as_their_files(
    run: RunCommand, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = sorted(photos.glob("*.png"))[:2]
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{files[1].name}"

    def captions(*words: object) -> list[str]:
        said = run("caption", *words, "--model", "tiny-opt", "--max-new-tokens", 6)
        assert said[0] == 0, said
        return [line.rpartition(": ")[2] for line in said[1].splitlines()]

    try:
        first, second = captions(*files)
        assert captions(tmp_path) == [first, second] and captions(address) == [second]
        piped = SimpleNamespace(buffer=io.BytesIO(files[0].read_bytes()))
        monkeypatch.setattr("sys.stdin", piped)
        assert captions("-") == [first]
        assert_two_lines(run("caption", f"{address}x", "--model", "tiny-opt"), "404", "fetched")
        assert_two_lines(run("caption", "-", "--model", "tiny-opt"), "stdin")
    finally:
        server.shutdown()
    (tmp_path / "empty").mkdir()
    assert_two_lines(run("caption", tmp_path / "empty"), "holds no images")


def test_chat_answers_each_line_as_generate_does(
    run: RunCommand, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Caption:\nCaption:\n\n"))
    image = ("tiny-opt", "--image", photos / "0.png", "--max-new-tokens", 6)
    code, out, _ = run("chat", *image)
    assert code == 0 and out == 2 * run("generate", *image, "--prompt", "Caption:", "--stream")[1]


def test_a_chat_asks_an_engine_that_keeps_no_prompts_for_none(
    run: RunCommand, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a plug-in, or of CUDA graphs."""

    class Plain:
        name, rows = "plain", 1

        def __init__(self, adapter: Any) -> None:
            self.adapter = adapter

        def generate(self, inputs: Any, **options: Any) -> Any:
            assert "prefix_cache" not in options
            return self.adapter.generate(inputs, **options)

    engine = DecoderEngine(lambda model, **_: Plain(model), replaces=True)
    monkeypatch.setitem(ENGINES, "plain", engine)
    monkeypatch.setattr("sys.stdin", io.StringIO("Caption:\n\n"))
    image = photos / "0.png"
    assert run("chat", "tiny-opt", "--image", image, "--engine", "plain")[0] == 0


def test_a_chat_reads_each_line_behind_those_before(
    run: RunCommand, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the model answers the whole conversation, by its own template."""
    save_smolvlm(tmp_path / "model")
    backbone = Backbone.from_pretrained(tmp_path / "model")
    adapter_of(backbone).save_pretrained(tmp_path / "exits")
    lines = ["Who is there?", "What is he doing?", "Where?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    image = photos / "0.png"
    how = ("--image", image, "--max-new-tokens", 5, "--mode", "lossless")
    made: list[Any] = []
    answer = generate._answer
    monkeypatch.setattr(generate, "_answer", lambda *words: made.append(answer(*words)) or made[-1])
    assert run("chat", tmp_path / "exits", *how)[0] == 0 and len(made) == 3
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    turns: list[dict[str, Any]] = []
    for line, result in zip(lines, made, strict=True):
        seen = [] if turns else [{"type": "image"}]
        turns.append({"role": "user", "content": [*seen, {"type": "text", "text": line}]})
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(
            text=[text], images=[[Image.open(image).convert("RGB")]], return_tensors="pt"
        )
        ids = backbone.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        assert new.tolist() == result.new_tokens.tolist()
        said = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
        turns.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


def test_a_wrong_path_is_told_before_pytorch_is_imported() -> None:
    code = (
        "import sys; from offramp.cli import main\n"
        "code = main(['generate', 'photo', '--image', 'nowhere.jpg'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1 False\n" and "nowhere.jpg does not exist" in done.stderr


def test_a_loaded_model_is_shown_in_five_lines() -> None:
    loaded = load("tiny-opt", engine="torch")
    adapter = loaded.adapter
    trusting = adapter.with_policy(replace(adapter.policy, trust=0.4))
    ways = {"thresholds: 0.": loaded, "trust: 0.4": replace(loaded, adapter=trusting)}
    for decides, one in ways.items():
        shown = repr(one).splitlines()
        assert len(shown) == 5 and max(map(len, shown)) <= 80
        assert "exits at depth: 2" in shown[2] and shown[3].strip().startswith(decides)


# -- a sliced folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("generate FOLDER", True),
        ("serve FOLDER --port 0", True),
        ("generate --quiet FOLDER --prompt hi", True),
        ("generate --prompt hi FOLDER", True),
        ("generate --prompt=hi FOLDER", True),
        ("serve --threads 2 -- FOLDER", True),
        ("generate --adapter exits --gguf FOLDER", False),
        ("serve exits --engine llama.cpp --gguf FOLDER", False),
        ("generate --gguf=FOLDER", False),
        ("serve exits", False),
        ("export FOLDER", False),
        ("slice model.gguf --adapter exits --out FOLDER", False),
        ("generate", False),
        ("", False),
    ],
)
def test_a_sliced_folder_is_found_wherever_it_stands_but_as_a_value(
    words: str, found: bool, tmp_path: Path
) -> None:
    (tmp_path / "segment-0.gguf").touch()
    assert edge.is_edge(words.replace("FOLDER", str(tmp_path)).split()) is found


def test_what_stands_without_a_value_there_is_known() -> None:
    parser = build_parser(_without_pytorch(edge.SLICED))
    actions = [action for action in parser.loaded() if action.nargs == 0]
    flags = {flag for action in actions for flag in action.option_strings}
    assert flags - {"--version"} == {*edge.ALONE} - {"--"}


@pytest.mark.slow
def test_a_name_of_nothing_is_told_before_pytorch_is_loaded(photos: Path, tmp_path: Path) -> None:
    image = photos / "0.png"
    commands = [
        ["generate", "gone", "--image", image],
        ["generate", "tiny-opt", "--image", image, "--gguf", tmp_path / "gone"],
        ["caption", image, "--model", tmp_path / "gone"],
        ["chat", "gone", "--image", image],
        ["caption", tmp_path / "gone.jpg"],
        ["inspect", tmp_path / "gone"],
        ["inspect", "phot"],
        ["serve", "gone"],
        ["calibrate", "gone", "--data", photos],
    ]
    program = (
        "import json, sys; from offramp.cli import main; "
        "print([main(words) for words in json.loads(sys.argv[1])], 'torch' in sys.modules)"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, "-c", program, words]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == f"{[1] * len(commands)} False\n", found
    assert found.stderr.count("error: ") == len(commands)
    assert found.stderr.count("gone") >= len(commands) - 1 and "mean 'photo'?" in found.stderr


def test_an_answer_takes_the_name_of_a_file(photos: Path) -> None:
    model, file = load("tiny-opt"), photos / "0.png"
    assert model.answer(str(file)) == model.answer(file) == model.answer(Image.open(file))


def test_captions_of_a_folder_go_on_where_they_stopped(
    run: RunCommand, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = sorted(photos.glob("*.png"))[:3], tmp_path / "captions.jsonl"
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    how = (tmp_path, "--model", "tiny-opt", "--max-new-tokens", 6)
    whole = run("caption", *how)
    assert whole[0] == 0 and len(whole[1].splitlines()) == 3
    answer, asked = generate._answer, []

    def stops(*given: Any) -> Any:
        asked.append(given)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(generate, "_answer", stops)
    assert run("caption", *how, "--out", out)[0] == 130
    assert run("caption", *how, "--out", out)[:2] == whole[:2] and len(asked) == 4
    assert run("caption", *how, "--out", out)[:2] == whole[:2] and len(asked) == 4
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [f"{row['image']}: {row['answer']}" for row in rows] == whole[1].splitlines()
    assert run("caption", *how, "--out", out, "--mode", "full")[0] == 0 and len(asked) == 7
    out.write_text('{"a": 1}\n')
    assert_two_lines(run("caption", *how, "--out", out), "other rows than answers", "--out")


def test_caption_takes_what_generate_takes() -> None:
    """But for the places of the model and of the images."""
    told = {}
    for name in ("caption", "generate"):
        commands = parser_of(name)._subparsers
        assert commands is not None
        (parser,) = (a.choices[name] for a in commands._group_actions if a.choices)
        told[name] = {
            (tuple(a.option_strings), a.dest, str(a.default), a.help)
            for a in parser.loaded()
            if a.dest not in ("adapter", "image")
        }
    assert told["caption"] == told["generate"] and len(told["caption"]) > 20
