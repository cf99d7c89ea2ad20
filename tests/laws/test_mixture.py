"""Laws of the mixture arithmetic: exact weights, true permutations, nothing lost or repeated."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glamcli.data.mixture import (
    MAX_DEVIATION,
    WEIGHT_PARTS,
    Schedule,
    integer_weights,
    permute,
)

GLAM = {
    "webpages": 0.42,
    "wikipedia": 0.06,
    "conversations": 0.28,
    "forums": 0.02,
    "books": 0.20,
    "news": 0.02,
}

weight = st.one_of(
    st.integers(0, 1000),
    st.decimals("0.0001", "9", places=4).map(float),
    st.floats(1e-12, 1e3, allow_nan=False),
)
mixtures = (
    st.lists(weight, min_size=1, max_size=12)
    .filter(any)
    .map(lambda weights: {f"s{i}": w for i, w in enumerate(weights)})
)


def schedule(weights, rows=1000, seed=0):
    return Schedule(seed, [(0, weights)], dict.fromkeys(weights, rows))


@settings(max_examples=150, deadline=None)
@given(mixtures, st.integers(0, 10**12), st.integers(0, 10**9))
def test_every_window_holds_weight_times_length_rows_within_the_bound(weights, start, length):
    counts = schedule(weights).counts(start, start + length)
    parts = integer_weights(weights)
    assert sum(counts.values()) == length
    for name in weights:
        # In integers: |count - length x part / total| < bound.
        total = sum(parts.values())
        assert abs(counts[name] * total - length * parts.get(name, 0)) < MAX_DEVIATION * total
        if not weights[name]:
            assert counts[name] == 0


@settings(max_examples=100, deadline=None)
@given(mixtures, st.integers(0, 10**12), st.integers(0, 300))
def test_counting_agrees_with_locating(weights, start, length):
    run = schedule(weights)
    places = run.locate_range(start, start + length)
    located = Counter(run.names[i] for i in places.source)
    assert located == Counter(run.counts(start, start + length))


@settings(max_examples=50, deadline=None)
@given(mixtures, st.integers(0, 10**10), st.integers(1, 50))
def test_a_range_is_its_single_rows(weights, start, length):
    run = schedule(weights, rows=7)
    places = run.locate_range(start, start + length)
    singles = [run.locate(k) for k in range(start, start + length)]
    assert [run.names[i] for i in places.source] == [place.source for place in singles]
    assert places.epoch.tolist() == [place.epoch for place in singles]
    assert places.row.tolist() == [place.row for place in singles]


@settings(max_examples=100, deadline=None)
@given(mixtures)
def test_parts_keep_the_proportions(weights):
    parts = integer_weights(weights)
    total = sum(parts.values())
    assert total <= WEIGHT_PARTS
    assert set(parts) == {name for name, w in weights.items() if w}
    for name, count in parts.items():
        share = weights[name] / sum(weights.values())
        assert abs(count / total - share) < 1e-9


def test_decimal_weights_are_exact_over_their_period():
    assert integer_weights(GLAM) == {
        "webpages": 21, "wikipedia": 3, "conversations": 14, "forums": 1, "books": 10, "news": 1,
    }  # fmt: skip
    run = schedule(GLAM)
    for start in (0, 50, 10**9 * 50):
        assert run.counts(start, start + 50) == integer_weights(GLAM)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64), st.text(max_size=5), st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(size, seed, name, epoch):
    assert np.array_equal(
        np.sort(permute(np.arange(size), size, seed, name, epoch)), np.arange(size)
    )


def test_each_epoch_is_a_permutation_for_every_small_size():
    for size in range(1, 200):
        assert sorted(permute(np.arange(size), size, 1, "s", 0)) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**31, 2**52), st.integers(0, 2**32))
def test_permutation_of_a_huge_source_stays_inside_and_does_not_collide(size, seed):
    image = permute(np.arange(1000) + size // 2, size, seed, "web", 0)
    assert image.min() >= 0
    assert image.max() < size
    assert len(set(image.tolist())) == 1000


def test_rows_land_everywhere_with_equal_frequency():
    size, epochs = 13, 3900
    landed = np.zeros((size, size))
    for epoch in range(epochs):
        landed[np.arange(size), permute(np.arange(size), size, 7, "s", epoch)] += 1
    expected = epochs / size
    chi_square = ((landed - expected) ** 2 / expected).sum()
    # 144 degrees of freedom: mean 144, standard deviation 17.
    assert chi_square < 144 + 5 * 17


def test_neighbours_do_not_stay_neighbours():
    image = permute(np.arange(10_000), 10_000, 3, "s", 0)
    assert (np.abs(np.diff(image)) == 1).sum() < 20


def test_epochs_seeds_and_names_each_change_the_order():
    base = permute(np.arange(50), 50, 1, "web", 0).tolist()
    for key in ((1, "web", 1), (2, "web", 0), (1, "news", 0)):
        assert permute(np.arange(50), 50, *key).tolist() != base


def test_a_source_is_read_in_another_order_in_every_epoch_of_every_seed():
    orders = [
        schedule({"web": 1}, rows=50, seed=seed).locate_range(start, start + 50).row.tolist()
        for seed in (0, 1)
        for start in (0, 50, 100)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), mixtures), max_size=4),
    st.integers(0, 10),
    st.integers(1, 9),
)
def test_nothing_is_lost_or_repeated_when_weights_change(changes, seed, rows):
    names = sorted({name for _, weights in changes for name in weights} | {"s0"})
    stages, first = [(0, {"s0": 1.0})], 0
    for length, weights in changes:
        first += length
        stages.append((first, weights))
    run = Schedule(seed, stages, dict.fromkeys(names, rows))
    places = run.locate_range(0, first + 60)
    for i, name in enumerate(run.names):
        mine = places.source == i
        order = list(zip(places.epoch[mine].tolist(), places.row[mine].tolist(), strict=True))
        # The source's own sequence, whatever the weights: epoch after epoch, each a permutation.
        alone = Schedule(seed, [(0, {name: 1.0})], {name: rows}).locate_range(0, len(order))
        assert order == list(zip(alone.epoch.tolist(), alone.row.tolist(), strict=True))


def test_another_source_leaves_the_order_of_this_one_alone():
    few = Schedule(5, [(0, {"a": 1, "b": 2})], {"a": 10, "b": 10})
    more = Schedule(5, [(0, {"c": 3, "a": 1, "b": 2})], {"c": 9, "a": 10, "b": 10})

    def rows_of_a(run):
        places = [run.locate(k) for k in range(200)]
        return [(place.epoch, place.row) for place in places if place.source == "a"]

    short, long = sorted((rows_of_a(few), rows_of_a(more)), key=len)
    assert long[: len(short)] == short
