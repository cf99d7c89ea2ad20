"""Text that every machine with Python and this package already has.

`reference` is the language reference inside `pydoc_data`; the other parts are docstrings, one
document each, headed by the name and signature they describe. Sources are parsed, never imported.
Topics that quote others and docstrings that repeat are dropped: a held-out one would be in training
too. The files and their order depend on the versions of Python and of the packages named here (all
of them our own dependencies), not on what else is installed.
"""

import ast
import functools
import gc
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from glamcli.errors import DataError

# The packages of every part but `reference` and `stdlib`.
PACKAGES = {"numpy": ("numpy",), "scipy": ("scipy",), "jax": ("jax", "flax", "optax")}
PARTS = ("reference", "stdlib", *PACKAGES)
# Tests, vendored copies, and what distributions such as Debian ship as separate packages.
SKIPPED = {"test", "tests", "__pycache__", "site-packages", "dist-packages", "_vendor"} | {
    *("third_party", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
    *("tkinter", "distutils", "venv", "array_api_compat"),
}
# Files with a smaller share of quoted text cost more time to parse than they give.
MIN_QUOTED_FRAC = 0.15
# A topic is dropped when more of it is in longer ones; shorter paragraphs are not compared.
MAX_REPEATED_FRAC = 0.3
MIN_PARAGRAPH_CHARS = 100


@functools.cache
def embedded_files(part: str) -> list[tuple[str, Path]]:
    """Names (package/module.py) and paths of the files a part is made from, sorted by name.

    Raises: DataError when there is no such part.
    """
    if part == "reference":
        return [("pydoc_data/topics.py", _origin("pydoc_data.topics"))]
    if part == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return [
            (name, path)
            for name, path in _python_files(root, "")
            if name.split("/")[0].removesuffix(".py") in sys.stdlib_module_names
        ]
    if part in PACKAGES:
        roots = {package: _origin(package).parent for package in PACKAGES[part]}
        return [found for name, root in roots.items() for found in _python_files(root, name + "/")]
    raise DataError(f"no embedded text is called `{part}`", hint=f"there is {', '.join(PARTS)}")


def _origin(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DataError(f"the embedded text of `{module}` is not part of this installation")
    return Path(spec.origin)


def _python_files(root: Path, prefix: str) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [(prefix + path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


@functools.cache
def embedded_documents(part: str) -> list[tuple[str, int]]:
    """The documents of a part, each with the bytes of the part's files used up to its end."""
    # Kept for the life of the process: a first run needs them for the tokenizer and for the rows.
    documents = []
    seen: set[str] = set()
    num_bytes = 0
    # Syntax trees are millions of objects and no garbage: collecting triples the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for name, path in embedded_files(part):
            source = path.read_bytes()
            num_bytes += len(source)
            text = source.decode("utf-8", "replace")
            for document in _topics(text) if part == "reference" else _docstrings(text, name):
                body = _on_one_line(document.partition("\n")[2])
                if part == "reference" or body not in seen:
                    documents.append((document, num_bytes))
                seen.add(body)
    finally:
        if was_enabled:
            gc.enable()
    return documents


def _topics(text: str) -> Iterator[str]:
    """The values of the dictionary literal `topics`, by name."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from _unrepeated([topics[key].strip() for key in sorted(topics)])


def _unrepeated(texts: list[str]) -> list[str]:
    """The texts, in their order, without those that are mostly in longer ones."""
    seen: set[str] = set()
    kept: set[str] = set()
    for text in sorted(set(texts), key=lambda text: (-len(text), text)):
        paragraphs = paragraphs_of(text, MIN_PARAGRAPH_CHARS)
        num_chars = sum(map(len, paragraphs))
        num_repeated = sum(len(each) for each in paragraphs if each in seen)
        if num_repeated <= MAX_REPEATED_FRAC * num_chars:
            kept.add(text)
            seen.update(paragraphs)
    return [text for text in dict.fromkeys(texts) if text in kept]


def paragraphs_of(text: str, min_chars: int) -> list[str]:
    """Paragraphs of at least `min_chars`, each on one line with single spaces."""
    found = map(_on_one_line, re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in found if len(paragraph) >= min_chars]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _docstrings(text: str, name: str) -> Iterator[str]:
    """Docstrings of a module and its public functions and classes, in the order of the file."""
    quoted = sum(len(part) for part in text.split('"""')[1::2])
    if quoted < MIN_QUOTED_FRAC * len(text):
        return
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from _walk(tree, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def _walk(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    if text := _docstring(node):
        yield f"{name}\n\n{text}"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef) and (text := _docstring(child)):
            yield f"{name}.{child.name}({_arguments(child.args)})\n\n{text}"


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").strip()


def _arguments(arguments: ast.arguments) -> str:
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args) if arg.arg != "self"]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [arg.arg for arg in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(names)
