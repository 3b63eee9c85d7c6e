"""The photo model's tower: padding as TensorFlow's, and detected words as embeddings."""

from __future__ import annotations

import pytest
import torch

import photo
from offramp_photo.tower import PhotoTower, WordDetector, WordTokens, _Conv


def test_padding_is_that_of_tensorflow() -> None:
    convolution = _Conv(1, 1, 3, stride=2)
    torch.nn.init.ones_(convolution.weight)
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 0, 0] = 1
    # With the odd pixel to the right and below, the first pixel is in the first window only once.
    assert convolution(corner).flatten().tolist() == [1, 0, 0, 0]


def words() -> WordTokens:
    torch.manual_seed(2)
    tokens = WordTokens(photo.TOWER)
    for parameter in tokens.parameters():
        torch.nn.init.normal_(parameter)
    return tokens


def test_the_surest_words_are_their_embeddings_weighed_by_how_sure() -> None:
    tokens = words()
    said = tokens(torch.logit(torch.tensor([[0.1, 0.2, 0.3, 0.02, 0.9]])))
    for place, (word, weight) in enumerate(((4, 1.0), (2, 0.6))):
        expected = tokens.table[word] * weight * tokens.gain + tokens.bias + tokens.place[place]
        torch.testing.assert_close(said[0, place], expected)


def test_a_dropped_word_leaves_its_place() -> None:
    tokens = words()
    said = tokens(torch.zeros(1, 5), torch.tensor([[1, 0]]))
    torch.testing.assert_close(said[0, 1], tokens.bias + tokens.place[1])


def test_the_table_of_words_and_the_detector_are_not_learnt_with_the_bridge() -> None:
    assert not words().table.requires_grad
    assert not WordDetector(photo.TOWER).mean.requires_grad


def test_a_tower_gives_as_many_tokens_as_its_configuration_says() -> None:
    tower = PhotoTower(photo.TOWER).eval()
    with torch.inference_mode():
        (states,) = tower(torch.rand(2, 3, 224, 224)).hidden_states
    assert states.shape == (2, photo.TOWER.tokens, photo.TOWER.hidden_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_words_are_surest_does_not_hang_on_the_batch(dtype: torch.dtype) -> None:
    tower = PhotoTower(photo.TOWER).eval().to(dtype)
    pixels = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        together = tower(pixels).last_hidden_state
        alone = tower(pixels[1:2]).last_hidden_state
    torch.testing.assert_close(together[1:2], alone, atol=0.05, rtol=0.05)
