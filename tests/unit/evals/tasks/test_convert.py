"""Authors' files, in the forms they are published in, become lines that the shipped tasks ask."""

import json

import pytest

from glamcli.errors import DataError
from glamcli.evals.asking.question import ask
from glamcli.evals.tasks import provision
from glamcli.evals.tasks.convert import records
from glamcli.evals.tasks.items import Library
from glamcli.evals.tasks.suites import load_suite

SQUAD = {"data": [{"title": "T", "paragraphs": [{"context": "C", "qas": [
    {"id": "1", "question": "Q?", "is_impossible": False,
     "answers": [{"text": "a", "answer_start": 0}, {"text": "a b", "answer_start": 0}]},
    {"id": "2", "question": "R?", "is_impossible": True, "answers": []}]}]}]}  # fmt: skip
DROP = {"nfl_1": {"passage": "P.", "qa_pairs": [
    {"question": "How many?", "query_id": "q",
     "answer": {"number": "4", "date": {"day": "", "month": "", "year": ""},
                "spans": []}}]}}  # fmt: skip
QUAC = {"data": [{"title": "T", "section_title": "S", "background": "B", "paragraphs": [
    {"id": "p", "context": "C", "qas": [
        {"id": "0", "question": "Who?", "answers": [{"text": "Bo", "answer_start": 0}],
         "orig_answer": {"text": "Bo", "answer_start": 0}}]}]}]}  # fmt: skip
TURN = {"input_text": "a", "span_text": "", "turn_id": 1}
COQA = {"data": [{"story": "S.", "questions": [TURN], "answers": [TURN],
                  "additional_answers": {"0": [TURN], "1": [TURN], "2": [TURN]}}]}  # fmt: skip
RACE = {"article": "A", "questions": ["Q1"], "answers": ["B"], "id": "high1.txt",
        "options": [["a", "b", "c", "d"]]}  # fmt: skip
STORY = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
    'x,A.,"B, b.",C.,D.,E.,F.,2\n'
)
SCHEMAS = """<?xml version="1.0" encoding="UTF-8"?>
<collection>
<schema><text><txt1>The trophy is not in the case because</txt1><pron>it</pron>
  <txt2>is too small.</txt2></text>
  <answers><answer>The trophy</answer><answer>the case</answer></answers>
  <correctAnswer> B. </correctAnswer></schema>
<schema><text><txt1>Ann thanked Bo.</txt1><pron>She</pron><txt2>smiled.</txt2></text>
  <answers><answer>Ann</answer><answer>Bo</answer></answers>
  <correctAnswer>A</correctAnswer></schema>
</collection>
"""
TRIVIA = {"Data": [{"QuestionId": "1", "Question": "Capital?", "EntityPages": [],
                    "Answer": {"Value": "Rome", "Aliases": ["Roma", "Rome"]}}]}  # fmt: skip
WEB = [{"url": "u", "utterance": "who?",
        "targetValue": '(list (description "Ann \\"A\\" Bo") (description 1990))'}]  # fmt: skip
MULTIRC = {"idx": 7, "passage": {"text": "P.", "questions": [
    {"question": "Why?", "idx": 3, "answers": [{"text": "so", "label": 1, "idx": 5},
                                             {"text": "no", "label": 0, "idx": 6}]}]}}  # fmt: skip
RECORD = {"idx": 2, "passage": {"text": "Ann met Bo.\n@highlight\nAnn left",
                                "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 9},
                                             {"start": 23, "end": 25}]},
          "qas": [{"idx": 0, "query": "@placeholder was there",
                   "answers": [{"start": 0, "end": 2, "text": "Ann"}]}]}  # fmt: skip
GENDER = (
    "sentid\tsentence\n"
    "nurse.patient.0.female.txt\tThe nurse told the patient that she would come.\n"
    "nurse.someone.1.male.txt\tThe nurse told someone that he had to wait.\n"
    "nurse.patient.0.neutral.txt\tThe nurse told the patient that they would come.\n"
)
STATS = "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\nnurse\t88\t90.2\t2015\n"
# Task: the authors' files, and the context and the right answer of its last question.
FILES = {
    "squad_v2": ({"dev-v2.0.json": SQUAD, "train-v2.0.json": SQUAD},
                 "Title: T\n\nBackground: C\n\nQ: R?\n\nA:", "unanswerable"),
    "drop": ({"drop_dataset_dev.json": DROP, "drop_dataset_train.json": DROP},
             "Passage: P.\nQuestion: How many?\nAnswer:", "4"),
    "quac": ({"val_v0.2.json": QUAC, "train_v0.2.json": QUAC},
             "TITLE: T - S\nPARAGRAPH: C\n\nQ: Who?\n\nA:", "Bo"),
    "coqa": ({"coqa-dev-v1.0.json": COQA, "coqa-train-v1.0.json": COQA}, "S.\n\nQ: a\n\nA:", "a"),
    "race_h": ({"RACE/test/high/1.txt": RACE, "RACE/test/high/2.txt": RACE,
                "RACE/train/high/3.txt": RACE}, "Article:\nA\n\nQ: Q1\n\nA:", " b"),
    "piqa": ({"valid.jsonl": [{"goal": "Go", "sol1": "a", "sol2": "b"}], "valid-labels.lst": "1\n",
              "train.jsonl": [{"goal": "Go", "sol1": "a", "sol2": "b"}],
              "train-labels.lst": "0\n"}, "Go", " b"),
    "story_cloze": ({"cloze_test_test__spring2016 - x.csv": STORY,
                     "cloze_test_val__spring2016 - y.csv": STORY}, "A. B, b. C. D.", " F."),
    "winograd": ({"WSCollection.xml": SCHEMAS}, "Ann thanked Bo. Ann", " smiled."),
    "lambada": ({"lambada_test.jsonl": [{"text": "a b c"}],
                 "lambada_development_plain_text.txt": "x y z\n\nu v w\n"}, "a b", "c"),
    "triviaqa": ({"qa/wikipedia-dev.json": TRIVIA, "qa/wikipedia-train.json": TRIVIA},
                 "Q: Capital?\n\nA:", "Rome"),
    "web_questions": ({"webquestions.examples.test.json": WEB,
                       "webquestions.examples.train.json": WEB}, "Q: who?\n\nA:", 'Ann "A" Bo'),
    "multirc": ({"MultiRC/val.jsonl": [MULTIRC], "MultiRC/train.jsonl": [MULTIRC]},
                "P.\n\nWhy?", "- [False] no"),
    "record": ({"ReCoRD/val.jsonl": [RECORD], "ReCoRD/train.jsonl": [RECORD]},
               "Ann met Bo.\n- Ann left", "\n- Ann was there"),
    "winogender": ({"data/all_sentences.tsv": GENDER, "data/occupations-stats.tsv": STATS},
                   'The nurse told the patient that they would come. "They" refers to',
                   " the nurse"),
}  # fmt: skip


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and name.endswith(".jsonl"):
            content = "".join(json.dumps(each) + "\n" for each in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", FILES)
def test_the_authors_files_become_questions_of_the_shipped_task(tmp_path, name):
    files, context, answer = FILES[name]
    write(tmp_path / "given", files)
    (file,) = load_suite(name).tasks
    needs = provision.needs(file, tmp_path)
    for need in needs:
        assert len(need.missing) == 1
        ((made, count),) = need.convert(tmp_path / "given")
        assert count == len(made.read_text().splitlines())
        assert need.missing == ()
    assert min(provision._count_items(file, tmp_path)) > 0
    asked = [ask(file.task, item) for item in Library(tmp_path).items(file.task, file.path)][-1]
    assert asked.gold_context.endswith(context)
    assert (asked.shown if asked.gold is None else asked.continuations[asked.gold]).endswith(answer)


def test_a_passage_of_lambada_may_hold_any_line_separator(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("a\u2028b\x85c\r\nd\n".encode())
    assert records("lambada", path) == [{"text": "a\u2028b\x85c"}, {"text": "d"}]


def test_converted_records_hold_what_the_files_say(tmp_path):
    write(
        tmp_path, {"x.xml": SCHEMAS, "web.json": WEB, "rec.jsonl": [RECORD], **FILES["race_h"][0]}
    )
    first, second = records("winograd", tmp_path / "x.xml")
    assert first["text"] == "The trophy is not in the case because _ is too small."
    assert (first["option1"], first["label"], second["label"]) == ("the trophy", 1, 0)
    assert records("webquestions", tmp_path / "web.json")[0]["answers"] == ['Ann "A" Bo', "1990"]
    assert records("record", tmp_path / "rec.jsonl")[0]["entities"] == ["Ann", "Bo"]


def test_stereotypes_follow_the_share_of_women(tmp_path):
    write(tmp_path, FILES["winogender"][0])
    found = records("winogender", tmp_path / "data" / "all_sentences.tsv")
    assert [each["stereotype"] for each in found] == ["stereo", "stereo", "none"]
    assert [each["option2"] for each in found] == ["the patient", "someone", "the patient"]
    (tmp_path / "data" / "occupations-stats.tsv").unlink()
    found = records("winogender", tmp_path / "data" / "all_sentences.tsv")
    assert {each["stereotype"] for each in found} == {"none"}


@pytest.mark.parametrize(
    ("shape", "content", "reason"),
    [
        ("squad", '{"data": [{}]}', "not of the shape `squad`: no 'paragraphs'"),
        ("squad", '{"data"\n', ":2: not JSON"),
        ("squad", b"\xff", "not UTF-8"),
        ("piqa", '{"goal": "x"}\n', "x-labels.lst"),
        ("winograd", "<a>", ":1: not XML"),
        ("story_cloze", "a,b\n1,2\n", "no 'AnswerRightEnding'"),
        pytest.param("story_cloze", 'a\n"' + "b" * 200_000, "`: field larger", id="long"),
        ("record", '{"passage": 1}\n', "not of the shape `record`"),
        ("jsonl", '{"a": 1}\n[]\n', "x.data:2: not a JSON object"),
        ("jsonl", "", "x.data: no items"),
        ("squad", '{"data": []}', "x.data: no records"),
        ("lambada", "\n", "x.data: no records"),
    ],
)
def test_other_files_are_refused(tmp_path, shape, content, reason):
    path = tmp_path / "x.data"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        records(shape, path)
    assert reason in caught.value.what
    assert str(tmp_path) in caught.value.what


def test_two_files_that_could_be_the_one_are_refused(tmp_path):
    write(tmp_path, {"a/dev-v2.0.json": SQUAD, "b/dev-v2.0.json": SQUAD})
    (file,) = load_suite("squad_v2").tasks
    need, _ = provision.needs(file, tmp_path / "data")
    with pytest.raises(DataError, match="several files could be"):
        need.convert(tmp_path)


def test_an_empty_file_is_refused_and_blocks_no_later_conversion(tmp_path):
    (file,) = load_suite("squad_v2").tasks
    need, _ = provision.needs(file, tmp_path / "data")
    write(tmp_path, {"given/dev-v2.0.json": {"data": []}})
    with pytest.raises(DataError, match="no records"):
        need.convert(tmp_path / "given")
    assert not (tmp_path / "data").exists()
    write(tmp_path, {"given/dev-v2.0.json": SQUAD, "data/squad_v2.jsonl": ""})
    assert len(need.missing) == 1
    assert len(need.convert(tmp_path / "given")) == 1
    assert need.missing == ()


def test_answers_of_people_count_where_triviaqa_has_them(tmp_path):
    (file,) = load_suite("triviaqa").tasks
    answer = {"Value": "Rome", "Aliases": ["Roma"]}
    for given, expected in ((answer, ("Rome", "Roma")),
                            ({**answer, "HumanAnswers": ["rome, italy"]},
                             ("Rome", "Roma", "rome, italy"))):  # fmt: skip
        line = {"QuestionId": "q", "Question": "Where?", "Answer": given}
        write(tmp_path, {"triviaqa.jsonl": [line]})
        (item,) = Library(tmp_path).items(file.task, file.path)
        assert ask(file.task, item).answers == expected
    assert "Answer.HumanAnswers" not in provision._record_fields(file.task, file.task.data)


def test_the_fields_that_a_person_has_to_write_are_those_the_task_reads():
    found = {}
    for file in load_suite("glam29").tasks:
        found[file.name] = provision._record_fields(file.task, file.task.data)
    assert found["piqa"] == ("goal", "label", "sol1", "sol2")
    assert found["nq_open"] == ("answer", "question")
    assert found["arc_easy"] == (
        "answerKey", "question.choices.*.label", "question.choices.*.text", "question.stem",
    )  # fmt: skip
    assert found["wsc"] == (
        "label", "target.span1_text", "target.span2_index", "target.span2_text", "text",
    )  # fmt: skip
    assert "history" not in found["coqa"]


def test_tfds_prepares_what_tasks_read_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tmp_path / "copa"
    lines = [{"premise": "He ran.", "choice1": "Late.", "choice2": "Cold.", "question": "cause",
              "label": 0, "idx": 3}]  # fmt: skip
    write(source, {f"COPA/{name}.jsonl": lines for name in ("train", "val", "test")})
    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download_and_extract", lambda self, url: str(source))
    (file,) = load_suite("copa").tasks
    for need in provision.needs(file, tmp_path):
        need.prepare()
        assert need.missing == ()
    assert provision._count_items(file, tmp_path) == (1, 1)


def test_what_tfds_cannot_prepare_is_told(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(self, url):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
    (file,) = load_suite("copa").tasks
    need, _ = provision.needs(file, tmp_path)
    with pytest.raises(DataError, match=r"`super_glue/copa/1\.0\.2`: .*no route to host"):
        need.prepare()
    (file,) = load_suite("drop").tasks
    need, _ = provision.needs(file, tmp_path)
    with pytest.raises(DataError, match="keeps all of it"):
        need.prepare()
