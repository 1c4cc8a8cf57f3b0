"""Keys are read when their files have changed, and no change is missed."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from agentqd.core.errors import ConfigError
from agentqd.sinks import signingkeys
from agentqd.sinks.signingkeys import SigningKeys

from .test_signing import line_of
from .webadapter import keep_secret

LATER_S = 100.0


def keys_of(*files: str, ahead_s: float = LATER_S) -> SigningKeys:
    """Its clock is 200 ms further at each look: longer than a look is good for."""
    steps = itertools.count()
    return SigningKeys(files, lambda: int((time.time() + ahead_s) * 1_000_000) + next(steps) * 200_000)


def test_a_file_that_has_not_changed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = signingkeys.secret_lines
    monkeypatch.setattr(signingkeys, "secret_lines", lambda path: reads.append(path) or real(path))
    keys = keys_of(keep_secret(tmp_path / "s", line_of(b"a")))
    assert [keys.now() for _ in range(5)] == [[b"a"]] * 5
    assert len(reads) == 1


@pytest.mark.parametrize("how", ["in place", "renamed", "behind a link"])
def test_an_exchanged_secret_is_seen_at_once(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s"
    keep_secret(tmp_path / "a", line_of(b"a"))
    keep_secret(tmp_path / "b", line_of(b"b"))
    os.symlink(tmp_path / "a", path) if how == "behind a link" else keep_secret(path, line_of(b"a"))
    keys = keys_of(str(path))
    assert keys.now() == [b"a"]
    if how == "in place":
        time.sleep(
            0.02
        )  # the file system's clock ticks every 4 to 10 ms; what changes faster is the next test's
        keep_secret(path, line_of(b"b"))
    elif how == "renamed":
        os.rename(tmp_path / "b", path)
    else:
        os.symlink(tmp_path / "b", tmp_path / "new")
        os.rename(tmp_path / "new", path)
    assert keys.now() == [b"b"]


def test_a_file_that_changes_within_one_tick_of_its_clock_is_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a coarse clock two contents of one length cannot be told apart by their times."""
    tick = time.time_ns()
    monkeypatch.setattr(signingkeys, "_identity", lambda path: (1, 1, 0o100600, 0, 50, tick, tick))
    path = str(tmp_path / "s")
    keys = keys_of(keep_secret(Path(path), line_of(b"a")), ahead_s=0.0)
    for n in range(3):
        keep_secret(Path(path), line_of(b"%03d" % n))
        assert keys.now() == [b"%03d" % n]


def test_a_file_that_is_gone_signs_nothing_any_more(tmp_path: Path) -> None:
    path = tmp_path / "s"
    keys = keys_of(keep_secret(path, line_of(b"a")))
    assert keys.now() == [b"a"]
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.now()
    keep_secret(path, line_of(b"b"))
    assert keys.now() == [b"b"]


def test_a_look_is_good_for_a_tenth_of_a_second(tmp_path: Path) -> None:
    now = [int((time.time() + LATER_S) * 1_000_000)]
    path = tmp_path / "s"
    keys = SigningKeys([keep_secret(path, line_of(b"a"))], lambda: now[0])
    assert keys.now() == [b"a"]
    path.unlink()
    now[0] += 99_999
    assert keys.now() == [b"a"]
    now[0] -= 1_000_000  # a clock that was put back
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.now()


def test_without_a_file_there_are_none() -> None:
    assert keys_of().now() == []
