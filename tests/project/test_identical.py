"""The same inputs give the same bytes, and what was made before can be had back."""

import shutil
from pathlib import Path

import pytest
from conftest import digests, outputs, run, sample_lines, set_params, stages_run
from test_reruns import OUTPUTS, PIPELINE, SETTINGS, UNRECORDED, outs

RUNTIME = [(key, value) for key, value, _ in SETTINGS if key.startswith("runtime.")]


@pytest.mark.parametrize("key, value", RUNTIME, ids=[key for key, _ in RUNTIME])
def test_runtime_settings_change_no_byte(copy, ready, warm, key, value):
    set_params(copy, f"{key}={value}")
    assert stages_run(warm("dvc", "repro", "--force", cwd=copy)) == list(PIPELINE)
    assert outputs(copy) == outputs(ready)


@pytest.mark.parametrize("stage", [stage for stage in PIPELINE if stage != "sample_corpus"])
def test_undeclared_settings_change_no_byte(copy, warm, stage):
    """The stage runs by itself, with another value of every setting that it doesn't declare."""
    definition = PIPELINE[stage]
    declared = {*definition["params"], *(dep.strip("${}") for dep in definition["deps"])}
    names = outs(stage)
    expected = digests(copy, *names)
    (copy / "data/my").mkdir()
    shutil.copy(copy / "data/test.txt", copy / "data/my/renamed.txt")
    others = {key: value for key, value, _ in SETTINGS if not {key, key.split(".")[0]} & declared}
    del others["runtime.executor"]  # another one needs a cluster: tests/text/test_engine.py
    set_params(copy, *(f"{key}={value}" for key, value in others.items()))
    for name in names:
        run("rm", "-r", name, cwd=copy)
    warm(f"stages.{stage}", cwd=copy)
    assert digests(copy, *names) == expected


def test_fresh_clone_without_cache(ready, tmp_path):
    """Another place, no cache, other processes, hash seeds, threads and workers: the committed dvc.lock again."""
    clone = tmp_path / "another place" / "clone"
    run("git", "clone", "-q", str(ready), str(clone), cwd=tmp_path)
    set_params(clone, "runtime.num_workers=2")
    environment = {
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "4",
        "TOKENIZERS_PARALLELISM": "true",
        "TZ": "Asia/Tokyo",
    }
    assert stages_run(run("dvc", "repro", "--force", cwd=clone, env=environment)) == list(PIPELINE)
    assert outputs(clone) == outputs(ready)
    changed = {line[3:] for line in run("git", "status", "--short", cwd=clone).stdout.splitlines()}
    assert changed == {"dvc.lock", "metrics/run.json", "params.yaml"}


ALGORITHMS = ("bpe", "unigram", "byte")
TRAIN_EACH = f"""
import os, sys
from stages import prepare_corpus, train_tokenizer
options = ["--tokenizer.vocab_size", "1000", "--data.train_file", "text.txt"]
sys.argv = ["", *options]
prepare_corpus.main()
for algorithm in {ALGORITHMS}:
    sys.argv = ["", *options, "--tokenizer.algorithm", algorithm]
    train_tokenizer.main()
    os.rename("models/tokenizer", algorithm)
"""


def test_tokenizers_whatever_the_order_of_hashes_and_threads(template, tmp_path):
    found = []
    for seed, threads, parallel in (("0", "1", "false"), ("1", "2", "true"), ("2", "4", "true")):
        project = tmp_path / seed
        shutil.copytree(template, project)
        (project / "text.txt").write_text(sample_lines(0, 3000))
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel}
        run("python", "-c", TRAIN_EACH, cwd=project, env=environment)
        found.append(digests(project, *ALGORITHMS))
    assert len(found[0]) >= 6
    assert found[0] == found[1] == found[2]


def test_going_back_runs_nothing(copy, warm):
    first, files = outputs(copy), digests(copy, *OUTPUTS)
    set_params(copy, "tokenizer.vocab_size=280", "evaluate.stride=5")
    assert len(stages_run(warm("dvc", "repro", cwd=copy))) == 4
    second = outputs(copy)
    assert second != first
    run("git", "commit", "-qam", "second", cwd=copy)

    # The settings alone.
    run("git", "checkout", "-q", "HEAD~", "--", "params.yaml", cwd=copy)
    assert stages_run(warm("dvc", "repro", cwd=copy)) == [UNRECORDED]
    assert outputs(copy) == first and digests(copy, *OUTPUTS) == files
    run("git", "reset", "-q", "--hard", cwd=copy)
    warm("dvc", "checkout", cwd=copy)
    assert outputs(copy) == second and stages_run(warm("dvc", "repro", cwd=copy)) == []

    # The whole commit.
    run("git", "checkout", "-q", "HEAD~", cwd=copy)
    warm("dvc", "checkout", cwd=copy)
    assert outputs(copy) == first and digests(copy, *OUTPUTS) == files
    assert stages_run(warm("dvc", "repro", cwd=copy)) == []
    assert run("git", "status", "--short", cwd=copy).stdout == ""


def test_fresh_clone_with_pull_runs_nothing(copy, warm, tmp_path):
    warm("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"), cwd=copy)
    warm("dvc", "push", cwd=copy)
    run("git", "commit", "-qam", "remote", cwd=copy)
    clone = tmp_path / "clone"
    run("git", "clone", "-q", str(copy), str(clone), cwd=tmp_path)
    warm("dvc", "pull", cwd=clone)
    assert stages_run(warm("dvc", "repro", cwd=clone)) == []
    assert digests(clone, *OUTPUTS) == digests(copy, *OUTPUTS)
    assert run("git", "status", "--short", cwd=clone).stdout == ""
    for name in OUTPUTS:
        run("rm", "-r", name, cwd=clone)
    warm("dvc", "checkout", cwd=clone)
    run("git", "checkout", "metrics", cwd=clone)
    assert digests(clone, *OUTPUTS) == digests(copy, *OUTPUTS)


def break_source(project: Path, file: str, old: str, new: str) -> None:
    source = project / "stages" / file
    assert old in source.read_text()
    source.write_text(source.read_text().replace(old, new, 1))


# What makes each stage fail, the later in its work the better.
FAILURES = {
    "sample_corpus": lambda project: break_source(project, "sample_corpus.py", 'SHA256 = "', 'SHA256 = "0'),
    "prepare_corpus": lambda project: (project / "data/test.txt").write_bytes(b"In the beginning\xff" * 999),
    "train_tokenizer": lambda project: break_source(project, "train_tokenizer.py", "save(folder", "save(1 / 0, folder"),
    "tokenize_blocks": lambda project: break_source(
        project, "tokenize_blocks.py", "for name in split_names", 'for name in ["gone"] + split_names'
    ),
    "train": lambda project: set_params(project, "optimizer.lr=1e30", "trainer.gradient_clip_val=null"),
    "evaluate": lambda project: set_params(project, "evaluate.stride=17"),
}
# SIGKILL at the moment when a file or folder that was written beside its place would be renamed into it.
KILL = """

def _killed(*_):
    os.kill(os.getpid(), 9)


os.rename = os.replace = _killed
"""


@pytest.mark.parametrize("how", ["fails", "killed"])
@pytest.mark.parametrize("stage", PIPELINE)
def test_outputs_of_a_stage_that_ends_early(copy, warm, stage, how):
    names = outs(stage)
    expected = digests(copy, *OUTPUTS)
    if how == "fails":
        FAILURES[stage](copy)
    else:
        with (copy / "stages/common/files.py").open("a") as file:
            file.write(KILL)

    # By itself, the stage touches nothing before it is done.
    alone = warm(f"stages.{stage}", cwd=copy, check=False)
    assert alone.returncode == (1 if how == "fails" else -9)
    assert digests(copy, *OUTPUTS) == expected

    # DVC deletes a stage's outputs before it runs it: all are there to be had back, and none is there by half.
    under_dvc = warm("dvc", "repro", "--single-item", stage, cwd=copy, check=False)
    assert under_dvc.returncode != 0 and f"failed to reproduce '{stage}'" in under_dvc.stderr
    assert digests(copy, *names) == {}
    warm("dvc", "checkout", cwd=copy)
    run("git", "checkout", "metrics", cwd=copy)
    assert digests(copy, *OUTPUTS) == expected

    # What was never committed comes back from the cache, once the cause is undone.
    for name in names:
        run("rm", "-r", name, cwd=copy)
    run("git", "checkout", "stages", "data", "params.yaml", cwd=copy)
    assert stages_run(warm("dvc", "repro", cwd=copy)) == [UNRECORDED] * (stage == UNRECORDED)
    assert digests(copy, *OUTPUTS) == expected
    assert run("git", "status", "--short", cwd=copy).stdout == ""
