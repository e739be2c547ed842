"""The tables of docs/reruns.md against the stages that a real `dvc repro` runs."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, outputs, run, set_params, stages_run

PAGE = (ROOT / "docs/reruns.md").read_text()
SETTINGS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([^|]+?) \|$", PAGE, re.M)
FILES = re.findall(r"^\| `([^|]+?)` \| ([^`|]+?) \|$", PAGE, re.M)
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


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


@pytest.mark.parametrize("file, stages", FILES, ids=[file for file, _ in FILES])
def test_file(copy, warm, file, stages):
    changed = copy / file
    addition = {".txt": "\n\nAnd God saw every thing that he had made.\n", ".py": "# a comment\n", ".json": "\n"}
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
    stages = {name: imports(name) for name in PIPELINE}
    rows = {
        f"stages/{name}.py": ", ".join(stage for stage in PIPELINE if name in stages[stage])
        for name in sorted(set().union(*stages.values()))
    }
    assert {file: stages for file, stages in FILES if file.startswith("stages/")} == rows


def test_every_setting_is_declared_but_for_the_runtime_group(ready, warm):
    """All that a stage accepts, not only what params.yaml holds."""
    accepted = yaml.safe_load(warm("stages.train", "--print_config", cwd=ready).stdout)
    declared = {name for stage in PIPELINE.values() for name in stage.get("params", [])}
    declared |= {dep.strip("${}") for stage in PIPELINE.values() for dep in stage["deps"] if dep.startswith("${")}
    undeclared = [key for key in leaves(accepted) if not {key, key.split(".")[0]} & declared]
    assert undeclared == [key for key in leaves(accepted) if key.startswith("runtime.")]


@pytest.mark.parametrize("stage", PIPELINE)
def test_deps_are_the_imports(stage):
    declared = {Path(dep).stem for dep in PIPELINE[stage]["deps"] if dep.startswith("stages/")}
    assert declared == imports(stage)


def imports(name: str) -> set[str]:
    """The files of stages/ that one of them imports, itself included, wherever in its code.

    But for __init__.py, which only sees to it that the right Python runs.
    """
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((ROOT / f"stages/{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "stages":
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages."):
                todo.append(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                todo += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stages.")]
    return found


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
