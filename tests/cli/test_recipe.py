"""`glam recipe` as a person meets it: output, exit codes, and no jax on the way."""

import json
import random
import subprocess
import sys
from functools import partial

import fsspec
import pytest

from glamcli.cli import recipe
from glamcli.config.load import load_recipe, shipped
from glamcli.data.open import open_data
from glamcli.progress import Silent


@pytest.fixture
def glam(glam, tmp_path, monkeypatch):
    """Runs `glam recipe` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(glam, "recipe")


def test_list_shows_every_shipped_recipe(glam):
    code, out, err = glam("list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(shipped("recipes"))
    assert "glam_64b_64e      1.16T   96.6B" in out
    rows = [json.loads(line) for line in glam("list", "--json")[1].splitlines()]
    assert {row["name"]: row["total"] for row in rows}["glam_64b_64e"] == 1_161_756_418_048


def test_show_prints_a_recipe_that_loads_again(glam, tmp_path):
    code, out, err = glam("show", "glam_64b_64e", "--origins", "--set", "seed=5")
    assert (code, err) == (0, "")
    (tmp_path / "again.yaml").write_text(out)
    assert load_recipe("./again.yaml").recipe == load_recipe("glam_64b_64e", ["seed=5"]).recipe


def test_show_says_what_follows_from_the_recipe(glam):
    _, out, _ = glam("show", "glam_64b_64e")
    assert "# parameters   1,161,756,418,048\n" in out
    assert "# active       96,604,528,640 per token\n" in out
    assert "1,099,511,627,776" in out  # experts
    assert "# FLOPs per token, forward    195B\n" in out
    assert "tokens of a run   600,000,430,080\n" in out
    [wikipedia] = [line for line in out.splitlines() if line.startswith("# wikipedia")]
    assert wikipedia.split() == ["#", "wikipedia", "0.06", "36B", "3B", "12"]
    assert "#" not in out.split("# parameters")[0].replace("\n#\n", "")  # no origins unasked


def test_show_notes_the_row_that_does_not_follow_from_its_shape(glam):
    _, out, _ = glam("show", "glam_1.7b_32e")
    assert "20B does not follow" in out


def test_show_counts_epochs_once_the_rows_are_prepared(glam, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(f"line {i} of these" for i in range(300)))
    (tmp_path / "mix.yaml").write_text(
        "sources: {texts: {kind: text, path: texts.txt, separator: line, weight: 1}}\n"
    )
    (tmp_path / "my.yaml").write_text(
        "extends: test-tiny\ndata: {mixture: ./mix.yaml, cache_dir: ./cache}\n"
    )
    note = "# -: known after preparation (`glam data prepare`)\n"
    _, out, _ = glam("show", "./my.yaml")
    assert out.endswith(f"# texts        1        10.2K     -       -\n{note}")
    assert not (tmp_path / "cache").exists(), "showing makes nothing"
    asked = load_recipe("./my.yaml").recipe
    line = open_data(asked, Silent()).summary(asked.train.steps)[0]
    _, out, _ = glam("show", "./my.yaml")
    row = out.splitlines()[-1].split()
    assert row == ["#", "texts", "1", "10.2K", recipe.short(line["num_tokens"]), row[5]]
    assert float(row[5]) == pytest.approx(10_240 / line["num_tokens"], rel=5e-3)
    (row,) = json.loads(glam("show", "./my.yaml", "--json")[1])["sources"]
    assert (row["prepared_tokens"], row["published_tokens"]) == (line["num_tokens"], None)
    _, out, _ = glam("show", "./my.yaml", "--set", "batch.row_tokens=128")
    assert out.endswith(note), "other rows than those prepared"
    program = (
        "import sys; from glamcli.cli.main import run\n"
        "try: run(['recipe', 'show', './my.yaml'])\n"
        "except SystemExit: assert not {'jax', 'flax', 'grain'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_show_counts_epochs_of_remote_sources_without_asking_for_them(glam, tmp_path):
    remote = fsspec.filesystem("memory")
    remote.pipe("/show/far.txt", "\n".join(f"{i} from far away" for i in range(300)).encode())
    near = tmp_path / "near.txt"
    near.write_text("\n".join(f"line {i} of these" for i in range(300)))
    (tmp_path / "mix.yaml").write_text(
        "sources:\n  near: {kind: text, path: near.txt, separator: line, weight: 1}\n"
        "  far: {kind: text, path: 'memory://show/far.txt', separator: line, weight: 1}\n"
    )
    (tmp_path / "my.yaml").write_text(
        "extends: test-tiny\ndata: {mixture: ./mix.yaml, cache_dir: ./cache}\n"
    )

    def epochs():
        rows = json.loads(glam("show", "./my.yaml", "--json")[1])["sources"]
        return {row["source"]: row["epochs"] for row in rows}

    assert epochs() == {"near": None, "far": None}
    asked = load_recipe("./my.yaml").recipe
    lines = open_data(asked, Silent()).summary(asked.train.steps)
    remote.rm("/show", recursive=True)
    assert epochs() == pytest.approx({line["name"]: 5_120 / line["num_tokens"] for line in lines})
    near.write_text("another text\n" * 300)
    assert epochs()["near"] is None
    assert epochs()["far"] is not None


def decided(out):
    """Who decided each setting, by dotted key, from the lines that `show --origins` prints."""
    found, sections = {}, []
    for line in out.splitlines():
        setting, mark, origin = line.partition("  # ")
        depth = (len(line) - len(line.lstrip())) // 2
        sections[depth:] = [setting.strip().split(":")[0]]
        if mark:
            found[".".join(sections)] = origin
    return found


def test_show_origins_tells_who_decided(glam, tmp_path):
    (tmp_path / "my.yaml").write_text("extends: test-tiny\nbatch:\n  rows: 16\n")
    _, out, _ = glam("show", "./my.yaml", "--origins", "--set", "seed=5")
    origins = decided(out)
    parent = shipped("recipes")["test-tiny"]
    lines = parent.read_text().splitlines()
    assert origins["seed"] == "--set"
    assert origins["batch.rows"] == "my.yaml:3"
    assert origins["batch.row_tokens"] == f"{parent}:{lines.index('  row_tokens: 64') + 1}"
    assert origins["data.tokenizer.kind"] == f"{parent}:{lines.index('    kind: bytes') + 1}"
    assert origins["runtime.huge_pages"] == origins["data.packing"] == "default"
    loaded = load_recipe("./my.yaml", ["seed=5"])
    assert origins == loaded.origins
    short = [line.index("  # ") for line in out.splitlines() if "  # " in line and len(line) < 90]
    assert len(set(short)) == 1, "origins stand below each other"


def test_show_json_is_one_object(glam):
    _, out, _ = glam("show", "glam_8b_64e", "--json", "--origins", "--set", "train.steps=10")
    assert out.count("\n") == 1
    shown = json.loads(out)
    assert shown["recipe"]["train"]["steps"] == 10
    assert shown["origins"]["train.steps"] == "--set"
    assert shown["parameters"]["active"] == 10_716_745_728
    assert shown["tokens"] == 10 * 2**20
    assert sum(source["weight"] for source in shown["sources"]) == pytest.approx(1)
    assert shown["flops_per_token"]["training"] == 3 * shown["flops_per_token"]["forward"]


def test_check_says_ok_or_everything_that_is_wrong(glam, tmp_path):
    assert glam("check", "test-tiny", "glam_8b") == (0, "test-tiny: ok\nglam_8b: ok\n", "")
    (tmp_path / "bad.yaml").write_text("extends: test-tiny\nmoe:\n  num_expert: 8\nsed: 1\n")
    code, out, err = glam("check", "./bad.yaml")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: 2 problems:",
        "  bad.yaml:3: unknown key `moe.num_expert` (did you mean `moe.num_experts`?)",
        "  bad.yaml:4: unknown key `sed` (did you mean `seed`?)",
    ]
    code, out, err = glam("check", "./bad.yaml", "test-tiny", "nothing")
    assert (code, out) == (2, "test-tiny: ok\n")
    assert "bad.yaml:3" in err
    assert "`nothing`" in err


def test_one_mistake_is_one_line_and_one_hint(glam, tmp_path):
    (tmp_path / "my.yaml").write_text("extends: test-tiny\nmoe:\n  num_expert: 8\n")
    assert glam("check", "./my.yaml") == (
        2,
        "",
        "error: my.yaml:3: unknown key `moe.num_expert`\nhint: did you mean `moe.num_experts`?\n",
    )


def test_check_imports_neither_jax_nor_flax():
    code = (
        "import sys\nfrom glamcli.cli.main import run\n"
        "for args in (['check', 'quickstart'], ['check', 'quickstart', '--set', 'seed=x'],\n"
        "             ['list'], ['show', 'glam_8b_64e'], ['diff', 'quickstart', 'test-tiny']):\n"
        "    try: run(['recipe', *args])\n"
        "    except SystemExit: pass\n"
        "assert not {'jax', 'flax', 'numpy', 'optax', 'orbax', 'grain'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "quickstart: ok" in run.stdout


def test_diff_shows_changes_with_both_origins(glam, tmp_path):
    (tmp_path / "my.yaml").write_text("extends: test-tiny\nabout: mine\nmoe:\n  num_experts: 8\n")
    code, out, err = glam("diff", "test-tiny", "./my.yaml")
    assert (code, err) == (0, "")
    header, row = out.splitlines()
    assert header.split() == ["setting", "test-tiny", "./my.yaml", "set", "at"]
    assert row.split()[:3] == ["moe.num_experts", "4", "8"]
    assert row.endswith(" | my.yaml:4")
    assert "test-tiny.yaml:" in row
    assert glam("diff", "test-tiny", "test-tiny") == (0, "no differences\n", "")


def test_diff_shows_as_much_of_a_path_as_tells_the_files_apart(glam, tmp_path):
    for name, rows in (("a", 8), ("b", 16)):
        (tmp_path / name).mkdir()
        text = f"extends: test-tiny\nbatch:\n  rows: {rows}\n"
        (tmp_path / name / "recipe.yaml").write_text(text)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    _, out, _ = glam("diff", a, b)
    assert out.splitlines()[1].endswith("  a/recipe.yaml:3 | b/recipe.yaml:3")
    row = json.loads(glam("diff", "test-tiny", b, "--json")[1].splitlines()[0])
    assert row["b_origin"].endswith("b/recipe.yaml:3")
    assert row["a_origin"].startswith(str(shipped("recipes")["test-tiny"]))
    _, out, _ = glam("diff", "test-tiny", b)
    assert out.splitlines()[1].endswith(" | recipe.yaml:3")
    assert "  test-tiny.yaml:" in out


def test_diff_compares_a_file_with_one_whose_path_ends_like_it(glam, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name, rows in (("x.yaml", 8), ("a/x.yaml", 16)):
        (tmp_path / name).write_text(f"extends: test-tiny\nbatch:\n  rows: {rows}\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = glam("diff", "x.yaml", "a/x.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].endswith("  x.yaml:3 | a/x.yaml:3")


def test_diff_with_a_dense_model_lists_the_settings_of_experts(glam):
    _, out, _ = glam("diff", "glam_8b_64e", "glam_8b", "--json")
    rows = {row["key"]: row for row in map(json.loads, out.splitlines())}
    assert (rows["moe.num_experts"]["a"], rows["moe.num_experts"]["b"]) == ("64", "-")
    assert rows["moe"]["b"] == "null"


def test_new_writes_a_child_that_is_its_parent_until_edited(glam, tmp_path):
    code, out, err = glam("new", "mine", "--from", "quickstart")
    assert (code, err) == (0, "")
    assert "glam train ./mine.yaml" in out
    assert load_recipe("./mine.yaml").recipe.model == load_recipe("quickstart").recipe.model
    text = (tmp_path / "mine.yaml").read_text()
    # With its comments taken away it says what the parent says.
    edited = "\n".join(line.removeprefix("# ") for line in text.splitlines()[5:])
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nabout: same\n" + edited)
    loaded = load_recipe("./mine.yaml")
    assert loaded.recipe.train == load_recipe("quickstart").recipe.train
    assert "mine.yaml" in loaded.origins["train.steps"]


def test_new_never_overwrites(glam, tmp_path):
    (tmp_path / "mine.yaml").write_text("precious")
    code, _, err = glam("new", "mine", "--from", "quickstart")
    assert (code, err) == (2, "error: mine.yaml exists already\nhint: choose another name\n")
    assert (tmp_path / "mine.yaml").read_text() == "precious"


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", ".hidden", "x\ny", "quickstart"])
def test_new_refuses_names_that_are_paths_or_shipped(glam, tmp_path, name):
    assert glam("new", name, "--from", "quickstart")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_new_refuses_an_unknown_parent_before_it_writes(glam, tmp_path):
    code, _, err = glam("new", "mine", "--from", "quikstart")
    assert code == 2
    assert "`quickstart`" in err
    assert list(tmp_path.iterdir()) == []


def test_schema_is_json_schema(glam):
    code, out, _ = glam("schema")
    assert code == 0
    assert "moe" in json.loads(out)["properties"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1000, "1K"), (999_700, "1M"), (96.6e9, "96.6B"), (1.16e12, "1.16T"), (0, "0")],
)
def test_short_numbers_keep_three_digits(number, text):
    assert recipe.short(number) == text


def test_no_mutation_of_a_recipe_shows_a_traceback(glam, tmp_path, monkeypatch):
    """Two hundred damaged files: each is fine or refused with exit code 2, in printable text."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    good = shipped("recipes")["test-tiny"].read_bytes()
    rng = random.Random(20)
    codes = []
    for seed in range(200):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            where = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[where] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[where] = rng.choice(b"\x00\x1b\xff\x80:{}[]&*!|>'\"%@`#-?,\t\n\r0")
            elif kind == 2:
                del data[where : where + rng.randrange(1, 20)]
            else:
                data[where:where] = bytes(rng.choices(b"\n :-[{&*'\"\\e9\xc3", k=3))
        (tmp_path / "fuzz.yaml").write_bytes(data)
        code, out, err = glam("check", "./fuzz.yaml")
        codes.append(code)
        assert code in (0, 2), (seed, err)
        assert "Traceback" not in err
        assert "bug in glam" not in err
        assert (out + err).replace("\n", "").isprintable()
    assert set(codes) == {0, 2}
