import jax
import numpy as np
import pytest

from glamcli.data.tokenizer import Bytes
from glamcli.errors import CheckpointError
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.requests import Request, make_requests


@pytest.fixture(scope="module")
def groups():
    """Options behind long common contexts, behind short ones, and requests by themselves."""
    items = [
        [("The river and the stone" * (i % 4), f" run{'s' * o} {i}") for o in range(1 + i % 3)]
        for i in range(17)
    ]
    items.append(
        [("Ann met Mary in the old house; Ann", " left."), ("Ann met Mary in it", " left.")]
    )
    return [make_requests(Bytes(), pairs, 256) or [] for pairs in items]


def make(subject, **options):
    return Likelihoods(subject.decoder, subject.params, window=256, **options)


@pytest.fixture(scope="module")
def together(subject):
    return make(subject, batch_tokens=256)


def full_softmax(subject, request):
    """Log-probabilities of the scored tokens, by one pass over the whole request."""
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : request.num_inputs] = request.ids[:-1]
    segments = (np.arange(128)[None] < request.num_inputs).astype(np.int32)

    def full(params):
        x, _ = subject.decoder.hidden(params, tokens, segments, dispatch="dropless")
        return jax.nn.log_softmax(subject.decoder.logits(params, x), axis=-1)[0]

    logp = np.asarray(jax.jit(full)(subject.params))
    places = range(request.num_inputs - request.num_scored, request.num_inputs)
    return [logp[place, request.ids[place + 1]] for place in places]


@pytest.mark.slow
def test_shared_and_batched_scores_equal_one_by_one_and_the_full_softmax(subject, together, groups):
    found = together.score(groups)
    alone = make(subject, batch_tokens=1)
    one_by_one = [[alone.score([[each]])[0][0] for each in group] for group in groups]
    for group, first, second in zip(groups, found, one_by_one, strict=True):
        for request, a, b in zip(group, first, second, strict=True):
            np.testing.assert_allclose(a.token_nats, b.token_nats, rtol=1e-5, atol=2e-5)
            assert a.greedy == b.greedy
            assert len(a.token_nats) == request.num_scored
    wanted = full_softmax(subject, groups[11][2])
    np.testing.assert_allclose(found[11][2].token_nats, wanted, rtol=1e-5, atol=2e-5)
    assert found[11][2].total == pytest.approx(sum(wanted), rel=1e-5)


@pytest.fixture(scope="module")
def told():
    """Questions behind two long beginnings, one of them with more of its own before the options."""
    shots = "A stone is grey.\nA river is wet.\nThe moon is cold.\n" * 2
    passage = "Ann and Mary met in the old house by the river, where it was cold and grey."
    longer = "Number {} of the long list of words is "
    items = [[(shots + longer.format(i), end) for end in ("one", "two")] for i in range(3)]
    items += [[(shots + f"No. {i}: ", end) for end in ("one", "two", "six")] for i in range(3)]
    items += [[(f"{passage} Question {i}:", " yes")] for i in range(5)]
    items += [[("Alone: ", "yes"), ("Alone: ", "no")]]
    return [make_requests(Bytes(), pairs, 256) or [] for pairs in items]


@pytest.mark.slow
def test_what_items_share_is_read_once_and_changes_no_score(subject, together, told):
    shared = make(subject, batch_tokens=256, min_saved=0)
    found = shared.score(told)
    wanted = together.score(told)
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # Sums of up to 128 float32 products in another order: 1e-6 each, at logits around 1.
            np.testing.assert_allclose(a.token_nats, b.token_nats, rtol=1e-5, atol=2e-5)
            assert a.greedy == b.greedy
    for first, second in zip(found, wanted, strict=True):
        assert np.argmax([each.total for each in first]) == np.argmax(
            [each.total for each in second]
        )
    before = shared.num_tokens
    shared.score(told[:6])
    flat = make(subject, batch_tokens=256, min_saved=10**9)
    flat.score([[each] for requests in told[:6] for each in requests])
    assert shared.num_tokens - before < 0.6 * flat.num_tokens


def test_each_shape_is_compiled_once(together, groups):
    def num_compiled():
        return together._read._cache_size() + together._score._cache_size()

    together.score(groups)
    before = num_compiled()
    together.score(groups[::-1])
    together.score(groups[:5])
    assert num_compiled() == before


def test_greedy_is_distinguished_from_anything_else(subject, together):
    ids = subject.generator.encode("The")
    (best,) = subject.generator.beams([ids], width=1, tokens=3, alpha=0.0)[0]
    good = Request((*ids, *best.ids), 3)
    bad = Request((*ids, *best.ids[:2], (best.ids[2] + 1) % 200 + 3), 3)
    ((first,), (second,)) = together.score([[good], [bad]])
    assert (first.greedy, second.greedy) == (True, False)
    np.testing.assert_allclose(first.token_nats, best.token_nats, rtol=1e-4, atol=1e-5)


def test_scores_that_are_no_numbers_are_refused(subject, groups):
    params = jax.tree.map(lambda x: x * np.float32("nan"), subject.params)
    model = Likelihoods(subject.decoder, params, window=256)
    with pytest.raises(CheckpointError, match="not finite"):
        model.score(groups[:1])
