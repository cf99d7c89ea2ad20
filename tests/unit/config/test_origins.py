"""Where a run's values came from, through starts, edits and old or damaged notes."""

import json

import pytest

from glamcli.config.dump import dump
from glamcli.config.load import load_recipe
from glamcli.config.origins import noted_origins, origins_to_note, short_origins

CHANGED = "moe.num_experts", "train.steps", "batch.rows", "seed"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A recipe with a parent, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("extends: test-tiny\nmoe:\n  num_experts: 8\n")
    (tmp_path / "mine.yaml").write_text("extends: ./base.yaml\ntrain: {steps: 9}\n")
    return tmp_path


def started(folder, recipe, *sets):
    """Does what the start of a run leaves; the origins that it notes."""
    loaded = load_recipe(recipe, sets)
    noted = origins_to_note(loaded)
    about = {"recipe": loaded.recipe.model_dump(mode="json"), "origins": noted}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump(loaded.recipe))
    (folder / "run.json").write_text(json.dumps(about))
    return [noted[key] for key in CHANGED]


def test_a_run_that_goes_on_from_its_own_folder_keeps_where_its_values_came_from(mine):
    first = ["base.yaml:3", "mine.yaml:2", "--set", "default"]
    run = mine / "runs/a"
    assert started(run, "./mine.yaml", "batch.rows=16") == first
    assert started(run, "runs/a") == first
    assert started(mine / "runs/copied", "runs/a", "seed=3") == [*first[:3], "--set"]
    assert started(run, "runs/a", "train.steps=20")[1] == "--set"
    assert started(run, "runs/a")[1] == "--set"


def test_a_value_that_was_edited_in_the_run_comes_from_there(mine):
    run = mine / "runs/a"
    started(run, "./mine.yaml")
    text = (run / "recipe.yaml").read_text()
    line = text[: text.index("steps: 9")].count("\n") + 1
    (run / "recipe.yaml").write_text(text.replace("steps: 9", "steps: 30"))
    assert started(run, "runs/a") == [
        "base.yaml:3", f"runs/a/recipe.yaml:{line}", load_origin("batch.rows"), "default",
    ]  # fmt: skip


def load_origin(key):
    return load_recipe("test-tiny").origins[key]


@pytest.mark.parametrize(
    "about",
    [None, 7, {}, {"recipe": {}}, {"recipe": {"seed": 0}, "origins": {"seed": "x"}},
     {"recipe": None, "origins": {}}],
)  # fmt: skip
def test_notes_that_are_none_say_nothing(about):
    assert noted_origins(about, load_recipe("test-tiny").recipe) == {}


@pytest.mark.parametrize("origins", [None, [], "x", {"seed": None, "nothing": "x"}])
def test_origins_of_another_form_are_text_of_known_keys_or_left_out(origins):
    recipe = load_recipe("test-tiny").recipe
    found = noted_origins({"recipe": recipe.model_dump(mode="json"), "origins": origins}, recipe)
    assert found in ({}, {"seed": "None"})


def test_credentials_of_a_recipe_at_a_url_are_not_noted(mine):
    loaded = load_recipe("./mine.yaml")
    loaded.origins["seed"] = "https://me:secret@host/r.yaml:3"
    assert origins_to_note(loaded)["seed"] == "https://***@host/r.yaml:3"


def test_files_are_shown_by_as_much_of_their_path_as_tells_them_apart():
    places = ["/a/b/x.yaml:1", "/a/c/x.yaml:2", "/a/c/y.yaml:3", "--set", "default"]
    assert list(short_origins(places).values()) == [
        "b/x.yaml:1", "c/x.yaml:2", "y.yaml:3", "--set", "default",
    ]  # fmt: skip
