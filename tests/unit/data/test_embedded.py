"""The corpus that needs no download is large enough, in order, and prose rather than code."""

from pathlib import Path

import pytest

from glamcli.config.mixtures import load_mixture
from glamcli.data import embedded
from glamcli.data.sources import documents, files
from glamcli.data.split import Sides
from glamcli.errors import DataError


@pytest.mark.parametrize("part", embedded.PARTS)
def test_files_are_sorted_by_names_that_do_not_depend_on_where_they_lie(part):
    found = embedded.embedded_files(part)
    names = [name for name, _ in found]
    packages = embedded.PACKAGES.get(part, (None,))
    by_package = [[n for n in names if p is None or n.startswith(f"{p}/")] for p in packages]
    assert names == [name for group in by_package for name in sorted(group)]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("/") or "/tests/" in name for name in names)
    assert all(path.is_file() for _, path in found)


def test_documents_are_headed_by_what_they_describe():
    name = "package/module.py"
    text = '"""A module."""\\ndef f(self, a, *b, c=1, **d):\\n  """Does\\n     it."""\\n'.replace(
        "\\n", "\n"
    )
    found = list(embedded._docstrings(text, name))
    assert found == [
        "package.module\n\nA module.",
        "package.module.f(a, *b, c, **d)\n\nDoes\nit.",
    ]
    assert not list(embedded._docstrings("def broken(:", name))
    assert not list(embedded._docstrings("x = 1\n" * 100 + '"""short"""', name))


def test_no_paragraph_of_the_reference_is_both_held_out_and_trained_on():
    texts = [text for text, _ in embedded.embedded_documents("reference")]
    for heldout_frac in (load_mixture("quickstart").heldout_frac, 0.2, 0.5):
        sides = {False: "", True: ""}
        for text, is_held in Sides(heldout_frac, {}).divide(texts):
            sides[is_held] += text + "\n\n"
        training = " ".join(sides[False].split())
        heldout = embedded.paragraphs_of(sides[True], 200)
        assert heldout
        assert not [paragraph for paragraph in heldout if paragraph in training]
    assert sum(map(len, texts)) > 300_000


def test_a_docstring_is_kept_once_whatever_stands_above_it(tmp_path, monkeypatch):
    body = '"""\n    Inherited{}text.\n    """'
    for name, blank in (("a", " "), ("b", "\n    ")):
        code = f"def {name}():\n    {body.format(blank)}\n"
        (tmp_path / f"{name}.py").write_text(code)
    found = [(name, tmp_path / name) for name in ("a.py", "b.py")]
    monkeypatch.setattr(embedded, "embedded_files", lambda part: found)
    made = embedded.embedded_documents.__wrapped__("stdlib")
    assert [text for text, _ in made] == ["a.a()\n\nInherited text."]


def test_an_unknown_part_names_those_there_are():
    with pytest.raises(DataError) as caught:
        embedded.embedded_files("novels")
    assert caught.value.hint == "there is reference, stdlib, numpy, scipy, jax"


@pytest.mark.slow
def test_the_quickstart_mixture_has_five_megabytes_from_three_sources():
    mixture = load_mixture("quickstart")
    sizes = {}
    for name, source in mixture.sources.items():
        texts = list(documents(source, name))
        assert texts == list(documents(source, name))
        sizes[name] = sum(len(text.encode()) for text in texts)
        assert all(Path(file.url).is_file() for file in files(source, name))
    assert len(sizes) >= 3
    assert min(sizes.values()) > 300_000
    assert sum(sizes.values()) > 5_000_000
