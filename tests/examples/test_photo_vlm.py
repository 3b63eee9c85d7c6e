"""The recipe of the VLM on photographs: its pure parts, on tiny random models."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.photo_vlm import evaluate, export, learn, photos, rows, train, words
from examples.photo_vlm.photos import Features, cache_features
from PIL import Image
from safetensors.torch import save_file

import photo as stand_ins
from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.hub import load_processor
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_photo import build as product
from offramp_photo.build import add_updates, image_processor
from offramp_photo.tower import Bridge, EfficientNetLite0
from photo import END, language, tokenizer
from photo import TOWER as PHOTO

SETTINGS = train.Settings(
    steps=3, captioned=2, ask_every=2, length=96, asked_length=96, rank=2, vary=0.5
)


def splits() -> dict[str, list[Example]]:
    picture = Image.new("RGB", (8, 8))
    captioned = [
        Example(picture, "Caption:", (f"A dog {n} .", "犬が走る"), key=f"c{n}", group=f"c{n}")
        for n in range(4)
    ]
    asked = [
        Example(picture, f"Question: how many {n} ? Answer:", ("2",), key=f"q{n}", group="q")
        for n in range(3)
    ]
    return {"captions": captioned, "questions": asked}


def trainer(settings: train.Settings = SETTINGS) -> train.Trainer:
    torch.manual_seed(3)
    lm = language()
    bridge, detectors = Bridge(PHOTO), words.Detectors(PHOTO)
    torch.nn.init.normal_(bridge.words.table)
    examples = splits()
    places = {"c0": 0, "c1": 1, "c2": 2, "c3": 3, "q": 4}
    groups = {e.group: e for some in examples.values() for e in some}
    views = train.Views(torch.rand(5, 49, 1280), list(groups.values()), EfficientNetLite0().eval())
    learner = rows.PackedRows(examples, places, rows.ids_of(tokenizer()), END)
    return train.Trainer(bridge, detectors, lm, learner, views, settings)


def weights(one: train.Trainer) -> torch.Tensor:
    learnt = one.weights()
    return torch.cat([t.flatten() for group in learnt.values() for t in group.values()])


# -- photographs ------------------------------------------------------------------------------


def test_pixels_are_shifted_by_127_and_divided_by_128() -> None:
    picture = Image.new("RGB", (224, 224), (0, 127, 255))
    pixels = image_processor()([picture], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-127 / 128, 0.0, 1.0]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "LA", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (900, 2)])
def test_photographs_of_any_mode_and_size_become_one_square(
    mode: str, size: tuple[int, int]
) -> None:
    example = Example(Image.new(mode, size), "", (), key="x")
    pixels = image_processor()([example.open_image()], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.abs().max() <= 1


def test_fifty_megapixels_on_their_side_become_one_upright_square(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    whole = Image.new("L", (10_000, 5_000))
    whole.paste(255, (0, 0, 5_000, 5_000))  # left here, on top once it is upright
    whole.save(tmp_path / "x.jpg", exif=exif)
    example = Example(tmp_path / "x.jpg", "", (), key="x")
    pixels = image_processor()([example.open_image()], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels[:, :, :100].min() > 0.9 and pixels[:, :, -100:].max() < -0.9


def test_cached_features_are_those_of_the_photographs(tmp_path: Path) -> None:
    network = EfficientNetLite0().eval()
    examples = splits()["captions"]
    said: list[str] = []
    cache_features(network, examples, tmp_path, said.append)
    pixels = image_processor()([examples[2].open_image()], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        torch.testing.assert_close(Features(tmp_path)[[2]], network(pixels), atol=2e-3, rtol=2e-3)
    assert "4 photographs: 1 MB" in said[0]


def test_a_varied_photograph_is_a_part_of_it() -> None:
    picture = Image.new("RGB", (224, 224), "red")
    picture.paste("blue", (112, 0, 224, 224))
    draw = random.Random(1)
    kept = [photos.varied(picture, draw, mirror=False).getpixel((0, 0)) for _ in range(8)]
    assert set(kept) == {(255, 0, 0)}
    turned = [photos.varied(picture, draw, mirror=True).getpixel((0, 0)) for _ in range(16)]
    assert set(turned) == {(255, 0, 0), (0, 0, 255)}


def test_half_a_cache_is_none(tmp_path: Path) -> None:
    cache_features(EfficientNetLite0().eval(), splits()["captions"], tmp_path, print)
    np.save(tmp_path / "features.npy", np.zeros((1, 49, 1280), np.float16))
    with pytest.raises(DataError, match="does not hold 4 photographs"):
        Features(tmp_path)


# -- rows -------------------------------------------------------------------------------------


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no flickr8k_captions\.jsonl"):
        rows.read_photographs(tmp_path)


def test_a_photograph_is_held_out_with_all_its_questions(tmp_path: Path) -> None:
    for name in ("flickr8k", "daquar"):
        (tmp_path / name).mkdir()
    lines: dict[str, list[dict[str, Any]]] = {rows.CAPTIONS: [], rows.QUESTIONS: []}
    for n in range(20):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{n}.png")
        for split in ("train", "val"):
            row = {"image": f"{n}.png", "captions": ["A dog ."], "split": split}
            lines[rows.CAPTIONS].append(row)
        for answer in ("2", "red"):
            row = {"image": f"{n}.png", "question": "what ?", "answer": answer, "split": "train"}
            lines[rows.QUESTIONS].append(row)
    for file, some in lines.items():
        (tmp_path / file).write_text("\n".join(map(json.dumps, some)))
    read = rows.read_photographs(tmp_path)
    learnt = {example.group for example in read["questions"]}
    kept = {example.group for example in read["questions_val"]}
    assert learnt and kept and not learnt & kept
    assert len(read["questions"]) + len(read["questions_val"]) == 40


def test_packed_texts_are_read_as_if_each_stood_alone() -> None:
    lm = language()
    ids = rows.ids_of(tokenizer())
    words = ["a dog", "two dogs run", "犬"]
    texts = tuple(rows.Text.of([("Caption:", word)], ids, END) for word in words)
    visual = torch.randn(1, 3, 32)

    def hidden(batch: rows.Batch) -> torch.Tensor:
        rest = lm.get_input_embeddings()(batch.ids[:, 3:])
        states = lm.model(
            inputs_embeds=torch.cat((visual, rest), 1),
            attention_mask=batch.mask,
            position_ids=batch.positions,
        ).last_hidden_state
        return states.flatten(0, 1)[batch.sources]  # type: ignore[no-any-return]

    together = rows.pack([rows.Row(0, texts)], 3, 64, torch.float32)
    apart = [rows.pack([rows.Row(0, (text,))], 3, 32, torch.float32) for text in texts]
    torch.testing.assert_close(hidden(together), torch.cat([hidden(one) for one in apart]))
    assert together.targets.tolist() == [i for one in apart for i in one.targets.tolist()]


def test_answers_alone_are_learnt_and_each_is_ended() -> None:
    ids = rows.ids_of(tokenizer())
    text = rows.Text.of([("Question: a ? Answer:", "b"), ("Question: c ? Answer:", "d")], ids, END)
    learnt = [i for i, one in zip(text.ids, text.learnt, strict=True) if one]
    assert learnt == [*ids(" b"), *ids(" d"), END]


def test_a_text_that_no_longer_fits_is_left_out() -> None:
    ids = rows.ids_of(tokenizer())
    texts = tuple(rows.Text.of([("", "x" * 20)], ids, END) for _ in range(3))
    batch = rows.pack([rows.Row(0, texts)], 3, 48, torch.float32)
    assert len(batch.targets) == 2 * 22


def test_the_likest_captions_are_kept() -> None:
    said = ("a dog runs on grass", "a brown dog runs on grass", "dog runs on grass", "my old hat")
    others = [
        Example(Image.new("RGB", (1, 1)), "", (f"a man {n} sits", f"man {n} sits"), key=f"{n}")
        for n in range(3)
    ]
    one = Example(Image.new("RGB", (1, 1)), "", said, key="x")
    (kept, *_) = rows.consensual([one, *others], 2)
    assert set(kept.answers) < set(said[:3])


def test_sides_are_known_where_a_text_tells_them_apart() -> None:
    learner = trainer().rows
    assert not any(row.sided for row in learner.captions(0, 0, 4))
    assert all(row.sided for row in learner.questions(0, 0, 1))


def test_each_photograph_comes_once_a_pass() -> None:
    learner = trainer().rows
    first = [row for step in range(2) for row in learner.captions(step, 0, 2)]
    assert {row.image for row in first} == {0, 1, 2, 3} and {row.pass_ for row in first} == {0}
    assert {row.pass_ for row in learner.captions(2, 0, 2)} == {1}


# -- words ------------------------------------------------------------------------------------


def test_words_say_what_is_seen() -> None:
    assert words.words_of("A dog's ball is on the left side .") == {"dog", "ball"}


def test_a_photograph_gets_its_words_from_who_did_not_see_it() -> None:
    """Each half's detector learns the other half's words: what it says of its own shows which."""
    torch.manual_seed(0)
    pooled = torch.randn(40, 3840)
    in_first = torch.arange(40) % 2 == 0
    present = torch.zeros(40, 5, dtype=torch.bool)
    present[in_first, 0] = present[~in_first, 1] = True
    detectors = words.Detectors.learnt(
        pooled, present, [in_first, ~in_first], PHOTO, lambda text: None
    )
    said = detectors(torch.rand(2, 49, 1280), [0, 1]).sigmoid()
    assert said[0, 1] > said[0, 0] and said[1, 0] > said[1, 1]


def test_a_word_of_several_pieces_is_their_mean() -> None:
    table = torch.randn(258, 4)
    ids = rows.ids_of(tokenizer())
    (one,) = words.embeddings_of(["dog"], table, ids)
    torch.testing.assert_close(one, table[torch.tensor(ids(" dog"))].mean(0))


# -- learning ---------------------------------------------------------------------------------


def test_the_frozen_head_is_weighted_cross_entropy_in_value_and_gradient() -> None:
    hidden = torch.randn(150, 8, requires_grad=True)
    head, targets = torch.randn(30, 8), torch.randint(30, (150,))
    share = torch.rand(150)
    loss = learn.FrozenHead.apply(hidden, head, targets, share)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    each = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    plain = (each * share).sum() / share.sum()
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer()
    whole.run(5, lambda row: True)
    part = trainer()
    part.run(3, lambda row: True)
    part.save(tmp_path / "state.pt")
    resumed = trainer()
    resumed.load(tmp_path / "state.pt")
    resumed.run(5, lambda row: True)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_training_changes_bridge_and_updates_and_nothing_else() -> None:
    one = trainer()
    before = one.weights()
    frozen = {n: p.clone() for n, p in one.lm.named_parameters() if "lora" not in n}
    detectors = {n: t.clone() for n, t in one.detectors.state_dict().items()}
    one.run(5, lambda row: True)
    now = one.weights()
    unchanged = {
        name
        for group in before
        for name in before[group]
        if torch.equal(before[group][name], now[group][name])
    }
    assert unchanged == {"words.table"}
    assert all(torch.equal(p, one.lm.get_parameter(n)) for n, p in frozen.items())
    assert all(torch.equal(t, one.detectors.state_dict()[n]) for n, t in detectors.items())


def test_merged_updates_are_what_the_language_model_trained_with() -> None:
    one = trainer()
    one.run(3, lambda row: True)
    torch.manual_seed(3)
    plain = language()
    add_updates(plain, plain.state_dict(), learn.low_rank(one.lora))
    inputs = torch.randn(1, 7, 32)
    with torch.inference_mode():
        trained, merged = (lm(inputs_embeds=inputs).logits for lm in (one.lm, plain))
    torch.testing.assert_close(trained, merged)


def test_training_starts_from_what_another_one_wrote(tmp_path: Path) -> None:
    one, other = trainer(), trainer()
    one.run(3, lambda row: True)
    learnt = export.weights_of(one.weights(), {})
    save_file(learnt, tmp_path / "model.safetensors")
    before = train.learnt_before(tmp_path)
    learn.set_low_rank(other.lora, before["lora"])
    bridge = train.start_bridge(PHOTO, before["bridge"], one.bridge.words.table)
    again = export.weights_of({**other.weights(), "bridge": bridge.state_dict()}, {})
    assert all(torch.equal(again[name], tensor) for name, tensor in learnt.items())
    with pytest.raises(DataError, match="holds no"):
        train.learnt_before(tmp_path / "nothing")
    del before["lora"][next(iter(before["lora"]))]
    with pytest.raises(InputError, match="no update"):
        learn.set_low_rank(other.lora, before["lora"])


def test_other_settings_are_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path / "state.pt")
    other = trainer(dataclasses.replace(SETTINGS, rate=0.5))
    with pytest.raises(InputError, match=r"with rate 0\.001, not 0\.5"):
        other.load(tmp_path / "state.pt")


def test_more_steps_are_not_other_settings(tmp_path: Path) -> None:
    trainer().save(tmp_path / "state.pt")
    trainer(dataclasses.replace(SETTINGS, steps=9)).load(tmp_path / "state.pt")


def test_half_a_state_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    trainer().save(file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DataError, match="not a whole training state"):
        trainer().load(file)


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [learn.rate_at(step, 300) for step in range(301)]
    assert rates[:30] == sorted(rates[:30]) and rates[0] < 0.1
    assert set(rates[29:181]) == {1.0}
    assert rates[180:] == sorted(rates[180:], reverse=True) and rates[-1] == pytest.approx(0.01)


# -- the whole model --------------------------------------------------------------------------


def test_the_built_model_answers_as_training_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins.use_stand_ins(monkeypatch)
    folder = product.built_folder(stand_ins.trained(tmp_path / "data"), tmp_path / "cache")
    backbone = Backbone.from_pretrained(folder, dtype=torch.float32)
    encoder = InputProcessor(backbone, load_processor(str(folder)))
    rng = np.random.default_rng(0)
    examples = [
        Example(
            Image.fromarray(rng.integers(0, 255, (224, 224, 3), np.uint8)), prompt, (), key=prompt
        )
        for prompt in ("Caption:", "Question: what is on the desk ? Answer:")
    ]
    pixels = image_processor()([e.open_image() for e in examples], return_tensors="pt")
    tower: Any = backbone.vision
    features = tower.net(pixels["pixel_values"])
    visual = tower.bridge(features, tower.detector(words.WordDetector.pooled(features)))
    lm = language()
    lm.model.load_state_dict(backbone.stack.state_dict())
    batches = iter([(visual, [e.prompt for e in examples])])
    said = evaluate.answers_from_features(lm, encoder.tokenizer, batches, 6)
    assert evaluate.full_answers(backbone, encoder, examples, 6) == said


def test_what_is_exported_is_what_the_photo_model_is_built_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer()
    one.run(2, lambda row: True)
    detector = one.detectors.whole.state_dict()
    tensors = export.weights_of(one.weights(), detector)
    save_file(tensors, tmp_path / product.WEIGHTS)
    digest = product.digest_file(tmp_path / product.WEIGHTS)
    product.write_json(tmp_path / product.CARD, {"tower": stand_ins.FIELDS, "sha256": digest})
    stand_ins.use_stand_ins(monkeypatch)
    assert (product.built_folder(tmp_path, tmp_path / "cache") / "config.json").is_file()


def test_accuracy_takes_any_of_the_right_answers() -> None:
    question = Example(Image.new("RGB", (1, 1)), "", ("Red", "blue"), key="q")
    assert evaluate.accuracy([" red", "green"], [question, question]) == 0.5
