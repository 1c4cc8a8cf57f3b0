"""`agentqctl box install-sync`: what it writes is what systemd takes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from agentqd.cli.verbs import installsync


def units(tmp_path: Path, box: str | None = None) -> dict[str, str]:
    env = {"HOME": str(tmp_path), "XDG_STATE_HOME": f"{tmp_path}/with space %h"}
    return installsync.sync_units(env, ["/opt/agent qd/$x/agentqctl"], box)


def test_the_units_pass_systemds_own_check(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "bin dir" / "agentqctl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = {"HOME": str(tmp_path), "XDG_STATE_HOME": f"{tmp_path}/with space %h"}
    for box in (None, "box1"):
        made = installsync.sync_units(env, [str(program)], box)
        for name, text in made.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o644)  # whatever the umask
        done = subprocess.run(
            [
                "systemd-analyze",
                "verify",
                "--user",
                "--man=no",
                "--recursive-errors=yes",
                *(str(tmp_path / name) for name in made),
            ],
            capture_output=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            timeout=60,
            check=False,
        )
        ours = [line for line in done.stderr.decode().splitlines() if "agentqctl-flush" in line]
        assert ours == []


def test_percent_signs_dollars_and_blanks_reach_the_program_as_they_are(tmp_path: Path) -> None:
    service = units(tmp_path, "box1")["agentqctl-flush-box1.service"]
    assert 'ExecStart="/opt/agent qd/$$x/agentqctl" flush --box box1\n' in service
    assert f'Environment="XDG_STATE_HOME={tmp_path}/with space %%h"\n' in service
    assert f"ConditionPathExistsGlob={tmp_path}/with space %%h/agentqctl/spool/box1/*.json\n" in service


def test_a_line_break_cannot_add_a_line_to_a_unit(tmp_path: Path) -> None:
    with pytest.raises(installsync.AgentqError, match="line break"):
        installsync.sync_units(
            {"HOME": str(tmp_path), "XDG_CONFIG_HOME": "/x\nExecStart=/bin/sh"}, ["/a"], None
        )


@pytest.fixture
def fake_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "systemctl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\nexit ${{FAIL:-0}}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def test_it_writes_the_units_starts_them_and_says_so(fake_systemctl: Path) -> None:
    done = CliRunner().invoke(installsync.command, [], standalone_mode=False)
    assert done.exception is None
    folder = fake_systemctl / ".config/systemd/user"
    names = {f"agentqctl-flush.{kind}" for kind in ("service", "timer", "path")}
    assert {path.name for path in folder.iterdir()} == names
    assert all(stat.S_ISREG(path.stat().st_mode) for path in folder.iterdir())
    assert (fake_systemctl / "ran").read_text().splitlines() == [
        "--user daemon-reload",
        "--user enable --now agentqctl-flush.timer agentqctl-flush.path",
    ]
    assert all(f"wrote {folder}/{name}" in done.output for name in names)


def test_print_only_prints(fake_systemctl: Path) -> None:
    done = CliRunner().invoke(installsync.command, ["--print", "--box", "box1"], standalone_mode=False)
    assert done.exception is None
    assert "OnCalendar=minutely" in done.output
    assert "flush --box box1" in done.output
    assert not (fake_systemctl / ".config").exists()
    assert not (fake_systemctl / "ran").exists()


def test_a_systemctl_that_fails_is_told_with_what_to_run(
    fake_systemctl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "1")
    done = CliRunner().invoke(installsync.command, [], standalone_mode=False)
    assert isinstance(done.exception, installsync.AgentqError)
    assert "systemctl --user daemon-reload && systemctl --user enable --now" in done.exception.message
