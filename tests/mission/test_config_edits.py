"""The config file edited under a running daemon."""

import json
import os
import signal
import time

import pytest
from conftest import MakeBox
from realbox import wait_for

pytestmark = pytest.mark.real


@pytest.mark.row(58, 67)
def test_a_saved_edit_applies_within_a_second(make_box: MakeBox) -> None:
    box = make_box("defaults: {run_timeout: 10s}\n")
    began = time.monotonic()
    box.config.write_text("defaults: {run_timeout: 20s}\n")
    wait_for("the edit", lambda: box.api("GET", "/v1/config")[1]["settings"]["defaults"]["run_timeout"] == 20)
    assert time.monotonic() - began < 3  # 0.1 s on a quiet machine
    new = box.config.with_name("new")
    new.write_text("defaults: {run_timeout: 30s}\n")
    new.rename(box.config)
    wait_for(
        "the edit by rename",
        lambda: box.api("GET", "/v1/config")[1]["settings"]["defaults"]["run_timeout"] == 30,
    )


@pytest.mark.row(58)
def test_a_bad_edit_keeps_the_old_settings_and_alerts_with_path_line_and_nearest_name(
    make_box: MakeBox,
) -> None:
    box = make_box("defaults: {run_timeout: 10s}\n")
    box.config.write_text("# a comment\ndefaults: {run_timout: 20s}\n")
    alert = wait_for("the alert", lambda: box.alerts("bad_config"))[0]
    assert f"{box.config}:2:" in alert["message"]
    assert "run_timeout" in alert["message"]
    assert box.api("GET", "/v1/config")[1]["settings"]["defaults"]["run_timeout"] == 10
    assert box.status()["attention"][0]["level"] == "error"
    done = box.ctl("reload", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]) == (65, "invalid_config")
    box.append({"task": "still", "prompt": "echo x"})
    assert box.result("still")["status"] == "success"
    box.config.write_text("defaults: {run_timeout: 20s}\n")
    wait_for(
        "the mended edit",
        lambda: not [item for item in box.status()["attention"] if "not applied: " in item["text"]],
    )
    assert box.api("GET", "/v1/config")[1]["error"] is None


@pytest.mark.row(58)
def test_sighup_and_reload_read_the_file_again(make_box: MakeBox) -> None:
    box = make_box("defaults: {run_timeout: 10s}\n")
    os.kill(box.daemon_pid(), signal.SIGHUP)
    assert box.ctl("reload").returncode == 0
    box.append({"task": "still", "prompt": "echo x"})
    assert box.result("still")["status"] == "success"


@pytest.mark.row(57)
def test_a_sink_and_a_queue_added_at_run_time_work_at_once(make_box: MakeBox) -> None:
    box = make_box("{}\n")
    path = box.folder / "entries.jsonl"
    box.config.write_text(
        f"sinks: {{archive: {{type: file, path: {path}}}}}\nqueues: {{new: {{}}}}\nroutes: [{{match: {{queue: new}}, deliver_to: [archive]}}]\n"
    )
    wait_for("the edit", lambda: box.events("config_applied"))
    box.append({"task": "routed", "queue": "new", "prompt": "echo x"})
    text = wait_for("its envelope", lambda: path.exists() and path.read_text())
    assert json.loads(text.splitlines()[0])["data"]["name"] == "routed"


@pytest.mark.row(60, 43)
def test_alerts_go_where_the_config_says(make_box: MakeBox) -> None:
    box = make_box("alerts: {deliver_to: [completions]}\n")
    box.append({"task": "idle", "prompt": "true"})
    wait_for(
        "the alert's line",
        lambda: [line for line in box.completions() if line.get("type") == "agentq.alert.no_work"],
    )
    (line,) = [line for line in box.completions() if line.get("type") == "agentq.alert.no_work"]
    assert "status" not in line
