"""Generation against the full forward pass, with a tiny random model over bytes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli import generate
from glamcli.beam_search import TextStream
from glamcli.config import schema
from glamcli.data.tokenizer import Bytes
from glamcli.decoding import Decoding
from glamcli.errors import RecipeError
from glamcli.generate import Generator, Sampling, _choose
from glamcli.model.decoder import Decoder

MODEL = schema.Model(
    num_layers=2,
    model_dim=32,
    ffn_dim=64,
    num_heads=2,
    head_dim=16,
    vocab_size=272,
    activation_dtype="float32",
)
MOE = schema.Moe(num_experts=4, group_tokens=32)
TOKENIZER = Bytes()


@pytest.fixture(scope="module")
def decoder():
    return Decoder(MODEL, MOE)


@pytest.fixture(scope="module")
def params(decoder):
    params = jax.jit(decoder.init)(jax.random.key(1))
    # Larger weights make sharper, more varied predictions than an initial model has.
    return jax.tree.map(lambda x: 1.5 * x, params)


@pytest.fixture(scope="module")
def generator(decoder, params):
    return Generator(decoder, params, TOKENIZER)


@pytest.mark.parametrize("how", ["sampled", "beam"])
def test_every_token_is_announced(decoder, params, how):
    generator, seen = Generator(decoder, params, TOKENIZER), []
    generator.before_token = lambda: seen.append(how)
    beam = 2 if how == "beam" else None
    generator.continuations("stone", Decoding(tokens=5, beam=beam, samples=2, temperature=0.0))
    assert 1 < len(seen) <= 5


@pytest.fixture(scope="module")
def forward(decoder, params):
    """Log-probabilities after a sequence, by the full forward pass without a cache."""

    @jax.jit
    def run(tokens_1S, segments_1S):
        x, _ = decoder.hidden(params, tokens_1S, segments_1S, dispatch="dropless")
        return jax.nn.log_softmax(decoder.logits(params, x), axis=-1)

    def after(ids):
        tokens, segments = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        logp = np.array(run(tokens, segments)[0, len(ids) - 1])
        logp[[0, 2]] = -np.inf
        logp[TOKENIZER.vocab_size :] = -np.inf
        return logp

    return after


def test_greedy_equals_the_full_forward_pass(generator, forward):
    ids = generator.encode("Ab")
    wanted = list(ids)
    for _ in range(12):
        wanted.append(int(forward(wanted).argmax()))
    text = TOKENIZER.decode(wanted[len(ids) :])
    assert generator.texts("Ab", tokens=12) == [text]
    (best,) = generator.beams([ids], width=1, tokens=12, alpha=0.0)[0]
    assert list(best.ids) == wanted[len(ids) :]
    np.testing.assert_allclose(
        best.token_nats,
        [forward(wanted[:i])[wanted[i]] for i in range(len(ids), len(wanted))],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_texts(generator, forward):
    """With two tokens to go and 12 beams, the two-token text of highest probability is found."""
    ids = generator.encode("The")
    first = forward(ids)
    totals = {}
    for a in np.argsort(-first)[:40]:
        second = forward([*ids, int(a)])
        b = int(second.argmax())
        totals[(int(a), b)] = first[a] + second[b]
    wanted = max(totals, key=lambda pair: totals[pair])
    best = generator.beams([ids], width=12, tokens=2, alpha=0.0)[0][0]
    assert best.ids == wanted
    assert best.score == pytest.approx(totals[wanted], rel=1e-4)


LETTERS = (TOKENIZER.eos_id, *(3 + ord(letter) for letter in "abc"))


class FewLetters(Decoder):
    """A decoder that only ever writes three letters and the end of a document."""

    def logits(self, params, x_BSM):
        logits_BSV = super().logits(params, x_BSM)
        known = np.isin(np.arange(logits_BSV.shape[-1]), LETTERS)
        return jnp.where(known[None, None], logits_BSV, -1e30)


@pytest.mark.parametrize(("alpha", "stop"), [(0.0, ()), (0.6, ()), (0.6, ("ab",))])
def test_beams_with_room_for_every_text_are_all_texts_in_order(params, forward, alpha, stop):
    """Against the probability of each text that ends or has three tokens, one by one."""
    decoder = FewLetters(MODEL, MOE)
    generator = Generator(decoder, params, TOKENIZER)
    prompt = generator.encode("x")

    def ended(ids):
        text = TOKENIZER.decode(list(ids))
        return bool(ids) and (ids[-1] == TOKENIZER.eos_id or any(each in text for each in stop))

    totals = {}
    open_texts = [((), 0.0)]
    for _ in range(3):
        following = []
        for ids, total in open_texts:
            logp_V = forward([*prompt, *ids])
            logp_V -= np.logaddexp.reduce(logp_V[list(LETTERS)])
            for letter in LETTERS:
                longer = (*ids, letter)
                if ended(longer):
                    totals[longer] = total + logp_V[letter]
                else:
                    following.append((longer, total + logp_V[letter]))
        open_texts = following
    totals |= dict(open_texts)
    scores = {ids: total / ((5 + len(ids)) / 6) ** alpha for ids, total in totals.items()}
    found = generator.beams([prompt], width=40, tokens=3, alpha=alpha, stop=stop)[0]
    assert {each.ids for each in found} == set(scores)
    assert [each.ids for each in found] == sorted(scores, key=lambda ids: -scores[ids])
    for each in found:
        assert each.score == pytest.approx(scores[each.ids], rel=1e-4)
        assert each.ended == ended(each.ids)


def test_beams_of_a_batch_are_those_of_each_prompt(generator):
    prompts = [generator.encode(text) for text in ("a", "longer prompt", "")]
    together = generator.beams(prompts, width=4, tokens=6, room=(24, 40))
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generator.beams([prompt], width=4, tokens=6)
        assert [each.ids for each in alone] == [each.ids for each in found]
        np.testing.assert_allclose(
            [each.score for each in alone], [each.score for each in found], rtol=1e-4
        )


def test_beams_come_best_first_and_alpha_favours_length(generator):
    (found,) = generator.beams([generator.encode("x")], width=4, tokens=5, alpha=0.8)
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    for each in found:
        penalty = ((5 + len(each.ids)) / 6) ** 0.8
        assert each.score == pytest.approx(sum(each.token_nats) / penalty)


def test_a_stop_text_ends_a_beam_and_is_not_part_of_it(generator):
    prompt = generator.encode("Ab")
    (plain,) = generator.beams([prompt], width=1, tokens=8, alpha=0.0)[0]
    stop = plain.text[2]
    (best,) = generator.beams([prompt], width=1, tokens=8, alpha=0.0, stop=[stop])[0]
    assert best.ended
    assert best.text == plain.text[: plain.text.index(stop)]


def test_a_prompt_begins_a_document(generator):
    assert generator.encode("ab") == [TOKENIZER.bos_id, *TOKENIZER.encode("ab")]
    assert generator.encode("") == [TOKENIZER.bos_id]


def test_samples_depend_on_the_seed_and_not_on_how_many_there_are(generator):
    sampling = Sampling(temperature=1.0)
    three = generator.texts("a", sampling, tokens=8, samples=3, seed=5)
    assert three == generator.texts("a", sampling, tokens=8, samples=3, seed=5)
    assert three[:1] == generator.texts("a", sampling, tokens=8, seed=5)
    assert three != generator.texts("a", sampling, tokens=8, samples=3, seed=6)
    assert len(set(three)) == 3


def test_the_end_of_a_document_ends_the_text(generator, monkeypatch):
    def then_end(logits_BV, allowed_V, keys_B, step, *, sampling):
        return jnp.full(logits_BV.shape[0], TOKENIZER.eos_id if step == 2 else 3 + 65, jnp.int32)

    monkeypatch.setattr(generate, "_choose", then_end)
    assert generator.texts("a", tokens=9, samples=2) == ["AA", "AA"]


def choose(logits, **sampling):
    logits_BV = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (400, 1))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(0), jnp.arange(400, dtype=jnp.int32)
    )
    allowed = jnp.asarray([True] * (len(logits) - 1) + [False])
    return set(
        np.asarray(_choose(logits_BV, allowed, keys, 0, sampling=Sampling(**sampling))).tolist()
    )


def test_sampling_cuts():
    logits = np.log([0.1, 0.4, 0.3, 0.15, 0.05])
    assert choose(logits) == {1}
    assert choose(logits, temperature=1.0) == {0, 1, 2, 3}  # the last one is not allowed
    assert choose(logits, temperature=1.0, top_k=2) == {1, 2}
    assert choose(logits, temperature=1.0, top_p=0.4) == {1}
    assert choose(logits, temperature=1.0, top_p=0.6) == {1, 2}
    assert choose(logits, temperature=1.0, top_k=3, top_p=0.6) == {1, 2}
    assert choose(logits, temperature=0.01) == {1}


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(RecipeError, match=f"`{next(iter(bad))}`"):
        Sampling(**bad)


@pytest.mark.parametrize("prompt", ["", "né", "abcdefghij"])
def test_characters_of_several_bytes_are_never_split(prompt):
    stream = TextStream(TOKENIZER, TOKENIZER.encode(prompt))
    text = "é漢🙂z"
    pieces = [stream.push(token_id) for token_id in TOKENIZER.encode(text)]
    assert "".join(pieces) == text
    assert set(pieces) == {*text, ""}
    assert stream.flush() == ""


@pytest.mark.parametrize("data", [b"\xf0\x9f", b"\xffabc", b"\x80\x80\x80\x80\x80a", b"a\xe9\xe9"])
def test_bytes_that_are_no_text_are_told_as_replacements_in_the_end(data):
    stream = TextStream(TOKENIZER, [])
    text = "".join(stream.push(3 + byte) for byte in data) + stream.flush()
    assert text == data.decode("utf-8", "replace")


def test_prompts_of_many_lengths_share_one_program(generator):
    generator.texts("a", tokens=3)
    read, following = generator._read._cache_size(), generator._next._cache_size()
    for text, tokens in itertools.product(("", "ab", "abc"), (5, 6)):
        generator.texts(text, tokens=tokens)
    assert generator._read._cache_size() == read
    assert generator._next._cache_size() == following
