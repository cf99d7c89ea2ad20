"""What a search tries, what it drops and why; nothing is compiled here."""

from collections import Counter

import pytest

from glamcli.config.chips import load_chips
from glamcli.config.load import load_recipe
from glamcli.errors import PlanError
from glamcli.plan import search, topology
from glamcli.plan.cost import Prices
from glamcli.plan.memory import state_bytes
from glamcli.plan.planner import Plan
from glamcli.plan.schedule import Time

CHIPS = load_chips()
V5E = topology.parse_target("v5e-8", CHIPS)
TINY = load_recipe("test-tiny").recipe


@pytest.fixture
def compiled(monkeypatch):
    """The layouts that a search compiles; each takes as long as it has model shards."""
    asked = []

    def make_plan(recipe, target, prices):
        asked.append(recipe)
        if recipe.mesh.model == 1:
            raise PlanError("the step needs 41.2 GiB per chip, v5e has 15.8")
        shape = {"data": recipe.mesh.data, "model": recipe.mesh.model}
        time = Time(compute=float(recipe.mesh.model))
        return Plan(recipe, target, shape, "compiled", {}, (), [], 0.0, time, None)

    monkeypatch.setattr(search, "make_plan", make_plan)
    return asked


def test_candidates_keep_the_run_unless_they_say_so():
    for each in search.candidates(TINY, V5E, Counter()):
        same = each.recipe.batch == TINY.batch and each.recipe.moe == TINY.moe
        assert each.same_run == same
        sizes = each.recipe.mesh
        assert sizes.data * sizes.expert * sizes.model == 8


def test_what_is_dropped_is_counted_by_reason():
    dropped = Counter()
    kept = list(search.candidates(TINY, V5E, dropped))
    assert dropped["with widths that do not divide over the mesh"] > 0, "2 heads over 4 and 8"
    assert dropped["with rows that do not divide over the data shards"] > 0, "4 rows over 8"
    num_meshes, num_variants = 9, 5 * 5  # remat x (as it is, 2 x rows, 2 x capacity)
    assert len(kept) + sum(dropped.values()) == num_meshes * num_variants


def test_the_best_that_compiles_and_trains_the_same_wins(compiled):
    told = []
    found = search.search(TINY, V5E, Prices(), num_compiled=9, tell=told.append)
    assert found.num_compiled == len(compiled) == len(told) == 9
    assert {why for _, why in found.refused} == {"the step needs 41.2 GiB per chip, v5e has 15.8"}
    assert found.best is not None
    assert found.best[0].same_run
    assert [plan.time.total for _, plan in found.plans] == [2.0] * len(found.plans)
    assert found.dropped["slower by arithmetic than those compiled"] > 0


def test_a_recipe_too_large_for_a_target_is_refused_before_compiling(compiled):
    large = load_recipe("glam_0.1b_128e", ["mesh.expert=1"]).recipe
    with pytest.raises(PlanError, match=r"no layout of the recipe fits `v5e-1` \(.*arithmetic"):
        search.search(
            large, topology.parse_target("v5e-1", CHIPS), Prices(), num_compiled=3, tell=print
        )
    assert not compiled


def test_all_targets_moves_to_larger_slices_until_one_fits(monkeypatch):
    tried = []

    def make_plan(recipe, target, prices):
        tried.append(target.name)
        if target.num_devices < 4:
            raise PlanError("the step needs 41.2 GiB per chip, v5e has 15.8")
        return Plan(recipe, target, {}, "compiled", {}, (), [], 0.0, None, None)

    monkeypatch.setattr(search, "make_plan", make_plan)
    some = {name: CHIPS[name] for name in ("v5e", "h100")}
    told = []
    ((chip, plan, why),) = search.all_targets(TINY, some, Prices(), told.append)
    assert (chip.name, plan.target.name, why) == ("v5e", "v5e-4", "")
    assert tried == ["v5e-1", "v5e-4"]
    large = load_recipe("glam_0.1b_64e").recipe
    list(search.all_targets(large, some, Prices(), told.append))
    assert tried[2:] == ["v5e-32"]
    assert told[-1].endswith("(4 smaller sizes are too small by arithmetic)")


def test_a_kind_without_a_size_is_one_section_of_the_table():
    assert set(topology.chips_of_kind("v5litepod", CHIPS)) == {"v5e"}
    for name in ("v5e-64", "h100", "local"):
        with pytest.raises(PlanError, match="goes through the sizes of a kind of TPU"):
            topology.chips_of_kind(name, CHIPS)


def test_state_bytes_follow_the_table():
    shape = {"slice": 1, "stage": 1, "data": 2, "expert": 2, "model": 2}
    one = dict.fromkeys(shape, 1)
    whole, split = state_bytes(TINY, one), state_bytes(TINY, shape)
    by_name = {array.name: array for array in split.arrays}
    experts = by_name["blocks.expert_layer.ffn.w_in"]
    assert experts.split == ((), ("expert",), ("data",), ("model",))
    assert experts.bytes * 8 == 4 * 32 * 64 * 4
    assert by_name["blocks.expert_layer.ffn.router"].bytes == 32 * 4 * 4, "on every device"
    assert whole.weights / 8 < split.weights < whole.weights / 4
    assert whole.batch == 4 * split.batch == 8 * (3 * 64 + 1) * 4


def test_the_best_of_every_model_size_comes_first_unless_it_is_far_behind():
    def candidate(model: int, seconds: float) -> search.Candidate:
        mesh = TINY.mesh.model_copy(update={"model": model})
        recipe = TINY.model_copy(update={"mesh": mesh})
        return search.Candidate(recipe, (), True, seconds)

    ranked = [candidate(*each) for each in ((2, 1.0), (2, 1.1), (4, 1.2), (2, 1.3), (8, 2.1))]
    order = [each.seconds_per_token for each in search._spread(ranked)]
    assert order == [1.0, 1.2, 1.1, 1.3, 2.1]
