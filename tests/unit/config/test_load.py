"""Recipes from files: names of mistakes, parents, `--set`, origins, paths."""

import re

import pytest

from glamcli.config.load import leaves, load_mixture, load_recipe, read_settings, shipped
from glamcli.config.schema import Batch
from glamcli.config.settings import Settings
from glamcli.errors import RecipeError

SMALL = """\
model:
  num_layers: 2
  model_dim: 32
  ffn_dim: 64
  num_heads: 2
  head_dim: 16
  vocab_size: 512
batch:
  rows: 8
  row_tokens: 64
train:
  steps: 20
data:
  mixture: quickstart
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="my.yaml"):
        (tmp_path / name).write_text(text)
        return f"./{name}"

    return write


def refusal(path, sets=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    return caught.value


def lines_of(name):
    """(line number, key) of every key written in a shipped recipe."""
    text = shipped("recipes")[name].read_text()
    for number, line in enumerate(text.splitlines()):
        match = re.match(r"\s*([a-z_0-9]+):", line)
        if match:
            yield pytest.param(name, number, match[1], id=f"{name}-{number + 1}-{match[1]}")


def misspelled(key):
    """The key with its middle letter missing, or doubled when it is short."""
    middle = len(key) // 2
    return key[:middle] + (key[middle] * 2 if len(key) < 6 else "") + key[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "number", "key"), [case for name in shipped("recipes") for case in lines_of(name)]
)
def test_a_misspelled_key_is_named_with_its_line_and_the_right_one(write, name, number, key):
    lines = shipped("recipes")[name].read_text().splitlines()
    wrong = misspelled(key)
    lines[number] = lines[number].replace(key, wrong, 1)
    error = refusal(write("\n".join(lines)))
    assert re.search(rf"my.yaml:{number + 1}: unknown key `([a-z_.]+\.)?{wrong}`", error.what)
    assert re.search(rf"did you mean `([a-z_.]+\.)?{key}`", f"{error.what} {error.hint}")


def test_a_key_of_another_section_is_suggested(write):
    error = refusal(write(SMALL + "learnin_rate: 1\n"))
    assert error.what == "my.yaml:15: unknown key `learnin_rate`"
    assert error.hint == "did you mean `optimizer.learning_rate`?"


def test_all_problems_are_told_at_once(write):
    text = SMALL.replace("rows: 8", "rows: eight").replace("steps: 20", "stepz: 20")
    error = refusal(write(text + "seed: -1\n"), ["optimizer.learning_rate=fast"])
    for what in (
        "my.yaml:15: `seed` must be at least 0, not `-1`",
        "my.yaml:9: `batch.rows` must be a whole number, not the text `eight`",
        "my.yaml:12: unknown key `train.stepz` (did you mean `train.steps`?)",
        "--set: `optimizer.learning_rate` must be a number, not the text `fast`",
    ):
        assert f"  {what}" in error.what.splitlines()
    assert "missing" not in error.what  # the misspelled key is told once
    assert error.what.startswith("4 problems:")


def test_a_missing_key_is_placed_at_its_section(write):
    error = refusal(write(SMALL.replace("  rows: 8\n", "")))
    assert error.what == "my.yaml:8: `batch.rows` is missing"


def test_an_empty_recipe_points_to_extends(write):
    error = refusal(write("seed: 1\n"))
    assert "`model` is missing" in error.what
    assert "extends: quickstart" in error.what


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.steps=3e4", 30_000),
        ("train.steps=1_000", 1000),
        ("optimizer.learning_rate=1e-3", 0.001),
        ("optimizer.learning_rate=1", 1.0),
        ("model.zero_logit=false", False),
        ("every.heldout_steps=null", None),
        ("every.heldout_steps=", None),
        ("finish.shots=[0, 2]", (0, 2)),
        ("finish.shots=[]", ()),
        ("finish.prompt='12'", "12"),
        ("finish.prompt=a = b", "a = b"),
        ("mesh.data=2", 2),
        ("mesh.data=auto", "auto"),
    ],
)
def test_set_values_are_read_as_yaml(assignment, value):
    loaded = load_recipe("test-tiny", [assignment])
    key = assignment.partition("=")[0]
    section, name = key.split(".")
    found = getattr(getattr(loaded.recipe, section), name)
    assert found == value
    assert type(found) is type(value)
    assert loaded.origins[key] == "--set"


@pytest.mark.parametrize(
    ("assignment", "what", "hint"),
    [
        ("train.steps='20'", "a whole number, not the text `20`", "write `20`, without quotes"),
        ("train.steps=010", "a whole number, not the text `010`", "write `10`, without quotes"),
        ("train.steps=1,000", "a whole number, not the text `1,000`", "write `1000`, without"),
        ("train.steps=2.0", "a whole number, not `2.0`", "write `2`"),
        ("train.steps=2.5", "a whole number, not `2.5`", None),
        ("train.steps=12:30", "a whole number, not the text `12:30`", None),
        ("train.steps=true", "a whole number, not `true`", None),
        ("train.steps=[1]", "a whole number, not a list", None),
        ("train.steps=0", "at least 1, not `0`", None),
        ("train.steps=1e300", "a whole number, not `1e+300`", None),
        ("train.steps=9_000_000_000_000_000", "at most 1,000,000,000,000,000", None),
        ("model.zero_logit=yes", "`true` or `false`, not the text `yes`", "write `true`"),
        ("model.zero_logit=off", "`true` or `false`, not the text `off`", "write `false`"),
        ("model.zero_logit=1", "`true` or `false`, not `1`", None),
        ("optimizer.learning_rate=.nan", "a number, not the text `.nan`", None),
        ("optimizer.learning_rate=-.inf", "a number, not the text `-.inf`", None),
        ("optimizer.learning_rate=1e999", "a number, not the text `1e999`", None),
        ("optimizer.learning_rate=0", "above 0, not `0`", None),
        ("optimizer.learning_rate=-1", "above 0, not `-1`", None),
        ("optimizer.beta1=1", "below 1, not `1`", None),
        ("optimizer.name=adafctor", "`adafactor` or `adamw`", "did you mean `adafactor`?"),
        ("mesh.data=atuo", "a whole number or `auto`, not the text `atuo`", "did you mean `auto`"),
        ("mesh.data=0", "at least 1", None),
        ("finish.prompt=12", "text, not `12`", 'write `"12"`, with quotes'),
        ("finish.shots=3", "a list such as `[1, 2]`, not `3`", "write `[3]`"),
        ("mesh.rules.embed=data", "a list such as", "write `[data]`"),
        ("mesh.rules.embed=[dta]", "must be `slice`, `stage`, `data`", "did you mean `data`?"),
        ("mesh.rules.embd=[data]", "unknown key `mesh.rules.embd`", "`mesh.rules.embed`"),
        ("model=3", "a section of `key: value` lines, not `3`", None),
        (
            "moe={num_experts: 4, num_expert: 4}",
            "unknown key `moe.num_expert`",
            "`moe.num_experts`",
        ),
        ("moe.num_expert=4", "unknown key `moe.num_expert`", "`moe.num_experts`"),
        ("rows=4", "unknown key `rows`", "did you mean `batch.rows`?"),
        ("steps=100", "unknown key `steps`", "did you mean `train.steps`?"),
        ("mesh=aut", "a section of `key: value` lines or `auto`", "did you mean `auto`?"),
        ("mesh.data=aut", "a whole number or `auto`", "did you mean `auto`?"),
        ("extends=quickstart", "`extends` belongs in a recipe file", None),
        ("run.project=a/b", "`run.project`: write 1 to 128 letters, digits, spaces", None),
        (f"run.project={'a' * 129}", "`run.project`: write 1 to 128 letters", None),
        ("train.steps", "expected key=value, got `train.steps`", "for example"),
        ("=3", "expected key=value", None),
        (".=3", "expected key=value", None),
        ("train.steps=[1", "--set", None),
        ("train.steps=*a", "--set", None),
        ("about=\x1b[31m", "control characters in `\\x1b[31m`", None),
    ],
)
def test_set_mistakes_are_refused_with_the_rewrite(assignment, what, hint):
    error = refusal("test-tiny", [assignment])
    assert error.what.startswith("--set: ")
    assert what in error.what
    assert hint is None or hint in (error.hint or "")
    assert error.what.isprintable()


def test_mistakes_of_several_sets_are_told_at_once():
    error = refusal("test-tiny", ["moe.num_expert=4", "optimzer.beta1=0", "train.steps.x=1"])
    assert error.what.splitlines()[1:] == [
        "  --set: unknown key `moe.num_expert` (did you mean `moe.num_experts`?)",
        "  --set: unknown key `optimzer` (did you mean `optimizer`?)",
        "  --set: `train.steps` must be a whole number, not a section",
    ]


def test_a_child_changes_what_it_says_and_keeps_the_rest(write):
    write(SMALL, "parent.yaml")
    path = write("extends: ./parent.yaml\nbatch:\n  rows: 16\n")
    loaded = load_recipe(path)
    assert (loaded.recipe.batch.rows, loaded.recipe.batch.row_tokens) == (16, 64)
    assert loaded.origins["batch.rows"] == "my.yaml:3"
    assert loaded.origins["batch.row_tokens"] == "parent.yaml:10"
    assert loaded.origins["seed"] == "default"
    assert {place.split(":")[0] for place in loaded.origins.values()} == {
        "my.yaml",
        "parent.yaml",
        "default",
    }


def test_null_drops_the_section_of_the_parent(write):
    loaded = load_recipe(write("extends: glam_8b_64e\nmoe: null\n"))
    assert loaded.recipe.moe is None
    assert loaded.origins["moe"] == "my.yaml:2"
    assert load_recipe("test-tiny", ["moe=null"]).recipe.moe is None


@pytest.mark.parametrize("key", ["finish", "optimizer", "mesh", "mesh.rules", "data.tokenizer"])
def test_null_sets_every_section_that_has_defaults_back_to_them(write, key):
    *outer, name = key.split(".")
    section = "".join(f"{each}:\n  " for each in outer) + f"{name}: null\n"
    write(SMALL + "finish: {prompt: x}\noptimizer: {beta1: 0.5}\n", "parent.yaml")
    plain = load_recipe(write(SMALL, "plain.yaml")).recipe
    loaded = load_recipe(write("extends: parent.yaml\n" + section))
    found, expected = loaded.recipe, plain
    for each in key.split("."):
        found, expected = getattr(found, each), getattr(expected, each)
    assert found == expected
    assert load_recipe("parent.yaml", [f"{key}=null"]).recipe == loaded.recipe


def test_problems_of_the_recipe_do_not_hide_those_of_its_mixture(write):
    write("sources:\n  a: {kind: text, path: a, weight: much}\n", "mix.yaml")
    path = write(SMALL.replace("quickstart", "./mix.yaml").replace("rows: 8", "rows: eight"))
    error = refusal(path)
    assert error.what.splitlines()[0] == "2 problems:"
    assert "my.yaml:9: `batch.rows` must be a whole number" in error.what
    assert "mix.yaml:2: `sources.a.weight` must be a number" in error.what


def test_a_mistake_in_a_parent_is_placed_in_the_parent(write):
    write(SMALL.replace("rows: 8", "rows: 0"), "parent.yaml")
    error = refusal(write("extends: parent.yaml\nseed: 1\n"))
    assert error.what == "parent.yaml:9: `batch.rows` must be at least 1, not `0`"


@pytest.mark.parametrize(
    ("extends", "what"),
    [
        ("my.yaml", "my.yaml:1: `extends` forms a cycle through `my.yaml`"),
        ("./other.yaml", "other.yaml:1: `extends` forms a cycle through `my.yaml`"),
        ("quickstrt", "my.yaml:1: no shipped recipe is called `quickstrt`"),
        ("./none.yaml", "my.yaml:1: no such recipe file: `./none.yaml`"),
        ("[quickstart, test-tiny]", "my.yaml:1: `extends` must be one recipe name or path"),
        ("", "my.yaml:1: `extends` must be one recipe name or path"),
    ],
)
def test_a_parent_that_cannot_be_is_refused_at_its_line(write, extends, what):
    write("extends: my.yaml\n", "other.yaml")
    assert refusal(write(f"extends: {extends}\n")).what == what


def test_chains_of_parents_are_limited(write):
    write(SMALL, "r0.yaml")
    for n in range(1, 20):
        write(f"extends: r{n - 1}.yaml\n", f"r{n}.yaml")
    assert load_recipe("./r16.yaml").recipe.batch.rows == 8
    assert "recipes extend each other" in refusal("./r19.yaml").what


@pytest.mark.parametrize("name", ["quikstart", "glam_64b_64", "glam_1.7B"])
def test_an_unknown_name_lists_near_ones(name):
    error = refusal(name)
    assert error.what == f"no shipped recipe is called `{name}`"
    assert (error.hint or "").startswith("shipped and near: `")


def test_a_file_without_a_path_mark_is_pointed_at(write):
    write(SMALL)
    assert "./my.yaml" in (refusal("my").hint or "")


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b.yaml", "~", "./" + "x" * 5000 + ".yaml"])
def test_strange_names_are_refused_in_one_line(name):
    error = refusal(name)
    assert error.what.isprintable()


def test_a_run_folder_means_its_recipe(write, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(SMALL)
    assert load_recipe("./run").path == tmp_path / "run" / "recipe.yaml"


def test_paths_are_relative_to_the_file_that_says_them(write, tmp_path):
    (tmp_path / "sub").mkdir()
    text = SMALL.replace("quickstart", "./mix.yaml")
    (tmp_path / "sub" / "parent.yaml").write_text(
        text
        + "  tokenizer:\n    path: ../tok.model\n  cache_dir: ~/cache\nfinish:\n  suite: quick\n"
    )
    (tmp_path / "sub" / "mix.yaml").write_text(
        "sources:\n  a: {kind: text, path: a.txt, weight: 1}"
    )
    loaded = load_recipe(write("extends: sub/parent.yaml\n"))
    data = loaded.recipe.data
    assert data.mixture == str(tmp_path / "sub" / "mix.yaml")
    assert data.tokenizer.path == str(tmp_path / "sub" / ".." / "tok.model")
    assert data.cache_dir is not None
    assert data.cache_dir.endswith("/cache")
    assert "~" not in data.cache_dir
    assert loaded.recipe.finish.suite == "quick"
    assert load_mixture(data.mixture).sources["a"].path == str(tmp_path / "sub" / "a.txt")


def test_variables_are_not_expanded_and_urls_stay(monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    recipe = load_recipe("test-tiny", ["data.cache_dir=$SECRET/x"]).recipe
    assert (recipe.data.cache_dir or "").endswith("/$SECRET/x")
    recipe = load_recipe("test-tiny", ["data.cache_dir=gs://bucket/x"], check=False).recipe
    assert recipe.data.cache_dir == "gs://bucket/x"


def test_a_missing_mixture_is_a_problem_of_the_recipe(write):
    error = refusal(write(SMALL.replace("quickstart", "quickstrt")))
    assert error.what == "my.yaml:14: no shipped mixture is called `quickstrt`"


def test_every_leaf_has_an_origin():
    loaded = load_recipe("quickstart", ["seed=3"])
    assert set(loaded.origins.values()) > {"default", "--set"}
    assert loaded.origins["seed"] == "--set"
    assert loaded.place("seed") == "--set"
    assert loaded.place("norm").endswith("quickstart.yaml")


def test_any_settings_can_be_read_strictly(tmp_path):
    path = tmp_path / "b.yaml"
    path.write_text("rows: 3\nrow_tokens: 8\n")
    assert read_settings(path, Batch) == Batch(rows=3, row_tokens=8)
    path.write_text("rows: 3\nrow_token: 8\n")
    with pytest.raises(RecipeError, match="unknown key `row_token`"):
        read_settings(path, Batch)


def test_keys_below_chosen_names_are_suggested(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("sources:\n  web:\n    kind: text\n    path: a\n    weigth: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_mixture(path)
    assert "m.yaml:5: unknown key `sources.web.weigth`" in caught.value.what
    assert "`sources.web.weight`" in f"{caught.value.what} {caught.value.hint}"


def test_settings_are_frozen():
    recipe = load_recipe("test-tiny").recipe
    assert issubclass(type(recipe), Settings)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 4


@pytest.mark.parametrize("value", [".nan", "-.inf", "-1", "1e16", "'1'", "yes", "[1]", "{a: 1}"])
def test_every_numeric_setting_refuses_what_is_no_number_in_its_range(value):
    numbers = [
        key
        for key, now in leaves(load_recipe("test-tiny").recipe)
        if isinstance(now, int | float) and not isinstance(now, bool)
    ]
    error = refusal("test-tiny", [f"{key}={value}" for key in numbers])
    assert len(numbers) > 30
    for key in numbers:
        assert re.search(rf"--set: (`{key}` must be|unknown key `{key}.a`)", error.what), key


def test_null_is_accepted_exactly_where_absence_has_a_meaning():
    recipe = load_recipe("test-tiny").recipe
    error = refusal("test-tiny", [f"{key}=null" for key, _ in leaves(recipe)])
    refused = re.findall(r"`([a-z0-9_.]+)` must be .*, not `null`", error.what)
    assert set(dict(leaves(recipe))) - set(refused) == {
        "moe.adaptive_capacity",
        "moe.eval_capacity_factor",
        "optimizer.clip_update_rms",
        "optimizer.clip_grad_norm",
        "guard.routers.first_frac",
        "guard.routers.starving_frac",
        "guard.routers.dropped_first_frac",
        "guard.routers.dropped_second_frac",
        "guard.routers.entropy_frac",
        "guard.routers.balance",
        "guard.spike_deviations",
        "guard.no_progress_steps",
        "guard.replay_steps",
        "guard.replica_steps",
        "every.eval_steps",
        "every.heldout_steps",
        "every.checkpoint_steps",
        "every.profile_steps",
        "data.tokenizer.path",
        "data.tokenizer.train_vocab_size",
        "data.cache_dir",
        "mesh.rules.seq",
        "mesh.rules.act_embed",
        "mesh.rules.outer_batch",
        "pipeline.microbatches",
        "runtime.step_timeout_seconds",
        "plan.target",
        "finish.suite",
        "finish.prompt",
    }
