"""How TensorStore, which writes arrays, finds a bucket of Amazon's kind: as fsspec does, which
reads what Amazon's own tools read (variables, `~/.aws`, the role of a machine)."""

import asyncio
import functools
import os
import re
from typing import Any

from glamcli.errors import CheckpointError
from glamcli.storage import file_system, in_words

SCHEME = "s3://"
_OF_AMAZON = re.compile(r"https://s3(\.[a-z0-9-]+)?\.amazonaws\.com(\.cn)?")
"""where TensorStore finds the region of a bucket by itself."""
_ANY_REGION = ("aws-global", None)
_KINDS = {
    "env": "environment",
    "iam-role": "imds",
    "container-role": "ecs",
    "assume-role-with-web-identity": "default",
}
_OF_PROFILE = ("shared-credentials-file", "config-file", "assume-role", "custom-process")


@functools.cache
def options() -> dict[str, Any]:
    """What a key-value store of TensorStore is told beside bucket and path. Secrets are not in it.

    Raises: CheckpointError where nobody is logged in, or in a way that TensorStore does not know.
    """
    try:
        fs, _ = file_system(f"{SCHEME}any")
        about = fs.s3.meta
        asked = asyncio.run_coroutine_threadsafe(fs.session.get_credentials(), fs.loop)
        method = getattr(asked.result(), "method", None)
    except Exception as error:
        raise CheckpointError(f"{SCHEME}: {in_words(error, SCHEME).strerror}") from error
    found: dict[str, Any] = {"aws_credentials": _credentials(fs.session, method)}
    if not _OF_AMAZON.fullmatch(about.endpoint_url):
        region = "us-east-1" if about.region_name in _ANY_REGION else about.region_name
        found |= {"endpoint": about.endpoint_url, "aws_region": region}
    return found


def _credentials(session: Any, method: str | None) -> dict[str, str]:
    if method in _KINDS:
        return {"type": _KINDS[method]}
    if method not in _OF_PROFILE:
        what = "no login" if method is None else f"a login of kind `{method}`"
        hint = 'run `eval "$(aws configure export-credentials --format env)"` before'
        raise CheckpointError(f"{what} at {SCHEME}, which TensorStore cannot use for arrays", hint)
    names = ("credentials_file", "config_file")
    files = {each: os.path.expanduser(session.get_config_variable(each)) for each in names}
    files = {each: path if os.path.exists(path) else os.devnull for each, path in files.items()}
    return {"type": "profile", "profile": session.profile or "default", **files}
