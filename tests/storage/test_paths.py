"""One place, one spelling: declared paths before they are compared."""

from __future__ import annotations

import os
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.errors import InvalidTask
from agentqd.core.intents import overlap
from agentqd.storage.paths import resolve_intents
from agentqd.system import letters
from agentqd.system.letters import Folders, fold


def one(path: str, workdir: Path | str | None = None) -> str:
    ((resolved, _),) = resolve_intents([path], None if workdir is None else str(workdir))
    return resolved


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """w/d/f, a link to d, a link to the link, one to nowhere, one to itself; home is w."""
    root = tmp_path / "w"
    (root / "d").mkdir(parents=True)
    (root / "d/f").touch()
    (root / "[id]").mkdir()
    (root / "link").symlink_to("d")
    (root / "twice").symlink_to(root / "link")
    (root / "ahead").symlink_to("later")
    (root / "loop").symlink_to("loop")
    (root / "d/up").symlink_to("..")
    monkeypatch.setenv("HOME", str(root))
    return root


@pytest.mark.parametrize(
    "alias",
    [
        "d/f", "./d//f", "d/f/", "d/../d/f", "link/f", "twice/f", "~/d/f", "{w}/d/f", "//{w}/d/f", "///{w}//d/./f", "d/up/d/f",
        "link/up/link/f", "new/../d/f", "*/../d/f", "x/*/../../d/f",
    ],
)  # fmt: skip
def test_every_name_of_a_file_is_one_path(world: Path, alias: str) -> None:
    assert one(alias.replace("{w}", str(world)), world) == f"{world}/d/f"


@pytest.mark.parametrize(
    ("given_", "resolved"),
    [
        (".", ""),
        ("/", None),
        ("link/new/x", "/d/new/x"),
        ("ahead/x", "/later/x"),
        ("link/*.md", "/d/*.md"),
        ("link/*/../y*", "/d/y*"),
        ("twice/**/x", "/d/**/x"),
        ("d/~/x", "/d/~/x"),
        ("~nobody-of-that-name/x", "/~nobody-of-that-name/x"),
        ("a\\b", "/a\\b"),
        ("{one}", "/{one}"),
        ("{{cookie.cutter}}/x", "/{{cookie.cutter}}/x"),
    ],
)
def test_what_does_not_exist_yet_and_what_is_a_pattern(
    world: Path, given_: str, resolved: str | None
) -> None:
    assert one(given_, world) == ("/" if resolved is None else f"{world}{resolved}")


def test_dots_behind_a_link_go_where_the_kernel_goes(world: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (world / "away").symlink_to(tmp_path / "elsewhere/deep")
    assert one("away/../x", world) == f"{tmp_path}/elsewhere/x"
    assert one("away/../x*", world) == f"{tmp_path}/elsewhere/x*"


def test_a_loop_of_links_is_a_path_like_any_other(world: Path) -> None:
    assert one("loop/x", world) == one("loop/./x", world)


def test_letters_of_the_workdir_are_no_pattern(world: Path) -> None:
    """Folders are called [id] (routes of web programs): as a workdir that is a name, and it meets itself written as a path."""
    inside = one("page", world / "[id]")
    assert not overlap(inside, f"{world}/i/page")
    assert overlap(inside, one("[id]/page", world))
    assert overlap(inside, str(world))
    assert not overlap(inside, f"{world}/d")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("  ", "empty"),
        ("a\nb", r"U\+000A"),
        ("a\x1b[2Jb", r"U\+001B"),
        ("a\x00b", r"U\+0000"),
        ("a\x7f", r"U\+007F"),
        ("a\x9bb", r"U\+009B"),
        ("a\u2028b", r"U\+2028"),
        ("a\ud800b", r"U\+D800"),
        ("src/{a,b}.py", "braces are not expanded"),
        ("a\\*b", r"\[\*\] is the letter"),
        ("a/**/../x", "behind `\\*\\*`"),
        ("x" * 256, "more than 255 bytes"),
        ("é" * 128, "more than 255 bytes"),
        ("/".join(["x" * 200] * 21), "longer than 4096"),
    ],
)
def test_what_cannot_be_compared_soundly_is_refused_and_shown_harmlessly(
    world: Path, bad: str, says: str
) -> None:
    with pytest.raises(InvalidTask, match=says) as refused:
        one(bad, world)
    assert refused.value.fields["field"] == "writes_to"
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 400


def test_a_link_to_a_name_that_is_no_text_is_refused(world: Path) -> None:
    os.mkdir(os.fsencode(world) + b"/\xff")
    os.symlink(b"\xff", os.fsencode(world) + b"/odd")
    with pytest.raises(InvalidTask, match="other than UTF-8") as refused:
        one("odd/x", world)
    assert refused.value.message.isprintable()


@given(st.text(alphabet="ab./*?[]!{},~\\\n-", min_size=1, max_size=14))
def test_any_text_is_a_path_or_an_error_and_a_path_stays_what_it_is(text: str) -> None:
    try:
        resolved = one(text, "/nowhere/at/all")
    except InvalidTask:
        return
    assert resolved.startswith("/")
    assert "//" not in resolved
    assert ".." not in resolved.split("/")
    assert one(resolved) == one(one(resolved))
    assert overlap(resolved, resolved)


# Case and spelling.


def test_an_ordinary_folder_tells_case_and_spelling_apart(world: Path) -> None:
    assert Folders().ignores_case(str(world)) is False
    assert one("D/f", world) != one("d/f", world)
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert one(composed, world) != one(decomposed, world)
    (world / composed).touch()
    assert not (world / decomposed).exists(), "this file system does not tell them apart"


def test_below_a_folder_that_ignores_case_names_are_folded(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such file system can be made on every machine: the answer alone is put in, as `letters` would give it."""
    (world / "Share/Sub").mkdir(parents=True)
    real = letters._ignores_case

    def answer(folder: str) -> bool | None:
        return True if real(folder) is not None and folder.startswith(f"{world}/Share") else real(folder)

    monkeypatch.setattr(letters, "_ignores_case", answer)
    assert one("Share/Sub/New.TXT", world) == one("Share/SUB/NEW.txt", world) == f"{world}/Share/sub/new.txt"
    assert one("Share/STRASSE", world) == one("Share/straße", world)
    assert one("Share/\u00c9", world) == one("Share/e\u0301", world)
    assert one("share/x", world) != one("Share/x", world)  # the folder it lies in tells them apart
    for pattern in ("Share/*.MD", "Share/[!a].Md", "Share/[A-C].md"):
        assert overlap(one(pattern, world), one("Share/B.mD", world))
    assert overlap(one("Share/[!a].md", world), one("Share/A.md", world))  # a false alarm, never a miss


def test_a_name_that_answers_in_the_other_case_shows_a_folder_that_ignores_case(tmp_path: Path) -> None:
    """What such a share shows, made of hard links: both names are the same file."""
    (tmp_path / "same").mkdir()
    (tmp_path / "same/a").touch()
    os.link(tmp_path / "same/a", tmp_path / "same/A")
    assert letters._answers_in_the_other_case(str(tmp_path / "same"))
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/a").touch()
    assert not letters._answers_in_the_other_case(str(tmp_path / "apart"))
    (tmp_path / "apart/A").touch()
    assert not letters._answers_in_the_other_case(str(tmp_path / "apart"))
    assert not letters._answers_in_the_other_case(str(tmp_path / "none"))


def test_fold_makes_one_spelling() -> None:
    assert fold("Straße") == fold("STRASSE")
    assert fold("\u212b") == fold("\u00e5") == fold("a\u030a")


@pytest.mark.root
def test_a_real_casefold_folder_is_seen_where_the_kernel_has_them(tmp_path: Path) -> None:
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["truncate", "-s", "16M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-O", "casefold", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, mount], check=False, capture_output=True)
    if mounted.returncode != 0:
        assert not Path("/sys/fs/ext4/features/casefold").exists(), mounted.stderr
        return  # a kernel without CONFIG_UNICODE: there is no such folder on this machine
    try:
        (mount / "Apart").mkdir()
        (mount / "Same").mkdir()
        subprocess.run(["chattr", "+F", mount / "Same"], check=True)
        assert one("Same/A/b", mount) == one("Same/a/B", mount)
        assert one("Apart/A", mount) != one("Apart/a", mount)
    finally:
        subprocess.run(["umount", mount], check=True)
