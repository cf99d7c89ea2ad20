"""One word, one meaning: letters of arrays, homes of names, and the size of files and functions."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import glamcli.model

PACKAGE = Path(glamcli.__file__).resolve().parent
FILES = sorted(PACKAGE.rglob("*.py"))
LETTERS = set(re.findall(r"(?:^|  )([A-Z]) [a-z]", glamcli.model.__doc__ or "", re.M))

# Every file of `cli/` is one command, and its function has this name.
SHARED_NAMES = {"command"}
LONG_FUNCTIONS = {"train/loop.py:_attempt": 80}


def here(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def variables(tree: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@pytest.mark.parametrize("path", FILES, ids=here)
def test_letters_of_arrays_are_those_of_the_legend(path):
    for name in variables(ast.parse(path.read_text())):
        suffix = re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*|[0-9]+[A-Z][A-Z0-9]*)", name)
        if suffix:
            unknown = {letter for letter in suffix[1] if letter.isalpha()} - LETTERS
            assert not unknown, f"{name}: {unknown} not in the legend of glamcli/model/__init__.py"


def test_every_public_name_has_one_home():
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_") and name not in SHARED_NAMES:
                    homes[name].append(here(path))
    several = {name: places for name, places in homes.items() if len(places) > 1}
    assert not several, "\n".join(f"{name}: {places}" for name, places in several.items())


@pytest.mark.parametrize("path", FILES, ids=here)
def test_no_file_and_no_function_is_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "split it, or find what can go"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            limit = LONG_FUNCTIONS.get(f"{here(path)}:{node.name}", 60)
            assert length <= limit, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=here)
def test_public_functions_and_classes_say_what_they_do(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{here(path)}: `{node.name}` has no docstring"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=here)
def test_every_package_has_a_doorway(path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(doc.splitlines()) >= 3, "say what lives here, what does not, and who calls it"
