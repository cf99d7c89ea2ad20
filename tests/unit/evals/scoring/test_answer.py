"""In which batches and shapes prompts are read, with a generator that only takes note of them."""

import pytest

from glamcli.beam_search import Hypothesis
from glamcli.evals.results.journal import Journal
from glamcli.evals.scoring.answer import _BATCH_ROWS, best_texts

LENGTHS = [3 + (i * 37) % 400 for i in range(150)]
SEARCH = {"width": 1, "tokens": 16, "alpha": 0.0, "stop": ()}


class Reader:
    """Answers each prompt with its length."""

    def __init__(self, compile_tokens):
        self.compile_tokens = compile_tokens
        self.shapes = set()
        self.read = []

    def beams(self, batch, *, room, **_):
        assert len(batch) == _BATCH_ROWS
        self.read.append((max(map(len, batch)), room))
        return [[Hypothesis(str(len(ids)), (), (), 0.0, True)] for ids in batch]


def answered(reader, lengths=LENGTHS):
    prompts = [[0] * length for length in lengths]
    return best_texts(prompts, SEARCH, reader, lambda count: None, Journal())


def test_answers_come_in_the_order_of_the_prompts():
    assert [each.text for each in answered(Reader(0))] == [str(each) for each in LENGTHS]


@pytest.mark.parametrize("compile_tokens", [0, 3000, 10**9])
def test_prompts_are_padded_by_an_eighth_unless_a_compilation_costs_more(compile_tokens):
    reader = Reader(compile_tokens)
    answered(reader)
    for longest, (size, places) in reader.read:
        assert longest <= size
        assert size + SEARCH["tokens"] <= places
    shapes = {room for _, room in reader.read}
    if compile_tokens == 0:
        assert all(size - longest < max(8, longest / 8) for longest, (size, _) in reader.read)
    elif compile_tokens == 3000:
        assert 1 < len(shapes) < len(reader.read)
    else:
        assert len(shapes) == 1
    assert reader.shapes == {(_BATCH_ROWS, *shape) for shape in shapes}


def test_programs_of_another_task_are_used_again():
    reader = Reader(16384)
    answered(reader, [64])
    answered(reader, [61, 60])
    assert [room for _, room in reader.read] == [(64, 96), (64, 96)]
