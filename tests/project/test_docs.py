"""README.md and docs/ against the project: nothing in them is out of date."""

import ast
import contextlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import types
from functools import cache
from importlib import import_module
from pathlib import Path

from stages.common import params
from stages.model import gpt2

import pytest
import torch
import yaml
from conftest import ROOT, run, run_stage, set_params
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = [file.stem for file in sorted((ROOT / "stages").glob("*.py")) if "__main__" in file.read_text()]

# Claims about the sample corpus and its settings are not about the text of whoever works in this checkout.
on_the_sample = pytest.mark.skipif(
    PARAMS["data"]["train_file"] != "data/sample/train.txt", reason="params.yaml names other text than the sample"
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", page.read_text(), re.M | re.S)
    return [body for _, language, body in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The simple commands of a page, in words: its bash blocks, what follows `$ ` in its console blocks,
    and inline code that begins with a program of the project."""
    scripts = blocks(page, "bash", "sh") + re.findall(r"`((?:dvc|make|python) [^`\n]+)`", page.read_text())
    for block in blocks(page, "console"):
        scripts.append("\n".join(line[2:] for line in block.splitlines() if line.startswith("$ ")))
    found = []
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, f"{name_of(page)}: {done.stderr}\n{script}"
        script = re.sub(r"(^|\s)#.*$|\$\(\(.*?\)\)", r"\1", script.replace("\\\n", " "), flags=re.M)
        lexer = shlex.shlex(script + "\n", posix=True, punctuation_chars=";&|()<>\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words, skip = [], False
        for word in lexer:
            if set(word) <= set(";&|()\n"):
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
                words = []
            elif set(word) <= set("<>"):
                skip = True  # where the output goes
            elif not skip:
                words.append(word)
            else:
                skip = False
    return found


def flat(group: dict, prefix: str = "") -> dict:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result = {}
    for key, value in group.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return result


def check_setting(key: str, value: str | None, where: str) -> None:
    """A setting exists and takes the value."""
    assert key in params.known_settings(), f"{where}: no such setting: {key}"
    if value is not None:
        params.load("stages.train", "", argv=[f"--{key}", value])


@cache
def help_of(stage: str) -> str:
    """What `python -m stages.NAME --help` prints."""
    module, printed = import_module(f"stages.{stage}"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", [stage, "--help"])
        patch.chdir(ROOT)
        with contextlib.suppress(SystemExit):
            module.main()
    return printed.getvalue()


# What the pages show of others' tools, which this environment needn't have.
OTHERS = set(
    "apt-get cd cat cp export git head iconv kill ls mkdir pip rm sbatch source squeue srun ssh sudo tail wc".split()
)


def check_command(words: list[str], where: str) -> None:
    program, *rest = words
    if program in ("python", "torchrun") and "-m" in rest:
        module, *arguments = rest[rest.index("-m") + 1 :]
        if not module.startswith("stages."):
            import_module(module)
            return
        stage = module.removeprefix("stages.")
        assert stage in STAGES, f"{where}: no such stage: {module}"
        for i, argument in enumerate(arguments):
            if not argument.startswith("--"):
                continue
            option, _, value = argument.partition("=")
            assert re.search(rf"{re.escape(option)}\b", help_of(stage)), f"{where}: {module} has no {option}"
            if "." in option:
                check_setting(option[2:], value or arguments[i + 1], where)
    elif program == "python" and rest[0] == "-c":
        ast.parse(rest[1])
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"{where}: no such file: {rest[0]}"
    elif program == "dvc":
        check_dvc(rest, where)
    elif program == "make":
        run("make", "-n", *rest, cwd=ROOT)
    else:
        known = program in OTHERS or (Path(sys.executable).parent / program).exists()
        assert known or (ROOT / program).is_file(), f"{where}: no such command: {program}"


def check_dvc(arguments: list[str], where: str) -> None:
    from dvc.cli import parse_args

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            known = parse_args(arguments)
        except (SystemExit, Exception) as error:
            pytest.fail(f"{where}: dvc {' '.join(arguments)}: {error} {said.getvalue()}")
    for change in getattr(known, "params", None) or []:
        key, value = change.removeprefix("+").removeprefix("params.yaml:").split("=", 1)
        # A queued grid gives values with commas between.
        for one in [value] if value.startswith("[") else value.split(","):
            check_setting(key, one, where)
    names = set(DVC["stages"])
    for target in getattr(known, "targets", None) or []:
        if arguments[0] in ("repro", "exp") and not target.startswith("dvc.yaml"):
            assert target in names, f"{where}: no such stage: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    for words in commands(page):
        check_command(words, name_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_blocks_hold_valid_settings(page, tmp_path):
    for block in blocks(page, "yaml", "yml"):
        content = yaml.safe_load(block)
        groups = {*params.GROUPS, "trainer", "seed_everything"}
        if isinstance(content, dict) and groups & content.keys():
            (tmp_path / "settings.yaml").write_text(block)
            params.load("stages.train", "", argv=["--config", str(tmp_path / "settings.yaml")])


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: no such file: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name_of(page)}: no such heading: {link}"


# Folders that a page may name although a finished run has none of them.
PASSING = ("models/checkpoints", "logs", "data/my", ".venv", ".dvc")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_settings_in_code_exist(page, built):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    groups = "|".join([*params.GROUPS, "trainer"])
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"\.?[\w.-]+(/[\w.-]+)*/?", code) and re.match(
            r"(stages|tests|docs|data|models|metrics|benchmarks|\.ci|\.github)/|.*\.(md|ya?ml|lock)$", code
        ):
            found = (built / code).exists() or (ROOT / code).exists() or (page.parent / code).exists()
            assert found or code.startswith(PASSING), f"{name_of(page)}: no such file: {code}"
        for key, value in re.findall(rf"(?:^|[ -])((?:{groups})\.[a-z]\w+)(?:[:=] ?([^\s,]+))?(?=[,\s]|$)", code):
            if f"{key}".rpartition(".")[2] not in ("json", "py"):
                check_setting(key, value or None, name_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language(page):
    fences = re.findall(r"^ *```(\w*)", page.read_text(), re.M)
    assert all(fences[::2]), f"{name_of(page)}: a block without a language: bash, console, yaml, text"


# docs/settings.md -------------------------------------------------------------------------------


def reruns_of(key: str) -> str:
    """The stages of dvc.yaml that read a setting."""
    group = key.split(".")[0]
    readers = [
        name
        for name, stage in DVC["stages"].items()
        if f"${{{key}}}" in stage["deps"] or {key, group} & set(stage.get("params", []))
    ]
    return ", ".join(readers) or "nothing"


def documented() -> dict[str, dict[str, str]]:
    """The rows of the tables in docs/settings.md by setting."""
    rows, head = {}, None
    for line in (ROOT / "docs/settings.md").read_text().splitlines():
        if not line.startswith("| "):
            head = None
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if head is None:
            head = cells
        elif not set(cells[0]) <= set("- ") and head[0] == "setting":
            rows[cells[0].strip("`")] = dict(zip(head, cells, strict=True))
    return rows


def test_every_setting_stands_in_the_table():
    assert documented().keys() == flat(PARAMS).keys(), "docs/settings.md and params.yaml name other settings"


@on_the_sample
def test_table_shows_the_defaults():
    for key, default in flat(PARAMS).items():
        shown = yaml.safe_load(documented()[key]["default"].strip("`"))
        # YAML reads 4e-3 as text, jsonargparse as a number.
        assert str(shown) == str(default), f"docs/settings.md: {key} is {default} in params.yaml"


def test_table_says_what_settings_take_and_are():
    for key, (kind, text) in params.known_settings().items():
        if not key.startswith("trainer."):
            assert documented()[key]["values"] == params.words(kind).replace(" (try quotes)", ""), key
            assert documented()[key]["what it is"] == text, f"docs/settings.md: {key}"


def test_table_says_what_reruns():
    for key, row in documented().items():
        assert row["reruns"] == reruns_of(key), f"docs/settings.md: {key}"


# README.md --------------------------------------------------------------------------------------


README = (ROOT / "README.md").read_text()


def test_readme_leads_to_every_page():
    for page in PAGES:
        assert page.name == "README.md" or f"({name_of(page)})" in README, f"README.md has no link to {name_of(page)}"


def test_readme_draws_the_pipeline_as_dvc_does():
    drawn = [line.rstrip() for line in run("dvc", "dag", cwd=ROOT).stdout.splitlines()]
    assert "\n".join(drawn).strip("\n") in README


@on_the_sample
def test_readme_shows_the_committed_figures():
    test, details = (json.loads((ROOT / f"metrics/{name}.json").read_text())["test"] for name in ("eval", "details"))
    assert f"| {test['ppl']:.1f} | {details['unigram_ppl']:.1f} |" in README, (
        "README.md: the figures of metrics/eval.json"
    )


@on_the_sample
def test_picture_shows_the_committed_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    drawn = import_module("loss").picture(ROOT / "metrics")
    assert (ROOT / "docs/loss.svg").read_text() == drawn, "draw it again: python docs/loss.py"
    assert drawn.count('aria-roledescription="line mark"') == 2
    assert len(drawn) < 100_000


def test_readme_counts_the_parameters():
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", README, re.M)
    assert [row[0] for row in rows] == ["small", "medium", "large", "XL"]
    for _, n_layer, n_head, n_embd, count in rows:
        shape = types.SimpleNamespace(
            block_size=1024, n_layer=int(n_layer), n_head=int(n_head), n_embd=int(n_embd), dropout=0.0
        )
        with torch.device("meta"):
            model = gpt2.new_model(shape, 50257, 50256)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count


# What the pages say, done -----------------------------------------------------------------------


def printed_by(project: Path, stage: str, *arguments: str) -> str:
    """What a stage prints that ends well."""
    status, out, err = run_stage(project, stage, *arguments)
    assert status == 0, err
    return out


def test_what_the_old_scripts_did(project):
    """docs/migrate.md: print_config, config, callbacks, TensorBoard, figures of a checkpoint."""
    callbacks = next(block for block in blocks(ROOT / "docs/migrate.md", "yaml") if "EarlyStopping" in block)
    (project / "callbacks.yaml").write_text(callbacks)
    overrides = ("--trainer.max_epochs", "1", "--optimizer.lr", "2e-3")
    config = printed_by(project, "train", "--config", "callbacks.yaml", *overrides, "--print_config")
    (project / "config.yaml").write_text(config)
    assert yaml.safe_load(config)["optimizer"]["lr"] == 2e-3

    shutil.rmtree(project / "logs")
    printed_by(project, "train", "--config", "config.yaml")
    log = EventAccumulator(str(next(project.glob("logs/*/events*")))).Reload().Tags()["scalars"]
    assert {"loss", "valid_loss", "valid_ppl"} <= set(log)
    assert any(name.startswith("lr-") for name in log)
    # Without a GPU, DeviceStatsMonitor has little to say.
    assert any(name.startswith("DeviceStatsMonitor") for name in log)

    checkpoints = sorted(project.glob("logs/checkpoints/*.ckpt"))
    assert len(checkpoints) == 3
    figures = [
        json.loads(printed_by(project, "evaluate", "--config", "config.yaml", "--model", str(model)))
        for model in (*checkpoints, project / "models/gpt2")
    ]
    for figure in figures:
        assert figure["test"]["ppl"] == pytest.approx(math.exp(figure["test"]["loss"]))
    losses = [figure["valid"]["loss"] for figure in figures]
    assert min(losses) == pytest.approx(losses[-1], rel=1e-6)  # models/gpt2 is the best of them
    assert len(set(losses[:3])) == 3


def test_own_text(project):
    """docs/own-text.md: one path in all three, and what is held out of it is what is tokenized."""
    page = ROOT / "docs/own-text.md"
    (project / "data/my").mkdir()
    shutil.copy(ROOT / "stages/common/settings.py", project / "data/my/text.txt")
    for key, value in flat(yaml.safe_load(blocks(page, "yaml")[0])).items():
        set_params(project, f"{key}={value}")
    set_params(project, "data.valid_fraction=0.2", "data.test_fraction=0.2")  # it is a small text
    for stage in ("prepare_corpus", "train_tokenizer", "tokenize_blocks"):
        printed_by(project, stage)
    counts = [json.loads((project / f"data/blocks/{split}.json").read_text()) for split in ("train", "valid", "test")]
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", (project / "data/my/text.txt").read_text().strip("\n"))
    assert sum(count["documents"] for count in counts) == len(paragraphs)
    assert sum(count["bytes"] for count in counts) == sum(len(text.encode()) for text in paragraphs)
