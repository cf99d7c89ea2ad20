"""The secret by which the processes of a run recognise each other, and how they prove to know it.

What it is worth is in docs/hosts.md.
"""

import hashlib
import hmac
import os
from pathlib import Path

SECRET_VARIABLE = "GLAM_SECRET"
"""the environment variable that holds it."""


def run_secret(run: Path) -> bytes:
    """GLAM_SECRET, or else derived from the name of the run (the last part of its path), which
    keeps out mistakes but nobody who knows the name."""
    given = os.environ.get(SECRET_VARIABLE)
    text = f"secret {given}" if given else f"run {os.path.basename(os.path.abspath(run))}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def proof(secret: bytes, challenge: str, reply: str, index: int, what: str) -> str:
    """That who says `what` knows the secret; another one for every connection and direction."""
    said = f"{what} {challenge} {reply} {index}".encode(errors="replace")
    return hmac.new(secret, said, hashlib.sha256).hexdigest()


def is_equal(given: str, expected: str) -> bool:
    """Whether a proof is the expected one, in a time that does not tell how much of it is."""
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
