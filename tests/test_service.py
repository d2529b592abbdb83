"""The unit and the container file: what they say, what systemd says of them, and their commands run as a nobody."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from served import KEY, make_run
from typer.testing import CliRunner

from llmft_nb.cli import app
from llmft_nb.core import UserError
from llmft_nb.server import DrainingServer
from llmft_nb.service import write_service

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    "A run that everybody may read."
    folder = make_run(tmp_path / "run", "classify", "tiny-encoder", max_length=64)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    "A key's file."
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o400)
    return file


class Several(dict):  # type: ignore[type-arg]
    "Values of a unit's section: a key that comes again adds a value."

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, self[key] + value if isinstance(value, list) and key in self else value)


def sections(unit: Path) -> dict[str, dict[str, list[str]]]:
    "By section and key, all values."
    parser = configparser.RawConfigParser(strict=False, dict_type=Several, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return {name: {one: value.split("\n") for one, value in parser.items(name)} for name in parser.sections()}


def test_the_unit_bounds_a_user_who_is_nobody(run: Path, key: Path, tmp_path: Path) -> None:
    told = write_service(run, tmp_path / "out", key_file=key, port=8123, name="labels", allow_hosts=["a.example"])
    found = sections(tmp_path / "out" / "llmft-serve.service")
    assert set(found) == {"Unit", "Service", "Install"}
    service = found["Service"]
    assert service["DynamicUser"] == ["yes"] and "User" not in service
    assert service["LoadCredential"] == [f"key:{key}"] and KEY not in str(found)
    assert not any("KEY" in word.upper() for word in service["Environment"])
    assert any("HF_HUB_OFFLINE=1" in words for words in service["Environment"])
    for name, value in {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "tmpfs", "PrivateTmp": "yes",
        "CapabilityBoundingSet": "", "Restart": "on-failure", "KillSignal": "SIGTERM", "TasksMax": "256",
        "LimitNOFILE": "4096", "MemoryMax": f"{told['memory_mb']}M", "CPUQuota": f"{100 * told['cpus']}%",
        "IPAddressDeny": "any", "IPAddressAllow": "localhost",
    }.items():  # fmt: skip
        assert service[name] == [value], name
    drain_s = DrainingServer.__init__.__defaults__[-1]
    assert drain_s < int(service["TimeoutStopSec"][0]) <= drain_s + 15
    words = shlex.split(service["ExecStart"][0])
    assert words[0] == sys.executable and words[3:5] == ["serve", str(run)]
    assert words[5:] == ["--host", "127.0.0.1", "--port", "8123", "--name", "labels", "--api-key-file", "%d/key",
                         "--allow-host", "a.example"]  # fmt: skip
    open_one = write_service(run, tmp_path / "open", key_file=key, host="10.0.0.7")
    wide = sections(Path(open_one["files"][1]))["Service"]
    assert "IPAddressDeny" not in wide and "10.0.0.7" in wide["ExecStartPost"][0]
    keyless = sections(Path(write_service(run, tmp_path / "keyless")["files"][1]))["Service"]
    assert "LoadCredential" not in keyless and "--api-key-file" not in keyless["ExecStart"][0]


def test_systemd_takes_the_unit_and_calls_it_safe(run: Path, key: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    write_service(run, tmp_path / "out", key_file=key)
    unit = tmp_path / "out" / "llmft-serve.service"
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0 and "llmft-serve" not in done.stderr, done.stderr
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(unit)]  # Tenths of 0 (best) to 10
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_is_nobodys_and_needs_its_key(run: Path, tmp_path: Path) -> None:
    write_service(run, tmp_path / "out", name="labels")
    text = (tmp_path / "out" / "Containerfile").read_text()
    lines = [line.split(" ", 1) for line in text.splitlines() if line and line[0] not in "# "]
    said = dict(lines)
    assert [word for word, _ in lines].index("USER") < [word for word, _ in lines].index("ENTRYPOINT")
    assert said["USER"] == "65532:65532" and said["STOPSIGNAL"] == "SIGTERM" and "/health" in said["HEALTHCHECK"]
    words = json.loads(said["ENTRYPOINT"])
    assert words[:5] == ["llmft", "serve", "/srv/run", "--host", "0.0.0.0"]
    assert words[words.index("--api-key-file") + 1] == "/run/secrets/llmft-key"
    assert not re.search(r"@[A-Z_]+@", text) and f"--volume {run}:/srv/run:ro" in text
    for word in ("--read-only", "--cap-drop=all", "no-new-privileges", "--pids-limit", "--stop-timeout=40"):
        assert word in text, word
    health = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    compile(health[2], "health", "exec")
    assert health[3:] == ["127.0.0.1", "8000", "GET", "/health"]


def test_what_cannot_stand_in_a_unit_is_refused(run: Path, key: Path, tmp_path: Path) -> None:
    for name in ("a b", "a%b", "a$b", "a:b", 'a"b', "a\nb"):
        odd = run.rename(run.with_name(name))
        with pytest.raises(UserError, match="can stand in a unit"):
            write_service(odd, tmp_path / "out")
        odd.rename(run)
    with pytest.raises(UserError, match="can stand in a unit"):
        write_service(run, tmp_path / "out", allow_hosts=["a\nUser=root"])
    with pytest.raises(UserError, match="can stand in a unit"):
        write_service(run, tmp_path / "out", key_file=key, host="1.2.3.4\nUser=root")
    with pytest.raises(UserError, match="no key"):
        write_service(run, tmp_path / "out", host="10.0.0.7")
    (run / "model" / "model.safetensors").chmod(0o600)
    with pytest.raises(UserError, match="only its owner can read it"):
        write_service(run, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is left where something is refused"
    (run / "model" / "model.safetensors").chmod(0o644)
    words = ["deploy", str(run), "--out", str(tmp_path / "out"), "--api-key-file", str(key), "--json"]
    assert len(json.loads(CliRunner().invoke(app, words).stdout)["files"]) == 2
    assert CliRunner().invoke(app, words).exit_code == 2, "nothing is overwritten"


SANDBOX = """
set -e
mount --make-rprivate /
mkdir -p {stage}
mount -t tmpfs tmpfs {stage}
for place in {places}; do mkdir -p {stage}$place; mount --bind $place {stage}$place; done
install -m 400 -o 65534 {key} {stage}/key
for home in {homes}; do mount -t tmpfs tmpfs $home; done; mount -t tmpfs tmpfs /tmp
for place in {places}; do mkdir -p $place; mount --bind {stage}$place $place; mount -o remount,bind,ro $place; done
mkdir -p -m 755 /tmp/credentials; mount --bind {stage}/key {stage}/key; cp -p {stage}/key /tmp/credentials/key
mount -o remount,bind,ro / ; chmod 1777 /tmp
cd /
exec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
  env -i PATH=/usr/bin:/bin {environment} {command}
"""  # As systemd would, but by hand: no home, nothing to write to but /tmp, no capability, nothing of our environment


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_the_units_command_serves_as_nobody_and_ends_well(run: Path, key: Path, tmp_path: Path) -> None:
    if any(shutil.which(name) is None for name in ("unshare", "setpriv")):
        pytest.skip("unshare and setpriv are not installed")
    if subprocess.run(["unshare", "-m", "mount", "--make-rprivate", "/"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    out, port = tmp_path / "out", 18000 + os.getpid() % 10000
    write_service(run, out, key_file=key, port=port)
    service = sections(out / "llmft-serve.service")["Service"]
    environment = " ".join(service["Environment"]) + f" PYTHONPATH={ROOT}"
    command = service["ExecStart"][0].replace("%d/key", "/tmp/credentials/key")
    places = service["BindReadOnlyPaths"][0]
    homes = f"{Path('~root').expanduser()} /home"
    script = SANDBOX.format(stage="/mnt", homes=homes, places=places, key=key, environment=environment, command=command)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["unshare", "-m", "bash", "-c", script], stdout=log, stderr=log)
    try:
        health = shlex.split(service["ExecStartPost"][0])[2]
        ready = subprocess.run(["sh", "-c", health], timeout=60)
        assert ready.returncode == 0 and process.poll() is None, (tmp_path / "log").read_text()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\s+65534\s+65534\s+65534\s+65534$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE) and re.search(
            r"^NoNewPrivs:\s+1$", status, re.MULTILINE
        )
        found = {}
        for given in (KEY, "wrong"):
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {given}"}
            line.request("POST", "/v1/classify", json.dumps({"input": "May I?"}), headers)
            answer = line.getresponse()
            found[given] = (answer.status, json.loads(answer.read()))
        assert found[KEY][0] == 200 and found[KEY][1]["data"][0]["label"] in ("no", "yes")
        assert found["wrong"][0] == 401
        started_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        ended = process.wait(30)
        assert ended in (0, -signal.SIGTERM, int(service["SuccessExitStatus"][0])), (tmp_path / "log").read_text()
        assert time.monotonic() - started_s < int(service["TimeoutStopSec"][0])
    finally:
        process.kill()
        process.wait()
