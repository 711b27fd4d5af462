"""What SECURITY.md says: no code from data, escaped pages, files in the output directory, no network, no tokens."""

import copy
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from rich.table import Table
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.console import note, stopped, terminal
from hpo_plugin.study.data import HELD_OUT, REWARD, STEP_SECONDS, CellData, write_data
from hpo_plugin.study.report import build_report, write_report
from hpo_plugin.study.spec import StudyError, load_study

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")

#: What a response, a name or a title can contain to become an element, an attribute or a script of a page.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</script><script>alert(1)</script>",
    "</title></style><script>alert(1)</script>",
    "[x](javascript:alert(1)) ![x](javascript:alert(1)) <javascript:alert(1)>",
    "[x](vbscript:alert(1)) [y](data:text/html;base64,PHNjcmlwdD4=) [z][r]",
    "<!-- <b> --> <![CDATA[<b>]]> <?php <b> ?>",
    "&lt;script&gt; &#60;script&#62; {{ 7*7 }} {% raw %} $x^2$ $\\frac$",
)
#: What a terminal or rich would interpret: color, title of the window, link, backspaces, 8-bit codes, markup, emoji.
MARKUP = "[red]a[/red] [/x] [link=x]b[/link] :smile:"
CONTROL = f"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]8;;http://x\x1b\\link \x08\x9b2J {MARKUP}"


# --- code ----------------------------------------------------------------------------------------------------------

#: Calls that `make lint` must find, one in each line.
DANGEROUS = """\
eval(x)
exec(x)
pickle.loads(x)
marshal.loads(x)
shelve.open(x)
dill.loads(x)
pandas.read_pickle(x)
yaml.load(x)
yaml.load(x, Loader=yaml.Loader)
yaml.unsafe_load(x)
yaml.full_load(x)
torch.load(x)
torch.load(x, weights_only=False)
subprocess.run(f"ls {x}", shell=True)
subprocess.getoutput(x)
os.system(f"ls {x}")
os.popen(x)
tarfile.open(x).extractall(x)
jinja2.Environment(autoescape=False)
tempfile.mktemp()
"""
HARMLESS = """\
yaml.safe_load(x)
yaml.load(x, Loader=yaml.SafeLoader)
torch.load(x, weights_only=True)
subprocess.run(["ls", x])
json.loads(x)
jinja2.Environment(autoescape=True)
"""
IMPORTS = "import dill, jinja2, json, marshal, os, pandas, pickle, shelve, subprocess, tarfile, tempfile, torch, yaml\n"


def lint_commands():
    """The commands of `make lint`, without those that set up the environment."""
    command = ["make", "--dry-run", "--always-make", f"VENV={sys.prefix}", "lint"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def found_lines(path, name, *options):
    """The lines of a file in which a tool of `make lint` finds something."""
    tool = Path(sys.executable).with_name(name)
    done = subprocess.run([str(tool), *options, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return {int(number) for number in re.findall(rf"{re.escape(path.name)}:(\d+)", done.stdout)}


def test_make_lint_finds_calls_that_execute_data(tmp_path):
    (bandit,) = [line for line in lint_commands() if "/bandit " in line]
    options = bandit.split(" --recursive ")[0].split("/bandit ")[1].split()
    found = {}
    for name, code in (("dangerous.py", DANGEROUS), ("harmless.py", HARMLESS)):
        path = tmp_path / name
        path.write_text(IMPORTS + code, encoding="utf-8")
        found[name] = found_lines(path, "bandit", *options, "--format=custom", "--msg-template={relpath}:{line}:")
        ruff = ("check", "--config=pyproject.toml", "--select=TID251", "--output-format=concise")
        found[name] |= found_lines(path, "ruff", *ruff)
    expected = set(range(2, 2 + len(DANGEROUS.splitlines())))
    assert found == {"dangerous.py": expected, "harmless.py": set()}


def test_make_lint_searches_all_code_but_the_tests():
    (bandit,) = [line for line in lint_commands() if "/bandit " in line]
    searched = set(bandit.split(" --recursive ")[1].split())
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("needs a checkout")
    assert {name.split("/")[0] for name in tracked.stdout.split()} - {"tests"} <= searched


def test_an_exception_names_the_check_and_the_reason():
    marked = []
    for path in sorted({*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")}):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if re.search(r"#\s*nosec", line) and "tests" not in path.parts:
                marked.append(f"{path.relative_to(ROOT)}:{number + 1}")
                assert re.search(r"# nosec B\d{3}$", line), marked[-1]
                above = next(text for text in reversed(lines[:number]) if text.strip())
                assert above.strip().startswith("#"), f"{marked[-1]}: a comment above must give the reason"
    assert marked
    assert len(marked) < 10


def test_a_config_or_study_file_cannot_construct_objects_with_yaml_tags(tmp_path, declared):
    text = yaml.safe_dump(declared)
    path = tmp_path / "study.yaml"
    path.write_text(text.replace("title: A small study", f"title: !!python/object/apply:os.mkdir [{tmp_path}/made]"))
    with pytest.raises(StudyError, match="could not determine a constructor"):
        load_study(path)
    assert not (tmp_path / "made").exists()


def test_the_variables_of_a_study_are_names_so_that_the_submit_command_is_what_it_seems(declared, load):
    declared["environment"] = {"A=1; touch made; B": "1"}
    with pytest.raises(StudyError, match=r"environment: 'A=1; touch made; B' is not the name of a variable"):
        load(declared)


def test_a_submit_command_quotes_everything_that_the_study_puts_into_it(tmp_path, declared, load):
    from hpo_plugin.study.cells import Workspace
    from hpo_plugin.study.run import submit_cell

    evil = f"$(touch {tmp_path}/made) `touch {tmp_path}/made` ; touch {tmp_path}/made"
    declared |= {"submit": f"printf '%s\\n' {{arguments}} > {tmp_path}/said; echo fine #", "environment": {"A": evil}}
    declared["arms"]["grpo"]["overrides"] = [f"a={evil}"]
    study = load(declared)
    submit_cell(Workspace(study, tmp_path / "a $(touch made) folder"), study.cells()[0])
    assert not list(tmp_path.rglob("made"))
    assert f"a={evil}" in (tmp_path / "said").read_text().splitlines()


# --- locks ---------------------------------------------------------------------------------------------------------


def test_every_locked_version_has_hashes():
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert lines
        for line in lines:
            assert re.match(r"[\w.-]+==\S+ .*?(?:--hash=sha256:[0-9a-f]{64}\s*)+$", line), f"{path.name}: {line[:80]}"


def test_make_installs_locked_versions_with_their_hashes_only(tmp_path):
    for target in ("install", "install-dev", "install-vllm"):
        command = ["make", "--dry-run", "--always-make", f"VENV={tmp_path}", target]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        installs = [part for line in said.splitlines() for part in line.split("||") if " install " in part]
        locked = [part for part in installs if " -r " in part]
        assert len(locked) == 3, locked
        assert all("--require-hashes" in part for part in locked)
        # The rest: torch, and this package, which is built with what the lock has.
        rest = [part for part in installs if part not in locked]
        assert all(" torch==" in part or "--no-build-isolation --editable ." in part for part in rest), rest
        assert all("--no-deps" in part for part in rest)


# --- pages ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements with their attributes, values of links, and text of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.links, self.open, self.title, self.text = Counter(), [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.update([tag, *(f"{tag} {name}" for name, _ in attrs)])
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if "title" in self.open:
            self.title += data

    def unexpected(self, other):
        """What another page does not have."""
        return set(self.found) - set(other.found)


@pytest.fixture
def declared():
    """The declaration of a study with all parts that have text."""
    return copy.deepcopy(DECLARED)


DECLARED = {
    "name": "small",
    "title": "A small study",
    "text": "Why? [A page](https://example.org/page), a list:\n\n- `one`\n- **two** and *three*\n\n> quoted\n",
    "config_name": "countdown_cpu",
    "steps": 4,
    "test_every": 2,
    "overrides": ["data.train_batch_size=8"],
    "settings": {"easy": {"title": "Easy"}, "hard": {"title": "Hard", "overrides": ["data.hard=1"]}},
    "arms": {
        "grpo": {"title": "GRPO", "overrides": ["algorithm.policy_loss=grpo"]},
        "ahpo": {"title": "A-HPO", "overrides": ["algorithm.policy_loss=ahpo"]},
    },
    "experiments": {
        name: {
            **{"title": name, "setting": setting, "text": "t"},
            **{"arms": ["grpo", "ahpo"], "seeds": seeds, "compare": "ahpo"},
        }
        for name, setting, seeds in (("one", "easy", [0]), ("two", "hard", [0]), ("three", "easy", [0, 1]))
    },
    "sweeps": {"rate": {"title": "Rate", "quantity": "rate", "experiments": {"one": 1.0, "two": 2.0}, "text": "t"}},
}


@pytest.fixture
def load(tmp_path):
    """Writes a declaration and reads it."""

    def write_and_load(declaration):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(declaration, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return load_study(path)

    return write_and_load


def collected(study, text="Linux"):
    """Data of all cells; the machine and the versions are named by whoever wrote the file."""
    found = {}
    for index, cell in enumerate(study.cells()):
        rows = {0: {HELD_OUT: 0.1}}
        for step in range(1, cell.steps + 1):
            rows[step] = {REWARD: 0.1 * step + 0.01 * index, STEP_SECONDS: 2.0, "response_length/mean": 8.0}
            rows[step] |= {
                "actor/hpo/alpha": 0.2 * step,
                "actor/hpo/share_positive": 0.1,
                "actor/hpo/share_negative": 0.5,
            }
            rows[step] |= {HELD_OUT: 0.1 * step} if step % 2 == 0 else {}
        machine = {"system": text, "machine": text, "cores": text, "memory_gb": text, "python": text}
        result = {"steps": cell.steps, "machine": machine, "versions": {"verl": text, text: text}}
        found[cell.key] = CellData.of(cell, rows, {"inputs": text, "start": None, "attempts": 1, "result": result})
    return found


def titled(declaration, texts):
    """The declaration with texts in all fields that are shown, one after another."""
    changed = copy.deepcopy(declaration)
    turns = itertools.cycle(texts)
    changed["title"] = next(turns)
    changed["text"] += "".join(f"\n{text}\n\n```\n{text}\n```\n\n    {text}\n" for text in texts)
    changed["text"] += "\n[r]: javascript:alert(1)"
    for part in ("settings", "arms", "experiments", "sweeps"):
        for entry in changed[part].values():
            entry |= {key: next(turns) for key in ("title", "text", "quantity") if key in entry}
    return changed


def reported(study, text, folder):
    write_report(build_report(study, collected(study, text)), folder, png=False)
    return Page((folder / "small.html").read_text(encoding="utf-8"))


def test_a_report_shows_the_texts_of_a_study_and_its_data_and_executes_none(tmp_path, declared, load):
    plain = titled(declared, ["plain"] * len(HOSTILE))
    # Pictures that do not exist are no error.
    plain["text"] += "\n\n![a](small/none.svg)\n\n![b](https://example.org/page)"
    expected = reported(load(plain), "plain", tmp_path / "plain")
    assert expected.found["svg"] >= 8
    folder = tmp_path / "hostile"
    page = reported(load(titled(declared, HOSTILE)), " ".join(HOSTILE), folder)
    assert page.unexpected(expected) == set()
    assert page.title == HOSTILE[0]
    assert page.found["svg"] == expected.found["svg"]
    for link in page.links:
        assert re.match(r"#|https://example\.org/page$", link), link
    for picture in folder.rglob("*.svg"):
        drawing = ElementTree.parse(picture).getroot()
        names = {name.rpartition("}")[2] for element in drawing.iter() for name in [element.tag, *element.attrib]}
        assert not [name for name in names if name.startswith("on") or name in ("script", "foreignObject", "a")]
    # The texts are on the page.
    assert all(page.text.count(text) > 3 for text in ("<script>alert(1)</script>", "{{ 7*7 }}", "$x^2$"))


@pytest.mark.parametrize("template", ["study/templates/report.html.j2", "preview/templates/page.html.j2"])
def test_a_page_runs_no_script_and_loads_nothing(template):
    text = (ROOT / "hpo_plugin" / template).read_text(encoding="utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}


def rollouts(text):
    """Rows of one step with a text in every place, and rows that are skipped."""
    good = [
        {f"group {text}": f"{text}{i // 4}", f"reward {text}": float(i % 4 == 0), "response": text * (i + 1), "step": 1}
        for i in range(8)
    ]
    return [*good, {**good[0], f"reward {text}": text}, {**good[0], f"group {text}": None}, text]


def previewed(folder, rows, text, name):
    folder.mkdir()
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    out = folder / "out"
    arguments = ["preview", str(path), f"--group=group {text}", f"--reward=reward {text}=1", f"--output={out}"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return Page((out / "preview.html").read_text(encoding="utf-8")), (out / "steps.jsonl").read_text(), done.output


def test_the_page_of_a_preview_shows_what_rollouts_contain_and_executes_none(tmp_path):
    expected, steps, _ = previewed(tmp_path / "plain", rollouts("plain"), "plain", "plain.jsonl")
    for number, text in enumerate([" ".join(HOSTILE), "'); DROP TABLE every; -- x\"); DROP TABLE every; --"]):
        # No separators, and no patterns of DuckDB.
        name = re.sub(r"[/*?\[]", "-", text)[:200] + ".jsonl"
        page, same, said = previewed(tmp_path / str(number), rollouts(text), text, name)
        assert page.unexpected(expected) == set(), text
        assert page.found["tr"] == expected.found["tr"], text
        assert all(link.startswith("data:image/png;base64,") for link in page.links)
        assert f"reward {text}" in page.text
        assert f"reward {text}" in said
        # Columns and files are quoted in SQL: the numbers are those of the same rows with other names.
        lengths = {"length", "length_positive", "length_negative"}
        one, other = ({k: v for k, v in json.loads(line).items() if k not in lengths} for line in (steps, same))
        assert one == other


# --- the terminal --------------------------------------------------------------------------------------------------


def controls(text):
    """The control characters of a text that a terminal interprets."""
    return {character for character in text if character < " " or "\x7f" <= character < "\xa0"} - {"\n", "\t"}


def test_the_console_prints_markup_and_escape_sequences_as_text():
    file = io.StringIO()
    console = terminal(file=file, force_terminal=True, color_system=None, width=400, highlight=False)
    table = Table(box=None)
    table.add_column("[red]head[/red]")
    table.add_row(CONTROL)
    for printed in (CONTROL, table):
        console.print(printed)
    note(console, "label", CONTROL)
    said = file.getvalue()
    assert controls(said) == set()
    # rich removes some control characters from a Text, such as the bell.
    said = said.replace(r"\x07", "").replace(r"\x08", "")
    shown = (
        r"\x1b[31mred\x1b[0m \x1b]0;title \x1b]8;;http://x\x1b\link \x9b2J [red]a[/red] [/x] [link=x]b[/link] :smile:"
    )
    assert said.count(shown) == 3
    assert "[red]head[/red]" in said


def test_an_error_is_printed_as_text(capsys):
    stopped(ValueError(CONTROL))
    said = capsys.readouterr().err
    assert controls(said) == set()
    assert said.startswith("error: \\x1b[31mred")
    assert "[red]a[/red] [/x]" in said


#: A task that shows the answers of samples, and does not restrict them.
OWN_TASK = """
from hpo_plugin.tasks.countdown.task import Countdown

class Own(Countdown):
    name = "own"

    def group(self, ground_truth):
        return ground_truth

TASK = Own()
"""


def test_answers_in_rollouts_are_printed_as_text(tmp_path):
    (tmp_path / "own.py").write_text(OWN_TASK)
    path = tmp_path / "1.jsonl"
    rows = [{"input": f"{CONTROL}{i}", "gts": CONTROL, "score": 1.0, "pred": CONTROL} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = CliRunner().invoke(app, ["score", str(tmp_path / "own.py"), str(path)], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert controls(done.output) == set()
    # The group and the answer.
    assert done.output.count(MARKUP) == 2


def test_columns_of_rollouts_are_printed_as_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({CONTROL: 1, "prompt": "p"}) + "\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["preview", str(path), f"--output={tmp_path / 'out'}"])
    assert done.exit_code == 1
    assert "no reward column found" in done.output
    assert controls(done.output) == set()
    assert "[red]a[/red]" in done.output


def test_only_the_console_of_this_package_is_used():
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hpo_plugin").rglob("*.py")
        if re.search(r"\bConsole\(", path.read_text(encoding="utf-8")) and path.name != "console.py"
    ]
    assert found == []


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/b", "a\\b", "A b", "", ".hidden", "a\nb", "~"])
@pytest.mark.parametrize("part", ["name", "settings", "arms", "experiments", "sweeps"])
def test_a_name_in_a_study_that_is_no_file_name_is_refused(declared, load, part, name):
    if part == "name":
        declared["name"] = name
    else:
        declared[part][name] = declared[part].popitem()[1]
    with pytest.raises(StudyError, match=rf"{part}: .* must consist of lowercase letters"):
        load(declared)


#: The trainer of the commands that start one: it logs all steps, and says whether it got the token.
STAND_IN = """
import json, os, sys

given = dict(word.lstrip("+").split("=", 1) for word in sys.argv[2:] if "=" in word)
with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as log:
    for step in range(int(given["trainer.total_training_steps"]) + 1):
        data = {"critic/rewards/mean": 0.1, "actor/hpo/alpha": 0.5, "timing_s/step": 2.0} if step else {}
        log.write(json.dumps({"step": step, "data": {**data, "val-core/countdown/reward/mean@1": 0.1}}) + chr(10))
print("the trainer got the token:", "HF_TOKEN" in os.environ)
"""
#: Variables with secrets that the package must not write down.
SECRETS = {
    name: f"canary-{name.lower()}" for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, inputs):
    """A model of random weights that the simulator supports, and its tokenizer."""
    from transformers import AutoConfig, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(inputs / "model", folder)
    config = AutoConfig.from_pretrained(folder, num_key_value_heads=2)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory, model):
    """Runs the commands once, and returns their directory, records and output."""
    work = tmp_path_factory.mktemp("watched").resolve()
    for name in ("home", "tmp", "cwd", "out"):
        (work / name).mkdir()
    package = work / "stand-in" / "verl" / "trainer"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "main_ppo.py").write_text(STAND_IN)
    rows = [{"prompt": "p", "response": "x" * (i + 1), "reward": float(i == 0)} for i in range(4)]
    (work / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Without the experiment of the curves, which take most of the time of a report.
    experiments = {name: {**DECLARED["experiments"][name], "seeds": [0, 1]} for name in ("one", "two")}
    (work / "study.yaml").write_text(yaml.safe_dump({**DECLARED, "experiments": experiments}))
    study = load_study(work / "study.yaml")
    write_data(work / "study.parquet", collected(study).values())
    environment = {
        # torch sets a variable for its cache in the environment of the tests.
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_", "XDG_", "TORCH"))},
        **{"HOME": str(work / "home"), "TMPDIR": str(work / "tmp"), "PYTHONDONTWRITEBYTECODE": "1", **SECRETS},
        "VERL_PLATFORM": "cpu",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("watched.py")), str(work), str(model)],
        **{"cwd": work / "cwd", "env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return work, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


#: Commands that tests/security/watched.py runs.
COMMANDS = {"import", "prepare", "prepare-telelogs", "preview", "report", "files", "check", "simulator", "quickstart"}
COMMANDS |= {"launch", "study-run", "study-status", "study-collect", "study-print"}


@pytest.mark.timeout(900)
def test_commands_write_below_their_output_directory_only(watched):
    work, records, _ = watched
    assert set(records) == COMMANDS | {"control"}
    outside = {}
    for name, record in records.items():
        own = [work / "out" / name, work / "tmp", work / "home"]
        # The run directories of the study.
        own += [work / "out" / "study-run" / "small"] if name.startswith("study") else []
        paths = {Path(path) for path in record["writes"]} - {Path(os.devnull)}
        outside[name] = sorted(str(path) for path in paths if not any(path.is_relative_to(top) for top in own))
    assert {name: paths for name, paths in outside.items() if paths} == {}
    # The events were seen.
    for name in ("prepare", "preview", "report", "files", "quickstart", "launch", "study-run", "study-collect"):
        assert any(path.startswith(str(work / "out")) for path in records[name]["writes"]), name
    # What native code writes has no events.
    assert list((work / "cwd").iterdir()) == []
    assert {path.name for path in (work / "home").iterdir()} <= {".cache", ".config"}
    assert [path for path in (work / "tmp").rglob("*") if path.is_file()] == []


@pytest.mark.timeout(900)
def test_commands_that_were_not_told_to_use_the_network_do_not(watched):
    _, records, _ = watched
    used = {name: record["network"] for name, record in records.items() if record["network"]}
    assert set(used) == {"control"}
    started = {name: record["processes"] for name, record in records.items() if record["processes"]}
    trainers = {"quickstart", "launch", "study-run"}
    assert {name for name, found in started.items() if any("verl.trainer.main_ppo" in one for one in found)} == trainers
    # Modules that were not imported: those of packages that the environment does not have.
    missing = {entry.rpartition(": ")[2].partition(".")[0] for entry in records["import"]["skipped"]}
    assert missing <= {"trl", "openrlhf", "vllm", "deepspeed", "megatron"}


@pytest.mark.timeout(900)
def test_the_values_of_tokens_are_in_no_file_and_no_output(watched):
    work, _, said = watched
    files = [path for path in work.rglob("*") if path.is_file()]
    contents = {path.relative_to(work).as_posix(): path.read_bytes() for path in files}
    for secret in SECRETS.values():
        assert secret not in said
        assert [name for name, content in contents.items() if secret.encode() in content] == []
    # The trainers had them.
    logs = [content for name, content in contents.items() if name.endswith("trainer.log")]
    assert len(logs) == 4
    assert all(b"the trainer got the token: True" in log for log in logs)
    # Overrides are saved as they are.
    saved = {Path(name).name for name, content in contents.items() if b"note=in-an-override" in content}
    assert {"command.sh", "request.json", "result.json"} <= saved


def test_every_statement_of_the_page_names_tests_that_exist():
    code = Path(__file__).read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", SECURITY)
    assert len(named) > 10
    everywhere = code + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in everywhere] == []
    ours = set(re.findall(r"^def (test_\w+)\(", code, re.MULTILINE))
    assert ours - set(named) == {"test_every_statement_of_the_page_names_tests_that_exist"}
