"""The unit files as systemd itself judges them, without booting anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
PROGRAMS = ("agentqd", "agentqd-supervisor")


def installed(folder: Path, source: Path, programs: Path) -> list[str]:
    """Copies of the units whose programs exist: verify demands that. Nothing else is changed."""
    programs.mkdir(parents=True)
    folder.mkdir()
    paths = []
    for program in (*PROGRAMS, "agentqctl"):
        shutil.copy("/bin/true", programs / program)
    for program in PROGRAMS:
        unit = folder / f"{program}.service"
        text = (source / unit.name).read_text()
        assert "/opt/agentqd/bin/" in text or "%h/.local/lib/agentqd/bin/" in text
        unit.write_text(text.replace("/opt/agentqd/bin/", f"{programs}/"))
        paths.append(str(unit))
    return paths


def verify(paths: list[str], *options: str, env: dict[str, str] | None = None) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (script/setup --test)")
    command = ["systemd-analyze", *options, "verify", "--man=no", "--recursive-errors=yes", *paths]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not [line for line in said.splitlines() if "agentqd" in line], said


@pytest.mark.systemd
def test_system_units_are_clean(tmp_path: Path) -> None:
    verify(installed(tmp_path / "units", UNITS, tmp_path / "bin"))


@pytest.mark.systemd
def test_user_units_are_clean(tmp_path: Path) -> None:
    home = tmp_path / "home"
    paths = installed(tmp_path / "units", UNITS / "user", home / ".local/lib/agentqd/bin")
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    verify(paths, "--user", env={"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)})


@pytest.mark.systemd
def test_verify_notices_a_unit_that_is_wrong(tmp_path: Path) -> None:
    paths = installed(tmp_path / "units", UNITS, tmp_path / "bin")
    with Path(paths[0]).open("a") as unit:
        unit.write("[Service]\nWatchdogSecs=30s\n")
    with pytest.raises(AssertionError, match="WatchdogSecs"):
        verify(paths)


@pytest.mark.parametrize("folder", [UNITS, UNITS / "user"])
def test_nothing_ties_the_daemon_to_its_supervisor(folder: Path) -> None:
    """Wants and After only: with any of the others a restart of one would be felt by the other's workers."""
    for program in PROGRAMS:
        text = (folder / f"{program}.service").read_text()
        for tie in ("Requires=", "Requisite=", "BindsTo=", "PartOf=", "PropagatesStopTo=", "ExecStop"):
            assert f"\n{tie}" not in text
        assert "\nRuntimeDirectoryPreserve=yes\n" in text
    assert "\nWants=agentqd-supervisor.service\n" in (folder / "agentqd.service").read_text()
