"""torchrun and srun start a stage several times: the same figures, one writer, one line where one fails. CPU, gloo.

tests/clusters.py does the same on two hosts, with a real SLURM.
"""

import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from stages.common import processes
from stages.model import scoring
from stages.model.gpt2 import load_model
from stages.text.streams import load_split

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, digests, run_stage, set_params

FIGURES = [f"metrics/{name}" for name in ("eval.json", "details.json", "documents.csv", "loss_by_position.csv")]

# Python runs it at the start of each process: it gets a signal as it opens the test split, after all have joined.
SIGNAL = """
import os, sys
number = os.environ.get("SIGNAL_" + os.environ.get("SLURM_PROCID", ""))
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith("test.npy"):
        os.kill(os.getpid(), int(number))
if number:
    sys.addaudithook(watch)
"""


def start(*command: str, cwd: Path, **environment: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "tests"), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


def torchrun(*words: str, cwd: Path, **environment: str) -> subprocess.Popen:
    return start("torchrun", "--standalone", *words, cwd=cwd, **environment)


def srun(project: Path, *words: str, **environment: str) -> list[subprocess.Popen]:
    """Two processes with what srun tells each of them; the port is below those that the system gives to anyone."""
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 9_000)}
    return [
        start(sys.executable, *words, cwd=project, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job, **environment)
        for i in range(2)
    ]


def test_figures_keep_their_bytes_on_any_number_of_processes(project, tmp_path):
    """With a batch size at which neither two nor three processes have equally many batches."""
    set_params(project, "evaluate.batch_size=7", "evaluate.stride=5")
    two, three = (shutil.copytree(project, tmp_path / name) for name in ("two", "three"))
    processes = [
        *srun(two, "-m", "stages.evaluate"),
        torchrun("--nproc-per-node=3", "-m", "stages.evaluate", cwd=three),
    ]
    status, _, err = run_stage(project, "evaluate")
    assert status == 0, err
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    for folder in (two, three):
        assert digests(folder, "metrics") == digests(project, "metrics")
    assert outputs[1] == "" and outputs[0] == outputs[2] and outputs[0].count("figures: metrics/eval.json") == 1


def test_sums_are_the_same_in_any_order(built, monkeypatch):
    """Of losses with digits from 2**-43 to 2**15, which sums in float64 depend on. Threads are the processes."""
    model, split = load_model(built / "models/gpt2"), load_split("test", built / "data/blocks")
    here, barrier = threading.local(), None

    def gather(mine):
        seen[here.rank] = mine
        barrier.wait(60)
        everyones = list(seen)
        barrier.wait(60)
        return everyones

    def sums(rank: int, batch_size: int = 7) -> list:
        here.rank = rank
        settings = SimpleNamespace(batch_size=batch_size, precision="32-true")
        return [table.to_csv() for table in scoring.losses_of(model, split, 16, settings)]

    def odd_losses(_, batch):
        scored.append(torch.exp2(batch[:, 1:] * 7919 % 3500 / 100 - 20))
        return scored[-1]

    scored = []
    monkeypatch.setattr(scoring.gpt2, "token_losses", odd_losses)
    alone = sums(0)
    documents = pd.read_csv(io.StringIO(alone[0]))
    every = torch.cat([batch.flatten() for batch in scored]).tolist()
    assert len(every) == len(split.tokens) - 1 == documents.tokens.sum()
    assert documents.nll.sum() == pytest.approx(math.fsum(every), rel=0, abs=len(every) * scoring.UNIT)
    ends = np.flatnonzero(split.tokens[:] == split.end_of_text)
    nll = [math.fsum(every[start:end]) for start, end in itertools.pairwise(ends)]
    assert documents.nll.tolist() == pytest.approx(nll, rel=1e-9, abs=1e-4)
    assert alone == sums(0, batch_size=6)
    monkeypatch.setattr(processes, "gather", gather)
    for size in (2, 3):
        seen, barrier = [None] * size, threading.Barrier(size)
        monkeypatch.setattr(processes, "launched", lambda size=size: (here.rank, here.rank, size))
        with ThreadPoolExecutor(size) as pool:
            assert list(pool.map(sums, range(size))) == [alone] * size


@pytest.mark.parametrize(
    "signals, status, line",
    [
        ({"SIGNAL_1": "9"}, 1, "error: one of the 2 processes of this evaluation has ended, or can't be reached"),
        ({"SIGNAL_0": "15", "SIGNAL_1": "15"}, 143, "this evaluation was stopped by SIGTERM: one of its 2 processes"),
    ],
)
def test_one_process_that_fails_ends_all_with_one_line(project, tmp_path, signals, status, line):
    (tmp_path / "sitecustomize.py").write_text(SIGNAL)
    before = digests(project, "metrics")
    processes = srun(project, "-m", "stages.evaluate", PYTHONPATH=str(tmp_path), **signals)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert outputs[0].startswith(line) and outputs[0].count("\n") == 1 and outputs[1] == "", outputs
    assert processes[0].returncode == status and processes[1].returncode != 0
    assert digests(project, "metrics") == before


def test_a_batch_script_is_one_process(project, monkeypatch):
    """It has the variables of the whole job, but nothing has started it several times."""
    for name, value in (("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "1")):
        monkeypatch.setenv(name, value)
    before = digests(project, *FIGURES)
    status, _, err = run_stage(project, "evaluate")
    assert status == 0, err
    assert digests(project, *FIGURES) == before


def test_torchrun_starts_a_training_again(project):
    """The first process is killed, and all go on from the checkpoint before it."""
    set_params(
        project,
        *("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=8"),
        *("trainer.callbacks=[{class_path: probe.Die}]", "runtime.checkpoint_every_n_steps=2"),
    )
    process = torchrun("--nproc-per-node=2", "--max-restarts=1", "-m", "stages.train", cwd=project, DIE="0")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("going on from") == 1 and "8 of 8" in output, output
