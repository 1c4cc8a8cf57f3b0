"""Secrets come from files, and no error shows what stands in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentqd.core.errors import ConfigError
from agentqd.sinks.secretfile import BYTES_MAX, open_since_ns, secret, secret_lines


def keep(path: Path, content: bytes, mode: int = 0o600) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_one_secret_is_the_first_line_as_it_stands(tmp_path: Path) -> None:
    assert secret(keep(tmp_path / "one", b"# pass word \r\nsecond\n")) == "# pass word "


def test_several_secrets_are_the_lines_without_comments(tmp_path: Path) -> None:
    assert secret_lines(keep(tmp_path / "many", b"# new\nwhsec_a\n\n  whsec_b \n")) == ["whsec_a", "whsec_b"]


def test_an_exchanged_secret_counts_at_the_next_look(tmp_path: Path) -> None:
    path = keep(tmp_path / "s", b"old")
    assert secret(path) == "old"
    os.replace(keep(tmp_path / "new", b"new"), path)
    assert secret(path) == "new"


def test_a_systemd_credential_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "smtp", b"x", 0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert secret("$CREDENTIALS_DIRECTORY/smtp") == "x"
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="LoadCredential"):
        secret("$CREDENTIALS_DIRECTORY/smtp")


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"", 0o600, "empty"),
        (b"\ntops3cret", 0o600, "empty"),
        (b"tops3cret\xff", 0o600, "UTF-8"),
        (b"tops3cret" * BYTES_MAX, 0o600, "longer"),
    ],
)
def test_what_cannot_be_used_is_refused_without_its_content(
    tmp_path: Path, content: bytes, mode: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        secret(keep(tmp_path / "bad", content, mode))
    assert "tops3cret" not in caught.value.message
    assert caught.value.__cause__ is None
    assert str(tmp_path / "bad") in caught.value.message


def test_a_secret_that_everybody_may_read_is_used_and_known(tmp_path: Path) -> None:
    path = keep(tmp_path / "s", b"word", 0o644)
    assert (secret(path), open_since_ns(path)) == ("word", os.stat(path).st_ctime_ns)
    (tmp_path / "s").chmod(0o640)
    assert open_since_ns(path) is None
    assert open_since_ns(str(tmp_path / "missing")) is None


def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, why in (("pipe", "regular"), ("missing", "No such file"), (".", "regular")):
        with pytest.raises(ConfigError, match=why):
            secret_lines(str(tmp_path / name))


def test_comments_alone_are_no_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="empty"):
        secret_lines(keep(tmp_path / "s", b"# nothing\n\n"))
