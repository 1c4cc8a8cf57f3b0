"""The container image: built from the Dockerfile without a network, and run: a task, a killed daemon, a clean stop."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from systemd import nspawn

PROJECT = Path(__file__).resolve().parents[2]
TOOLS = ("buildah", "podman", "crun", "mmdebstrap", "unshare", "nsenter")
IMAGE = "localhost/agentqd-test"

pytestmark = [
    pytest.mark.xdist_group("image"),
    pytest.mark.image,
    pytest.mark.root,
    pytest.mark.real,
    pytest.mark.timeout(300),
]


class Engine:
    """buildah and podman on a storage of their own, in namespaces of their own: killing one process ends it all."""

    def __init__(self, cache: Path) -> None:
        # The storage is kept for its base image. Podman binds it to its run folders by name; emptied, they mean a reboot.
        self._lock = (cache / "containers.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        run, tmp = cache / "containers-run", cache / "containers-tmp"
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(tmp, ignore_errors=True)
        self._store = ["--root", str(cache / "containers"), "--runroot", str(run)]
        self._podman = ["podman", *self._store, "--tmpdir", str(tmp), "--events-backend", "none"]
        self._podman += ["--cgroup-manager", "cgroupfs", "--runtime", "crun"]
        mount = (
            "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; echo ready; exec sleep infinity"
        )
        self._holder = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--net",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "sh",
                "-c",
                mount,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._inside = ["nsenter", "-t", children[0], "-m", "-n", "-p", "--"]

    def buildah(self, *words: str) -> str:
        return _run("buildah", *self._store, *words)

    def podman(self, *words: str, stdin: str = "") -> str:
        return _run(*self._inside, *self._podman, *words, stdin=stdin)

    def close(self) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.communicate()
        self._lock.close()

    def import_base(self, name: str, root: Path) -> None:
        """The root file system as an image, once per storage."""
        with contextlib.suppress(AssertionError):
            self.buildah("inspect", "--type", "image", name)
            return
        container = self.buildah("from", "scratch").strip()
        mounted = self.buildah("mount", container).strip()
        _run("cp", "-a", f"{root}/.", mounted)
        self.buildah("umount", container)
        self.buildah("commit", "-q", "--rm", container, name)


def _run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        raise AssertionError(
            f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the image built as IMAGE."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or lacking:
        pytest.skip(f"needs {', '.join(lacking)} (script/setup --test)" if lacking else "needs root")
    root = nspawn.root_file_system()
    wheels = nspawn.wheels(root)
    scratch = tmp_path_factory.mktemp("image")
    engine = Engine(nspawn.cache_folder())
    try:
        engine.podman("rm", "-f", "-a")  # of a run that was killed
        engine.import_base(f"localhost/{root.name}", root)
        # pip finds everything in a folder: no network, and the host's own pip settings do not matter.
        (scratch / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        engine.buildah(
            *("bud", "--isolation", "chroot", "--format", "docker", "--layers=false", "-t", IMAGE),
            *("--build-arg", f"BASE=localhost/{root.name}"),
            *("--volume", f"{wheels}:/wheels:ro", "--volume", f"{scratch}/pip.conf:/etc/pip.conf:ro"),
            str(PROJECT),
        )
        yield engine
        with contextlib.suppress(AssertionError):
            engine.buildah("rmi", IMAGE)
    finally:
        engine.close()


@pytest.fixture
def container(engine: Engine, tmp_path: Path) -> Iterator[Container]:
    running = Container(engine, tmp_path / "volume")
    yield running
    engine.podman("rm", "-f", "-t", "0", running.name)


class Container:
    """One running container with its state in `volume`."""

    def __init__(self, engine: Engine, volume: Path) -> None:
        volume.mkdir()
        self.engine, self.volume, self.name = engine, volume, f"agentqd-{os.getpid()}"
        options = ["--cgroups=disabled", "--network", "none", "--stop-timeout", "30"]
        engine.podman("run", "-d", "--name", self.name, *options, "-v", f"{volume}:/var/lib/agentqd:U", IMAGE)
        nspawn.wait_for("the queue file", (volume / "queue/tasks.jsonl").exists)

    def sh(self, script: str, stdin: str = "") -> str:
        return self.engine.podman("exec", "-i", self.name, "sh", "-c", script, stdin=stdin)

    def append(self, name: str, prompt: str) -> None:
        self.sh(
            "cat >> /var/lib/agentqd/queue/tasks.jsonl", json.dumps({"task": name, "prompt": prompt}) + "\n"
        )

    def result(self, name: str) -> dict[str, object]:
        def look() -> dict[str, object] | None:
            path = self.volume / "completions.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            return next((line for line in lines if line["name"] == name), None)

        found = nspawn.wait_for(f"the result of {name}", look)
        assert found is not None
        return found

    def states(self) -> dict[int, str]:
        """pid → state letter of every process inside, but for those of the question itself."""
        text = self.sh("cat /proc/[0-9]*/stat 2>/dev/null || true")
        stats = [
            line.replace(" (cat) ", " () ").partition(" ")
            for line in text.splitlines()
            if "(cat)" not in line
        ]
        found = {int(pid): rest.rpartition(")")[2].split() for pid, _, rest in stats}
        return {pid: fields[0] for pid, fields in found.items() if pid == 1 or fields[1] != "0"}


def test_container_runs_a_task_from_an_appended_line_as_an_ordinary_user(container: Container) -> None:
    container.append("hello", "id -u; echo hello from $AGENTQ_TASK_ID")
    result = container.result("hello")
    assert result["status"] == "success"
    assert result["stdout_tail"] == f"10001\nhello from {result['task_id']}\n"
    status = json.loads(container.sh("agentqctl status --json"))
    assert status["results"]["success"] == 1


def test_worker_outlives_a_killed_daemon_in_a_container(container: Container) -> None:
    container.append("survivor", "until [ -e /tmp/go ]; do sleep 0.1; done; echo pid $$ has finished")
    worker = nspawn.wait_for(
        "the worker", lambda: json.loads(container.sh("agentqctl status --json"))["running"]
    )
    daemon = (container.volume / "agentqd.lock").read_text()
    container.sh(f"kill -9 {daemon}")
    nspawn.wait_for("a new daemon", lambda: (container.volume / "agentqd.lock").read_text() != daemon)
    container.sh("touch /tmp/go")
    result = container.result("survivor")
    assert (result["status"], result["attempt"]) == ("success", 1)
    assert result["stdout_tail"] == f"pid {worker[0]['pid']} has finished\n"


def test_no_zombies_pile_up(container: Container) -> None:
    for _ in range(3):
        container.sh("(sleep 0.1 &) ; (sleep 0.1 &)")  # orphans of an exec'd shell go to PID 1
        container.append("orphans", "(setsid sleep 0.1 &) ; echo done")
    nspawn.wait_for(
        "the end of all but three", lambda: len(container.states()) == 3
    )  # init, daemon, supervisor
    assert "Z" not in container.states().values()


def test_stop_ends_workers_in_order_and_records_them(container: Container) -> None:
    container.append("long", "trap 'echo asked to end; exit 0' TERM; while :; do sleep 0.1; done")
    nspawn.wait_for("the worker", lambda: json.loads(container.sh("agentqctl status --json"))["running"])
    container.engine.podman("stop", container.name)
    assert (
        container.engine.podman("inspect", "--format", "{{.State.ExitCode}}", container.name).strip() == "0"
    )
    result = container.result("long")
    assert (result["status"], result["stdout_tail"]) == ("lost", "asked to end\n")


def test_container_with_a_config_that_cannot_be_used_ends_and_says_why(
    engine: Engine, tmp_path: Path
) -> None:
    config = tmp_path / "agentqd.yaml"
    config.write_text("max_wokers: 3\n")
    mount = f"{config}:/etc/agentqd/agentqd.yaml:ro"
    with pytest.raises(AssertionError, match=r"exit 78\n(?s:.*)max_workers"):
        engine.podman("run", "--rm", "--cgroups=disabled", "--network", "none", "-v", mount, IMAGE)


def test_image_says_how_it_is_to_be_run(engine: Engine) -> None:
    config = json.loads(engine.podman("image", "inspect", IMAGE))[0]
    assert config["User"] == "agentqd"
    assert list(config["Config"]["Volumes"]) == ["/var/lib/agentqd"]
    assert config["Healthcheck"]["Test"] == ["CMD", "agentqctl", "status", "--json"]
