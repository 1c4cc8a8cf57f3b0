"""Signatures, as the Standard Webhooks package verifies them."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from agentqd.core.errors import ConfigError
from agentqd.sinks.signing import Signer, read_keys, signature

KEYS = st.lists(st.binary(min_size=24, max_size=64), min_size=1, max_size=3)


def line_of(key: bytes) -> str:
    return "whsec_" + base64.b64encode(key).decode()


@given(keys=KEYS, value=st.dictionaries(st.text(max_size=5), st.text(max_size=20)), pieces=st.integers(1, 7))
def test_each_key_has_a_signature_that_its_verifier_accepts(
    keys: list[bytes], value: dict[str, str], pieces: int
) -> None:
    body, at = json.dumps(value).encode(), int(time.time())
    read = read_keys([line_of(key) for key in keys], "f")
    assert read == keys
    signed = signature(read, "d12", at, body)
    for key in keys:
        headers = {"webhook-id": "d12", "webhook-timestamp": str(at), "webhook-signature": signed}
        assert Webhook(line_of(key)).verify(body, headers) == value
    signer = Signer(keys, "d12", at)
    for start in range(0, len(body), pieces):
        signer.update(body[start : start + pieces])
    assert signer.signature() == signed


def test_the_example_of_the_specification() -> None:
    keys = read_keys(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], "f")
    signed = signature(keys, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "line",
    [
        "xyzzy",
        "whsec_",
        "whsec_a",
        "whsec_ab cd",
        "whpk_MfKQ",
        "whsec_M\u00e9",
    ],
)
def test_what_is_no_secret_is_refused_and_not_shown(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_keys([line_of(b"x" * 24), line], "/etc/s")
    assert str(caught.value.message).startswith("/etc/s: secret 2 ")
    assert line.removeprefix("whsec_") == "" or line not in caught.value.message
    assert caught.value.__cause__ is None


def _receiver(monkeypatch: pytest.MonkeyPatch, secrets: Path) -> ModuleType:
    """The page's receiver, as a module."""
    monkeypatch.setattr(sys, "argv", ["receiver.py", "0", ":memory:", str(secrets)])
    spec = importlib.util.spec_from_file_location("receiver", Path(__file__).parents[2] / "docs/receiver.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shown_receiver_reads_the_secret_file_that_the_sink_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, at = b"k" * 24, int(time.time())
    (tmp_path / "s").write_text(f"# of the hook, März\n\n  {line_of(key)} \n# {line_of(b'o' * 24)}\n")
    receiver = _receiver(monkeypatch, tmp_path / "s")
    assert receiver.is_signed(b"{}", "d1", str(at), signature([key], "d1", at, b"{}"))
    assert not receiver.is_signed(b"{}", "d1", str(at), signature([b"o" * 24], "d1", at, b"{}"))
