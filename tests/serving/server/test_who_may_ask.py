"""Laws of who may ask: under which name, with which key, and what one key learns of another's."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.cli.commands.serve import _config
from offramp.core.errors import OfframpError
from offramp.features.cache_salt import current_salt, salted
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.server.middleware import host_name
from serving import asking, messages, scene_examples, service_of, shipped

CHAT = "/v1/chat/completions"
BODY = {"messages": messages(scene_examples()[0]), "max_tokens": 2}

# -- names -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local() -> Iterator[Any]:
    service = service_of(
        slots=1, hosts=("localhost", "127.0.0.1", "::1", "Models.Example.org", ".in.org")
    )
    yield asking(service)
    service.close()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "127.0.0.1:80",
        "[::1]:8000",
        "[::1]",
        "models.example.org",
        "a.in.org:1",
        "b.a.in.org",
    ],
)
def test_it_answers_to_its_names(local: Any, host: str) -> None:
    assert local.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.org",
        "localhost.evil.org",
        "evil.org:8000",
        "127.0.0.1.evil.org",
        "in.org",
        "xin.org",
        "localhost@evil.org",
        "evil.org#localhost",
        "127.0.0.2",
        "[::2]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "localhost:80:80",
        "localhost:x",
        "",
        ".",
        "a b",
        "localhost,evil.org",
        "2130706433",
    ],
)
def test_it_answers_to_no_other_name(local: Any, host: str) -> None:
    for path in ("/", "/v1/models", "/metrics", "/nowhere"):
        found = local.get(path, headers={"Host": host})
        assert (found.status_code, found.json()["error"]["code"]) == (421, "host_not_allowed")
    assert local.post(CHAT, json=BODY, headers={"Host": host}).status_code == 421
    assert local.get("/health", headers={"Host": host}).status_code == 200  # a load balancer's


def test_names_are_read_as_clients_write_them() -> None:
    assert host_name("Example.ORG.:8000") == "example.org"
    assert host_name("[fe80::1]:1") == "fe80::1"
    assert host_name("fe80::1") is None


def served(*words: str) -> Any:
    """The configuration that a command line makes."""
    import argparse

    from offramp.cli import parser as parsers
    from offramp.cli.commands import serve

    made = argparse.ArgumentParser()
    serve.add(made.add_subparsers(parser_class=parsers.Parser))
    return _config(made.parse_args(["serve", "tiny-opt", *words]))


def test_without_keys_a_server_has_the_machines_names_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OFFRAMP_API_KEYS", raising=False)
    assert {"localhost", "127.0.0.1", "::1"} <= set(served().hosts)
    assert caplog.records == []
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        caplog.clear()
        config = served("--host", host)
        assert host in config.hosts and "*" not in config.hosts
        assert "Without keys everybody" in caplog.text
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    caplog.clear()
    assert served("--host", "0.0.0.0", "--api-keys", str(keys)).hosts == ()
    assert caplog.records == []
    named = served("--allowed-hosts", "a.org", ".b.org").hosts
    assert set(named) == {"localhost", "127.0.0.1", "::1", "a.org", ".b.org"}
    for wrong in ("http://a.org", "a.org:80", "", "a/b"):
        with pytest.raises(OfframpError, match="not the name of a host"):
            served("--allowed-hosts", wrong)


# -- the page --------------------------------------------------------------------------------------


def test_pages_of_others_cannot_hold_it(local: Any) -> None:
    for path in ("/", "/v1/models", "/nowhere"):
        headers = local.get(path, headers={"Host": "localhost"}).headers
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    policy = local.get("/", headers={"Host": "localhost"}).headers["content-security-policy"]
    assert "unsafe" not in policy and "script-src 'sha256-" in policy
    page = local.get("/", headers={"Host": "localhost"}).text
    assert page.count("<script") == page.count("<script>") == policy.count("script-src 'sha256")
    assert " onclick=" not in page and " style=" not in page


# -- keys ------------------------------------------------------------------------------------------

ODD = ("schlüssel", "ключ", "鍵", "a:b", "a b", "=+/", "\U0001f511")


@pytest.fixture(scope="module")
def keyed() -> Iterator[Any]:
    service = service_of(slots=1, keys=ODD)
    yield asking(service)
    service.close()


@pytest.mark.parametrize("key", ODD)
def test_keys_are_utf_8(keyed: Any, key: str) -> None:
    bearer = [(b"Authorization", b"Bearer " + key.encode())]
    assert keyed.get("/v1/models", headers=bearer).status_code == 200
    basic = base64.b64encode(f"anybody:{key}".encode())
    assert keyed.get("/v1/models", headers=[(b"Authorization", b"Basic " + basic)]).is_success
    for wrong in (key.encode()[:-1], key.encode() + b"x", key.encode("utf-16"), b"\xff"):
        assert (
            keyed.get("/v1/models", headers=[(b"Authorization", b"Bearer " + wrong)]).status_code
            == 401
        )


@pytest.mark.parametrize(
    "content",
    ["one\nt,w#o\n", "\ufeffone\r\nt,w#o", "\ufeff# keys\none\n # and\nt,w#o", " one \n\n t,w#o "],
)
def test_keys_of_a_file_are_what_its_writer_meant(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content.encode())
    assert served("--api-keys", str(file)).keys == ("one", "t,w#o")


def test_keys_of_the_variable_stand_between_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without comments: a key that begins with # is one, where the server would else be open."""
    monkeypatch.setenv("OFFRAMP_API_KEYS", " #one , two,,three\nfour")
    assert served().keys == ("#one", "two", "three", "four")


@pytest.mark.parametrize("value", ["", " ", ",", "\n , \n"])
def test_a_variable_that_is_set_and_holds_no_key_leaves_no_server_open(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a secret which was not found."""
    monkeypatch.setenv("OFFRAMP_API_KEYS", value)
    with pytest.raises(OfframpError, match="OFFRAMP_API_KEYS"):
        served()
    monkeypatch.delenv("OFFRAMP_API_KEYS")
    assert served().keys == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xef\xbb\xbf",
        b"# none\n",
        "one".encode("utf-16"),
        "one".encode("utf-16-le"),
        b"\xff\xfe\xfd",
        b"o\x00ne",
        b"o\x1bne",
    ],
)
def test_files_that_hold_no_keys_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(OfframpError):
        served("--api-keys", str(file))


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("serial", [False, True])
def test_what_is_kept_for_a_key_helps_no_other(serial: bool) -> None:
    kept: dict[str, Any] = {"prefix_cache": PrefixCache(8), "vision_cache": VisionCache()}
    if serial:
        kept["serial"] = shipped()[0]
    service = service_of(slots=1, keys=("a", "b"), more=kept)
    client = asking(service)

    def tokens_reused(key: str) -> tuple[int, int]:
        before = kept["prefix_cache"].reused, kept["vision_cache"].hits
        full = {**BODY, "offramp": {"mode": "full"}}  # else a prompt may stay pending at an exit
        found = client.post(CHAT, json=full, headers={"Authorization": f"Bearer {key}"})
        assert found.status_code == 200
        return kept["prefix_cache"].reused - before[0], kept["vision_cache"].hits - before[1]

    try:
        first = tokens_reused("a")
        other = tokens_reused("b")
        again = tokens_reused("a")
    finally:
        service.close()
    assert first[0] == 0
    assert again[0] > 0 and again[1] > first[1]
    assert other == first


def test_salts_end_with_their_work() -> None:
    tower, cache, image = torch.nn.Linear(2, 2), VisionCache(), torch.ones(2)
    for salt, hits in ((None, 0), ("a", 0), ("a", 1), (None, 2), ("b", 2)):
        with salted(salt), torch.inference_mode():
            assert current_salt() == salt
            cache.call(tower, (image,), {})
        assert current_salt() is None
        assert cache.hits == hits
