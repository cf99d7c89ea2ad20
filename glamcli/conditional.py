"""Objects read with their version, and written on the condition that they still have it: Google's
buckets and Amazon's (and their like) in their own words, through the file systems of fsspec.

A version is a number of Google's, and the ETag of Amazon's, which is a digest: there an object that
is written with the content it had before has its version again.
"""

import json
import uuid
from collections.abc import Coroutine
from typing import Any

SCHEMES = ("gs://", "s3://")
ABSENT = ""
"""the version of an object that is not there."""
_CONFLICT_WAITS = (0.2, 1.0, 5.0)
"""seconds before a write is tried again that met another one, of which either may fail."""


def fetch(fs: Any, path: str, seconds: float | None) -> tuple[bytes, str]:
    """The content of an object and its version, in so many seconds; what the file system raises."""
    bucket, _, name = path.partition("/")
    if "s3" in fs.protocol:
        return _in_time(fs, _read_s3(fs, bucket, name), seconds)
    url = fs._location + "/download/storage/v1/b/{}/o/{}"
    headers, data = fs.call("GET", url, bucket, name, alt="media", timeout=seconds)
    return data, headers["X-Goog-Generation"]


def replace(fs: Any, path: str, data: bytes, version: str, seconds: float) -> str:
    """The new version of an object, which had this one.

    Raises: FileExistsError when it had another; what the file system raises.
    """
    bucket, _, name = path.partition("/")
    if "s3" in fs.protocol:
        return _in_time(fs, _write_s3(fs, bucket, name, data, version), seconds)
    mark = uuid.uuid4().hex
    part = f"--{mark}\nContent-Type: application/"
    head = f"{part}json; charset=UTF-8\n\n{json.dumps({'name': name})}\n"
    head += f"{part}octet-stream\n\n"
    written = fs.call(
        "POST",
        fs._location + "/upload/storage/v1/b/{}/o",
        bucket,
        uploadType="multipart",
        ifGenerationMatch=version or 0,
        headers={"Content-Type": f"multipart/related; boundary={mark}"},
        data=head.encode() + data + f"\n--{mark}--".encode(),
        json_out=True,
        timeout=seconds,
    )
    return written["generation"]


async def _read_s3(fs: Any, bucket: str, name: str) -> tuple[bytes, str]:
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=name)
    async with answer["Body"] as body:
        return await body.read(), answer["ETag"]


async def _write_s3(fs: Any, bucket: str, name: str, data: bytes, version: str) -> str:
    import asyncio

    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    about = {"Bucket": bucket, "Key": name, "Body": data, **condition}
    for wait in (*_CONFLICT_WAITS, None):
        try:
            return (await fs._call_s3("put_object", **about))["ETag"]
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 409 and wait is not None:
                await asyncio.sleep(wait)
                continue
            if status == 412 or answer.get("Error", {}).get("Code") == "NoSuchKey":
                raise FileExistsError from error
            raise
    raise AssertionError  # the last attempt returns or raises


def _in_time(fs: Any, request: Coroutine[Any, Any, Any], seconds: float | None) -> Any:
    import asyncio  # which every command would wait for, as all import this module

    request = asyncio.wait_for(request, seconds)
    return asyncio.run_coroutine_threadsafe(request, fs.loop).result()
