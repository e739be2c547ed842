"""The work of prepare_corpus and tokenize_blocks in tasks: the same bytes as in one process, whoever runs them."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from stages.common.errors import UserError
from stages.text import measures, sources, splits, streams
from stages.text.corpus import Documents
from stages.text.measures import measure_share

import pytest
from conftest import ROOT, data_settings, digests, run, run_stage, sample_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory import write

MADE = ("data/corpus", "metrics/corpus.json", "data/blocks", "metrics/tokens.json")
KILL = "kill.me"  # the task of rank 1 looks for it
OUTSIDE = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}

lines = st.lists(
    st.sampled_from(["\n", "\r\n", "\n\n", " ", "\t", "\r", "\f", "a", "b c", "日本", "\x1c", "<|e|>", "<|", "ee"])
)


@example(b"eeeee" * 4, "separator", "ee", 4, 4)
@example(b"", "separator", "<|e|>", 6, 5)
@example(b"", "blank_line", "a", 3, 20)
@settings(max_examples=200, deadline=None)
@given(
    lines.map("".join).map(str.encode),
    st.sampled_from(["blank_line", "line", "file", "separator"]),
    st.sampled_from(["<|e|>", "ee", "a"]),
    st.integers(1, 9),
    st.integers(2, 6),
)
def test_shares_are_whole_documents(tmp_path_factory, text, document, separator, chunk, tasks):
    """Together, those of all tasks are the documents of the files, in order."""
    folder = tmp_path_factory.mktemp("shares")
    for i, part in enumerate((text, b"one\n\ntwo<|e|>three\n", text)):
        (folder / f"{i}.txt").write_bytes(part)
    group = data_settings(document=document, separator=separator)
    files = sources.find_files(str(folder), document)

    def read(files: list) -> list[bytes]:
        return [bytes(d) for d in sources.read_source("", files, group, lambda size: None)]

    whole = read(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", chunk)
        shares = [sources.share_of(files, rank, tasks, group) for rank in range(tasks)]
        assert [document for share in shares for document in read(share)] == whole
    covered = [(file.path, file.start, file.start + file.stretch) for share in shares for file in share]
    assert sum(end - start for _, start, end in covered) == sum(file.size for file in files)


def test_a_file_is_shared_where_its_documents_allow_it(tmp_path):
    """Of four tasks on one file, each has a part of it; of what only its beginning explains, the first has all."""
    text = sample_lines(0, 200)
    rows = [json.dumps({"text": line}) for line in text.split("\n")]
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(rows))
    for name, document, parts in (
        ("txt", "blank_line", 4),
        ("txt", "file", 1),
        ("jsonl", "line", 4),
        ("csv", "line", 1),
    ):
        group = data_settings(document=document)
        files = sources.find_files(str(tmp_path / f"t.{name}"), document)
        sizes = [sum(file.stretch for file in sources.share_of(files, rank, 4, group)) for rank in range(4)]
        assert sum(sizes) == files[0].size and sum(size > 0 for size in sizes) == parts
        assert parts == 1 or max(sizes) < 0.4 * sum(sizes)


def test_a_mistake_stands_where_it_does_in_the_file(tmp_path):
    """Whichever task finds it."""
    rows = [json.dumps({"text": f"row {i}"}) for i in range(1000)]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows[:900], '{"text": 7}', *rows[900:]]))
    (tmp_path / "t.txt").write_bytes(b"a line\n" * 1000 + b"\xff")
    for name, place in (("t.jsonl", "line 901: field 'text' is 7"), ("t.txt", "not UTF-8 at byte offset 7,000")):
        group = data_settings(document="line")
        files = sources.find_files(str(tmp_path / name), "line")
        for tasks in (1, 4):
            with pytest.raises(UserError, match=f"{name}: {place}"):
                splits.write_share(tmp_path, tasks - 1, tasks, group, {name: files})


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A folder in which the stages have run in one process, on text of several record batches, which the tokenizer
    changes near its end."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("data/sample/", ""))
    for split, mib in (("train", 2.2), ("valid", 0.01), ("test", 0.01)):
        write(folder / f"{split}.txt", "prose", mib)
    with (folder / "train.txt").open("a") as text:
        text.write("\n\nThe ﬁrst.\n\nThe ﬁrst of all.\n")
    settings = {"train_tokenizer": ("--tokenizer.vocab_size=300", "--tokenizer.normalization=nfkc")}
    for stage in ("prepare_corpus", "train_tokenizer", "tokenize_blocks"):
        assert run_stage(folder, stage, *settings.get(stage, ()))[0] == 0
    return folder


def in_tasks(folder: Path, tasks: int, *options: str, env: dict | None = None) -> dict[str, str]:
    """Makes both stages' outputs anew; returns their digests."""
    for made in (*MADE, *folder.glob("data/.*.parts")):  # a test that failed on purpose leaves parts
        run("rm", "-rf", str(made), cwd=folder)
    for stage in ("prepare_corpus", "tokenize_blocks"):
        arguments = (f"--runtime.tasks={tasks}", *options)
        done = run("python", "-m", f"stages.{stage}", *arguments, cwd=folder, env=OUTSIDE | (env or {}))
        assert not list(folder.glob("data/.*.parts"))
    number = sum(1 for _ in Documents("train", folder / "data/corpus").documents()) - 1
    assert (
        f"2 of {number + 1:,} train documents, first 'ﬁrst.' to 'first.' in train document {number:,}:" in done.stderr
    )
    return digests(folder, *MADE)


def test_tasks_make_the_same_bytes(large):
    expected = digests(large, *MADE)
    assert in_tasks(large, 4) == expected


def test_tasks_leave_out_the_same_near_duplicates(large):
    with (large / "valid.txt").open() as valid:
        known = valid.read().split("\n\n")[0]
    (large / "near.txt").write_text(f"{known} again\n\n{(large / 'train.txt').read_text()}\n\n{known} and again")
    made = []
    for tasks in (1, 2, 4):
        arguments = ("--data.train_file=near.txt", "--data.deduplicate=near", f"--runtime.tasks={tasks}")
        assert run_stage(large, "prepare_corpus", *arguments)[0] == 0
        made.append(digests(large, "data/corpus", "metrics/corpus.json"))
    assert made[0] == made[1] == made[2]
    assert json.loads((large / "metrics/corpus.json").read_text())["sets"]["train"]["dropped"] >= 2
    assert run_stage(large, "prepare_corpus")[0] == 0


def test_a_killed_look_for_leakage_reads_nothing_again(large, monkeypatch):
    expected = digests(large, *MADE[:2])
    monkeypatch.setattr(measures, "measure_share", measuring)
    (large / KILL).touch()
    arguments = ("--runtime.tasks=3", "--runtime.executor_options={max_workers: 1}")
    status, _, err = run_stage(large, "prepare_corpus", *arguments)
    assert status == 1 and err.startswith("error: runtime.executor: local: a task was killed") and err.count("\n") == 1
    assert len(list(large.glob("data/.corpus.parts/*/*"))) == 3 and digests(large, *MADE[:2]) == expected

    def write_share(*_, **__):
        raise AssertionError("a share was read again")

    monkeypatch.setattr(splits, "write_share", write_share)
    assert run_stage(large, "prepare_corpus", *arguments)[0] == 0
    assert (large / "measured.txt").read_text().split() == ["0", "1", "1", "2"]
    assert not list(large.glob("data/.*.parts")) and not list(large.glob("data/.*.tmp"))
    assert digests(large, *MADE[:2]) == expected


def measuring(folder: Path, rank: int, tasks: int, **rest) -> None:
    logged(folder, rank, tasks, measure_share, "measured.txt", **rest)


def logged(folder: Path, rank: int, tasks: int, write: Callable = streams.write_part, log="ranks.txt", **rest) -> None:
    """A task that says that it works, and one of which is killed."""
    with Path(log).open("a") as ranks:
        ranks.write(f"{rank} ")
    if rank == 1 and Path(KILL).exists():
        Path(KILL).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, rank, tasks, **rest)


def test_a_killed_task_is_all_that_is_done_again(large, monkeypatch):
    expected = digests(large, "data/blocks")
    shutil.rmtree(large / "data/blocks")
    monkeypatch.setattr(streams, "write_part", logged)
    (large / KILL).touch()
    arguments = ("--runtime.tasks=4", "--runtime.executor_options={max_workers: 1}")
    status, _, err = run_stage(large, "tokenize_blocks", *arguments)
    assert status == 1 and err.startswith("error: runtime.executor: local: a task was killed") and err.count("\n") == 1
    assert not (large / "data/blocks").exists()
    assert run_stage(large, "tokenize_blocks", *arguments)[0] == 0
    assert (large / "ranks.txt").read_text().split() == ["0", "1", "1", "2", "3"]
    assert digests(large, "data/blocks") == expected


def test_what_a_task_finds_is_the_line_of_one_process(large):
    lines = []
    for tasks in (1, 2):
        status, _, err = run_stage(large, "tokenize_blocks", "--tokenizer.lossy=refuse", f"--runtime.tasks={tasks}")
        assert status == 1
        lines.append(err.splitlines()[-1])
    assert lines[0] == lines[1] and lines[0].startswith("error: data/corpus/train.arrow: document ")


def test_an_engine_that_is_not_there_is_one_line(large, monkeypatch):
    for executor, package in (("ray", "ray"), ("slurm", "datatrove")):
        monkeypatch.setitem(sys.modules, package, None)
        status, _, err = run_stage(large, "tokenize_blocks", "--runtime.tasks=2", f"--runtime.executor={executor}")
        assert status == 1 and err.count("\n") == 1 and f"`pip install {package}`" in err


def test_options_that_the_executor_does_not_have_are_one_line(large):
    arguments = ("--runtime.tasks=2", "--runtime.executor_options={partition: cpu}")
    status, _, err = run_stage(large, "tokenize_blocks", *arguments)
    assert status == 1 and err.count("\n") == 1 and "runtime.executor_options: " in err and "'partition'" in err


# What sbatch does with a job array, one task after the other.
SBATCH = """#!/bin/sh
for script; do :; done
grep -q '^#SBATCH --wait$' "$script" || exit 1
for i in $(seq 0 "$(sed -n 's/^#SBATCH --array=0-//p' "$script")"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" >> jobs.txt 2>&1 || exit 1
done
echo Submitted batch job 1
"""


def test_slurm(large, tmp_path):
    """The job array that datatrove makes, without a cluster: docs/scale.md shows one."""
    pytest.importorskip("datatrove")
    for name, text in (("sbatch", SBATCH), ("scontrol", "#!/bin/sh\necho $3\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    expected = digests(large, *MADE)
    options = "--runtime.executor_options={partition: cpu, time: '1:00:00', with_srun: false}"
    env = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert in_tasks(large, 3, "--runtime.executor=slurm", options, env=env) == expected


def test_ray_on_two_nodes(large, monkeypatch):
    Cluster = pytest.importorskip("ray.cluster_utils").Cluster
    monkeypatch.setenv("PYTHONPATH", OUTSIDE["PYTHONPATH"])

    expected = digests(large, *MADE)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        env = {"RAY_ADDRESS": cluster.address}
        assert in_tasks(large, 4, "--runtime.executor=ray", env=env) == expected
    finally:
        cluster.shutdown()
