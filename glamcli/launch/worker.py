"""What runs on every machine of a slice: installs glam, starts `glam train`, says how it is.

It is copied there and run by the machine's own Python, 3.8 or newer, with nothing but its standard
library. The command outlives the connection that started it: its log and exit code are files. All
commands may be repeated: what has been done is not done again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIN_FREE_BYTES = 8 * 10**9
MAX_LOG_BYTES = 1 << 16
ANSWER = "glam-worker "
"""before the one line of an answer: ssh and gcloud print their own."""
STOPPED = HERE / "stopped"
"""somebody asked for the end of the launch, maybe from a machine that the launcher is not on."""
LOG_SECONDS = 60
LIBTPU_LOCK = Path("/tmp/libtpu_lockfile")


def _storage(url, data=None):
    """The content of an object in a bucket, or, with `data`, writes it. Raises: OSError."""
    bucket, _, name = url[len("gs://") :].partition("/")
    server = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    headers = {}
    if server.startswith("https://"):
        account = "instance/service-accounts/default/token"
        headers["Authorization"] = "Bearer " + json.loads(_metadata(account))["access_token"]
    place, quoted = f"/storage/v1/b/{bucket}/o", urllib.parse.quote(name, safe="")
    if data is None:
        url = f"{server}/download{place}/{quoted}?alt=media"
    else:
        url = f"{server}/upload{place}?uploadType=media&name={quoted}"
        headers["Content-Type"] = "text/plain"
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        hint = "; may the machines' service account use it?" if error.code in (401, 403) else ""
        raise OSError(f"gs://{bucket}/{name}: HTTP status {error.code}{hint}") from error


def _metadata(path):
    """What Google says to the machine of itself."""
    url = f"http://metadata.google.internal/computeMetadata/v1/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def _number():
    """Which machine of the slice this is."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK")  # of machines that are none of Google's
    return rank or _metadata("instance/attributes/agent-worker-number")


def _upload_log(attempt):
    """Where the run is in a bucket; the next time if that fails."""
    run = _package()["run"]
    if run.startswith("gs://"):
        try:
            name = f"{run}/launch/logs/worker-{_number()}-start-{attempt}.log"
            _storage(name, _of(attempt, "log").read_bytes())
        except OSError as error:
            sys.stderr.write(f"warning: this log was not uploaded: {error}\n")


def _answer(text):
    sys.stdout.write(ANSWER + text + "\n")


def _package():
    return json.loads((HERE / "package.json").read_text())


def _install():
    """Runs the setup, makes an environment and installs glam in it."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # with all that it starts, for `kill`
    with open(str(HERE / "install.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (HERE / "install.group").write_text(str(os.getpgrp()))
        _install_package(_package())


def _install_package(package):
    free = shutil.disk_usage(str(HERE)).free
    if free < MIN_FREE_BYTES:
        sys.exit(f"only {free / 1e9:.1f} GB are free on the disk, 8 are needed")
    for name, digest in package.get("fetch", {}).items():
        data = _storage(package["run"] + "/launch/package/" + name)
        if hashlib.sha256(data).hexdigest() != digest:
            sys.exit(f"{name} in the bucket is not the one that was sent: launch again")
        (HERE / name).write_bytes(data)
    if package["setup"]:
        subprocess.run(["bash", "-e", "-c", package["setup"]], check=True)
    uv = shutil.which("uv") or os.path.expanduser("~/.local/bin/uv")
    if not os.path.exists(uv):
        fetch = "curl -LsSf https://astral.sh/uv/install.sh | sh"
        subprocess.run(["bash", "-o", "pipefail", "-c", fetch], check=True)
    environment = str(HERE / "venv")
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([uv, "venv", "--python", package["python"], environment], check=True)
    pip = [uv, "pip", "install", "--python", environment + "/bin/python"]
    pins = ["--constraint", str(HERE / "constraints.txt")]
    wheel = str(HERE / package["wheel"]) + "[" + package["extras"] + "]"
    subprocess.run([*pip, *pins, wheel], check=True)
    (HERE / "installed").write_text(package["digest"])
    _answer("{}")


def _attempt():
    """The number of the newest attempt; 0 before the first."""
    found = [int(path.suffix[1:]) for path in HERE.glob("attempt.*") if path.suffix[1:].isdigit()]
    return max(found, default=0)


def _of(attempt, kind):
    return HERE / f"{attempt}-{kind}"


def _is_held(path):
    """Whether the attempt's supervisor lives: it holds the file."""
    with open(str(path), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _code(attempt):
    """The exit code of an attempt; None while it runs. One that vanished, as after the machine
    was started anew, was killed."""
    held = _is_held(_of(attempt, "lock"))
    try:
        return int(_of(attempt, "code").read_text())
    except (OSError, ValueError):
        return None if held else -int(signal.SIGKILL)


def _start(attempt):
    """Starts the command as an attempt of that number, unless it or a later one was started."""
    before = _attempt()
    if before < attempt and not STOPPED.exists():
        _kill(before)
        with contextlib.suppress(OSError):  # of a dead process, it would keep ours from the TPU
            LIBTPU_LOCK.unlink()
        with open(str(_of(attempt, "lock")), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(str(_of(attempt, "log")), "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, "supervise", str(attempt), str(lock.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )
            _of(attempt, "group").write_text(str(process.pid))
            (HERE / f"attempt.{attempt}").touch()
    _answer("{}")


def _command():
    """The command of the run, and its environment."""
    package = _package()
    words = [str(HERE / "venv/bin/glam"), "train", str(HERE / "recipe.yaml")]
    words += ["--run", package["run"]]
    return words, dict(os.environ, GLAM_SECRET=package["secret"])


def _run():
    """Becomes the command: for a scheduler that looks after it."""
    with contextlib.suppress(OSError):
        LIBTPU_LOCK.unlink()
    words, environment = _command()
    os.execve(words[0], words, environment)


def _supervise(attempt, lock):
    """Runs the command to its end and writes its exit code. Its parent is gone. The command holds
    the lock (a file descriptor), too: it may outlive this process."""
    command, environment = _command()
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, pass_fds=(lock,)
        )
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        code = 127
    else:
        _of(attempt, "pid").write_text(str(process.pid))
        code = None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=LOG_SECONDS)
            _upload_log(attempt)
    unfinished = _of(attempt, "code.new")
    unfinished.write_text(str(code))
    os.replace(str(unfinished), str(_of(attempt, "code")))


def _stop():
    """Asks the newest attempt to save and end, once: a second signal would end it at once."""
    STOPPED.touch()
    attempt = _attempt()
    asked, process = _of(attempt, "asked"), _of(attempt, "pid")
    if attempt and _code(attempt) is None and process.exists() and not asked.exists():
        asked.touch()
        os.kill(int(process.read_text()), signal.SIGTERM)
    _answer("{}")


def _kill(attempt):
    """Ends all processes of an attempt at once and waits until they are gone."""
    _end_group(_of(attempt, "group"), _of(attempt, "lock"))


def _end_group(group, lock):
    try:
        if _is_held(lock):
            os.killpg(int(group.read_text()), signal.SIGKILL)
    except (OSError, ValueError):
        return
    while _is_held(lock):
        time.sleep(0.05)


def _kill_all():
    """Ends what runs of the newest attempt and of an installation."""
    _kill(_attempt())
    _end_group(HERE / "install.group", HERE / "install.lock")


def _status(offset):
    """One line: what is installed, the newest attempt and how it is, the newest saved step, the
    clock, and what the log has from `offset` on (below 0: its end)."""
    attempt, package = _attempt(), _package()
    code = _code(attempt) if attempt else None  # before the log: it then is whole
    installed, log = HERE / "installed", _of(attempt, "log")
    text, size = b"", 0
    if log.exists():
        with open(str(log), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            offset = max(0, size - MAX_LOG_BYTES) if offset < 0 else offset
            file.seek(offset)
            text = file.read(MAX_LOG_BYTES)
    names = []
    with contextlib.suppress(OSError):  # no checkpoints yet, or not mounted
        names = os.listdir(os.path.join(package["run"], "checkpoints"))
    answer = {
        "digest": installed.read_text() if installed.exists() else None,
        "attempt": attempt,
        "code": code,
        "stopped": STOPPED.exists(),
        "step": max((int(name) for name in names if name.isdigit()), default=0),
        "clock": time.time(),
        "offset": offset + len(text),
        "rest": max(0, size - offset - len(text)),
        "text": text.decode("utf-8", "replace"),
    }
    _answer(json.dumps(answer))


if __name__ == "__main__":
    {
        "install": _install,
        "run": _run,
        "start": _start,
        "supervise": _supervise,
        "stop": _stop,
        "kill": _kill_all,
        "status": _status,
    }[sys.argv[1]](*map(int, sys.argv[2:]))
