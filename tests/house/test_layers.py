"""The layers of the code base, and one door per heavy library, read from the syntax tree."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "glamcli"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from lower rows and from its own package. The first matching prefix counts.
ROWS = (
    ("glamcli.errors", -2),
    ("glamcli.conditional", -2),
    ("glamcli.storage", -1),
    ("glamcli.atomic", 0),
    ("glamcli.progress", 0),
    ("glamcli.hugepages", 0),
    ("glamcli.libtpu", 0),
    ("glamcli.memory", 1),
    ("glamcli.untrusted", 0),
    ("glamcli.faults", 1),
    ("glamcli.config", 1),
    ("glamcli.hosts", 2),
    ("glamcli.parallel", 3),
    ("glamcli.data", 3),
    ("glamcli.model.digest", 3),
    ("glamcli.model", 4),
    ("glamcli.decoding", 2),
    ("glamcli.beam_search", 4),
    ("glamcli.train.loop", 7),
    ("glamcli.train.events", 7),
    ("glamcli.train.save", 7),
    ("glamcli.train.meter", 7),
    ("glamcli.train.profile", 7),
    ("glamcli.train.health", 7),
    ("glamcli.train.go_back", 7),
    ("glamcli.train.folder", 7),
    ("glamcli.train.ending", 7),
    ("glamcli.train.beginning", 7),
    ("glamcli.train.room", 7),
    ("glamcli.train.bucket", 6),
    ("glamcli.train", 5),
    ("glamcli.checkpoint", 6),
    ("glamcli.restore", 5),
    ("glamcli.orbax_setup", 3),
    ("glamcli.stored_arrays", 4),
    ("glamcli.array_errors", 3),
    ("glamcli.step_writers", 5),
    ("glamcli.stored_runs", 4),
    ("glamcli.step_folders", 2),
    ("glamcli.named_leaves", 2),
    ("glamcli.saved_steps", 6),
    ("glamcli.step_diff", 6),
    ("glamcli.generate", 5),
    ("glamcli.trained", 6),
    ("glamcli.evals", 7),
    ("glamcli.plan", 7),
    ("glamcli.doctor", 7),
    ("glamcli.webpage", 1),
    ("glamcli.report", 8),
    ("glamcli.launch", 8),
    ("glamcli.cli", 9),
    ("glamcli.api", 10),
    ("glamcli", 0),
)

# Which modules may import which heavy library.
DOORS = {
    "flax": ("glamcli.model",),
    "optax": (),
    "orbax": ("glamcli.checkpoint", "glamcli.step_writers", "glamcli.stored_arrays"),
    "grain": ("glamcli.data.stream",),
    "tensorflow_datasets": ("glamcli.data",),
    "array_record": ("glamcli.data",),
    "sentencepiece": ("glamcli.data.tokenizer",),
    "fsspec": ("glamcli.storage",),
    "tensorboardX": ("glamcli.train.metric_files",),
    "click": ("glamcli.cli",),
    "rich": ("glamcli.cli.render", "glamcli.cli.screen"),
    "pydantic": ("glamcli.config", "glamcli.evals.tasks.schema", "glamcli.untrusted"),
    "ruamel": ("glamcli.config",),
    "lm_eval": ("glamcli.evals.harness",),
    "tensorflow": (),
    "torch": (),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def row(module: str) -> int:
    return next(number for prefix, number in ROWS if under(module, prefix))


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_only_lower_rows_or_its_own_package(path):
    here = module_name(path)
    package = ".".join(here.split(".")[:2])
    for name in imports(path):
        if not under(name, "glamcli") or under(name, package):
            continue
        assert row(name) < row(here), f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_have_one_door(path):
    here = module_name(path)
    for name in imports(path):
        library = name.split(".")[0]
        if library in DOORS:
            assert any(under(here, door) for door in DOORS[library]), f"{here} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_programs_do_not_print_or_read_environment_settings(path):
    here = module_name(path)
    if under(here, "glamcli.cli"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{here}:{node.lineno} prints"
