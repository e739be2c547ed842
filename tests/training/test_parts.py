"""Large checkpoints under FSDP: folders that processes write together while training goes on. CPU, gloo."""

import json
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

from stages.common import checkpoint_files
from stages.training import checkpoints, sharded

import faults
import pytest
import safetensors.torch
import torch
from conftest import run_stage, set_params, train_inputs
from forks import after_step, stopped_at, together
from test_resume import made

SETTINGS = [
    *("trainer.accelerator=cpu", "trainer.max_steps=8", "trainer.val_check_interval=2", "optimizer.name=muon"),
    "optimizer.betas=[0.95, 0.95]",  # a momentum in which rounding stays small
    *("optimizer.batch_size=6", "runtime.checkpoint_every_n_steps=2", "runtime.enable_progress_bar=false"),
]


@pytest.fixture(scope="module", autouse=True)
def large():
    """Every checkpoint is one that is written while training goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "ASIDE_BYTES", 0)
        yield


def held_back(name: str, step: int) -> None:
    """Makes this process write its part of a checkpoint only after a later step."""
    later, write = threading.Event(), sharded.write_parts

    def late(parts, rest, path, group):
        assert path.name != name or later.wait(60)
        write(parts, rest, path, group)

    sharded.write_parts = late
    after_step(step, later.set)


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory) -> Path:
    project = train_inputs(built, tmp_path_factory.mktemp("fresh") / "project")
    set_params(project, *SETTINGS, "trainer.strategy=fsdp")
    return project


@pytest.fixture(scope="module")
def whole(fresh, tmp_path_factory) -> Path:
    """Trained by two processes, never stopped."""
    project = shutil.copytree(fresh, tmp_path_factory.mktemp("whole") / "project")
    statuses, log = together(project, 2)
    assert statuses == [0, 0], log
    return project


@pytest.fixture(scope="module")
def stopped(fresh, tmp_path_factory) -> Path:
    """Stopped by SIGTERM at step 3."""
    project = shutil.copytree(fresh, tmp_path_factory.mktemp("stopped") / "project")
    statuses, log = together(project, 2, stopped_at(3, rank=1))
    assert statuses == [128 + signal.SIGTERM, 0] and "stopped by SIGTERM at step 3" in log, log
    return project


@pytest.fixture
def project(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "project")


def newest(project: Path) -> Path:
    return faults.checkpoint_files(project)[-1]


def same_but_for_rounding(project: Path, whole: Path) -> None:
    got, wanted = (safetensors.torch.load_file(folder / "models/gpt2/model.safetensors") for folder in (project, whole))
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=2e-4)


def test_killed_and_resumed_it_ends_with_the_same_bytes(project, whole):
    folder = newest(project)
    assert {file.name for file in folder.iterdir()} == {
        *("__0_0.distcp", "__1_0.distcp", ".metadata", "rest.pt", "checksums.json"),
    }
    rest = checkpoint_files.mapped(folder)
    assert len(rest["identity"]) == 64 and rest["gpt2_config"]["n_layer"] == 2
    assert set(map(type, rest["state_dict"].values())) == {str}

    def prepare(rank: int) -> None:
        held_back("step-000000004.ckpt", step=5)

        def killed() -> None:
            while not folder.with_name("step-000000004.ckpt").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

        if rank == 1:
            after_step(6, killed)

    statuses, log = together(project, 2, prepare)
    assert statuses == [1, -signal.SIGKILL], log
    assert log.count("error: one of the 2 processes of this training has ended") == 1 and "Traceback" not in log, log
    assert "step-000000003.ckpt\n" in log
    unfinished = folder.with_name(".step-000000008.ckpt.tmp")
    unfinished.mkdir(exist_ok=True)
    (unfinished / "__0_0.distcp").touch()
    statuses, log = together(project, 2)
    assert statuses == [0, 0] and "step-000000004.ckpt\n" in log, log
    assert made(project) == made(whole)
    assert not unfinished.exists()
    names = [file.name for file in sorted(folder.parent.glob("*.ckpt"))]  # one may still be about to be deleted
    assert names == ["final.ckpt", *(f"step-{step:09d}.ckpt" for step in (3, 4, 6))]


def test_a_longer_training_goes_on_from_the_trunk(fresh, tmp_path):
    """By the default schedule."""
    short, longer = (shutil.copytree(fresh, tmp_path / name) for name in ("short", "longer"))
    for project, steps in ((short, 8), (longer, 12)):
        set_params(project, "optimizer.schedule=wsd", "optimizer.decay_fraction=0.5", f"trainer.max_steps={steps}")
        statuses, log = together(project, 2)
        assert statuses == [0, 0] and "going on" not in log, log
    set_params(short, "trainer.max_steps=12")
    statuses, log = together(short, 2)
    assert statuses == [0, 0] and "of the trunk: 8 steps to train in place of 12" in log, log
    assert made(short) == made(longer)


def test_others_go_on_with_it_where_it_is_not_damaged(project, whole, tmp_path):
    one = shutil.copytree(project, tmp_path / "one")
    part = newest(project) / "__1_0.distcp"
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    statuses, log = together(project, 3)
    assert statuses == [0, 0, 0], log
    said = "step-000000003.ckpt is passed over: __1_0.distcp doesn't match its checksum"
    assert log.count(said) == 1 and "step-000000002.ckpt\n" in log, log
    same_but_for_rounding(project, whole)

    set_params(one, "trainer.strategy=auto")
    statuses, log = together(one, 1)
    assert statuses == [0] and "step-000000003.ckpt\n" in log, log
    same_but_for_rounding(one, whole)
    assert newest(one).is_file()


def test_it_is_measured_listed_and_deleted(built, whole, tmp_path):
    """At the end the last weights are the best."""
    (final,) = whole.glob("models/checkpoints/*/final.ckpt")
    status, figures, err = run_stage(built, "evaluate", "--model", str(final))
    assert status == 0, err
    assert run_stage(built, "evaluate", "--model", str(whole / "models/gpt2"))[1] == figures
    project = shutil.copytree(whole, tmp_path / "project")
    status, listed, err = run_stage(project, "tools.checkpoints", "--clean")
    size = sum(file.stat().st_size for file in whole.glob("models/checkpoints/*/*/*")) / 2**20
    assert status == 0 and f": finished, {size:.1f} MiB, deleted" in listed, (listed, err)
    assert not list(project.glob("models/checkpoints/*/"))


def test_the_model_of_a_finished_run_is_exported_again(whole, tmp_path):
    project = shutil.copytree(whole, tmp_path / "project")
    shutil.rmtree(project / "models/gpt2")
    statuses, log = together(project, 2)
    assert statuses == [0, 0] and "final.ckpt\n" in log, log
    assert made(project) == made(whole)


@pytest.mark.parametrize("damage", ["code", "missing"])
def test_what_is_no_checkpoint_is_refused_in_a_line(built, whole, tmp_path, damage):
    folder = shutil.copytree(next(whole.glob("models/checkpoints/*/final.ckpt")), tmp_path / "x.ckpt")
    if damage == "code":
        (folder / ".metadata").write_bytes(pickle.dumps(faults.Hostile()))
    else:
        (folder / "__1_0.distcp").unlink()
    status, out, err = run_stage(built, "evaluate", "--model", str(folder))
    assert status == 1 and "is no checkpoint of this project's train stage" in err and err.count("\n") == 1, err
    assert not (built / "hostile").exists()


def test_a_full_disk_is_said_in_a_line(fresh, tmp_path):
    """Only the second process can't write."""
    project = shutil.copytree(fresh, tmp_path / "project")

    def prepare(rank: int) -> None:
        import resource

        if rank == 1:
            after_step(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))

    statuses, log = together(project, 2, prepare)
    assert statuses == [1, 1] and "Traceback" not in log, log
    assert log.count("error: ") == 1 and "step-000000002.ckpt: can't be written" in log, log
    assert not list(project.glob("models/checkpoints/*/*"))


def test_a_checkpoint_of_the_other_kind_gives_way(tmp_path):
    file, folder, path = tmp_path / "file", tmp_path / "folder", tmp_path / "step-000000001.ckpt"
    for new in (file, folder, file, folder, folder):
        file.write_text(json.dumps({}))
        folder.mkdir(exist_ok=True)
        (folder / "rest.pt").touch()
        checkpoint_files.put(new, path)
        assert path.is_dir() == (new == folder) and not new.exists()
    checkpoint_files.delete(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
