"""The tables of docs/reruns.md against the stages that a real `dvc repro` runs."""

import ast
import functools
import re
import shutil
from pathlib import Path

from stages.training import identity

import pytest
import yaml
from conftest import ROOT, outputs, run, set_params, stages_run

PAGE = (ROOT / "docs/reruns.md").read_text()
SETTINGS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([^|]+?) \|$", PAGE, re.M)
FILES = re.findall(r"^\| `([^|]+?)` \| ([^`|]+?) \|$", PAGE, re.M)
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SOURCES = ROOT / "stages"


def listed(cell: str) -> list[str]:
    return [] if cell == "nothing" else cell.split(", ")


def leaves(settings: dict, prefix: str = "") -> list[str]:
    return [
        leaf
        for key, value in settings.items()
        for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key])
    ]


def outs(stage: str) -> list[str]:
    """The paths of a stage's outputs, whatever their kind."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in PIPELINE[stage].get(kind, [])]
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


# DVC keeps no record of the runs of a stage with an out that is neither cached, metric nor plot.
UNRECORDED = "evaluate"
OUTPUTS = [path for stage in PIPELINE for path in outs(stage)]


@pytest.mark.parametrize("key, value, stages", SETTINGS, ids=[key for key, *_ in SETTINGS])
def test_setting(copy, warm, key, value, stages):
    if key == "model.compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs g++ on a CPU")
    if re.fullmatch(r"data\.\w+_file", key):
        (copy / "data/my").mkdir()
        shutil.copy(copy / f"data/{key.removeprefix('data.').removesuffix('_file')}.txt", copy / value)
    set_params(copy, f"{key}={value}")
    done = warm("dvc", "repro", cwd=copy, check=key != "trainer.num_nodes")  # there is only one node here
    assert stages_run(done) == listed(stages)


def test_a_changed_test_set_trains_nothing(copy, warm):
    set_params(copy, "data.test_files={more: data/more.txt}")
    warm("dvc", "repro", cwd=copy)
    with (copy / "data/more.txt").open("a") as file:
        file.write("\n\nAnd God saw every thing that he had made.\n")
    assert stages_run(warm("dvc", "repro", cwd=copy)) == ["prepare_corpus", "tokenize_blocks", "evaluate"]


@pytest.mark.parametrize("file, stages", FILES, ids=[file for file, _ in FILES])
def test_file(copy, warm, file, stages):
    addition = {".txt": "\n\nAnd God saw every thing that he had made.\n", ".py": "# a comment\n", ".json": "\n"}
    for changed in [copy / file] if (copy / file).is_file() else (copy / file).glob("*.py"):
        changed.write_text(changed.read_text() + addition[changed.suffix])
    assert stages_run(warm("dvc", "repro", cwd=copy)) == listed(stages)


@pytest.mark.parametrize("path", OUTPUTS)
def test_output_deleted_or_edited(copy, warm, path):
    expected = outputs(copy)
    stages = [UNRECORDED] if path in outs(UNRECORDED) else []
    run("rm", "-r", path, cwd=copy)
    assert stages_run(warm("dvc", "repro", cwd=copy)) == stages
    output = copy / path
    edited = min(output.iterdir()) if output.is_dir() else output
    edited.write_bytes(edited.read_bytes() + b"\n")
    assert stages_run(warm("dvc", "repro", cwd=copy)) == stages
    assert outputs(copy) == expected
    assert warm("dvc", "status", cwd=copy).stdout == "Data and pipelines are up to date.\n"
    assert run("git", "status", "--short", cwd=copy).stdout == ""


def test_every_setting_has_a_row():
    assert [key for key, *_ in SETTINGS] == leaves(yaml.safe_load((ROOT / "params.yaml").read_text()))


def test_every_source_file_has_a_row():
    """A stage's own file, and a row for each room."""
    used = {name: [f"stages/{name}.py", *(f"stages/{room}/" for room in rooms_of(name))] for name in PIPELINE}
    sources = {
        f"{path.relative_to(ROOT)}{'/' * path.is_dir()}" for path in SOURCES.iterdir() if path.name[0] not in "._"
    }
    assert {file for file, _ in FILES if file.startswith("stages/")} == sources
    for source in sources - {"stages/watch/"}:
        assert dict(FILES)[source] == ", ".join(name for name in PIPELINE if source in used[name])


def test_every_setting_is_declared_but_for_the_runtime_group(ready, warm):
    """All that a stage accepts, not only what params.yaml holds."""
    accepted = yaml.safe_load(warm("stages.train", "--print_config", cwd=ready).stdout)
    declared = {name for stage in PIPELINE.values() for name in stage.get("params", [])}
    declared |= {dep.strip("${}") for stage in PIPELINE.values() for dep in stage["deps"] if dep.startswith("${")}
    undeclared = [key for key in leaves(accepted) if not {key, key.split(".")[0]} & declared]
    assert undeclared == [key for key in leaves(accepted) if key.startswith("runtime.")]


@pytest.mark.parametrize("stage", PIPELINE)
def test_deps_are_the_imports(stage):
    """Its own file and the rooms it imports from, directly or through another, but for what people only look at."""
    declared = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("stages", "tools"))}
    assert declared == {f"stages/{stage}.py", *(f"stages/{room}" for room in rooms_of(stage) - {"watch"})}


def rooms_of(stage: str) -> set[str]:
    """The folders of stages/ that a stage imports from, wherever in its code, and what they import from in turn."""
    found, todo = set(), [SOURCES / f"{stage}.py"]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += [path for name in imported(file) for path in files_of(name)]
    alone = {file.stem for file in found if file.parent == SOURCES and file.name != "__init__.py"}
    assert alone == {stage}, f"{stage} imports another stage"
    return {file.parent.name for file in found if file.parent != SOURCES}


def imported(file: Path) -> list[str]:
    """The full names of what a file imports of this project: modules, and what is taken from them."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert not [name for name in names if name.startswith("tools")], f"{file} imports from tools/"
    return [name for name in names if name.startswith("stages.")]


def files_of(name: str) -> list[Path]:
    """The file of a module, or of a package; none for what is in one."""
    path = ROOT / name.replace(".", "/")
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def test_what_people_look_at_reruns_nothing(copy, warm):
    """Every message in stages/watch is another one: nothing runs, and a training would still take its checkpoint."""
    before = identity.code_digest(copy)
    for file in (copy / "stages/watch").glob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value += " "
        assert ast.unparse(tree) != file.read_text()
        file.write_text(ast.unparse(tree))
    assert stages_run(warm("dvc", "repro", cwd=copy)) == []
    assert identity.code_digest(copy) == before


def test_the_users_own_code_is_part_of_a_run(tmp_path):
    """A callback's file that dvc.yaml names is, as those of the stages are."""
    digests = []
    for code in ("SCALE = 1", "SCALE = 1  # as before", "SCALE = 3"):
        (tmp_path / "my_callbacks.py").write_text(code)
        (tmp_path / "dvc.yaml").write_text("stages: {train: {deps: [my_callbacks.py, data/blocks]}}")
        digests.append(identity.code_digest(tmp_path))
    assert digests[0] == digests[1] != digests[2]


digest_of = functools.cache(identity.code_digest)
TRAINS = [file for dep in PIPELINE["train"]["deps"] if dep.startswith("stages")
          for file in sorted((ROOT / dep).rglob("*.py") if (ROOT / dep).is_dir() else [ROOT / dep])]  # fmt: skip


def test_comments_cost_no_checkpoint(template, tmp_path):
    """Comments, docstrings and layout of all that trains, at once, are no part of what a run is."""
    project = tmp_path / "project"
    shutil.copytree(template, project, ignore=shutil.ignore_patterns(".git"))
    before = identity.code_digest(project)
    for file in TRAINS:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                if ast.get_docstring(node):
                    node.body = node.body[1:]
                node.body.insert(0, ast.Expr(ast.Constant("Another docstring.")))
        (project / file.relative_to(ROOT)).write_text(f"# A comment.\n{ast.unparse(ast.fix_missing_locations(tree))}\n")
    assert identity.code_digest(project) == before


@pytest.mark.parametrize("file", TRAINS, ids=lambda file: file.name)
def test_changed_code_is_another_run(template, tmp_path, file):
    for name in ("stages", "dvc.yaml"):
        (shutil.copytree if (template / name).is_dir() else shutil.copy)(template / name, tmp_path / name)
    tree = ast.parse(file.read_text())
    [node for node in ast.walk(tree) if isinstance(node, ast.Name)][-1].id = "another"
    (tmp_path / file.relative_to(ROOT)).write_text(ast.unparse(tree))
    assert identity.code_digest(tmp_path) != digest_of(template)


def test_folder_that_dvc_does_not_watch(copy, warm):
    """One line, before any work: a change in it would rerun nothing."""
    pipeline = copy / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("      - pretrained\n", ""))
    for stage, key in (("train", "model.from_pretrained"), ("train_tokenizer", "tokenizer.tokenizer_model")):
        set_params(copy, f"{key}=pretrained")
        failed = warm("dvc", "repro", "--single-item", stage, cwd=copy, check=False)
        assert failed.returncode != 0
        line = next(line for line in failed.stderr.splitlines() if line.startswith("error:"))
        assert re.fullmatch(
            rf"error: params\.yaml: {key}: DVC doesn't watch pretrained: "
            rf"add `- pretrained` to the deps of {stage} in dvc\.yaml",
            line,
        )
        set_params(copy, f"{key}=null")


def test_pretrained_folder_changes(copy, warm):
    """Its weights decide what is fine-tuned."""
    set_params(copy, "tokenizer.tokenizer_model=pretrained", "model.from_pretrained=pretrained")
    warm("dvc", "repro", cwd=copy)
    before = outputs(copy)
    shutil.copy(copy / "models/gpt2/model.safetensors", copy / "pretrained/model.safetensors")
    assert stages_run(warm("dvc", "repro", cwd=copy)) == ["train_tokenizer", "train", "evaluate"]
    assert outputs(copy)["models/gpt2"] != before["models/gpt2"]
