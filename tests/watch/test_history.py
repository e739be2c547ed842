"""What a training shows while it runs and leaves behind: DVCLive, TensorBoard, terminal, history."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from stages.training.data import permuted

import numpy as np
import pandas as pd
import pytest
from conftest import first_loss, in_terminal, run, run_stage, set_params
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

NAMES = ("loss", "lr", "grad_norm", "tokens_per_second")
TRAIN = (sys.executable, "-m", "stages.train")


def live(project: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(project / f"logs/dvclive/plots/metrics/{name}.tsv", sep="\t")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing came in five minutes"
        time.sleep(0.02)


def logged_step(project: Path) -> int:
    """The last step that DVCLive's summary names; 0 before the first."""
    try:
        return json.loads((project / "logs/dvclive/metrics.json").read_text()).get("step", 0)
    except (OSError, ValueError):
        return 0


@pytest.fixture(scope="module")
def killed(built, tmp_path_factory) -> Path:
    """A training stopped while DVC looked at it, killed well after a checkpoint, and finished."""
    project = tmp_path_factory.mktemp("killed") / "project"
    shutil.copytree(built, project)
    shutil.rmtree(project / "logs")
    # As often as the history has its points, so that the two can be compared.
    set_params(project, "runtime.log_every_n_steps=2", "runtime.checkpoint_every_n_steps=200")
    run("git", "commit", "-qam", "log often", cwd=project)
    training = subprocess.Popen(TRAIN, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: logged_step(project) >= 20)
    training.send_signal(signal.SIGSTOP)
    (project / "seen.json").write_text(run("dvc", "metrics", "show", "--json", cwd=project).stdout)
    (project / "plots.json").write_text(run("dvc", "plots", "show", "--json", cwd=project).stdout)
    training.send_signal(signal.SIGCONT)
    wait_for(lambda: logged_step(project) >= 220)
    assert training.poll() is None
    training.kill()
    training.wait()
    assert "going on from" in run(*TRAIN, cwd=project).stdout
    return project


def test_dvc_shows_a_training_live(killed):
    seen = json.loads((killed / "seen.json").read_text())[""]["data"]["logs/dvclive/metrics.json"]["data"]
    assert seen["step"] >= 20
    assert set(NAMES) <= set(seen)
    plots = json.loads((killed / "plots.json").read_text())["data"]
    assert {str(Path(f"logs/dvclive/plots/metrics/{name}.tsv")) for name in NAMES} <= {
        key.split("::")[0] for key in plots
    }


def test_live_files_stay_out_of_the_way_afterwards(killed):
    """Neither DVC nor Git sees them once the training is done."""
    changed = run("git", "status", "--short", "--untracked-files=all", cwd=killed).stdout
    assert "logs/" not in changed
    assert "dvclive" not in run("dvc", "metrics", "show", "--json", cwd=killed).stdout


def test_live_files_of_a_resumed_run_are_whole(killed):
    history = pd.read_csv(killed / "metrics/train.csv").set_index("step")
    for name, column in (("loss", "train_loss"), ("lr", "lr"), ("grad_norm", "grad_norm")):
        table = live(killed, name).set_index("step")[name]
        assert list(table.index) == list(range(2, 291, 2))
        assert table.to_numpy() == pytest.approx(history[column].to_numpy(), rel=1e-5)
    valid = pd.read_csv(killed / "metrics/valid.csv")
    table = live(killed, "valid_loss")
    assert list(table.step) == list(valid.step)
    assert table.valid_loss.to_numpy() == pytest.approx(valid.valid_loss.to_numpy())
    assert (live(killed, "tokens_per_second").tokens_per_second > 0).all()


def test_tensorboard_of_a_resumed_run_has_every_step_once(killed):
    (folder,) = [path for path in (killed / "logs").iterdir() if path.name != "dvclive"]
    assert len(list(folder.glob("events.*"))) == 2
    events = EventAccumulator(str(folder)).Reload()
    history = pd.read_csv(killed / "metrics/train.csv")
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(history.step)
    assert [event.value for event in scalars] == pytest.approx(list(history.train_loss), rel=1e-5)


def test_tensorboard_names_a_run_and_lists_its_settings(killed):
    """What its HPARAMS tab reads."""
    (folder,) = [path for path in (killed / "logs").iterdir() if path.name != "dvclive"]
    assert re.fullmatch("2x16-adamw-0.004-seed1-[0-9a-f]{8}", folder.name)
    events = EventAccumulator(str(folder)).Reload()
    start = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    told = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.session_start_info.hparams.items()}
    assert (told["optimizer/lr"], told["model/n_layer"], told["seed_everything"]) == (4e-3, 2, 1)
    (best,) = events.Scalars("best_valid_loss")
    assert best.value == pytest.approx(pd.read_csv(killed / "metrics/valid.csv").valid_loss.min())


def test_what_the_first_step_does_not_need_is_loaded_after_it(project):
    """DVC when it has a figure to show, what holds text out never, and no clients of cloud stores."""
    (project / "probe_modules.py").write_text(
        "import sys\nimport pytorch_lightning as pl\n\nclass Loaded(pl.Callback):\n"
        "    def on_train_batch_start(self, *_):\n        print('loaded:', *sys.modules)\n"
    )
    callbacks = json.dumps([{"class_path": "probe_modules.Loaded"}])
    words = (*TRAIN, "--trainer.callbacks", callbacks, "--trainer.max_epochs", "null", "--trainer.max_steps", "1")
    (loaded,) = re.findall("loaded: (.*)", run(*words, cwd=project).stdout)
    assert "torch.utils.tensorboard" in loaded.split()
    assert not {"dvc", "dvclive", "stages.text.splits", "s3fs", "aiohttp"} & set(loaded.split())
    assert logged_step(project) == 1


def test_gradient_norm_equals_an_independent_computation(project):
    assert run_stage(project, "train", "--runtime.log_every_n_steps", "1", "--trainer.max_steps", "3")[0] == 0
    tokens = np.load(project / "data/blocks/train.npy").tolist()
    blocks = permuted(np.arange(4), (len(tokens) - 1) // 16, [1, 0])
    loss, model = first_loss(project, [tokens[i * 16 : i * 16 + 17] for i in blocks])
    loss.backward()
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().item()
    assert live(project, "loss").loss[0] == pytest.approx(loss.item(), rel=1e-5)
    assert live(project, "grad_norm").grad_norm[0] == pytest.approx(norm, rel=1e-4)


def test_in_a_terminal_and_in_a_pipe(project, warm):
    """One line that is written over, lines for validations, and a table; no control characters in a pipe."""
    piped = warm("dvc", "repro", "--force", "--single-item", "train", cwd=project)
    assert "\r" not in piped.stdout + piped.stderr
    assert "tokens/s " in piped.stdout
    figures = json.loads((project / "metrics/eval.json").read_text())["valid"]
    assert re.search(rf"^step 290: valid_loss {figures['loss']:.4f}, valid_ppl", piped.stdout, re.M)
    assert re.search(rf"^valid ppl +{figures['ppl']:.2f}$", piped.stdout, re.M)
    assert re.search(rf"^bits per byte +{figures['bits_per_byte']:.4f}$", piped.stdout, re.M)

    shutil.rmtree(project / "models/checkpoints")  # else there is nothing left to train
    shown = in_terminal(100, "dvc", "repro", "--force", "--single-item", "train", cwd=project)
    bars = re.findall(r"training: +\d+%.*? \d+/290 .*?loss \d\.\d{3}, valid \d\.\d{3}, [\d,]+ tokens/s", shown)
    assert bars
    assert max(len(line) for line in re.split(r"[\r\n]+", shown) if line.startswith("training:")) <= 100
    # Each validation's line stands on a line of its own.
    assert re.search(r"[\r\n]step 290: valid_loss [\d.]+, valid_ppl [\d.]+\r\n", shown)


def test_git_without_a_commit(project, warm):
    """DVCLive fails there; the training doesn't."""
    shutil.rmtree(project / ".git")
    run("git", "init", "-q", cwd=project)
    done = warm("stages.train", "--trainer.max_epochs", "null", "--trainer.max_steps", "4", cwd=project)
    assert "note: DVCLive can't follow this training: Empty git repo" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(project.glob("logs/*/events*"))  # TensorBoard has it


def test_loggers_by_class_path_have_what_tensorboard_has(project):
    """Lightning's for CSV files, and a user's own."""
    csv = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "logs/csv"}}
    loggers = [csv, {"class_path": "probe.Lines", "init_args": {"file": "logs/lines.jsonl"}}]
    arguments = ["--trainer.logger", json.dumps(loggers), "--trainer.max_steps", "6"]
    shutil.rmtree(project / "models/checkpoints", ignore_errors=True)
    assert run_stage(project, "train", *arguments, "--runtime.log_every_n_steps", "2")[0] == 0
    (file,) = project.glob("logs/csv/**/metrics.csv")
    for table in (pd.read_csv(file), pd.read_json(project / "logs/lines.jsonl", lines=True)):
        assert list(table.dropna(subset="loss").step) == [2, 4, 6]
        assert table.dropna(subset="loss").loss.tolist() == pytest.approx(live(project, "loss").loss.tolist())
        assert len(table.dropna(subset="valid_loss")) > 0
