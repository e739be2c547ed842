"""Kills a whole `dvc repro` at moments drawn by a seed, and compares what comes out with a run never disturbed.

    python tests/faults.py --points 50 --seed 1

A chain starts from nothing and is killed up to five times on its way through the stages: by one of
three signals, sent to the stage, to `dvc` and the stage, or to `dvc` alone, at a time drawn within
the stage's duration, or when training has written a drawn number of checkpoints. After some kills the
newest checkpoint is damaged too. Then `dvc repro` runs to the end, and every output must have the
bytes of the undisturbed run. It ends with the table of docs/reliability.md, and status 1 when
anything was lost.
"""

import argparse
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import digests, small_project

CHAIN = 5
# Training is where most is at stake, so it is drawn as often as three others together.
STAGES = [
    "sample_corpus",
    "prepare_corpus",
    "train_tokenizer",
    "tokenize_blocks",
    "train",
    "train",
    "train",
    "evaluate",
]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]  # SIGINT to dvc alone: it waits for its stage
TARGETS = ["the stage", "dvc and the stage", "dvc"]
DAMAGES = [
    "cut short",
    "empty",
    "with other bytes in it",
    "a pickle with code in it",
    "a checkpoint with code in it",
]
OUTPUTS = ["data/sample", "data/corpus", "data/blocks", "models/tokenizer", "models/gpt2", "metrics"]
TRAINING = [
    "model.dropout=0.1",
    "trainer.max_epochs=6",
    "trainer.accumulate_grad_batches=2",
    "runtime.checkpoint_every_n_steps=10",
    "runtime.enable_progress_bar=false",
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults.py", description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=50, help="how many kills")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed, how and when")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = small_project(Path(folder, "fresh"), *TRAINING)
        whole = Path(folder, "whole")
        shutil.copytree(fresh, whole)
        seconds = undisturbed(whole)
        lost = faults(
            fresh, Path(folder, "disturbed"), digests(whole, *OUTPUTS), seconds, arguments.points, arguments.seed
        )
    return 1 if lost else 0


def start(project: Path) -> subprocess.Popen:
    """`dvc repro` in a process group of its own; what it prints goes to a file beside the project."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }
    with log_file(project).open("w") as log:
        return subprocess.Popen(
            ["dvc", "repro"], cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def log_file(project: Path) -> Path:
    return project.with_suffix(".log")


def undisturbed(project: Path) -> dict[str, float]:
    """Runs a whole `dvc repro`; returns each stage's seconds."""
    dvc, began = start(project), {}
    while dvc.poll() is None:
        began.setdefault(running_stage(project), time.monotonic())
        time.sleep(0.01)
    assert dvc.returncode == 0, log_file(project).read_text()
    ends = [*list(began.values())[1:], time.monotonic()]
    return {stage: end - begin for (stage, begin), end in zip(began.items(), ends)}


def running_stage(project: Path) -> str:
    return (re.findall(r"Running stage '(\w+)'", log_file(project).read_text()) or ["dvc"])[-1]


def faults(fresh: Path, project: Path, expected: dict, seconds: dict, points: int, seed: int) -> int:
    """Disturbs `dvc repro` in chains; returns how many of them ended with other bytes.

    Args:
        fresh: a project not yet run.
        project: where a copy of it is made for each chain.
        expected: the `digests` of OUTPUTS of a run never disturbed.
        seconds: how long each stage takes.
        points: how many kills.
        seed: of all that is drawn.
    """
    draw, tried, by_hand, killed, chains, lost = random.Random(seed), Counter(), Counter(), 0, 0, 0
    while killed < points:
        shutil.rmtree(project, ignore_errors=True)
        shutil.copytree(fresh, project)
        chains += 1
        for stage in sorted(draw.choices(STAGES, k=min(CHAIN, points - killed)), key=STAGES.index):
            number, target = draw.choice(SIGNALS), draw.choice(TARGETS)
            moment, checkpoints = draw.uniform(0, seconds[stage] + 1), draw.choice([0, draw.randint(1, 12)])
            damage, full = draw.choice([None, *DAMAGES]), draw.random() < 0.3
            happened = kill(project, stage, number, target, moment, checkpoints if stage == "train" else 0)
            print(f"chain {chains}: {number.name} to {target} in {happened or 'nothing: all was done'}", flush=True)
            if not happened:
                break
            killed += 1
            tried[f"{number.name} to {target}"] += 1
            tried[f"in {happened}"] += 1
            if stage == "train" and target != "dvc":
                tried["full disk while a checkpoint is written"] += full and train_on_a_full_disk(project)
                tried[f"newest checkpoint {damage}"] += damage is not None and damage_newest(project, damage)
        status = finish(project, by_hand)
        found = digests(project, *OUTPUTS)
        if status or found != expected:
            lost += 1
            differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            print(f"chain {chains}: status {status}, differs: {differing}\n{log_file(project).read_text()}", flush=True)
    print(f"\n{killed} kills in {chains} runs of `dvc repro` (seed {seed})\n\n| what | how often |\n| --- | --- |")
    for what, count in sorted(tried.items()):
        print(f"| {what} | {count} |")
    for what, count in by_hand.items():
        print(f"| {what} | {count} |")
    print(f"| **runs that ended with other bytes than an undisturbed one** | **{lost}** |")
    return lost


def kill(project: Path, stage: str, number: int, target: str, moment: float, checkpoints: int) -> str | None:
    """Runs `dvc repro` and kills it when a stage has run for a time, or has written some checkpoints.

    Args:
        stage: counts from the start of this stage, or of the run when it was done before.
        number: the signal.
        target: one of TARGETS.
        moment: seconds.
        checkpoints: how many new ones to wait for instead; 0: none.
    Returns:
        the stage that was at work; None when all had ended before.
    """
    dvc, due, written = start(project), None, set()
    old = set(checkpoint_files(project))
    while dvc.poll() is None:
        now, running = time.monotonic(), running_stage(project)
        if due is None and (running == stage or running != "dvc" and STAGES.index(running) > STAGES.index(stage)):
            due = now + moment
        written |= set(checkpoint_files(project)) - old
        if len(written) >= checkpoints if checkpoints else due is not None and now >= due:
            break
        time.sleep(0.005)
    if dvc.poll() is not None:
        return None
    children = [child.pid for child in psutil.Process(dvc.pid).children(recursive=True)]
    victims = {"the stage": children or [dvc.pid], "dvc": [dvc.pid], "dvc and the stage": [dvc.pid, *children]}[target]
    for pid in victims:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended
    dvc.wait()  # where it alone was killed, its stage is still at work when the next one starts
    return running


def checkpoint_files(project: Path) -> list[Path]:
    return sorted((project / "models/checkpoints").glob("*/*.ckpt"))


# From the first checkpoint on, no file can grow to the size of one: a full disk that needs no root.
FULL_DISK = """
import resource
from stages import train
from stages.common import errors
from stages.training import checkpoints

save = checkpoints.AtomicCheckpointIO.save_checkpoint

def save_on_a_full_disk(*arguments, **more):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(*arguments, **more)

checkpoints.AtomicCheckpointIO.save_checkpoint = save_on_a_full_disk
errors.run(train.main)
"""


def train_on_a_full_disk(project: Path, *arguments: str) -> bool:
    """Runs the train stage where no checkpoint can be written; whether it came to write one."""
    command = [sys.executable, "-c", FULL_DISK, *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return False  # it had only to export what was trained
    assert done.returncode == 1 and "can't be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return True


class Hostile:
    """Its pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


def damage_newest(project: Path, kind: str) -> bool:
    """Damages the newest checkpoint; False when there is none."""
    files = checkpoint_files(project)
    if not files:
        return False
    file, raw = files[-1], files[-1].read_bytes()
    if kind == "cut short":
        file.write_bytes(raw[: len(raw) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "with other bytes in it":
        file.write_bytes(
            raw[: len(raw) // 2] + bytes(byte ^ 0xFF for byte in raw[len(raw) // 2 :][:64]) + raw[len(raw) // 2 + 64 :]
        )
    elif kind == "a pickle with code in it":
        file.write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"identity": Hostile()}, file)
    return True


def finish(project: Path, by_hand: Counter) -> int:
    """Runs `dvc repro` to its end; its exit status."""
    status = start(project).wait()
    if "JSON structure is corrupted" in log_file(project).read_text():
        (project / ".dvc/tmp/rwlock").unlink()  # killed while it wrote its lock: it asks for this
        by_hand["removed .dvc/tmp/rwlock by hand, as DVC's message says"] += 1
        status = start(project).wait()
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(project):
            process.wait()  # a stage that outlived its dvc
    assert not (project / "hostile").exists(), "code in a checkpoint was run"
    return status


if __name__ == "__main__":
    sys.exit(main())
