"""A stage's work in tasks: in processes of this machine, or on the machines of a Ray or Slurm cluster.

Each task writes a folder of its own, which is there whole or not at all: a stage that is run again does what is
missing. All machines see the project's folder at the same path.
"""

import hashlib
import importlib
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.common.commands import progress_bar
from stages.common.errors import UserError, one_line
from stages.common.files import state_of, write_text
from stages.common.settings import Runtime

Work = partial[None]  # called with (folder, rank, tasks), it writes the share of one task into a folder
SAID = "said.txt"
AGAIN = "the same command goes on with what is missing"


@contextmanager
def in_tasks(work: Work, folder: Path, inputs: Iterable[Path], runtime: Runtime | None) -> Iterator[list[Path]]:
    """The folders that all tasks have written, in the order of their ranks, until the block ends.

    Args:
        work: its result depends on nothing but its arguments, whose repr() tells them apart, and `inputs`.
        folder: .NAME.tmp: where one task alone writes; several write below .NAME.parts beside it, which stays there
            when something fails.
        inputs: the files that are read.
        runtime: how many tasks, and who runs them; None: one, here.
    Raises:
        UserError: of a task; an engine that isn't there; a task that was killed.
    """
    if runtime is None or runtime.tasks == 1:
        work(folder, 0, 1)
        yield [folder]
        return
    above = folder.with_suffix(".parts").absolute()
    task = Task(work, above / key_of(work, inputs, runtime.tasks), runtime.tasks, os.getcwd())
    for other in above.glob("*"):
        if other != task.parts:
            shutil.rmtree(other)
    task.parts.mkdir(parents=True, exist_ok=True)
    parts = [task.part(rank) for rank in range(task.tasks)]
    missing = [rank for rank, part in enumerate(parts) if not part.exists()]
    with progress_bar(task.tasks, "tasks", "") as bar:
        bar.update(task.tasks - len(missing))
        if missing:
            for _ in EXECUTORS[runtime.executor](task, missing, runtime.executor_options):
                bar.update()
    for mistake in sorted(task.parts.glob("*.error")):
        text = mistake.read_text(encoding="utf-8")
        mistake.unlink()
        raise UserError(text)
    for line in dict.fromkeys(line for part in parts for line in (part / SAID).read_text().splitlines()):
        print(line, file=sys.stderr)
    yield parts
    shutil.rmtree(above)


def key_of(work: Work, inputs: Iterable[Path], tasks: int) -> str:
    """A hash of all that decides what the tasks write."""
    rooms = Path(__file__).parents[1]
    code = [file.read_bytes() for room in ("common", "text") for file in sorted((rooms / room).glob("*.py"))]
    states = [(str(file), state_of(str(file))) for file in inputs]
    return hashlib.sha256(repr((code, states, work.func.__name__, work.keywords, tasks)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """What every task does, by its rank.

    Args:
        parts: the folder of all tasks' folders.
        project: the working directory.
    """

    work: Work
    parts: Path
    tasks: int
    project: str

    def part(self, rank: int) -> Path:
        return self.parts / f"{rank:05d}"

    def mistake(self, rank: int) -> Path:
        """Holds a mistake of the user's that a task has found, in place of its folder."""
        return self.parts / f"{rank:05d}.error"

    def __call__(self, rank: int) -> None:
        """Writes a task's folder."""
        os.chdir(self.project)
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a task is for one core
        if self.part(rank).exists():
            return
        temporary = Path(tempfile.mkdtemp(prefix=f".{rank:05d}.", dir=self.parts))
        try:
            with redirect_stderr(io.StringIO()) as said:
                self.work(temporary, rank, self.tasks)
        except UserError as error:
            write_text(self.mistake(rank), str(error))
            return shutil.rmtree(temporary)
        write_text(temporary / SAID, said.getvalue())
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            os.rename(temporary, self.part(rank))
        except OSError:  # a task of a killed run has outlived it, and was first: the bytes are the same
            if not self.part(rank).exists():
                raise
            shutil.rmtree(temporary)


def on_this_machine(task: Task, ranks: list[int], options: dict) -> Iterator[None]:
    """By concurrent.futures: it notices that a process was killed. datatrove's executors for one machine and for Ray
    wait for ever then: they are built on multiprocessing.Pool."""
    context = multiprocessing.get_context("spawn")
    with made(ProcessPoolExecutor, mp_context=context, initializer=end_with_parent, **options) as pool:
        try:
            yield from pool.map(task, ranks)
        except BrokenProcessPool:
            raise UserError(f"runtime.executor: local: a task was killed (for its memory?): {AGAIN}") from None


def end_with_parent() -> None:
    """A process of tasks outlives neither the stage nor Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def on_ray(task: Task, ranks: list[int], options: dict) -> Iterator[None]:
    """By the Ray cluster that this machine is part of. A task whose process or machine is lost is done again."""
    ray = engine("ray", "ray")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        raise UserError("runtime.executor: ray: no Ray cluster here: start one with `ray start --head`") from None
    try:
        waiting = [made(ray.remote(run).options, **options).remote(task, rank) for rank in ranks]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if not isinstance(cause, ray.exceptions.RayError):
            raise cause from None
        raise UserError(f"runtime.executor: ray: {one_line(cause)}: {AGAIN}") from None
    finally:
        ray.shutdown()


def run(task: Task, rank: int) -> None:
    task(rank)


def on_slurm(task: Task, ranks: list[int], options: dict) -> Iterator[None]:
    """By datatrove: a job array, for whose end sbatch waits."""
    slurm = engine("datatrove.executor.slurm", "datatrove")
    sys.modules["loguru"].logger.remove()
    logs = task.parts / "slurm"
    shutil.rmtree(logs, ignore_errors=True)
    # The jobs inherit the environment.
    for key, folder in (("PATH", os.path.dirname(sys.executable)), ("PYTHONPATH", task.project)):
        os.environ[key] = os.pathsep.join(filter(None, (folder, os.environ.get(key))))
    own = {"tasks": len(ranks), "logging_dir": str(logs)}
    own["sbatch_args"] = {"wait": ""} | options.get("sbatch_args", {})
    with suppress(subprocess.CalledProcessError):  # which tasks are missing says more
        made(slurm.SlurmPipelineExecutor, [Step(task, ranks)], **options | own).run()
    if lost := sum(not (task.part(rank).exists() or task.mistake(rank).exists()) for rank in ranks):
        raise UserError(f"runtime.executor: slurm: {lost:,} tasks have failed, see {logs}: {AGAIN}")
    yield from (None for _ in ranks)


@dataclass(frozen=True)
class Step:
    """What datatrove calls for each task of a job array."""

    task: Task
    ranks: list[int]

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        self.task(self.ranks[rank])


EXECUTORS = {"local": on_this_machine, "ray": on_ray, "slurm": on_slurm}


def engine(module: str, package: str) -> ModuleType:
    """A module of a package that only the tasks of its executor need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = f"runtime.executor needs the package {package} ({one_line(error)})"
        raise UserError(f"{why}: `pip install {package}`, or set it to local") from None


def made(make: Callable, *arguments: Any, **options: Any) -> Any:
    """What `make` makes of runtime.executor_options and more."""
    try:
        return make(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"runtime.executor_options: {one_line(error)}: see docs/scale.md") from None
