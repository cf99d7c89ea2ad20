"""`glam report`: one page of runs that are finished, training, damaged or hostile."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cli.run_folder import make_run
from glamcli.evals.results.scores import Average, Measured, Reported, Results, Score
from glamcli.evals.results.store import keep_results
from glamcli.progress import Silent
from glamcli.report.page import report_page
from glamcli.report.run import read_run

TITLES = ("Overview", "Loss", "Optimizer", "Routers", "Mixture", "Scores", "Speed and time",
          "Memory", "Cost", "Events", "Recipe", "Other numbers")  # fmt: skip
TIMES = {"start": 4.0, "data": 1.0, "compile": 6.0, "step": 8.0, "data_wait": 0.5, "eval": 0.3,
         "save": 0.2, "lost": 0.0}  # fmt: skip


PROCESS = "memory/process_bytes"


def line(step, **more):
    """A line of metrics as a run with two expert layers writes it."""
    times = {f"seconds/{kind}": spent + step * (kind == "step") for kind, spent in TIMES.items()}
    return {
        "step": step, "tokens_seen": 1024 * step, "unix_seconds": 1.7e9 + step, "loss": 8 / step,
        "loss/words": 8 / step, "learning_rate": 0.01, "grad_norm": 1.0, "update_norm": 0.5,
        "param_norm": 9.0, "bad_steps": 0, "bad_steps_total": 0, "dropped_first_frac": 0.1,
        "dropped_second_frac": 0.2, "unserved_frac": 0.05, "router_entropy_nats": 1.0,
        "balance": 1.1, "dead_experts": 0, "max_first_frac": 0.3, "tokens_per_second": 100.0,
        "seconds_per_step": 1.0, "goodput": 0.5, "balance_by_layer": [1.0, 1.2],
        "dead_experts_by_layer": [0, 1], "load_by_layer": [[0.2, 0.8], [0.5, 0.5]], **times, **more,
    }  # fmt: skip


def write(run, lines, end="\n"):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
    return run


def data_of(page):
    return json.loads(re.search(r"id=data>(.*?)</script>", page, re.S)[1])


def charts_of(page):
    return {each["title"]: each for each in data_of(page)["charts"]}


def section(page, title):
    anchor = title.lower().replace(" ", "-")
    return re.search(rf"<section id={anchor}>(.*?)</section>", page, re.S)[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a saved step, beside which a test puts metrics."""
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(folder)
    write(run, [line(step) for step in (1, 2, 3)] + [{"step": 3, "heldout/words": 3.0}])
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "words")


def page_of(*runs):
    return report_page([read_run(run, run.name) for run in runs])


def test_a_page_has_every_section_and_every_chart_a_place(glam, run):
    code, out, err = glam("report", run)
    assert code == 0, err
    assert out == f"wrote {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    for title in TITLES:
        assert f"<h2>{title}</h2>" in page
    charts = data_of(page)["charts"]
    places = re.findall(r"data-chart=(\d+)", page)
    assert places == [str(number) for number in range(len(charts))]
    assert {"Training loss", "Learning rate", "Load of every expert, layer 2", "Epochs",
            "Goodput"} <= {each["title"] for each in charts}  # fmt: skip
    assert data_of(page)["runs"][0]["tokens"] == 1024
    assert data_of(page)["runs"][0]["flops"] > 1024


class Balanced(HTMLParser):
    """Raises where an element is closed that is not the one open."""

    EMPTY = ("meta", "input", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_whole_html_and_asks_for_nothing_from_outside(run):
    page = page_of(run, run)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len({*parser.ids})
    assert {address for address in parser.addresses if not address.startswith("#")} == set()
    assert {address[1:] for address in parser.addresses} <= {*parser.ids}
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page)


def test_several_runs_share_charts_and_their_settings_are_compared(run, tmp_path):
    other = write(tmp_path / "other", [line(1), line(5)])
    (other / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("seed: 0", "seed: 7")
    )
    page = page_of(run, other)
    loss = charts_of(page)["Training loss"]
    assert [(each["label"], each["at"]) for each in loss["lines"]] == [
        ("words", [1, 2, 3]),
        ("other", [1, 5]),
    ]
    assert "<tr><td>seed</td><td>0</td><td>7</td></tr>" in section(page, "Recipe")


def test_a_run_that_is_training_is_shown_up_to_its_last_whole_line(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(4))[:50])
    page = page_of(run)
    assert charts_of(page)["Training loss"]["lines"][0]["at"] == [1, 2, 3]
    assert "damaged" not in section(page, "Overview")


def test_damaged_lines_are_counted_and_said(run):
    (run / "metrics.jsonl").write_text(
        "\n".join([json.dumps(line(1)), "{", '{"step": "x"}', '{"step": -4}', json.dumps(line(2))])
        + "\n"
    )
    page = page_of(run)
    assert "3 lines are damaged and left out" in section(page, "Overview")
    assert charts_of(page)["Training loss"]["lines"][0]["at"] == [1, 2]


@pytest.mark.parametrize("content", [None, "", "{\n"])
def test_a_folder_without_numbers_is_an_error_that_says_so(glam, tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    code, out, err = glam("report", tmp_path)
    assert (code, out) == (4, "")
    assert "hint: " in err
    assert not (tmp_path / "report.html").exists()


def test_mistakes_in_the_command_are_told(glam, run, tmp_path):
    assert glam("report")[0] == 2
    assert glam("report", *[run] * 9)[0] == 2
    code, _, err = glam("report", run, "-o", run / "metrics.jsonl" / "page.html")
    assert code == 1
    assert "error: cannot write" in err


def test_metrics_alone_make_a_page_and_what_is_missing_is_said(tmp_path):
    page = page_of(write(tmp_path / "bare", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]))
    assert list(charts_of(page)) == ["Training loss"]
    assert "recipe is left out" in section(page, "Overview")
    for title in TITLES[2:]:
        assert section(page, title).count("<p class=soft>") == 1, title


def test_numbers_this_version_does_not_know_are_drawn_as_well(run):
    write(run, [line(step, **{"of/tomorrow": 1.5 * step, "words": "x"}) for step in (1, 2)])
    assert charts_of(page_of(run))["of/tomorrow"]["lines"][0]["mean"] == [1.5, 3.0]


def test_what_happened_is_listed_and_marked(run):
    rewind = {"unix_seconds": 1.7e9, "from_step": 9, "to_step": 2, "skip_batches": 3,
              "reason": "bad text", "set_aside": {}, "automatic": True}  # fmt: skip
    (run / "rewinds.jsonl").write_text(json.dumps(rewind) + "\n")
    failures = {"step": 3, "program": "x", "time": 1.7e9, "failures": [["no memory", 5]]}
    (run / "failures.json").write_text(json.dumps(failures))
    lines = [line(1), line(2, bad_steps=1, spike=1), line(3, bad_steps=2, spike=1), line(4)]
    lines += [{"step": 4, "alarms": ["expert layer 1: collapsed"]}]
    lines += [line(5, **{"seconds/start": 8.0})]
    page = page_of(write(run, lines))
    marks = {(step, kind): text for step, kind, _, text in data_of(page)["runs"][0]["marks"]}
    assert marks.keys() == {
        (3, "skipped"), (4, "alarm"), (5, "restart"), (2, "rewind"), (3, "failure"), (3, "save"),
    }  # fmt: skip
    assert marks[3, "skipped"] == "from step 2 on, update skipped: a spike"
    listed = section(page, "Events")
    for text in (
        "back to step 2 (newest save: 9) by the run itself",
        "expert layer 1: collapsed",
        "bad text",
        "left out 3 batches",
        "no memory (exit 5",
    ):
        assert text in listed


@pytest.mark.parametrize(("automatic", "expected"), [(True, []), (False, [2])])
def test_a_run_that_went_back_by_itself_did_not_start_again(run, automatic, expected):
    rewind = {"unix_seconds": 1.7e9 + 1.5, "from_step": 3, "to_step": 1, "skip_batches": 2,
              "reason": "", "set_aside": {}, "automatic": automatic}  # fmt: skip
    (run / "rewinds.jsonl").write_text(json.dumps(rewind) + "\n")
    write(run, [line(1), line(2, **{"seconds/start": 8.0}), line(3, **{"seconds/start": 8.0})])
    marks = data_of(page_of(run))["runs"][0]["marks"]
    assert [step for step, kind, *_ in marks if kind == "restart"] == expected


def test_the_page_opens_by_steps_where_tokens_are_not_known(run, tmp_path):
    def opened(page):
        return re.search(r"name=x value=(\w+) checked", page)[1]

    bare = write(tmp_path / "bare", [{"step": 1, "loss": 2.0}])
    assert opened(page_of(run)) == "tokens"
    assert opened(page_of(bare)) == opened(page_of(run, bare)) == "steps"


def test_what_is_missing_is_told_in_words(tmp_path):
    bare = write(tmp_path / "bare", [{"step": 1, "loss": 2.0}])
    overview = section(page_of(bare), "Overview")
    assert "left out: run.json: no such file or directory" in overview
    assert "Errno" not in overview
    assert "last line written" not in overview


def test_a_loss_that_is_not_finite_any_more_is_said(run):
    for lines, loss in (([line(1), line(2, loss=None)], "not finite"), ([line(1)], "8.000")):
        assert f"<b>{loss}</b>training loss" in section(page_of(write(run, lines)), "Overview")


def test_the_newest_line_of_runs_is_one_row_with_its_date(run, tmp_path):
    other = write(tmp_path / "other", [line(1, unix_seconds=1.8e9)])
    overview = section(page_of(run, other), "Overview")
    row = "<tr><td>last line written</td>"
    cells = "2023-11-14 22:13:23 UTC", "2027-01-15 08:00:00 UTC"
    assert row + "".join(f"<td class=n>{cell}</td>" for cell in cells) in overview


def test_planned_and_realised_shares_are_those_of_the_saved_step(run):
    listed = section(page_of(run), "Mixture")
    rows = "<td>words</td>" + 3 * "<td class=n>100.00 %</td>"
    assert rows in listed
    assert "newest saved step, 3." in listed


def test_a_setting_of_the_recipe_says_whether_it_is_a_default(run):
    listed = section(page_of(run), "Recipe")
    assert "<tr><td>seed</td><td>0</td><td>default</td></tr>" in listed
    assert "<tr><td>model.zero_logit</td><td>true</td><td>default</td></tr>" in listed
    assert "<td>finish.suite</td><td>null</td>" in listed
    assert "<tr><td>batch.row_tokens</td><td>128</td><td>recipe</td></tr>" in listed


def test_a_setting_says_where_it_came_from_when_the_run_was_started(run):
    path = run / "run.json"
    about = json.loads(path.read_text())
    places = {"seed": "--set", "batch.row_tokens": "/home/me/a<b>.yaml:7", "batch.rows": "default"}
    path.write_text(json.dumps(about | {"origins": places}))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("seed: 0", "seed: 5"))  # edited since
    listed = section(page_of(run), "Recipe")
    assert "<tr><td>batch.row_tokens</td><td>128</td><td>a&lt;b&gt;.yaml:7</td></tr>" in listed
    assert "<tr><td>seed</td><td>5</td><td>recipe</td></tr>" in listed
    assert "<td>data.cache_dir</td>" in listed


def test_memory_is_drawn_beside_what_a_chip_has(run):
    about = json.loads((run / "run.json").read_text())
    assert "do not tell" in section(page_of(write(run, [line(1, **{PROCESS: 2**31})])), "Memory")
    about["topology"] |= {"device_kind": "TPU v4"}
    (run / "run.json").write_text(json.dumps(about))
    sizes = {PROCESS: 2**31, "memory/device_bytes": 5 * 2**30, "memory/device_peak_bytes": 2**33}
    page = page_of(write(run, [line(1, **sizes), line(2, **sizes)]))
    charts = charts_of(page)
    assert charts["Memory of the largest process"]["lines"][0]["mean"] == [2.0, 2.0]
    of_device = charts["Memory of the fullest device"]
    assert [each["mean"][0] for each in of_device["lines"]] == [5.0, 8.0]
    assert of_device["levels"] == [["a v4 has", 30.75]]
    assert "do not tell" not in section(page, "Memory")
    assert not [title for title in charts if "memory/" in title]


def test_the_kinds_of_time_add_up_to_the_time_of_the_run(run):
    shares = re.findall(r"<td class=n>([\d.]+) %</td>", section(page_of(run), "Speed and time"))
    assert shares.pop() == "100"
    assert len(shares) == len(TIMES)
    assert abs(sum(map(float, shares)) - 100) < 0.5


@pytest.mark.parametrize("wrong", [1e298, -5.0])
def test_times_that_cannot_be_are_left_out(run, wrong):
    page = page_of(write(run, [line(1, **{"seconds/step": wrong})]))
    assert "<b>12 s</b>run time" in section(page, "Overview")
    assert "<td>training</td>" not in section(page, "Speed and time")


def test_time_in_which_no_process_trained_is_said(run):
    lines = [line(1), line(2, unix_seconds=1.7e9 + 602.2)]
    listed = section(page_of(write(run, lines)), "Speed and time")
    assert "10:22 have passed from its start" in listed
    assert "For 10:00 of them no process trained it" in listed
    for at in (2.2, 1e290):  # within a hundredth; by a clock that was wrong
        lines = [line(1), line(2, unix_seconds=1.7e9 + at)]
        listed = section(page_of(write(run, lines)), "Speed and time")
        assert "have passed" not in listed


def test_scores_stand_beside_those_that_were_published(run):
    scores = {f"eval/piqa/accuracy/{setting}_shots": 0.5 for setting in ("0", "1")}
    write(run, [line(1), {"step": 1, **scores}, line(9), {"step": 9, **scores}])
    page = page_of(run)
    listed = section(page, "Scores")
    assert "GLaM 64B/64E" in listed
    assert "<td class=n>81.4?</td>" in listed
    levels = charts_of(page)["piqa, 1 shots"]["levels"]
    assert ["GLaM 64B/64E", 81.4] in levels


def test_scores_of_training_have_their_errors_and_averages_stand_beside_them(run):
    names = "eval/piqa/accuracy/0_shots", "eval/NLU/0_shots"
    errors = {1: 0.05, 9: 0.025}
    lines = [
        {"step": step, names[0]: 0.5, names[0] + "_stderr": error, names[1]: step / 10}
        for step, error in errors.items()
    ]
    page = page_of(write(run, [line(1), *lines]))
    (drawn,) = charts_of(page)["piqa, 0 shots"]["lines"]
    assert drawn["errors"] == [5.0, 2.5]
    assert charts_of(page)["NLU, 0 shots"]["lines"][0]["mean"] == [10.0, 90.0]
    listed = section(page, "Scores")
    assert "<td class=n>± 2.5</td>" in listed
    assert "<td>NLU</td><td class=n>0</td><td>average</td><td class=n>9</td>" in listed
    assert "_stderr" not in listed


def test_scores_are_in_order_of_tasks_and_shots(run):
    asked = [(task, shots) for shots in (0, 10, 5) for task in ("b", "a")]
    scores = {f"eval/{task}/f1/{shots}_shots": 0.5 for task, shots in asked}
    listed = section(page_of(write(run, [line(1), {"step": 1, **scores}])), "Scores")
    rows = re.findall(r"<tr><td>(\w)</td><td class=n>(\d+)</td>", listed)
    assert rows == [(task, shots) for task in "ba" for shots in ("0", "5", "10")]


def test_published_averages_stand_beside_kept_ones_that_lack_no_task(run):
    published = (Reported("GPT-3", 60.8, True),)
    means = [Average("NLU", "0", 0.5, 2, missing, published) for missing in ((), ("piqa",))]
    keep(run, 2, averages=(means[0],))
    keep(run, 3, averages=(means[1],))
    listed = section(page_of(run), "Scores")
    assert re.findall(r"<td>NLU</td>.*?</tr>", listed)[0].endswith("<td class=n>60.8</td></tr>")
    assert "<td>NLU</td><td class=n>0</td><td>average</td><td class=n>2</td>" in listed


def keep(run, step, baselines=None, published=(), averages=()):
    """A result as `glam eval` keeps it in the run folder."""
    measured = Measured("accuracy", 0.75, 0.1, baselines or {}, None, published)
    score = Score("t", 0, "0", (measured,), 9, 0, 0, 0, (), {}, ())
    keep_results(Results("s", {"step": step}, (score,), (), (), averages), run, Silent())


def test_a_kept_result_replaces_the_score_of_its_step_in_a_long_run(tmp_path):
    name = "eval/t/accuracy/0_shots"
    lines = [{"step": step, "loss": 1.0} for step in range(1, 2101)]
    lines += [{"step": step, name: 0.5} for step in (1000, 2000)]
    run = write(tmp_path / "long", sorted(lines, key=lambda each: each["step"]))
    keep(run, 2000)
    (drawn,) = charts_of(page_of(run))["t, 0 shots"]["lines"]
    assert drawn["at"] == [1000, 2000]
    assert drawn["mean"] == [50.0, 75.0]


def test_numbers_that_are_not_finite_are_left_out(run):
    for step in (1, 2):
        keep(run, step, {"random": math.nan}, (Reported("M", math.inf, True),))
    write(run, [line(1, tokens_seen=9e299)])
    page = page_of(run)
    assert charts_of(page)["t, 0 shots"]["levels"] == []
    assert data_of(page)["runs"][0]["flops"] is None


@pytest.mark.parametrize(("kind", "price"), [("TPU v4", 3.22), ("NVIDIA A100-SXM4-80GB", None)])
def test_money_and_energy_are_shown_of_chips_that_are_known(run, kind, price):
    assert "does not have these devices" in section(page_of(run), "Cost")
    about = json.loads((run / "run.json").read_text())
    about["topology"] |= {"device_kind": kind, "mesh": {"data": 4, "expert": 2}}
    (run / "run.json").write_text(json.dumps(about))
    write(run, [line(1, seconds_left=3600.0)])
    hours, beside = 8 * 21 / 3600, 0.5 / 9.5  # evaluation and saving, to steps and their waits
    listed = section(page_of(run), "Cost")
    cells = re.findall("<td class=n>(.*?)</td>", listed)
    for each in (hours, hours + 8 * (1 + beside)):
        money = f"${each * price:,.2f}" if price else "-"
        energy = f"{each * 326 * 1.11 / 1e3:.4g} kWh"
        assert cells[:3] == [f"{each:,.1f}", money, energy]
        del cells[:3]


def test_a_long_run_makes_a_page_of_bounded_size(tmp_path):
    lines = (line(step) for step in range(1, 8001))
    page = page_of(write(tmp_path / "long", lines))
    assert len(page) < 2e6
    (loss,) = charts_of(page)["Training loss"]["lines"]
    assert len(loss["at"]) <= 1000
    assert loss["low"][0] < loss["mean"][0] < loss["high"][0]


def dom_of(page, path):
    """What a browser makes of a page, and what it says."""
    path.write_text(page)
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--window-size=1400,2000", "--virtual-time-budget=4000", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return shown.stdout, shown.stderr


needs_a_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")


@pytest.mark.slow
@needs_a_browser
def test_a_browser_draws_the_charts_in_view_and_reports_no_error(run, tmp_path):
    dom, said = dom_of(page_of(run), tmp_path / "page.html")
    assert dom.count("<canvas") >= 3
    assert "CONSOLE" not in said, said


NOTES_TEXTS = """<script>
const draw = CanvasRenderingContext2D.prototype.fillText, drawn = [];
CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
  drawn.push(text);
  document.documentElement.dataset.drawn = drawn.join(" ");
  return draw.call(this, text, ...at);
};
</script>"""


@pytest.mark.slow
@needs_a_browser
def test_the_marks_of_all_runs_have_their_letters(tmp_path):
    one = write(tmp_path / "one", [line(1), line(90, bad_steps=1), line(100)])
    other = write(tmp_path / "other", [line(1), line(30, alarms=["expert layer 1"]), line(100)])
    page = re.sub(
        '<meta http-equiv="Content-Security-Policy".*?>', NOTES_TEXTS, page_of(one, other)
    )
    dom, _ = dom_of(page, tmp_path / "page.html")
    drawn = re.search('data-drawn="(.*?)"', dom)[1].split()
    assert drawn.count("A") == drawn.count("K") > 3
