"""Prompts: from the line, from a file, from nowhere."""

import json
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A prompt that must never run, outside every allowed root: it would leave a mark."""
    secret = tmp_path / "secret.txt"
    secret.write_text(f"touch {tmp_path}/ran")
    return secret


@pytest.mark.row(6)
@pytest.mark.parametrize("way", ["dots", "absolute", "symlink", "folder link", "state folder"])
def test_a_prompt_ref_that_leads_out_of_its_root_is_refused(box: RealBox, marked: Path, way: str) -> None:
    prompts = box.state / "prompts"
    (prompts / "link").symlink_to(marked)
    (prompts / "out").symlink_to(marked.parent)
    ref = {
        "dots": "../../../secret.txt",
        "absolute": str(marked),
        "symlink": "link",
        "folder link": "out/secret.txt",
        "state folder": "../queue/tasks.jsonl",
    }[way]
    box.append({"task": "escape", "prompt_ref": ref})
    told = box.result("escape")
    assert (told["status"], told["reason"], told["task_id"]) == ("refused", "prompt_outside", None)
    assert not (marked.parent / "ran").exists()
    status, answer = box.api("POST", "/v1/tasks", {"task": "escape", "prompt_ref": ref})
    assert (status, answer["error"]) == (422, "prompt_outside")


@pytest.mark.row(6)
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty_prompt"), (b" \n\t\n", "empty_prompt"), (b"\xff\xfe", "prompt_not_text")],
)
def test_a_prompt_file_without_a_prompt_is_refused(box: RealBox, content: bytes, reason: str) -> None:
    (box.state / "prompts" / "p").write_bytes(content)
    box.append({"task": "odd", "prompt_ref": "p"})
    assert (box.result("odd")["status"], box.result("odd")["reason"]) == ("refused", reason)
    assert box.alerts("line_rejected")


@pytest.mark.row(6)
def test_a_late_prompt_file_blocks_its_task_until_it_comes(box: RealBox) -> None:
    box.append({"task": "late", "id": "late", "prompt_ref": "late.txt"})
    shown = box.wait_state("late", "blocked")
    assert shown["reason"] == "prompt_missing"
    assert shown["waiting_for"]["reason"] == "prompt_missing"
    (box.state / "prompts" / ".tmp").write_text("echo at last")
    (box.state / "prompts" / ".tmp").rename(box.state / "prompts" / "late.txt")
    assert box.result("late")["stdout_tail"] == "at last\n"


@pytest.mark.row(6)
def test_a_prompt_file_that_never_comes_is_a_loud_refusal(make_box: MakeBox) -> None:
    box = make_box("limits: {late_prompt: 300ms}\n")
    box.append({"task": "never", "id": "never", "prompt_ref": "never.txt"})
    told = box.result("never")
    assert (told["status"], told["reason"], told["task_id"]) == ("refused", "prompt_missing", "never")
    assert box.show("never")["result"] == "refused"
    wait_for("the alert", lambda: box.alerts("prompt_missing"))


@pytest.mark.row(6)
def test_a_configured_root_is_allowed_and_the_prompt_is_a_copy(make_box: MakeBox, tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    (root / "p").write_text("echo first")
    box = make_box(f"limits: {{prompt_roots: ['{root}']}}\nqueues: {{slow: {{paused: true}}}}\n")
    box.append({"task": "kept", "id": "kept", "queue": "slow", "prompt_ref": f"{root}/p"})
    box.wait_state("kept", "queued")
    (root / "p").unlink()
    box.config.write_text(f"limits: {{prompt_roots: ['{root}']}}\nqueues: {{slow: {{}}}}\n")
    assert box.result("kept")["stdout_tail"] == "first\n"


@pytest.mark.row(26)
@pytest.mark.parametrize("prompt", ["", " \n\t "])
def test_an_empty_or_blank_prompt_is_refused_at_the_door(box: RealBox, prompt: str) -> None:
    box.append({"task": "empty", "prompt": prompt})
    told = box.result("empty")
    assert (told["status"], told["reason"]) == ("refused", "empty_prompt")
    done = box.ctl("submit", "--prompt-file", "-", "--json", stdin=prompt.encode())
    assert done.returncode == 65
    assert json.loads(done.stdout)["error"] == "empty_prompt"
    assert box.api("GET", "/v1/tasks")[1]["tasks"] == []


@pytest.mark.row(26)
def test_a_prompt_is_given_by_stdin_argument_or_file_as_its_runner_says(make_box: MakeBox) -> None:
    box = make_box(
        "runners:\n"
        "  in: {command: [cat], prompt: stdin}\n"
        "  arg: {command: [echo, got], prompt: argument}\n"
        "  file: {command: [cat, '{prompt_file}'], prompt: file}\n"
    )
    box.append(
        *(
            {"task": name, "runner": name, "prompt": "the $words; {prompt_file}"}
            for name in ("in", "arg", "file")
        )
    )
    assert box.result("in")["stdout_tail"] == "the $words; {prompt_file}"
    assert box.result("arg")["stdout_tail"] == "got the $words; {prompt_file}\n"
    assert box.result("file")["stdout_tail"] == "the $words; {prompt_file}"
