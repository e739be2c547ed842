"""The processes that torchrun or srun has started to do one stage together."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stages.common.errors import UserError

import torch
from torch import distributed


def launched() -> tuple[int, int, int]:
    """Rank of this process, rank on this machine, and how many processes there are: 0, 0, 1 without a launcher."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # Not SLURM_NTASKS, which a batch script has too, although it is one process.
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        if names[2] not in os.environ:
            return 0, 0, 1
    rank, local_rank, size = (int(os.environ[name]) for name in names)
    return rank, local_rank, size


def join(device: torch.device) -> None:
    """Makes torch.distributed's default group of the launched processes, with NCCL between GPUs, else gloo."""
    rank, _, size = launched()
    if size == 1:
        return
    # torchrun's own store serves all its restarts: under the same keys, processes would find those that are gone.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.TCPStore(*address(), size, is_master=rank == 0 and not of_agent)
    if of_agent:
        store = distributed.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank, world_size=size, device_id=device if gpu else None
    )


def address() -> tuple[str, int]:
    """Where the launched processes meet."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    from pytorch_lightning.plugins.environments import SLURMEnvironment  # it takes seconds, and one process needs none

    return SLURMEnvironment().main_address, SLURMEnvironment().main_port


def gather(mine: Any) -> list[Any]:
    """What each process of the group has, in order of rank, in all of them."""
    if not distributed.is_initialized():
        return [mine]
    everyones = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, mine)
    return everyones


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process can't be reached: gloo says it in a plain RuntimeError."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextmanager
def together(what: str) -> Iterator[None]:
    """The launched processes as one group, on CPUs; where one fails, all end, and the first says it.

    Args:
        what: they do, for that line.
    Raises:
        UserError: another process has ended.
        SystemExit: the launcher stops them.
    """
    rank, local_rank, size = launched()
    if size == 1:
        yield
        return

    def stopped(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        if local_rank == 0:
            why = f"one of its {size} processes has ended, or the job's time is up"
            print(f"{what} was stopped by SIGTERM: {why}", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stopped)
    try:
        join(torch.device("cpu"))
        yield
    except (RuntimeError, UserError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
        if not lost_another(error):
            raise
        if rank:
            sys.exit(1)
        raise UserError(f"one of the {size} processes of {what} has ended, or can't be reached") from None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
