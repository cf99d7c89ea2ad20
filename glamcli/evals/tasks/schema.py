"""The keys of task and suite files: what is asked, how it is scored, where the items are.

Both are strict YAML (`suites.py`). The descriptions below are the reference for writers of files.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from glamcli.config.explain import WrongKey
from glamcli.config.settings import MAX_TEXTS, Count, CountOrZero, Fraction, NotNegative, Settings
from glamcli.evals.tasks import template

Template = Annotated[str, AfterValidator(lambda text: template.checked(text, is_path=False))]
_FieldPath = Annotated[str, AfterValidator(lambda text: template.checked(text, is_path=True))]
_FieldOrTemplate = Annotated[str, AfterValidator(template.checked)]
_MetricName = Literal["accuracy", "em", "f1", "f1a", "question_em", "macro_f1", "perplexity"]


class Records(Settings):
    """One form in which items are stored."""

    kind: Literal["jsonl", "tfds", "heldout"] = "jsonl"
    """`jsonl`: files with one JSON object per line; `tfds`: a prepared TFDS directory
    (array_record); `heldout`: questions made from the run's held-out documents."""
    path: str | tuple[str, ...] | None = None
    """file or files, or the prepared directory (`builder[/config]/version`); relative to
    `--data-dir`, else to the task file (shipped tasks: to the folder `glam eval data` fills)."""
    split: str | None = None
    """tfds: the split, for example `validation`; slices such as `train[:1000]` work."""
    build: Literal["continuation", "last_word", "word_order"] | None = None
    """heldout: which questions to make (`quick.py`)."""
    items: Count = 100
    """heldout: number of questions."""
    where: _FieldPath | None = None
    """keep only records in which this field is neither empty, false nor 0."""
    fields: dict[str, _FieldOrTemplate] = Field(default_factory=dict)
    """names for templates to use, each with a field path or a template with holes."""
    drop: tuple[str, ...] = ()
    """fields that are not kept in memory."""
    each: tuple[_FieldPath, ...] = ()
    """lists of a record, equally long, of whose entries each makes an item: in the n-th item
    the fields hold the n-th entries. The items before it are its history."""

    def paths(self, folder: Path) -> tuple[Path, ...]:
        """Its files, or its prepared directory, in a folder."""
        names = (self.path,) if isinstance(self.path, str) else self.path or ()
        return tuple(folder / name for name in names)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needs = {"jsonl": ("path",), "tfds": ("path", "split"), "heldout": ("build",)}[self.kind]
        for name in ("path", "split", "build"):
            given = getattr(self, name) is not None
            if given != (name in needs):
                key, verb = (name, "does not use") if given else ("kind", "needs")
                raise WrongKey(key, f"data of kind `{self.kind}` {verb} `{name}`")
        return self


class ItemSource(Records):
    """Where items come from."""

    otherwise: Records | None = None
    """another form, read when the files of the first one are missing."""

    @property
    def forms(self) -> tuple[Records, ...]:
        """Of which the first whose files are there is read."""
        return (self, self.otherwise) if self.otherwise else (self,)


class _Shots(Settings):
    """Where demonstrations come from and how they are drawn."""

    source: Literal["self", "pool"] = "self"
    """`self`: the other items of the task; `pool`: the items of `data` below (or, for held-out
    questions, further questions from documents that are not asked about)."""
    data: ItemSource | None = None
    """the pool; None only where the task's data is `heldout`."""
    few: Count | None = None
    """how many demonstrations the setting `few` asks for."""
    draw: Literal["per_item", "fixed"] = "per_item"
    """drawn again for every item, or once for all of them. Either way from the seed, never the
    item itself, and k shots begin with the same ones as k-1 shots."""
    separator: str = "\n\n"
    """between demonstrations, and between the last one and the question."""


class Published(Settings):
    """A published score of another model, for the column beside ours."""

    model: str
    of: str | None = None
    """task files: the metric, None for the task's score; suite files: the average."""
    zero: NotNegative | None = None
    one: NotNegative | None = None
    few: NotNegative | None = None
    confirmed: bool = True
    """false: from memory or second hand, not seen in the paper itself."""

    def at(self, setting: str | None) -> float | None:
        """The score at a setting `0`, `1` or `few`; none is published for others."""
        return {"0": self.zero, "1": self.one, "few": self.few}.get(setting or "")


class OriginalFile(Settings):
    """A file as the authors of the dataset publish it."""

    name: str
    """its name, or a pattern such as `test/high/*.txt`, below the folder of `--from`."""
    url: str
    """where it can be downloaded."""
    shape: Literal[
        "jsonl", "json_data", "squad", "drop", "quac", "race", "piqa", "story_cloze", "winograd",
        "lambada", "triviaqa", "webquestions", "multirc", "record", "winogender",
    ]  # fmt: skip
    """how it becomes lines of JSON (`convert.py`)."""
    to: str
    """the file of the task it becomes."""


class _DatasetOrigin(Settings):
    """Where the data is from, for `glam eval data`."""

    page: str
    """the home of the dataset."""
    licence: str = "see its page"
    files: tuple[OriginalFile, ...] = ()
    note: str = ""
    """what has to be done by hand."""


class Task(Settings):
    """One dataset and the way it is asked and scored."""

    about: str = ""
    data: ItemSource
    shots: _Shots = _Shots()
    origin: _DatasetOrigin | None = None
    published: tuple[Published, ...] = ()
    header: str = ""
    """text before the first demonstration."""
    history: Template | None = None
    """an earlier item of the same record, with its `{answer}`; `prompt` shows all of them at its
    hole `{history}`."""
    prompt: Template | None = None
    """the text before the scored or generated answer, without its trailing blank."""
    contexts: tuple[Template, ...] | None = None
    """instead of `prompt` and `options`: one context per option, all followed by `continuation`
    (partial scoring, as for Winograd)."""
    continuation: Template | None = None
    options: _FieldPath | tuple[Template, ...] | None = None
    """a field with the list of options, or one template per option."""
    option_text: Template | None = None
    """the scored text of an option where that is more: a template with a hole `{option}`."""
    num_options: Count | None = None
    """an item with another number of options is refused."""
    label: _FieldPath | None = None
    """the field that says which option is right."""
    labels: _FieldPath | tuple[str | int | bool, ...] | None = None
    """values of `label` in the order of the options, or the field that lists them; None reads
    `label` as an index from 0 (or as false, true)."""
    right: _FieldPath | None = None
    """instead of `label`: a field with the texts of the right options, compared by `normalize`."""
    answers: _FieldPath | tuple[Template, ...] | None = None
    """generate: a field with the accepted answers (a text or a list), or templates; the filter
    `all` makes every entry of a list an answer."""
    shown_answer: Template | None = None
    """generate: the answer in demonstrations; None: the first accepted one."""
    no_answer: str | None = None
    """generate: the answer that means that there is none; expected when `answers` is an empty
    list. It can only be right or wrong as a whole, and means the same as an empty text, except with
    normalize `squad_v1`."""
    no_answer_vote: bool = False
    """generate: when at least half of the accepted answers are `no_answer`, it is the only one;
    else it is none of them (QuAC)."""
    references: Literal["best", "leave_one_out"] = "best"
    """generate: against several accepted answers count the best match, or the mean of the best
    matches with each of them omitted in turn (CoQA, QuAC)."""
    min_agreement: Fraction = 0.0
    """generate: skip items whose accepted answers have a lower F1 against each other (QuAC)."""
    delimiter: str = " "
    """between the prompt and the answer; belongs to the scored text."""
    scorer: Literal["sum", "per_token", "uncond", "generate"] = "per_token"
    """`sum`: log-likelihood of the option; `per_token`: divided by its number of tokens (GLaM);
    `uncond`: minus its log-likelihood after `uncond_context`; `generate`: text is generated."""
    uncond_context: str = "Answer:"
    """uncond: the context of the denominator; an empty text is the beginning of a document."""
    metrics: tuple[_MetricName, ...] = ()
    """the first one is the task's score; default: accuracy, or em for `generate`. `accuracy`: the
    chosen option is right (generate: the text is the answer if and only if `label` is true);
    `em`, `f1`: of texts; `f1a`, `question_em`: over the answers of each `group`; `macro_f1`: mean
    over the options as classes; `perplexity`: of the answer that demonstrations would show."""
    classes: tuple[str, ...] | None = None
    """generate, `macro_f1`: the answers that are classes; None: those that items accept."""
    group: Template | None = None
    """items of one group are one question (`f1a`, `question_em`)."""
    by: tuple[_FieldPath, ...] = ()
    """the score is also reported for every value of these fields."""
    normalize: Literal["exact", "words", "squad", "squad_v1", "triviaqa", "drop"] = "squad"
    """em and f1 compare texts: as they are (without outer blanks); lower-cased without
    punctuation; without articles as well, as the scripts of SQuAD v2, SQuAD v1.1, TriviaQA and
    DROP do (`text_metrics.py`)."""
    span_separator: str | None = None
    """normalize `drop`: an answer of several spans is written, and a generated one read, with
    this between them; None: written with a comma, and a generated one is a single span."""
    stop: tuple[str, ...] = ("\n",)
    """generate: texts that end an answer, after leading blanks; so does the end of a document."""
    max_tokens: Count = 16
    """generate: tokens at most."""
    beam: Annotated[int, Field(ge=0, le=MAX_TEXTS)] = 4
    """generate: beam width; 0 or 1 is greedy."""
    length_alpha: NotNegative = 0.6
    """generate: beam scores are divided by ((5 + length) / 6)^alpha; 0 switches it off."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        kind = "`contexts`" if self.contexts is not None else f"scorer `{self.scorer}`"
        judged = "label" if self.right is None else "right"
        # Keys a task of this kind must have, and others it may have.
        wanted, possible = {"prompt", "options", judged}, {"option_text"}
        if self.scorer == "generate":
            wanted, possible = {"prompt", "answers"}, {"shown_answer", "label"}
        elif self.contexts is not None:
            wanted, possible = {"contexts", "continuation", judged}, set()
        for name in _ASKING:
            given = getattr(self, name) is not None
            if given and name not in wanted | possible:
                raise WrongKey(name, f"a task with {kind} does not use `{name}`")
            if not given and name in wanted:
                at = next(key for key in _DECIDING if key in self.model_fields_set)
                raise WrongKey(at, f"a task with {kind} needs `{name}`")
        for name in self.metrics:
            if name not in self._possible_metrics():
                raise WrongKey("metrics", f"metric `{name}` does not go with {kind}")
        fixed, listed = self.contexts or self.options, self.labels
        if isinstance(listed, tuple) and isinstance(fixed, tuple) and len(listed) != len(fixed):
            raise WrongKey("labels", f"{len(listed)} `labels` for {len(fixed)} options")
        if self.shots.source == "pool" and self.shots.data is None and self.data.kind != "heldout":
            raise WrongKey("shots", "`shots.source` is `pool`, so `shots.data` must name the pool")
        if self.classes is not None and self.scorer != "generate":
            raise WrongKey("classes", "`classes` needs scorer `generate`: options are classes")
        if self.no_answer is None and self.no_answer_vote:
            raise WrongKey("no_answer_vote", "`no_answer_vote` needs `no_answer`")
        return self

    def _possible_metrics(self) -> set[str]:
        is_open = self.scorer == "generate"
        texts = {"em", "f1"} if is_open or self.right else set()
        of_all = {"perplexity"} if is_open else {"f1a", "question_em"} if self.group else set()
        judged = {"macro_f1"} if is_open and not self.label else {"macro_f1", "accuracy"}
        return texts | of_all | judged

    @property
    def measured(self) -> tuple[_MetricName, ...]:
        """The metrics reported, the task's score first."""
        return self.metrics or (("em",) if self.scorer == "generate" else ("accuracy",))

    @property
    def fixed_classes(self) -> tuple[str, ...] | None:
        """The classes of `macro_f1` where they are the same for all items."""
        options = self.options if isinstance(self.options, tuple) else ()
        same = options and not any(template.paths(each) for each in options)
        return options if same else self.classes


_ASKING = ("prompt", "contexts", "continuation", "options", "option_text", "label", "right",
           "answers", "shown_answer")  # fmt: skip
# What decides which keys a task needs: the first that it has is named when one is missing.
_DECIDING = ("contexts", "scorer", "options", "prompt", "data")


class Suite(Settings):
    """Tasks that are run together."""

    about: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)
    """task files: names of shipped tasks, or paths relative to this file."""
    shots: tuple[CountOrZero | Literal["few"], ...] = (0, 1, 5)
    """numbers of demonstrations (`few`: the task's own); `--shots` overrides it."""
    averages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """tasks whose scores are averaged, by the name of the average. `task/metric` counts another
    metric than the task's score."""
    overall: tuple[str, ...] = ()
    """averages that together hold every entry of the overall mean."""
    published: tuple[Published, ...] = ()
    """published averages."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        names = {name.removesuffix(".yaml").rpartition("/")[2] for name in self.tasks}
        for entry in (each for entries in self.averages.values() for each in entries):
            if entry.partition("/")[0] not in names:
                raise WrongKey("averages", f"an average names `{entry}`, no task of this suite")
        for name in self.overall:
            if name not in self.averages:
                raise WrongKey("overall", f"`overall` names `{name}`, no average of this suite")
        return self
