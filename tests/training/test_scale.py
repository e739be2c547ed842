"""Several processes train what one trains, and fail, stop and go on as one. CPU, gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from stages import train
from stages.common.errors import UserError
from stages.training import checkpoints

import faults
import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.torch
import torch
from conftest import ROOT, run, run_stage, set_params, train_inputs
from forks import stopped_at, together

TESTS = ROOT / "tests"
TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp")
FSDP = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=fsdp")

# Python runs it at the start of every process: it notes what any but the first one writes in the project.
WATCH = """
import os, sys
if os.environ.get("LOCAL_RANK", "0") != "0":
    def watch(event, arguments, here=os.getcwd(), log=os.environ["WATCH_LOG"]):
        writes = event == "open" and set(str(arguments[1])) & set("wax+")
        if writes or event in ("os.rename", "os.mkdir", "os.remove"):
            path = os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes)) else ""
            if path.startswith(here) and "__pycache__" not in path and path != log:
                os.write(watch.file, f"{event} {path}\\n".encode())
    watch.file = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(watch.file, b"watching\\n")
    sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def alone(built, warm, tmp_path_factory) -> Path:
    """The project trained on the CPU by one process."""
    project = tmp_path_factory.mktemp("alone") / "project"
    shutil.copytree(built, project)
    set_params(project, "trainer.accelerator=cpu")
    warm("stages.train", cwd=project)
    return project


def same_training(project: Path, expected: Path) -> None:
    for name, tolerance in (("train", 1e-4), ("valid", 1e-6)):
        got, wanted = (pd.read_csv(folder / f"metrics/{name}.csv") for folder in (project, expected))
        assert list(got.columns) == list(wanted.columns)
        assert list(got["tokens"]) == list(wanted["tokens"])
        np.testing.assert_allclose(got, wanted, rtol=tolerance)
    got, wanted = (
        safetensors.torch.load_file(folder / "models/gpt2/model.safetensors") for folder in (project, expected)
    )
    assert got.keys() == wanted.keys()
    for key in wanted:
        if key.endswith("c_attn.bias"):  # softmax ignores the bias of keys: its gradient is rounding alone
            got[key], wanted[key] = (torch.stack(w[key].chunk(3))[::2] for w in (got, wanted))
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-4)


def start(*command: str, cwd: Path, **environment: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(TESTS), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)


def training_processes(parent: subprocess.Popen) -> list[psutil.Process]:
    """The processes that run the train stage, in the order of their ranks on this machine."""
    processes = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]
    processes = [p for p in processes if p.cmdline()[1:3] in (["-m", "stages.train"], ["-u", "-m"])]
    return sorted(processes, key=lambda p: int(p.environ().get("LOCAL_RANK", 0)))


def wait_for_checkpoint(project: Path, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(project.glob("models/checkpoints/*/step-*.ckpt")):
        assert all(p.poll() is None for p in processes), processes[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_are_one_training(project, alone, warm, tmp_path):
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    log = tmp_path / "written.txt"
    set_params(project, *TWO)
    environment = {"PYTHONPATH": str(tmp_path / "watch"), "WATCH_LOG": str(log)}
    process = start(sys.executable, "-m", "stages.train", cwd=project, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    same_training(project, alone)
    assert log.read_text() == "watching\n"
    for line in ("GPT-2 with", "step 290: valid_loss", "best step"):
        assert output.count(line) == 1, output
    assert "warn" not in output.lower()
    assert json.loads((project / "metrics/run.json").read_text())["processes"] == 2
    warm("stages.evaluate", cwd=project)
    loss = json.loads((project / "metrics/eval.json").read_text())["valid"]["loss"]
    assert loss == pytest.approx(pd.read_csv(alone / "metrics/valid.csv")["valid_loss"].min(), abs=1e-6)


def test_two_processes_plan_with_different_clocks(project):
    set_params(project, *TWO)
    (project / "clocks.py").write_text(
        "import os\nfrom stages.common.errors import run\nfrom tools import plan\n"
        "plan.SECONDS = 0.0 if os.environ.get('LOCAL_RANK') else 2.0\nrun(plan.main)\n"
    )
    process = start(sys.executable, "clocks.py", cwd=project)
    output, _ = process.communicate(timeout=120)  # one alone would wait for the other
    assert process.returncode == 0 and output.count("minutes") == 1, output


def test_killed_process_ends_the_run_and_one_goes_on(project, alone, warm):
    set_params(project, *TWO, "runtime.checkpoint_every_n_steps=20")
    dvc = start("dvc", "repro", "train", cwd=project)
    wait_for_checkpoint(project, dvc)
    processes = training_processes(dvc)
    assert len(processes) == 2
    processes[1].kill()
    output, _ = dvc.communicate(timeout=300)
    assert dvc.returncode != 0
    assert output.count("error: one of the 2 processes of this training has ended") == 1, output
    assert "Traceback" not in output
    psutil.wait_procs(processes, timeout=20)
    assert not any(p.is_running() for p in processes)

    set_params(project, "trainer.devices=1", "trainer.strategy=auto")
    assert "going on from models/checkpoints" in warm("dvc", "repro", "train", cwd=project).stdout
    same_training(project, alone)


@pytest.mark.parametrize("strategy, precision", [("ddp", "32-true"), ("fsdp", "bf16-true")])
def test_a_resume_has_the_same_bytes_and_shares_the_work(project, built, tmp_path, strategy, precision):
    """Of three numbers the order of a sum matters, and DDP would change it after a process's first step."""
    set_params(
        project,
        *("trainer.accelerator=cpu", "trainer.devices=3", f"trainer.strategy={strategy}"),
        *("optimizer.batch_size=6", "optimizer.name=muon", f"trainer.precision={precision}"),
        *("trainer.max_steps=8", "trainer.accumulate_grad_batches=2"),
        "runtime.checkpoint_every_n_steps=3",
        "trainer.callbacks=[{class_path: probe.Shares, init_args: {folder: shares}}, {class_path: probe.FewPoints}]",
    )
    whole = shutil.copytree(project, tmp_path / "whole")
    statuses, output = together(whole, 3)
    assert statuses == [0, 0, 0], output
    output = together(project, 3, stopped_at(5))[1]
    assert "stopped by SIGTERM at step 5" in output, output
    assert faults.damage_newest(project, "with other bytes in it")
    statuses, output = together(project, 3)
    assert statuses == [0, 0, 0] and output.count("step-000000005.ckpt is passed over") == 1, output
    assert "step-000000003.ckpt\n" in output, output
    for name in ("models/gpt2/model.safetensors", "metrics/train.csv", "metrics/valid.csv"):
        assert (project / name).read_bytes() == (whole / name).read_bytes(), name

    made, wanted = (safetensors.torch.load_file(p / "models/gpt2/model.safetensors") for p in (project, built))
    assert {name: weight.shape for name, weight in made.items()} == {name: w.shape for name, w in wanted.items()}

    shares = [json.loads(file.read_text()) for file in sorted(whole.glob("shares/*.json"))]
    # Two layers of four matrices, eight steps: each is one process's work, and all have some.
    assert len(shares) == 3 and sum(share["matrices"] for share in shares) == 8 * 8
    assert all(share["matrices"] for share in shares)
    if strategy == "fsdp":
        for share in shares:
            # Gradients pass between processes at the last batch of a step alone, one message for each block and
            # one for the rest, in float32; while a block computes, the others are in parts.
            assert share["reduced"] == [[], ["torch.float32"] * 3] * 8
            assert set(share["whole"]) == {1}
        parameters = json.loads((whole / "metrics/run.json").read_text())["parameters"]
        assert sum(share["held"] for share in shares) == parameters
        assert max(share["held"] for share in shares) < 1.2 * parameters / 3


def test_the_first_process_alone_reads_a_checkpoint_through(monkeypatch):
    monkeypatch.setenv(checkpoints.SAID, "")
    monkeypatch.delenv(checkpoints.SAID)
    calls, found = [], Path("models/checkpoints/a/step-000000002.ckpt")
    me = SimpleNamespace(newest_whole=lambda: calls.append(1) or found)
    started = SimpleNamespace(world_size=2)  # the second one has the first one's environment
    assert [checkpoints.Checkpoints.newest(me, started) for _ in range(2)] == [found, found]
    assert len(calls) == 1


def test_a_large_checkpoint_is_written_while_training_goes_on(built, tmp_path, monkeypatch):
    """Each but the last is held back until a step later, and yet holds what it held when it was due."""
    arguments = ["--trainer.max_steps=6", "--runtime.checkpoint_every_n_steps=2", "--optimizer.name=muon"]
    found, in_time, later = [], [], threading.Event()
    write, end = checkpoints.write, train.History.on_train_batch_end

    def late(checkpoint: dict, path: Path) -> None:
        in_time.append(path.name == "final.ckpt" or later.wait(60))
        write(checkpoint, path)

    def batch_ends(history, trainer, *rest) -> None:
        end(history, trainer, *rest)
        (later.set if trainer.global_step % 2 else later.clear)()

    for aside in (False, True):
        project = train_inputs(built, tmp_path / str(aside))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "LONG_VALIDATION_SECONDS", float("nan"))  # none is long
            if aside:
                patch.setattr(checkpoints, "ASIDE_BYTES", 0)
                patch.setattr(checkpoints, "write", late)
                patch.setattr(train.History, "on_train_batch_end", batch_ends)
            assert run_stage(project, "train", *arguments)[0] == 0
        files = sorted(project.glob("models/checkpoints/*/*.ckpt"))
        assert [file.name for file in files] == ["final.ckpt", "step-000000002.ckpt", "step-000000004.ckpt"]
        found.append([checkpoints.mapped(file) for file in files])
    assert in_time == [True] * 3
    for one, other in zip(*found, strict=True):
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
            torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_two_nodes_stop_together_and_go_on(project, alone):
    """torchrun on two "machines" that share the project's folder; SIGTERM reaches only one of them."""
    set_params(project, "trainer.accelerator=cpu", "trainer.num_nodes=2", "runtime.checkpoint_every_n_steps=20")

    def two_nodes() -> list[subprocess.Popen]:
        # Below the ports that the system gives to whoever asks for any.
        address = ["--master-addr", "127.0.0.1", "--master-port", str(20_000 + os.getpid() % 10_000)]
        command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *address]
        return [start(*command, "--node-rank", str(i), "-m", "stages.train", cwd=project) for i in range(2)]

    nodes = two_nodes()
    wait_for_checkpoint(project, *nodes)
    training_processes(nodes[1])[0].send_signal(signal.SIGTERM)
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert nodes[0].returncode != 0
    assert "stopped by SIGTERM at step" in outputs[0] and "stopped by" not in outputs[1], outputs

    nodes = two_nodes()
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "going on from" in outputs[0] and "going on from" not in outputs[1], outputs
    same_training(project, alone)
    run("dvc", "commit", "--force", "train", cwd=project)
    assert "Stage 'train' didn't change" in run("dvc", "repro", "train", cwd=project).stdout


def test_fsdp_is_one_training_and_other_processes_go_on_with_it(project, alone):
    """By one process until SIGTERM, then by two under FSDP until SIGTERM, then by two under DDP."""
    for strategy, count, stop_at in (("auto", 1, 100), ("fsdp", 2, 200), ("ddp", 2, 0)):
        set_params(project, "trainer.accelerator=cpu", f"trainer.strategy={strategy}")
        statuses, output = together(project, count, stopped_at(stop_at))
        assert f"stopped by SIGTERM at step {stop_at}" in output if stop_at else not any(statuses), output
    assert "going on from" in output
    same_training(project, alone)
    for name in ("config.json", "tokenizer.json"):
        assert (project / "models/gpt2" / name).read_bytes() == (alone / "models/gpt2" / name).read_bytes()


@pytest.mark.parametrize(
    "settings, message",
    [
        ([*TWO, "optimizer.batch_size=3"], "optimizer.batch_size: 3 can't be shared evenly by 2 processes"),
        (["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_spawn"], "set auto, ddp or fsdp"),
        ([*FSDP, "trainer.precision=16-mixed"], "does not support .*16-mixed"),
        ([*FSDP, "trainer.callbacks=[{class_path: EMAWeightAveraging}]"], "needs whole weights"),
    ],
)
def test_impossible_combinations(project, monkeypatch, settings, message):
    set_params(project, *settings)
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(UserError, match=message) as error:
        train.main()
    assert "\n" not in str(error.value)


def test_other_number_of_processes_than_set_is_said_once(project, tmp_path):
    """By the first, although the other one has found it long before and its launcher stops all when one ends."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(3 * (os.environ.get('LOCAL_RANK') == '0'))")
    words = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "stages.train")
    process = start(*words, cwd=project, PYTHONPATH=str(tmp_path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("error: trainer.devices 1 on trainer.num_nodes 1 are 1 processes, but 2 were started") == 1
