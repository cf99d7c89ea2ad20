"""Settings written out read back the same, whatever they hold; editors get the same schema."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.config import yaml
from glamcli.config.dump import as_yaml, dump, json_schema
from glamcli.config.load import load_recipe, shipped

texts = st.text(st.characters(codec="utf-8")).filter(lambda text: not yaml._HOSTILE.search(text))
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
values = st.none() | st.booleans() | numbers | texts


@pytest.mark.parametrize("name", shipped("recipes"))
def test_a_dumped_recipe_loads_to_the_same_recipe_without_parents(name, tmp_path):
    loaded = load_recipe(name, ["seed=7", "finish.prompt='a: b # \"c\"'"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(loaded.recipe))
    again = load_recipe(path)
    assert again.recipe == loaded.recipe
    assert "extends" not in path.read_text()
    assert dump(again.recipe) == dump(loaded.recipe)


def test_a_dumped_recipe_with_paths_loads_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix.yaml").write_text("sources:\n  a: {kind: text, path: a.txt, weight: 1}\n")
    (tmp_path / "my.yaml").write_text("extends: test-tiny\ndata:\n  mixture: ./mix.yaml\n")
    recipe = load_recipe("./my.yaml").recipe
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(recipe))
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "run").recipe == recipe


@given(values)
def test_every_value_reads_back_equal(value):
    node = yaml.parse(f"key: {as_yaml(value)}\n", "x")
    assert isinstance(node, yaml.Mapping)
    found = yaml.plain(node)["key"]
    assert found == value
    assert isinstance(found, str) == isinstance(value, str)
    assert isinstance(found, bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    "text",
    ["yes", "true", "null", "1e-3", "", " x", "x ", "a: b", "#x", "- x", "é", "\U0001f600", "*a"],
)
def test_treacherous_text_reads_back_as_text(text):
    assert yaml.plain(yaml.parse(f"[{as_yaml(text)}]", "x")) == [text]


def test_the_schema_beside_the_recipes_is_fresh():
    path = next(iter(shipped("recipes").values())).parent / "schema.json"
    assert json.loads(path.read_text()) == json_schema(), "run `glam recipe schema` into it"


def test_the_schema_describes_every_key_and_requires_none():
    schema = json_schema()
    assert "required" not in json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert next(iter(schema["properties"])) == "extends"
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
    moe = schema["$defs"]["Moe"]["properties"]
    assert moe["num_experts"]["description"].startswith("[E] experts")
    assert moe["num_experts"]["minimum"] == 1


def test_no_setting_is_a_choice_between_schemas():
    """Of choices, editors report the mistake in one: "3 is not of type 'null'" for a number."""
    schema = json_schema()
    assert "anyOf" not in json.dumps(schema)
    sections = schema["$defs"]
    assert sections["Finish"]["properties"]["suite"]["type"] == ["string", "null"]
    assert sections["Every"]["properties"]["eval_steps"]["type"] == ["integer", "string", "null"]
    for name in ("Moe", "Finish", "Rules", "TokenizerSettings"):  # as `null` drops the section
        assert sections[name]["type"] == ["object", "null"]
    assert sections["Model"]["type"] == "object"


def test_words_beside_numbers_and_sections_are_patterns():
    sections = json_schema()["$defs"]
    data = sections["Mesh"]["properties"]["data"]
    for settings, wrong in ((sections["Mesh"], "aut"), (data, "aut"), (data, "1_")):
        assert re.search(settings["pattern"], "auto")
        assert not re.search(settings["pattern"], wrong)
        assert "`auto`" in settings["patternErrorMessage"]
    assert re.search(data["pattern"], "1_000")
