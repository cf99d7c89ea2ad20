"""Contradictions: each is found, placed and given values that work; all are told together."""

import re
from pathlib import Path

import pytest

from glamcli.config.load import load_recipe, shipped
from glamcli.config.schema import Loss, Moe, Optimizer
from glamcli.errors import RecipeError


def refusal(name, sets):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, sets)
    return caught.value


STAGES = ("mesh.stage=2", "model.num_layers=8", "pipeline.microbatches=4")

CASES = {
    "odd layers": (["model.num_layers=3"], "layers come in pairs", "use 2 or 4"),
    "one layer": (["model.num_layers=1"], "layers come in pairs", "use 2"),
    "buckets odd": (["model.position_buckets=7"], "even and at least 4, not 7", "use 6 or 8"),
    "buckets few": (["model.position_buckets=2"], "even and at least 4, not 2", "use 4 or 6"),
    "distance": (["model.position_max_distance=16"], "must be above that, not 16", "use 128"),
    "kernel": (["model.attention=pallas"], "rows of a multiple of 128 tokens", "`auto` or `xla`"),
    "more per token": (["moe.num_experts=1"], "there is only 1 expert", "moe: null"),
    "no second": (
        ["moe.experts_per_token=1", "moe.second_policy=random"],
        "there is no second choice",
        "use `all`",
    ),
    "slots": (["moe.num_experts=512"], "less than one slot per expert", "`moe.group_tokens` 256"),
    "tiny factor": (["moe.capacity_factor=1e-300"], "less than one slot", "use 1 or more"),
    "eval factor": (
        ["moe.eval_capacity_factor=1.0"],
        "`dropless`, which has no capacity, but `moe.eval_capacity_factor` is 1",
        "set `moe.eval_dispatch` to `gather`",
    ),
    "tiny eval factor": (
        ["moe.eval_dispatch=gather", "moe.eval_capacity_factor=1e-300"],
        "less than one slot",
        "use 1 or more",
    ),
    "sums of float32": (
        ["mesh.expert_sums=bfloat16", "model.activation_dtype=float32"],
        "`mesh.expert_sums` is `bfloat16`, but `model.activation_dtype` is `float32`",
        "remove it",
    ),
    "sums without slots": (
        ["mesh.expert_sums=bfloat16", "moe.dispatch=dropless"],
        "`moe.dispatch` is `dropless`, which adds up in float32",
        "use another `moe.dispatch`",
    ),
    "no lower factor": (
        ["moe.adaptive_capacity={lower_factors: [1.0, 2.0]}"],
        "must be below `moe.capacity_factor` 2",
        "[1]",
    ),
    "factors alike": (
        ["moe.group_tokens=32", "moe.adaptive_capacity={lower_factors: [1.0, 1.6, 1.9]}"],
        "capacity factors 1.9 and 2 both give an expert 16 slots of 32 tokens",
        "remove one",
    ),
    "tiny lower factor": (
        ["moe.adaptive_capacity={lower_factors: [0.001]}"],
        "less than one slot",
        "use `moe.group_tokens` 4096 or more",
    ),
    "capacity of dropless": (
        ["moe.dispatch=dropless", "moe.adaptive_capacity={lower_factors: [1.0]}"],
        "has no capacity, but there is `moe.adaptive_capacity`",
        "remove it",
    ),
    "capacity of dense": (
        ["moe=null", "moe.adaptive_capacity.lower_factors=[1]"],
        "`moe.num_experts` is missing",
        None,
    ),
    "accumulate": (["batch.accumulate=3"], "does not divide over 3 accumulated", "use 6 or 9"),
    "shards": (["mesh.data=2", "mesh.expert=8"], "over 16 data shards", "use 16"),
    "shards and parts": (
        ["mesh.data=4", "batch.accumulate=4"],
        "4 data shards (`mesh.slice` x `mesh.data` x `mesh.expert`) x 4 accumulated",
        "use 16",
    ),
    "auto counts once": (["mesh.slice=3"], "over 3 data shards", "use 6 or 9"),
    "group and row": (["moe.group_tokens=96"], "whole rows or a row holds whole", "use 64 or 128"),
    "group and batch": (["moe.group_tokens=1024"], "8 rows x 64 tokens", "use 512"),
    "group and part": (
        ["batch.accumulate=8"],
        "each of 8 parts has 1 rows x 64 tokens",
        None,
    ),
    "vocab over model": (["mesh.model=3"], "`model.vocab_size` is 512", "may be 2"),
    "heads over model": (["mesh.model=4"], "`model.num_heads` is 2", "`mesh.model` may be 2"),
    "ffn over model": (["model.ffn_dim=63", "mesh.model=2"], "`model.ffn_dim` is 63", "may be 1"),
    "experts": (["mesh.expert=8"], "`moe.num_experts` is 4", "`mesh.expert` may be 4"),
    "width over data": (["mesh.data=64", "batch.rows=64"], "`model.model_dim` is 32", "may be 32"),
    "stages": (["mesh.stage=2"], "`model.num_layers` is 1 (in pairs)", "`mesh.stage` may be 1"),
    "no microbatches": (
        ["mesh.stage=2", "model.num_layers=8"],
        "`mesh.stage` is 2, which needs `pipeline.microbatches`",
        "for example 4",
    ),
    "few rows for stages": (
        ["mesh.stage=2", "model.num_layers=8", "mesh.data=8"],
        "which needs `pipeline.microbatches`",
        "for example 2, with `batch.rows` 16",
    ),
    "turns": (
        [*STAGES, "pipeline.microbatches=3"],
        "in turns of `mesh.stage` 2, but `pipeline.microbatches` is 3",
        "use 2 or 4",
    ),
    "microbatches": (
        [*STAGES, "batch.rows=6", "pipeline.microbatches=4"],
        "`batch.rows` is 6, which does not divide over 4 microbatches",
        "use 4 or 8",
    ),
    "group and microbatch": (
        [*STAGES, "pipeline.microbatches=8"],
        "a microbatch has 1 rows x 64 tokens, which does not divide into groups of 128",
        "use 64",
    ),
    "repeats": (
        [*STAGES, "pipeline.repeats=3"],
        "a stage has 2 layers (in pairs), which do not divide over `pipeline.repeats` 3",
        "use 2",
    ),
    "layers whole": (
        [*STAGES, "mesh.rules.layers=[]"],
        "`mesh.stage` is 2, but `mesh.rules.layers` keeps all layers on each",
        "use [stage]",
    ),
    "no stages": (
        ["pipeline.microbatches=4"],
        "`pipeline.microbatches` has no effect with one stage",
        "remove it",
    ),
    "bytes": (["model.vocab_size=256"], "bytes need 259 ids", "use 259"),
    "bytes path": (["data.tokenizer.path=x"], "has no effect with the `bytes`", "remove it"),
    "pieces": (
        ["data.tokenizer.kind=sentencepiece", "data.tokenizer.train_vocab_size=600"],
        "is 600, more than `model.vocab_size` 512",
        "use at most 512",
    ),
    "few pieces": (
        ["data.tokenizer.kind=sentencepiece", "model.vocab_size=280"],
        "needs 300 pieces",
        "use 300",
    ),
    "path and training": (
        [
            "data.tokenizer={kind: sentencepiece, path: a.model, train_vocab_size: 400}",
        ],
        "names a trained model",
        "remove one",
    ),
    "warmup": (["optimizer.warmup_steps=21"], "more than the 20 steps", "use 0 or 2"),
    "warmup and hold": (["optimizer.warmup_steps=15"], "before it has risen", "`optimizer.hold"),
    "decay": (["optimizer.weight_decay=0.1"], "has no effect with `adafactor`", "default 0.0"),
    "beta2": (["optimizer.beta2=0.95"], "has no effect with `adafactor`", "default 0.99"),
    "adamw": (
        ["optimizer.name=adamw", "optimizer.scale_by_parameter=false"],
        "`optimizer.scale_by_parameter` has no effect with `adamw`",
        "default true",
    ),
    "suite name": (["finish.suite=quik"], "no shipped suite is called `quik`", "`quick`"),
    "suite file": (["finish.suite=./no.yaml"], "no such suite file: `", None),
    "suite without shots": (
        ["finish.suite=quick", "finish.shots=[]"],
        "there are no `finish.shots`",
        "[0]",
    ),
    "shots": (["finish.shots=[1, 1]"], "`finish.shots` repeats a number: [1, 1]", None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_contradiction_is_found_and_given_a_way_out(case):
    sets, what, hint = CASES[case]
    error = refusal("test-tiny", sets)
    text = f"{error.what}\n{error.hint}"
    assert what in text
    assert hint is None or hint in text


@pytest.mark.parametrize(
    ("case", "advice"),
    [
        ("odd layers", "model.num_layers=2"),
        ("one layer", "model.num_layers=2"),
        ("buckets odd", "model.position_buckets=6"),
        ("buckets few", "model.position_buckets=4"),
        ("distance", "model.position_max_distance=128"),
        ("more per token", "moe=null"),
        ("no second", "moe.second_policy=all"),
        ("slots", "moe.group_tokens=256"),
        ("shards and parts", "batch.rows=16"),
        ("auto counts once", "batch.rows=6"),
        ("group and row", "moe.group_tokens=64"),
        ("group and batch", "moe.group_tokens=512"),
        ("group and part", "moe.group_tokens=64"),
        ("heads over model", "mesh.model=2"),
        ("ffn over model", "mesh.model=1"),
        ("experts", "mesh.expert=4"),
        ("no microbatches", "pipeline.microbatches=4"),
        ("turns", "pipeline.microbatches=2"),
        ("microbatches", "batch.rows=8"),
        ("group and microbatch", "moe.group_tokens=64"),
        ("repeats", "pipeline.repeats=2"),
        ("layers whole", "mesh.rules.layers=[stage]"),
        ("stages", "mesh.stage=1"),
        ("bytes", "model.vocab_size=259"),
        ("pieces", "data.tokenizer.train_vocab_size=512"),
        ("few pieces", "model.vocab_size=300"),
        ("warmup", "optimizer.warmup_steps=2"),
        ("warmup and hold", "optimizer.hold_steps=15"),
        ("adamw", "optimizer.scale_by_parameter=true"),
    ],
)
def test_what_a_hint_advises_works(case, advice):
    load_recipe("test-tiny", [*CASES[case][0], advice])


def test_all_contradictions_are_told_together():
    every = [CASES[name] for name in ("odd layers", "buckets odd", "warmup", "decay", "shots")]
    error = refusal("test-tiny", [assignment for sets, _, _ in every for assignment in sets])
    assert error.what.startswith(f"{len(every)} problems:")
    for _, what, _ in every:
        assert sum(what in line for line in error.what.splitlines()) == 1


def test_a_contradiction_is_placed_where_the_value_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("extends: test-tiny\nmodel:\n  num_layers: 5\n")
    assert refusal("./my.yaml", []).what.startswith("my.yaml:3: layers come in pairs")
    (tmp_path / "my.yaml").write_text("extends: test-tiny\nmesh:\n  model: 4\n")
    assert re.match(r"\S*test-tiny.yaml:7: `model.num_heads`", refusal("./my.yaml", []).what)


def test_contradictions_of_recipe_and_mixture_are_told_together(tmp_path):
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("sources:\n  a: {kind: text, path: x, weight: 1}\nheldout_frac: 0\n")
    sets = [f"data.mixture={mixture}", "finish.suite=quick", "model.num_layers=3"]
    error = refusal("test-tiny", sets)
    assert "layers come in pairs" in error.what
    assert "keeps no document out of training" in error.what
    assert "quick suite is made of held-out documents" in error.what
    sets = [f"data.mixture={mixture}", "every.heldout_steps=null"]
    assert load_recipe("test-tiny", sets).recipe.every.heldout_steps is None


def test_unchecked_loading_is_possible():
    assert (
        load_recipe("test-tiny", ["model.num_layers=3"], check=False).recipe.model.num_layers == 3
    )


@pytest.mark.parametrize("name", shipped("recipes"))
def test_every_shipped_recipe_is_fine_and_says_what_it_is(name):
    loaded = load_recipe(name)
    assert loaded.recipe.about
    first = loaded.path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"


def test_only_the_recipe_that_gains_by_it_leaves_products_to_the_compiler():
    cut = [n for n in shipped("recipes") if load_recipe(n).recipe.mesh.collective_matmul == "auto"]
    assert cut == ["glam_64b_64e"]


@pytest.mark.parametrize("name", [name for name in shipped("recipes") if name.startswith("glam")])
def test_paper_recipes_have_the_paper_s_training_settings(name):
    recipe = load_recipe(name).recipe
    assert recipe.batch.rows * recipe.batch.row_tokens == 2**20
    assert recipe.batch.row_tokens == 1024
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adafactor", 0.01)
    assert (optimizer.hold_steps, optimizer.warmup_steps) == (10_000, 0)
    assert (optimizer.beta1, optimizer.decay_exponent, optimizer.clip_update_rms) == (0.0, 0.8, 1.0)
    assert recipe.loss.z_coef == 1e-4
    assert recipe.model.activation_dtype == "bfloat16"
    assert recipe.data.mixture == "glam"
    assert recipe.data.tokenizer.kind == "sentencepiece"
    if recipe.moe:
        assert (recipe.moe.experts_per_token, recipe.moe.balance_coef) == (2, 0.01)
    assert any("vocabulary" in note for note in recipe.notes)


def test_a_recipe_that_says_nothing_trains_as_the_paper_does():
    optimizer, moe = Optimizer(), Moe(num_experts=64)
    assert (optimizer.name, optimizer.learning_rate) == ("adafactor", 0.01)
    assert (optimizer.hold_steps, optimizer.warmup_steps) == (10_000, 0)
    assert (optimizer.beta1, optimizer.decay_exponent, optimizer.clip_update_rms) == (0.0, 0.8, 1.0)
    assert optimizer.scale_by_parameter
    assert Loss().z_coef == 1e-4
    assert (moe.experts_per_token, moe.balance_coef, moe.balance_over_layers) == (2, 0.01, "sum")
    assert (moe.capacity_factor, moe.eval_dispatch) == (2.0, "dropless")


def test_the_row_that_does_not_follow_from_its_shape_says_so():
    notes = load_recipe("glam_1.7b_32e").recipe.notes
    assert any("20B does not follow" in note for note in notes)


def test_every_open_point_of_the_paper_is_a_setting_with_the_default_that_is_written():
    page = Path(__file__).parents[3] / "docs/decisions/0001-ambiguities-of-the-paper.md"
    rows = re.findall(r"^\|[^|]*\| `(\w+)\.(\w+)` \| ([^|]*) \|", page.read_text(), re.M)
    assert len(rows) == 15
    recipe = load_recipe("glam_64b_64e").recipe
    for section, name, default in rows:
        settings = getattr(recipe, section)
        field = type(settings).model_fields[name]
        value = getattr(settings, name) if field.is_required() else field.default
        text = re.sub(r":.*|[`,]", "", default)
        assert text == str(value).lower() or float(text) == value, name
