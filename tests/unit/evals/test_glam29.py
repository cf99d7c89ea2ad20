"""The shipped tasks of the paper: every form of their data asks the same question.

Records are written for these tests in the forms of the authors' files (as lines of JSON) and of
TFDS; where a dataset is read in one form only, the text of the question is compared.
"""

import pytest

from glamcli.evals.asking.prompts import _assemble
from glamcli.evals.asking.question import ask
from glamcli.evals.tasks.items import Item, _items_of
from glamcli.evals.tasks.suites import load_suite

SUITE = {file.name: file for file in load_suite("glam29").tasks}
GPT3 = {file.name: file for file in load_suite("glam29", "gpt3").tasks}

ARC = {
    "id": "x",
    "question": {"stem": "Why?", "choices": [{"text": t, "label": k}
                                            for t, k in (("a", "1"), ("b", "2"), ("c", "3"))]},
    "answerKey": "2",
}  # fmt: skip
OBQA = {
    "question": {"stem": "Rain is", "choices": [
        {"text": t, "label": k} for t, k in (("wet", "A"), ("dry", "B"), ("x", "C"), ("y", "D"))]},
    "answerKey": "B",
}  # fmt: skip
RACE = {
    "article": "Long ago.",
    "questions": ["When?", "Who?"],
    "answers": ["B", "D"],
    "options": [["now", "then", "never", "always"], ["I", "you", "he", "she"]],
}
NLI = {"premise": "It rained.", "hypothesis": "It was wet"}
WIC = {"word": "bank", "sentence1": "By the bank.", "sentence2": "A bank failed."}
WSC = {"text": "Ann told Bo that (she) won."}
TRIVIA = {"value": "Rome", "aliases": ["Roma", "Rome"], "normalized_aliases": ["roma", "rome"]}
RECORD = {
    "passage": "Ann met Bo.\n@highlight\nThey met",
    "query": "@placeholder was there",
    "entities": ["Ann", "Bo", "Cy"],
    "answers": ["Ann", "Bo"],
}
MULTIRC = {
    "paragraph": "P.",
    "question": "Why?",
    "answer": "so",
    "label": 1,
    "idx": {"paragraph": 0, "question": 2, "answer": 5},
}
# Task: (a record of the authors' file, the same as TFDS holds it).
FORMS = {
    "triviaqa": (
        {"Question": "Capital?", "Answer": {"Value": "Rome", "Aliases": ["Roma", "Rome"]}},
        {"question": "Capital?", "answer": TRIVIA, "entity_pages": {"title": ["Rome"]},
         "search_results": {}},
    ),
    "nq_open": ({"question": "when", "answer": ["1990"]},) * 2,
    "web_questions": ({"url": "u", "question": "who", "answers": ["Bo", "Ann"]},) * 2,
    "squad_v2": (
        {"title": "T", "context": "C", "question": "Q", "answers": {"text": ["a", "a b"]},
         "is_impossible": False},
        {"title": "T", "context": "C", "question": "Q", "is_impossible": False,
         "answers": {"text": ["a", "a b"], "answer_start": [0, 0]}, "plausible_answers": {}},
    ),
    "hellaswag": (
        {"activity_label": "Ski", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": 3},
        {"activity_label": "Ski", "context": "He", "endings": ["a", "b", "c", "d"], "label": 3},
    ),
    "story_cloze": (
        {"InputSentence1": "A.", "InputSentence2": "B.", "InputSentence3": "C.",
         "InputSentence4": "D.", "RandomFifthSentenceQuiz1": "E.",
         "RandomFifthSentenceQuiz2": "F.", "AnswerRightEnding": 2},
        {"context": "A. B. C. D.", "endings": ["E.", "F."], "label": 2},
    ),
    "winograd": (
        {"text": "It fits, as _ is small.", "option1": "the cup", "option2": "the box", "label": 0},
        {"text": "It fits, as it is small.", "option1_normalized": "the cup", "label": 0,
         "option2_normalized": "the box", "pronoun_start": 12, "pronoun_end": 14},
    ),
    "winogrande": (
        {"sentence": "The _ fits.", "option1": "cup", "option2": "box", "answer": "2"},
        {"sentence": "The _ fits.", "option1": "cup", "option2": "box", "label": 1},
    ),
    "race_h": (RACE, {**RACE, "example_id": "x"}),
    "race_m": (RACE, {**RACE, "example_id": "x"}),
    "piqa": ({"goal": "Go", "sol1": "a ", "sol2": "b", "label": 1},) * 2,
    "arc_easy": (
        ARC, {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": [0, 1, 2]},
              "answerKey": 1},
    ),
    "arc_challenge": (
        ARC, {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": [0, 1, 2]},
              "answerKey": 1},
    ),
    "openbookqa": (
        OBQA, {"question": {"stem": "Rain is", "choice_A": "wet", "choice_B": "dry",
                            "choice_C": "x", "choice_D": "y"}, "answerKey": 1},
    ),
    "boolq": (
        {"passage": "P", "question": "q", "label": True},
        {"passage": "P", "question": "q", "answer": True, "title": "T"},
    ),
    "cb": ({**NLI, "label": "neutral"}, {**NLI, "label": 2}),
    "copa": ({"premise": "He ran.", "choice1": "Late.", "choice2": "Cold.", "question": "cause",
              "label": 0},) * 2,
    "rte": ({**NLI, "label": "not_entailment"}, {**NLI, "label": 1}),
    "wic": ({**WIC, "label": False}, {**WIC, "label": 0}),
    "wsc": (
        {**WSC, "label": True, "target": {"span1_text": "Ann", "span1_index": 0,
                                         "span2_text": "she", "span2_index": 4}},
        {**WSC, "label": 1, "span1_text": "Ann", "span2_text": "she", "span2_index": 4},
    ),
    "multirc": (MULTIRC, MULTIRC),
    "record": (RECORD, RECORD),
    **{f"anli_r{n}": ({"context": "C", "hypothesis": "H", "label": "c"},
                      {"context": "C", "hypothesis": "H", "label": 2}) for n in (1, 2, 3)},
}  # fmt: skip


def asked(task, records, record):
    return [ask(task, item) for item in _items_of(records, Item(record, "a.jsonl:1"))]


def shape(question):
    names = ("contexts", "continuations", "accepted", "answers", "options", "shown", "is_true")
    return {name: getattr(question, name) for name in names}


@pytest.mark.parametrize("preset", ["glam", "gpt3"])
@pytest.mark.parametrize("name", FORMS)
def test_both_forms_of_a_record_ask_the_same(name, preset):
    file = {"glam": SUITE, "gpt3": GPT3}[preset][name]
    authors, tfds = FORMS[name]
    for shots in (0, 1):
        task = file.at(shots)
        first = asked(task, task.data, authors)
        second = asked(task, task.data.otherwise, tfds)
        assert first
        assert [shape(each) for each in first] == [shape(each) for each in second]
        if task.shots.source == "pool":
            pool = task.shots.data
            shown = asked(task, pool, authors), asked(task, pool.otherwise, tfds)
            assert [e.demonstration(task.delimiter) for e in shown[0]] == [
                e.demonstration(task.delimiter) for e in shown[1]
            ]


def test_every_task_of_the_paper_is_there_and_has_a_sample():
    alone = {"lambada", "drop", "quac", "coqa"}
    assert set(SUITE) == set(FORMS) | alone
    assert len(SUITE) == 29
    generated = [name for name, file in SUITE.items() if file.task.scorer == "generate"]
    assert len(generated) == 8
    for file in SUITE.values():
        assert file.task.shots.few, file.name
        assert file.task.origin is not None, file.name
        assert file.task.origin.files, file.name
        assert any(each.model == "GPT-3 175B" for each in file.task.published), file.name


QUAC = {
    "title": "Bo",
    "section_title": "Life",
    "context": "Bo was born. CANNOTANSWER",
    "qas": [
        {"question": "Born?", "orig_answer": {"text": "was born"},
         "answers": [{"text": "was born"}, {"text": "born"}]},
        {"question": "Rich?", "orig_answer": {"text": "CANNOTANSWER"},
         "answers": [{"text": "CANNOTANSWER"}, {"text": "Bo"}]},
    ],
}  # fmt: skip


def test_quac_keeps_the_dialogue_and_lets_references_vote():
    task = SUITE["quac"].task
    first, second = asked(task, task.data, QUAC)
    assert first.contexts == (
        "TITLE: Bo - Life\nPARAGRAPH: Bo was born. CANNOTANSWER\n\nQ: Born?\n\nA:",
    )
    assert second.contexts[0].endswith("Q: Born?\n\nA: was born\n\nQ: Rich?\n\nA:")
    assert first.answers == ("was born", "born")
    assert second.answers == ("CANNOTANSWER",)
    assert second.demonstration(" ").endswith("A: CANNOTANSWER")


COQA = {
    "story": "A cat.",
    "questions": [{"input_text": "What?"}, {"input_text": "How many?"}],
    "answers": [{"input_text": "a cat"}, {"input_text": "one"}],
    "additional_answers": {
        key: [{"input_text": f"cat {key}"}, {"input_text": f"{key}"}] for key in ("0", "1", "2")
    },
}


def test_coqa_has_four_references_in_the_dev_set_and_one_in_the_training_set():
    task = SUITE["coqa"].task
    first, second = asked(task, task.data, COQA)
    assert first.answers == ("a cat", "cat 0", "cat 1", "cat 2")
    assert second.contexts[0] == "A cat.\n\nQ: What?\n\nA: a cat\n\nQ: How many?\n\nA:"
    training = {name: value for name, value in COQA.items() if name != "additional_answers"}
    pool = [
        ask(task, item, shown=True)
        for item in _items_of(task.shots.data, Item(training, "a.jsonl:1"))
    ]
    assert pool[1].demonstration(" ") == second.contexts[0] + " one"


DROP = {
    "passage": "Bo ran 4 and 5 yards.",
    "qa_pairs": [
        {"question": "Which runs?",
         "answer": {"number": "", "spans": ["4", "5"], "date": {}},
         "validated_answers": [{"number": "9", "spans": [], "date": {}},
                               {"number": "", "spans": [], "date": {"day": ""}}]},
    ],
}  # fmt: skip


def test_drop_takes_every_annotation_with_all_its_spans():
    task = SUITE["drop"].task
    (question,) = asked(task, task.data, DROP)
    assert question.contexts == ("Passage: Bo ran 4 and 5 yards.\nQuestion: Which runs?\nAnswer:",)
    assert question.references == (("4", "5"), ("9",))
    assert question.demonstration(" ").endswith("Answer: 4, 5")


def test_lambada_is_a_sentence_with_a_gap_behind_demonstrations_only():
    file = SUITE["lambada"]
    record = {"text": "He went\nhome"}
    (zero,) = asked(file.task, file.task.data, record)
    (some,) = asked(file.with_shots, file.task.data, record)
    assert (zero.contexts, zero.answers) == (("He went",), ("home",))
    assert some.contexts == ("He went ____. ->",)
    made = _assemble(file.with_shots, some, [some], lambda text: True)
    assert made.contexts == ("Fill in blank:\n\nHe went ____. -> home\n\nHe went ____. ->",)


def test_record_scores_the_sentence_with_each_entity_and_several_may_be_right():
    task = SUITE["record"].task
    (question,) = asked(task, task.data, RECORD)
    assert question.contexts[0] == "Ann met Bo.\n- They met"
    assert question.continuations == (
        "\n- Ann was there", "\n- Bo was there", "\n- Cy was there",
    )  # fmt: skip
    assert question.accepted == (0, 1)


def test_wsc_marks_the_pronoun_and_gpt3_writes_the_noun():
    record = FORMS["wsc"][0]
    (question,) = asked(SUITE["wsc"].task, SUITE["wsc"].task.data, record)
    assert question.contexts[0].startswith("Passage: Ann told Bo that (*she*) won.\n")
    task = GPT3["wsc"].with_shots
    (question,) = asked(task, task.data, record)
    assert (question.answers, question.is_true) == (("ann",), True)
    false = {**record, "label": False}
    assert not asked(task, task.shots.data, false)  # a demonstration would show a wrong noun
    assert asked(task, task.data, false)[0].is_true is False


@pytest.mark.parametrize(
    ("name", "preset", "key", "value"),
    [
        ("arc_easy", "glam", "scorer", "per_token"),
        ("arc_easy", "gpt3", "scorer", "uncond"),
        ("race_h", "gpt3", "uncond_context", "A:"),
        ("openbookqa", "gpt3", "uncond_context", "Answer:"),
        ("copa", "glam", "scorer", "sum"),
        ("copa", "gpt3", "scorer", "per_token"),
        ("record", "glam", "scorer", "sum"),
        ("piqa", "gpt3", "scorer", "per_token"),
        ("wic", "glam", "scorer", "per_token"),
        ("wic", "gpt3", "scorer", "generate"),
        ("multirc", "glam", "measured", ("f1a", "question_em", "accuracy")),
        ("coqa", "glam", "beam", 4),
        ("coqa", "glam", "length_alpha", 0.6),
    ],
)
def test_the_presets_differ_where_the_papers_do(name, preset, key, value):
    file = {"glam": SUITE, "gpt3": GPT3}[preset][name]
    assert getattr(file.task, key) == value


def test_glam_scores_the_dev_set_of_anli_and_gpt3_the_test_set():
    for task, split in ((SUITE["anli_r2"].task, "validation"), (GPT3["anli_r2"].task, "test")):
        assert task.data.otherwise.split == split
        assert task.shots.data.otherwise.split == "train"


def test_gpt3_draws_once_for_all_items_of_wsc_and_multirc():
    fixed = {name for name, file in GPT3.items() if file.with_shots.shots.draw == "fixed"}
    assert fixed == {"wsc", "multirc"}
    assert all(file.with_shots.shots.draw == "per_item" for file in SUITE.values())
