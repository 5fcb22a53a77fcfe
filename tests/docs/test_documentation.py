"""README.md and docs/: short enough, without dead links, and complete: what must be documented is computed from the code."""

import configparser
import dataclasses
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import ev3_distill
from ev3_distill import config, guards
from ev3_distill.arms import ARMS, EVOLVING
from ev3_distill.arms.tuned_arm import TUNABLE
from ev3_distill.data.sources import npz
from ev3_distill.students import FAMILIES
from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES
from ev3_distill.tasks.classification.losses import LOSSES
from ev3_distill.teachers.registry import KINDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if not {"_generated", "_build"} & set(path.parts)),
]
WORDS = 1500  # of README.md
SKIPPED = 3  # examples that CI does not run, at most
OF_OTHERS = {"check", "extra-index-url", "help", "keep-going", "logdir", "signal"}  # other programs' options
PREFIXES = {"teacher-input"}  # of several options


def module(path):
    """A script of the repository that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def generate():
    return module(DOCS / "generate.py")


@pytest.fixture(scope="module")
def run_examples():
    return module(ROOT / ".ci" / "run_examples.py")


def page(name):
    return (DOCS / name).read_text()


def missing(names, text):
    """Names that do not stand in the text as `name`."""
    return sorted(name for name in names if not re.search(rf"`{re.escape(name)}[`(]", text))


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_at_most_1500_words():
    assert len((ROOT / "README.md").read_text().split()) <= WORDS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_internal_link_resolves(path, generate):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{path}: {target}"
        if anchor:
            text = linked.read_text()
            if linked.name == "arms.md":
                text += generate.losses()  # which it includes
            assert anchor in anchors(text), f"{path}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_source_file_that_a_page_names_exists(path):
    for name in re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_]+\.(?:py|toml))`", path.read_text()):
        assert (ROOT / name).exists() or (ROOT / "ev3_distill" / name).exists(), f"{path}: {name}"


def test_every_page_is_in_the_table_of_contents():
    index = page("index.md")
    for path in PAGES[1:]:
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        if not name.startswith("benchmarks/") and name not in ("index", "explanation/architecture-map"):
            assert name in index


def test_first_page_lists_every_extra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert [extra for extra in setup["options.extras_require"] if f"`.[{extra}]`" not in page("index.md")] == []


def test_api_page_documents_every_public_name(generate):
    text = generate.api()
    assert [name for name in ev3_distill.__all__ if f"### {name}\n" not in text] == []
    assert [n for n in ev3_distill.__all__ if not (inspect.getdoc(getattr(ev3_distill, n)) or "").strip()] == []


def test_api_page_has_every_field_of_a_public_class(generate):
    for name in ev3_distill.__all__:
        value = getattr(ev3_distill, name)
        if inspect.isclass(value) and (dataclasses.is_dataclass(value) or hasattr(value, "_fields")):
            names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]
            rows = generate.fields_of(value)
            assert [row[0] for row in rows] == list(names)
            undescribed = [row[0] for row in rows if not row[3]]
            assert len(undescribed) <= 1, (name, undescribed)


@pytest.mark.parametrize("command", ["compress", "teach", "evaluate", "copies", "report", "export", "bench"])
def test_command_line_page_has_the_help_of_every_command(generate, command):
    assert f"## {command}\n" in generate.command_line()
    assert f"usage: ev3-distill {command}" in generate.help_text(command)


@pytest.mark.parametrize(("command", "options"), [("compress", config.Compress()), ("teach", config.Teach())])
def test_command_line_page_has_every_option_of_a_configuration(generate, command, options):
    text = generate.help_text(command)
    names, older = {"guards": "guard"}, {"joint_strata", "stored_pixels"}  # not for new runs, and hidden
    for field in dataclasses.fields(options):
        if field.name in older:
            continue
        value = getattr(options, field.name)
        inner = [one.name for one in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [field.name]
        prefix = "teacher-input." if isinstance(value, config.Preprocessing) else ""
        for name in inner:
            assert re.search(rf"--{prefix}{names.get(name, name).replace('_', '-')}[\s,]", text), name


def test_every_option_that_a_page_names_exists(generate):
    known = "".join(generate.help_text(command) for command in generate.COMMANDS)
    for path in PAGES:
        text = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
        named = set(re.findall(r"(?<![\w-])--([a-z][a-z.-]*[a-z0-9])", text))
        unknown = {option for option in named if not re.search(rf"--{re.escape(option)}[\s,|\]]", known)}
        assert unknown <= OF_OTHERS | PREFIXES, path


def test_students_page_has_every_option_of_every_family(generate):
    text = generate.students()
    for name, family in FAMILIES.items():
        assert f"## {name}\n" in text
        options = generate.options_of(family.network)
        assert {option for option, _, _ in options} == set(inspect.signature(family.network).parameters) - {
            "input_shape",
            "num_classes",
        }
        for option, _, meaning in options:
            assert f"| `{option}` |" in text
            assert meaning.strip(".")
        assert generate._moves(family), f"{name} has a default network for one of the example shapes"


def test_arms_page_has_every_arm_and_every_loss(generate):
    text = page("reference/arms.md")
    assert missing([*ARMS, *EVOLVING], text) == []
    assert missing(TUNABLE, text) == []
    assert missing([*LOSSES, *FEATURE_LOSSES], generate.losses()) == []


def test_metrics_pages_have_every_metric():
    metrics = {*guards.METRICS, *getattr(guards, "FORMS", ())}
    assert missing(metrics, page("reference/metrics.md")) == []
    assert missing(metrics, page("explanation/promise.md")) == []


def test_data_page_has_every_array_of_an_npz_file():
    inputs = {name for pair in npz._PAIRS for name in pair}
    names = {"class_names", "groups", *inputs, *(part + name for part in npz._PREFIXES for name in (*inputs, "groups"))}
    names |= {"logits", "train_logits", "test_logits", "fingerprint"}
    assert missing(names, page("reference/data.md")) == []


def test_teacher_page_has_every_kind_and_every_preprocessing_option():
    text = page("how-to/teacher.md")
    assert [kind for kind in (*KINDS, "logits") if f"| `{kind}:" not in text] == []
    fields = [field.name for field in dataclasses.fields(config.Preprocessing)]
    assert [name for name in fields if f"--teacher-input.{name}" not in text and f"`.{name}`" not in text] == []
    assert missing(fields, page("reference/data.md")) == []


def test_run_directory_page_has_every_file_and_field(finished):
    text = page("reference/run-directory.md")
    files = {path.name + ("/" if path.is_dir() else "") for path in finished.iterdir()}
    assert missing(files - {"lock"}, text) == []
    for name in ("report.json", "certificate.json"):
        content = json.loads((finished / name).read_text())
        assert missing(content, text) == []
    rows = [json.loads(line) for line in (finished / "ledger.jsonl").read_text().splitlines()]
    assert missing({key for row in rows for key in (*row, *(row["test"] or ()))}, text) == []
    (opening,) = json.loads((finished / "opened.json").read_text())["openings"]
    assert missing(opening, text) == []


def test_few_examples_are_skipped_and_each_has_a_reason(run_examples):
    pages = [run_examples.read_page(name) for name in run_examples.all_pages()]
    reasons = [block.skip for one in pages for block in one.blocks if block.skip]
    assert len(reasons) <= SKIPPED
    assert all(len(reason.split()) > 2 for reason in reasons)
    assert sum(len(one.blocks) for one in pages) > 10 * len(reasons)


def test_examples_run_in_order_and_in_the_directory_of_the_page_they_continue(run_examples, tmp_path, monkeypatch):
    monkeypatch.setattr(run_examples, "ROOT", tmp_path)
    monkeypatch.setattr(run_examples, "copy_repository", lambda directory: directory.mkdir(parents=True))
    (tmp_path / "first.md").write_text("```sh\necho one > file\n```\ntext\n\n```yaml\n  - run: echo two >> file\n```\n")
    (tmp_path / "second.md").write_text(
        "<!-- examples: after first.md -->\n<!-- examples: skip for a good reason -->\n\n```sh\nfalse\n```\n"
        "```python\nprint(open('file').read(), file=open('seen', 'w'))\n```\n```console\n$ false\n```\n"
    )
    run_examples.main(tmp_path / "copy", ["second.md"])
    assert (tmp_path / "copy" / "first" / "seen").read_text().split() == ["one", "two"]


def test_a_failing_example_ends_the_script(run_examples, tmp_path, monkeypatch):
    monkeypatch.setattr(run_examples, "ROOT", tmp_path)
    monkeypatch.setattr(run_examples, "copy_repository", lambda directory: directory.mkdir(parents=True))
    (tmp_path / "page.md").write_text("```sh\nfalse | cat\necho not reached > file\n```\n")
    with pytest.raises(SystemExit, match=r"page.md: this sh block must succeed; got exit code 1"):
        run_examples.main(tmp_path / "copy", ["page.md"])
    assert not (tmp_path / "copy" / "page" / "file").exists()


def test_the_copy_of_the_repository_keeps_links(run_examples, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the tracked files are not known")
    run_examples.copy_repository(tmp_path)
    for name in ("teachers", "students", "benchmarks"):
        assert (tmp_path / "ev3_distill" / name).is_symlink()
        assert (tmp_path / "ev3_distill" / name / "__init__.py").is_file()
