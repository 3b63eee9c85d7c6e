"""Laws of what clients see of an answer: pieces that are never taken back, penalties, key files."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from offramp.serving.server.api.text import StopStrings, TextStream
from offramp.serving.server.hf_options import CountPenalties
from offramp.serving.server.middleware import keys_of


class Letters:
    """A tokenizer whose tokens are bytes, so that a letter may take several; 0 is special."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(i for i in ids if i).decode("utf-8", "replace")

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row) for row in rows.tolist()]


def pieces(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(), stops)
    found = [stream.put(i) for i in (*text.encode(), 0)]
    return [*found, stream.finish()], stream


@pytest.mark.parametrize(
    "text", ["abc", "  a b  ", "", "   ", "größe 🙂 ", "日本語\n\nx", "a\ufffd"]
)
def test_pieces_are_the_decoded_answer(text: str) -> None:
    found, stream = pieces(text)
    assert "".join(found) == text.strip() == stream.text
    assert not stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("one two three", ("two",), "one"),
        ("one two three", ("three", "two"), "one"),
        ("one twothree", ("twot", "o t"), "one"),
        ("aab", ("ab",), "a"),
        ("stop", ("stop",), ""),
        ("no st", ("stop",), "no st"),
        ("größe", ("ö",), "gr"),
    ],
)
def test_nothing_of_a_stop_string_is_ever_given_out(
    text: str, stops: tuple[str, ...], left: str
) -> None:
    found, stream = pieces(text, stops)
    assert "".join(found) == left == stream.text
    assert stream.stopped == any(stop in text for stop in stops)


def test_a_stop_string_ends_generation_with_the_token_that_completes_it() -> None:
    text = b"xx one two three"
    asked = StopStrings(Letters(), ("two", "never"))
    prompt = 3  # its text does not count, though "two" may stand in it
    over = [
        bool(asked(torch.tensor([[*b"two", *text[:n]]]), None)) for n in range(1, len(text) + 1)
    ]
    assert prompt == 3 and over.index(True) + 1 == len(b"xx one two")


def test_a_stop_string_of_letters_that_take_several_tokens_is_found() -> None:
    asked, text = StopStrings(Letters(), ("日本語",)), "xx 日本語".encode()
    assert [asked.found(text[:n]) for n in range(1, len(text) + 1)].index(True) + 1 == len(text)


def test_penalties_count_the_answer_alone() -> None:
    rules = CountPenalties(0.5, 0.25)
    scores, prompt, answer = torch.zeros(1, 8), [1, 1, 2], [3, 4, 3, 3]
    assert torch.equal(rules(torch.tensor([prompt]), scores), scores)
    found = rules(torch.tensor([prompt + answer]), scores)[0].tolist()
    counts = Counter(answer)
    assert found == [-(0.5 + 0.25 * counts[i]) if counts[i] else 0.0 for i in range(8)]


def test_keys_stand_in_lines_between_comments() -> None:
    assert keys_of("a\n# no\n b ,c\n\n") == ["a", "b ,c"]
    assert keys_of("") == []
