import pytest

from glamcli.errors import DataError
from glamcli.evals.tasks import template

ITEM = {
    "q": "Why?",
    "answers": {"text": ["a", "b"]},
    "n": 3,
    "kind": "effect",
    "s": "The end.",
    "long": "It said (that) she, left.",
    "spans": [{"text": "x"}, {"text": "y"}],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Q: {q}", "Q: Why?"),
        ("{answers.text.1}", "b"),
        ("{{{n}}}", "{3}"),
        ("{s|drop_end:.|lower_first} {kind|map:cause=because,effect=so}", "the end so"),
        ("{s|before: }/{s|after: }", "The/end."),
        ("{s|but_last_word}|{s|last_word}", "The|end."),
        ("{s|replace:end=start}", "The start."),
        ("{s|upto:n}|{s|from:n}", "The| end."),
        ("{long|star_word:n}", "It said (that) *she*, left."),
        ("", ""),
    ],
)
def test_holes_are_filled_and_filtered(text, expected):
    assert template.render(text, ITEM, "f:1") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{q", "single `{`"),
        ("q}", "single `}`"),
        ("{}", "not a field path"),
        ("{q!r}", "not a field path"),
        ("{q.__class__()}", "not a field path"),
        ("{q|lowr}", "did you mean `lower`"),
        ("{q|before}", "takes an argument"),
        ("{q|strip:x}", "takes no argument"),
        ("{q|map:cause}", "from=to"),
        ("{q|replace:cause}", "from=to"),
        ("{q|upto:0x}", "not a field path"),
        ("A: {q|all}", "must be used alone"),
    ],
)
def test_what_cannot_be_read_is_refused_when_the_task_is_read(text, reason):
    with pytest.raises(ValueError) as caught:
        template.checked(text, is_path=False)
    assert reason in str(caught.value)


@pytest.mark.parametrize("path", ["missing", "answers.text.2", "answers.txt", "q.0", "n.real"])
def test_a_missing_field_names_the_line_of_the_item(path):
    with pytest.raises(DataError, match="f:7") as caught:
        template.render("{" + path + "}", ITEM, "f:7")
    assert f"`{path}`" in caught.value.what


def test_attributes_of_values_cannot_be_reached():
    with pytest.raises(DataError):
        template.render("{q.__class__}", ITEM, "f:1")


def test_a_list_is_not_text_and_map_is_total():
    with pytest.raises(DataError, match="not text"):
        template.render("{answers.text}", ITEM, "f:1")
    with pytest.raises(DataError, match="not one of"):
        template.render("{q|map:a=b}", ITEM, "f:1")


def test_texts_are_a_list_field_one_text_or_templates():
    assert template.texts(ITEM, "answers.text", "f:1") == ("a", "b")
    assert template.texts(ITEM, "q", "f:1") == ("Why?",)
    assert template.texts(ITEM, ("x {n}", "y"), "f:1") == ("x 3", "y")


def test_every_entry_of_a_list_is_meant_by_a_star():
    assert template.texts(ITEM, "spans.*.text", "f:1") == ("x", "y")
    with pytest.raises(DataError, match="f:7"):
        template.look_up(ITEM, "spans.*.start", "f:7")
    with pytest.raises(DataError, match="f:7"):
        template.look_up(ITEM, "q.*", "f:7")


def test_all_entries_of_a_list_stand_beside_single_texts():
    found = template.texts(ITEM, ["{q}", "{answers.text|all}", "{n|all}"], "f:1")
    assert found == ("Why?", "a", "b", "3")


@pytest.mark.parametrize("text", ["{s|upto:q}", "{s|star_word:n}", "{s|star_word:answers}"])
def test_an_index_must_be_a_number_within_the_text(text):
    with pytest.raises(DataError, match="f:7"):
        template.render(text, ITEM, "f:7")
