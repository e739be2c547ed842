"""Projects to test on: copies of this checkout with small text and a small model."""

import contextlib
import fcntl
import gc
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

# One thread a process: the suite runs three at a time, and small models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

SMALL = [
    "tokenizer.vocab_size=300",
    "model.block_size=16",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "optimizer.name=adamw",
    "optimizer.lr=4e-3",
    "optimizer.batch_size=4",
    "optimizer.betas=[0.9, 0.95]",
    "optimizer.schedule=cosine",
    "optimizer.decay_fraction=0.2",
    "optimizer.min_lr_ratio=null",
    "optimizer.num_warmup_steps=2",
    "trainer.max_epochs=2",
    "trainer.precision=32-true",  # what is compared with an independent computation is compared to its last digits
    "generate.max_new_tokens=8",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def run(*command: str, cwd: Path, check: bool = True, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Runs a real command; its output is in the assertion message when it fails."""
    if command[0] == "python":
        command = (sys.executable, *command[1:])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(env or {})}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, **kwargs)
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def in_terminal(columns: int, *command: str, cwd: Path) -> str:
    """Runs a command in a terminal this wide; returns what it writes there. DVC's pager wraps nothing."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"TERM": "xterm", "DVC_PAGER": "cat"}
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            break
    assert process.wait() == 0, shown
    return shown.decode()


def run_stage(project: Path, name: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a stage in this process, which saves its start: exit status, standard output and error."""
    import importlib

    from stages.common.errors import run as run_main

    main = importlib.import_module(name if "." in name else f"stages.{name}").main
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(project),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr("sys.argv", [name, *arguments])
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code or 0
            if isinstance(status, str):  # what Python itself does with it
                print(status, file=err)
                status = 1
        finally:
            gc.collect()  # of what came since its start: frees the lock of a training, for which other processes wait
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def first_loss(project: Path, windows: list[list[int]]):
    """The loss of the model that a training of this project starts from, in float32 with a graph, and the model.

    Args:
        windows: token ids, each input one before its target.
    """
    from stages.common.params import load
    from stages.model import gpt2

    import pytorch_lightning as pl
    import torch

    with contextlib.chdir(project):
        settings = load("stages.train", "", argv=[])
    meta = json.loads((project / "data/blocks/meta.json").read_text())
    pl.seed_everything(settings.seed_everything, verbose=False)
    model = gpt2.new_model(settings.model, meta["vocab_size"], meta["end_of_text"])
    batch = torch.tensor(windows)
    logits = model(batch[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), model


def set_params(project: Path, *settings: str) -> None:
    """Edits params.yaml as a user would: `group.key=value`, comments kept."""
    from ruamel.yaml import YAML

    yaml = YAML()
    file = project / "params.yaml"
    params = yaml.load(file.read_text())
    for setting in settings:
        key, value = setting.split("=", 1)
        group = params
        *parents, leaf = key.split(".")
        for parent in parents:
            group = group.setdefault(parent, {})
        group[leaf] = YAML(typ="safe").load(value)
    with file.open("w") as stream:
        yaml.dump(params, stream)


def data_settings(**changes) -> SimpleNamespace:
    """The data group of params.yaml, with changes."""
    return SimpleNamespace(**{**yaml.safe_load((ROOT / "params.yaml").read_text())["data"], **changes})


def corpus_of(text: Path, document: str) -> dict:
    """The documents of one text file as the train split, as prepare_corpus makes it, in a folder beside it."""
    from stages.text.corpus import Documents
    from stages.text.splits import written_splits

    folder = text.with_name("corpus")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with written_splits(data_settings(train_file=str(text), document=document), folder, ["train"]):
        pass
    return {"train": Documents("train", folder)}


def copy_checkout(target: Path) -> Path:
    """A repository with the files of this checkout as they are now, committed or not."""
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    run("git", "init", "-q", "-b", "main", cwd=target)
    run("git", "config", "user.email", "test@example.com", cwd=target)
    run("git", "config", "user.name", "Test", cwd=target)
    return target


def sample_lines(start: int, count: int) -> str:
    """Real text: verses of the King James Bible, a blank line after every twelfth."""
    import json

    from stages.sample_corpus import source_file

    lines = [json.loads(line)["text"] for line in source_file().read_text().splitlines()[start : start + count]]
    return "\n\n".join("\n".join(lines[i : i + 12]) for i in range(0, len(lines), 12)) + "\n"


def small_project(target: Path, *settings: str) -> Path:
    """A committed project with small text and a small model, not yet run."""
    copy_checkout(target)
    for split, start, count in (("train", 0, 120), ("valid", 5000, 24), ("test", 9000, 24)):
        (target / "data" / f"{split}.txt").write_text(sample_lines(start, count))
        set_params(target, f"data.{split}_file=data/{split}.txt")
    set_params(target, *SMALL, *settings)
    (target / "dvc.lock").unlink(missing_ok=True)
    # Once for all copies: each start would compile them again, or a copy meet a file that just comes.
    run("python", "-m", "compileall", "-q", "stages", "tools", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "commit", "-qm", "small", cwd=target)
    return target


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A project with small text, not yet run."""
    return small_project(tmp_path_factory.mktemp("template") / "project")


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A project that the first of pytest's processes that needs it makes, for all of them to read."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder / "project", ignore_errors=True)  # by a process that failed
            make(folder / "project")
            (folder / "made").touch()
    return folder / "project"


@pytest.fixture(scope="session")
def built(template, tmp_path_factory) -> Path:
    """The same project after a real `dvc repro`. Tests read it; those that change it copy it."""

    def make(project: Path) -> None:
        shutil.copytree(template, project)
        run("dvc", "repro", cwd=project)
        run("git", "add", "-A", cwd=project)
        run("git", "commit", "-qm", "built", cwd=project)

    return once(tmp_path_factory, "built", make)


def train_inputs(built: Path, project: Path) -> Path:
    """A folder with what the train stage reads, and nothing that it made."""
    for name in ("data/blocks", "models/tokenizer"):
        shutil.copytree(built / name, project / name)
    shutil.copy(built / "params.yaml", project)
    return project


@pytest.fixture
def project(built, tmp_path) -> Path:
    """A copy of the built project that a test may change."""
    shutil.copytree(built, tmp_path / "project")
    return tmp_path / "project"


@contextlib.contextmanager
def chromium():
    """A headless Chromium that reaches no other machine; `browser.get_log("browser")` is its console."""
    from selenium import webdriver

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "Chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as driver:
        yield driver


@pytest.fixture(scope="session")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Runs `python -m MODULE` with the `python` of tests/warm.py, which DVC's stages then are run by too."""
    folder = tmp_path_factory.mktemp("w")
    command = [sys.executable, str(ROOT / "tests/warm.py"), str(folder)]
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run_warm(*module: str, cwd: Path, check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
        command = (str(folder / "python"), "-m", *module)
        return run(*command, cwd=cwd, check=check, env={"PATH": path, **(env or {})})

    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield run_warm
        server.kill()


@pytest.fixture(scope="session")
def ready(template, warm, tmp_path_factory) -> Path:
    """A built and committed project that trains for 18 steps, and knows a folder with a pretrained model."""

    def make(project: Path) -> None:
        shutil.copytree(template, project)
        set_params(project, "optimizer.batch_size=32", "trainer.max_epochs=1")
        warm("dvc", "repro", cwd=project)
        shutil.copytree(project / "models/gpt2", project / "pretrained")
        pipeline = project / "dvc.yaml"
        pipeline.write_text(pipeline.read_text().replace("# - path/to/folder", "- pretrained"))
        (project / "data/more.txt").write_text(sample_lines(12_000, 24))
        pipeline.write_text(pipeline.read_text().replace("# - path/to/text", "- data/more.txt"))
        warm("dvc", "repro", cwd=project)
        shutil.rmtree(project / "models/checkpoints")  # or a forced training would only export the last one
        run("git", "add", "-A", cwd=project)
        run("git", "commit", "-qm", "ready", cwd=project)

    return once(tmp_path_factory, "ready", make)


@pytest.fixture
def copy(ready, tmp_path) -> Path:
    """A copy of the ready project that a test may change."""
    shutil.copytree(ready, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def outputs(project: Path) -> dict[str, str]:
    """The hash of every output in dvc.lock, but for metrics/run.json, whose figures differ between two runs."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage["outs"] if out["path"] != "metrics/run.json"}


def digests(project: Path, *names: str) -> dict[str, str]:
    """SHA-256 of every file of these outputs, but for metrics/run.json and hidden ones."""
    files = [file for name in names for file in sorted([project / name, *(project / name).rglob("*")])]
    return {
        str(file.relative_to(project)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.name != "run.json" and not file.name.startswith(".")
    }


def stages_run(done: subprocess.CompletedProcess) -> list[str]:
    """The stages whose commands a `dvc repro` ran."""
    return re.findall(r"^Running stage '(\w+)'", done.stdout, re.M)
