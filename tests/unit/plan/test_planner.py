"""Plans compiled by the real TPU compiler for chips that are not here, and those it refuses."""

import importlib.util

import pytest

from glamcli import libtpu
from glamcli.config.chips import load_chips
from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.errors import PlanError
from glamcli.plan import compile, search, topology
from glamcli.plan.candidates import remedy
from glamcli.plan.cost import Prices
from glamcli.plan.planner import Plan, make_plan

CHIPS = load_chips()
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def plan(name: str, target: str, *sets: str) -> Plan:
    libtpu.quiet()
    sets = ("runtime.compile_cache=false", *sets)
    return make_plan(load_recipe(name, sets).recipe, topology.parse_target(target, CHIPS), Prices())


# More rows than one chip has memory for, and what lets it run them.
LARGE = ("batch.rows=512", "batch.row_tokens=2048", "train.remat=none", "moe=null")
REMEDY = "--set batch.accumulate=8 --set train.remat=attention"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[str, ...]:
    """Settings that keep programs in a folder of these tests."""
    return "runtime.compile_cache=true", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def tiny(kept) -> Plan:
    return plan("test-tiny", "v4-16", "mesh.expert=4", "mesh.model=2", *kept)


@pytest.mark.slow
@needs_libtpu
def test_groups_add_up_to_what_the_compiler_reserves(tiny):
    assert tiny.mesh == {"slice": 1, "stage": 1, "data": 1, "expert": 4, "model": 2}
    assert all(size >= 0 for size in tiny.bytes.values())
    assert tiny.bytes["weights"] == sum(a.bytes for a in tiny.arrays)
    assert tiny.bytes.get("gradients") in (None, tiny.bytes["weights"]), "all of them or no row"
    assert tiny.total_bytes < 2**26
    assert tiny.headroom_frac == pytest.approx(1, abs=0.01)


@pytest.mark.slow
@needs_libtpu
def test_collectives_are_named_by_mesh_axis_and_no_expert_is_gathered(tiny):
    over = {(kind, axes) for kind, axes, _, _ in tiny.collectives}
    assert ("all-to-all", ("expert",)) in over
    gathered = [size for kind, axes, _, size in tiny.collectives if kind == "all-gather" if axes]
    assert gathered


@pytest.mark.slow
@needs_libtpu
def test_the_estimate_says_where_the_time_goes(tiny):
    time, cost = tiny.time, tiny.cost
    assert 0 < time.compute == pytest.approx(sum(time.scopes.values()))
    assert {"attention", "experts", "optimizer"} <= set(time.scopes)
    tokens = 8 * 64
    assert cost.tokens_per_second == pytest.approx(tokens / time.total)
    assert cost.chip_hours == pytest.approx(8 * 20 * time.total / 3600)
    assert cost.dollars == pytest.approx(CHIPS["v4"].price * cost.chip_hours)
    assert cost.mwh == pytest.approx(cost.chip_hours * 326 * 1.11 / 1e6)
    assert tiny.to_json()["estimate"]["step_seconds"] == time.total


@needs_libtpu
@pytest.mark.slow
def test_the_same_program_is_compiled_once_and_another_one_again(tiny, kept, monkeypatch):
    class Compiled(Exception):
        pass

    def compiled(*_):
        raise Compiled

    monkeypatch.setattr("glamcli.plan.compile._compiled", compiled)
    again = plan("test-tiny", "v4-16", "mesh.expert=4", "mesh.model=2", *kept)
    assert again.to_json() == tiny.to_json()
    for other in (("v4-16", "mesh.expert=2"), ("v5e-8", "mesh.expert=4")):
        with pytest.raises(Compiled):
            plan("test-tiny", other[0], other[1], "mesh.model=2", *kept)


def test_a_damaged_file_of_a_kept_program_is_as_good_as_none(tmp_path):
    path = tmp_path / "plans" / "a.json.gz"
    assert compile._read_cached(path) is None
    compile._write_cached(path, {"hlo": "text", "code": 1})
    assert compile._read_cached(path) == {"hlo": "text", "code": 1}
    assert [each.name for each in path.parent.iterdir()] == ["a.json.gz"]
    for damaged in (path.read_bytes()[:-9], b"", b"no gzip"):
        path.write_bytes(damaged)
        assert compile._read_cached(path) is None


@needs_libtpu
def test_a_refusal_of_the_compiler_lists_bytes_by_group():
    with pytest.raises(PlanError) as caught:
        plan("test-tiny", "v5e-1", *LARGE)
    assert caught.value.exit_code == 5
    assert "GiB per chip, v5e has 15.8 (" in caught.value.what
    assert "activations and temporaries" in caught.value.what
    assert caught.value.hint == f"{REMEDY} fits by arithmetic"


@needs_libtpu
@pytest.mark.slow
def test_the_advice_of_a_refusal_compiles_and_fits():
    assert plan("test-tiny", "v5e-1", *LARGE, *REMEDY.replace("--set ", "").split()).bytes


def test_a_target_that_is_too_small_is_answered_with_one_that_is_not():
    with pytest.raises(PlanError, match="the mesh asks for auto x 64 devices") as caught:
        plan("glam_8b_64e", "v4-32")
    options = "--target v4-512 --set train.remat=projections"
    hint = f"`v4-32` is too small by arithmetic; {options} is not"
    assert caught.value.hint == hint
    with pytest.raises(PlanError, match="the step needs at least 67") as caught:
        plan("glam_8b_64e", "v4-32", "mesh.expert=16")
    assert caught.value.hint == hint.replace("512", "512 --set mesh.expert=64")


@pytest.mark.parametrize(
    ("target", "settings", "hint"),
    [
        ("v5e-256", ("mesh=auto",), "raise `batch.rows` to a multiple of"),
        ("v4-64", ("mesh.data=4",), "for 32 devices use"),
    ],
)
def test_a_target_that_is_too_large_is_not_called_too_small(target, settings, hint):
    with pytest.raises(PlanError) as caught:
        plan("quickstart", target, *settings)
    assert hint in caught.value.hint


def test_gpus_may_have_slices():
    found = plan("quickstart", "16xh100", "mesh.slice=2", "batch.rows=16")
    assert found.mesh["slice"] == 2


def test_advice_for_an_automatic_mesh_can_be_followed():
    asked = (*LARGE, "mesh.auto=true")
    hint = remedy(load_recipe("test-tiny", asked).recipe, topology.parse_target("v5e-4", CHIPS))
    sets = [word for word in hint.split() if "=" in word]
    assert {"mesh.auto=false", "mesh.data=4"} <= set(sets)
    load_recipe("test-tiny", [*asked, *sets])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v3-8", "v5e-8", "v5p-16", "v6e-8", "7x-8", "2xv5e-8"])
def test_every_kind_of_tpu_compiles_and_says_nothing_on_the_way(target, capfd):
    slices = topology.parse_target(target, CHIPS).num_slices
    found = plan("test-tiny", target, "mesh.expert=4", "mesh.model=2", f"mesh.slice={slices}")
    assert capfd.readouterr() == ("", "")
    assert found.method == "compiled"
    assert "expert" in {axis for _, axes, _, _ in found.collectives for axis in axes}
    assert {"attention", "experts"} <= set(found.time.scopes)


@needs_libtpu
@pytest.mark.slow
def test_products_are_cut_into_loops_only_where_the_recipe_asks_for_it():
    wide = ("moe=null", "model.model_dim=768", "model.ffn_dim=3072", "mesh.data=8")
    rows = ("batch.rows=256", "batch.row_tokens=1024", "train.remat=full")
    off, auto = (
        plan("test-tiny", "v4-16", *wide, *rows, f"mesh.collective_matmul={value}")
        for value in ("off", "auto")
    )
    assert "collective-permute" not in {kind for kind, *_ in off.collectives}
    assert "collective-permute" in {kind for kind, *_ in auto.collectives}
    assert off.time.total < auto.time.total, "every piece would write the whole result again"


def test_a_plan_has_as_many_sources_as_the_recipe(monkeypatch):
    class Traced(Exception):
        pass

    def trace(decoder, recipe, num_sources, mesh):
        raise Traced(num_sources)

    monkeypatch.setattr("glamcli.plan.compile.programs.trace_train_step", trace)
    for name in ("test-tiny", "glam_0.1b"):
        recipe = load_recipe(name, ["mesh.data=auto", "batch.rows=8"]).recipe
        sources = load_mixture(recipe.data.mixture).sources
        with pytest.raises(Traced, match=f"^{len(sources)}$"):
            compile.compile_step(recipe, topology.parse_target("local", CHIPS))


def test_what_arithmetic_rules_out_is_refused_before_compiling(monkeypatch):
    monkeypatch.setattr("glamcli.plan.planner.compile_step", None)
    mesh = ("mesh.expert=1", "mesh.data=auto", "batch.rows=4")
    with pytest.raises(PlanError) as caught:
        plan("glam_8b_64e", "v4-8", *mesh)
    assert "the step needs at least " in caught.value.what
    assert "weights " in caught.value.what
    assert caught.value.hint is not None
    assert "--target v4-128 " in caught.value.hint


def test_slices_must_be_those_of_the_mesh():
    with pytest.raises(PlanError, match=r"has 2 slice\(s\), `mesh\.slice` is 1") as caught:
        plan("test-tiny", "2xv5e-4")
    assert caught.value.hint == "--set mesh.slice=2"


def test_gpus_go_by_formula_and_say_so():
    found = plan("quickstart", "8xh100")
    assert found.method == "formula"
    assert not found.collectives
    assert found.time.total > 0
    with pytest.raises(PlanError, match=r"h100 has 79\.6"):
        plan("glam_8b_64e", "8xh100", "mesh.expert=8")


@pytest.mark.slow
def test_simulated_cpus_have_bytes_and_collectives_but_no_time():
    found = plan("test-tiny", "cpu:8", "mesh.expert=4", "mesh.model=2")
    assert found.method == "compiled"
    assert found.time is None
    assert found.headroom_frac is None
    assert found.collectives


@pytest.mark.parametrize(
    "message",
    [
        "JAX TPU support not installed; cannot generate TPU topology.",
        "Unable to find libtpu: No module named 'libtpu'",
    ],
)
def test_without_libtpu_the_extra_is_named(message, monkeypatch):
    def missing(**_):
        raise RuntimeError(message)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(PlanError, match=r"the TPU compiler .* is not installed") as caught:
        plan("test-tiny", "v5e-8")
    assert "pip install '.[plan]'" in caught.value.hint
    tiny = load_recipe("test-tiny").recipe
    v5e = topology.parse_target("v5e-8", CHIPS)
    with pytest.raises(PlanError, match="the TPU compiler"):  # not a layout that is too large
        search.search(tiny, v5e, Prices(), num_compiled=1, tell=print)
    with pytest.raises(PlanError, match="the TPU compiler"):
        list(search.all_targets(tiny, {"v5e": CHIPS["v5e"]}, Prices(), print))
