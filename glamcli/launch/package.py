"""What the workers are sent: this very glam as a wheel, the versions of its libraries, the recipe
with its mixture, and `worker.py`."""

import base64
import hashlib
import importlib.metadata
import json
import re
import secrets
import shutil
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import glamcli
from glamcli import atomic
from glamcli.config.dump import dump
from glamcli.config.files import shipped
from glamcli.config.load import Loaded
from glamcli.config.mixtures import load_mixture
from glamcli.errors import LaunchError
from glamcli.storage import is_url

DISTRIBUTION = "glamcli"
TPU = ("tpu",)
"""what machines need for their chips."""
LOGGER_EXTRAS = ("trackio", "wandb")
SHIPPED = ("recipes", "data_mixtures")
_CHOSEN_BY_JAX = {DISTRIBUTION, "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"}
# A zip file cannot hold an earlier time; without the real ones equal files are equal wheels.
_TIME = (1980, 1, 1, 0, 0, 0)


def wheel_files() -> dict[str, bytes]:
    """The files of a wheel of the program that is running, by their path in it.

    Raises: LaunchError when it is not installed, so that nobody knows what it depends on.
    """
    package = Path(glamcli.__file__).resolve().parent
    found = {f"{DISTRIBUTION}/{path.relative_to(package)}": path for path in package.rglob("*")}
    for kind in SHIPPED:  # beside the package in a checkout
        found |= {f"{DISTRIBUTION}/{kind}/{path.name}": path for path in shipped(kind).values()}
    files = {
        name: path.read_bytes()
        for name, path in sorted(found.items())
        if path.is_file() and "__pycache__" not in path.parts
    }
    try:
        about = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError("glam is not installed, only on the path", "pip install -e .") from None
    info = f"{DISTRIBUTION}-{glamcli.__version__}.dist-info"
    tags = "Root-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/METADATA"] = (about.read_text("METADATA") or "").encode()
    files[f"{info}/entry_points.txt"] = (about.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: glam\n{tags}".encode()
    record = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    return files


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def constraints() -> str:
    """The version of every library here, for pip; but those that jax chooses for a TPU."""
    found = {
        re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): each.version
        for each in importlib.metadata.distributions()
        if each.metadata["Name"]
    }
    lines = (
        f"{name}=={version}\n"
        for name, version in sorted(found.items())
        # A local version (`+cpu`) is of no index.
        if name not in _CHOSEN_BY_JAX and "+" not in version
    )
    return "".join(lines)


def recipe_files(loaded: Loaded) -> dict[str, str]:
    """The resolved recipe and its mixture, which it names."""
    mixture = load_mixture(loaded.recipe.data.mixture)
    data = loaded.recipe.data.model_copy(update={"mixture": "./mixture.yaml"})
    recipe = loaded.recipe.model_copy(update={"data": data})
    return {"recipe.yaml": dump(recipe), "mixture.yaml": mixture.model_dump_json(indent=2)}


def local_paths(loaded: Loaded) -> list[str]:
    """Files of this machine that the recipe reads: every worker needs them at the same place."""
    data, finish = loaded.recipe.data, loaded.recipe.finish
    sources = load_mixture(data.mixture).sources.values()
    paths = [each.path for each in sources if each.kind != "embedded"]
    paths += [data.tokenizer.path, finish.suite if "/" in (finish.suite or "") else None]
    return [path for path in paths if path is not None and not is_url(path)]


def extras(loaded: Loaded, chips: tuple[str, ...] = TPU) -> tuple[str, ...]:
    """Those of glam's package that the machines need."""
    return (*chips, "remote", *(e for e in loaded.recipe.run.loggers if e in LOGGER_EXTRAS))


def write_package(
    folder: Path,
    loaded: Loaded,
    run: str,
    setup: str | None,
    chips: tuple[str, ...] = TPU,
) -> str:
    """Writes the package into `folder`, in place of an earlier one; its digest.

    Raises: LaunchError when it cannot be written.
    """
    files, texts = wheel_files(), recipe_files(loaded)
    wheel = f"{DISTRIBUTION}-{glamcli.__version__}-py3-none-any.whl"
    pins, python = constraints(), f"{sys.version_info.major}.{sys.version_info.minor}"
    facts = {"run": run, "setup": setup, "python": python, "wheel": wheel}
    facts["extras"] = ",".join(extras(loaded, chips))
    seen = {name: _digest(data) for name, data in files.items()}
    text = json.dumps([seen, texts, pins, facts], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    facts |= {"digest": digest, "secret": secrets.token_hex(16)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        folder.chmod(0o700)  # the secret of the run is in it
        with ZipFile(folder / wheel, "w", ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(ZipInfo(name, _TIME), data, ZIP_DEFLATED)
        shutil.copy(Path(__file__).with_name("worker.py"), folder / "worker.py")
        texts |= {"constraints.txt": pins, "package.json": json.dumps(facts, indent=1) + "\n"}
        for name, content in texts.items():
            atomic.write(folder / name, content)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error.strerror or error}") from error
    return digest
