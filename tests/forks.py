"""Trainings in forks of this process, which has their libraries loaded already."""

import atexit
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stages import train
from stages.common import errors, params
from stages.training import identity

from warm import preload, status_of

preload()
params.trainer_parser()
CODE = identity.code_digest()


def start(project: Path, *arguments: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Begins a training, whose output goes to the end of train.log; returns its process number.

    Args:
        prepare: is called in the fork before it.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(project)
        log = os.open("train.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.path.insert(0, str(project))
        sys.argv = ["train", *arguments]
        identity.code_digest = lambda: CODE
        atexit._clear()  # pytest's would delete the folders of earlier runs
        prepare()
        os._exit(status_of("stages.train"))
    finally:
        os._exit(1)


def end(child: int) -> int:
    """Waits for a fork; returns its status as Popen would."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(project: Path, *arguments: str, kill: tuple[signal.Signals, int] | None = None) -> int:
    """Trains to the end, or to a signal that comes after a step; returns the status."""

    def prepare() -> None:
        if kill:
            number, step = kill
            after_step(step, lambda: os.kill(os.getpid(), number))

    return end(start(project, *arguments, prepare=prepare))


def together(project: Path, count: int, prepare: Callable[[int], None] = lambda rank: None) -> tuple[list[int], str]:
    """Trains in forks of this process, as torchrun would start them; each one's status, and what they print.

    Args:
        prepare: is called in each with its rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = project / "train.log"
    log.write_text("")

    def joined(rank: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        numbers |= {"GROUP_RANK": 0, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        if count > 1:
            os.environ.update({name: str(value) for name, value in numbers.items()}, TORCHELASTIC_RUN_ID="test")
            errors.leave_it_to_the_first = partial(errors.leave_it_to_the_first, 0)  # nobody stops the others
        prepare(rank)

    devices = f"--trainer.devices={count}"
    children = [start(project, devices, prepare=partial(joined, rank)) for rank in range(count)]
    return [end(child) for child in children], log.read_text()


def stopped_at(step: int, rank: int = 0) -> Callable[[int], None]:
    """For `together`: one of the processes gets SIGTERM after a step, or none does after step 0."""

    def prepare(of: int) -> None:
        if of == rank:
            after_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))

    return prepare


def after_step(step: int, do: Callable[[], None]) -> None:
    """Makes this process do something after a step."""
    after = train.History.on_train_batch_end

    def on_train_batch_end(self, trainer, *rest):
        after(self, trainer, *rest)
        if trainer.global_step == step:
            do()

    train.History.on_train_batch_end = on_train_batch_end
