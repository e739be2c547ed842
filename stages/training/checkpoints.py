"""Checkpoints of a training in models/checkpoints/, and how it goes on from one.

A run has a folder there. Its name starts the run's identity, a hash of all the settings, data and
code that decide the run's result, so that only the same run goes on from it.

With schedule wsd, what comes before the cooldown, the trunk, has a folder of its own: its identity
leaves out where training ends. Runs of any length go on from its checkpoints, and trunk-*.ckpt, from
the start of a cooldown, stay for them.
"""

import fcntl
import math
import os
import random
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from stages.common.checkpoint_files import delete, filled, hide, mapped, put, sync, verify
from stages.common.errors import UserError, not_written, note, one_line
from stages.common.paths import CHECKPOINTS
from stages.common.settings import Optimizer, Runtime
from stages.model import ops
from stages.model.optimizers import cooldown_start, here
from stages.training import lightning_internals as internals
from stages.training.best import BestWeights
from stages.training.history import History

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO

SAID = "GPT2_RESUME_FROM"  # the environment variable with which the first process tells the others
KEPT = 2  # when the newest is damaged, the one before it serves
# A checkpoint with so many bytes of weights is written while training goes on; with fsdp, in a folder.
ASIDE_BYTES = 1 << 30
LONG_VALIDATION_SECONDS = 10  # clusters leave half a minute between SIGTERM and SIGKILL


def training_lock(wait: bool = True) -> TextIO:
    """An open file that only one training of this project can have; the system frees it with its holder.

    A `dvc` that was killed alone leaves its training at work. The next one waits for it here, and
    has then only to export what it made.

    Raises:
        UserError: another process holds it, and wait is False.
    """
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    file = (CHECKPOINTS / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = f"process {file.read()} is training in this folder"
        if not wait:
            raise UserError(f"{CHECKPOINTS}: {holder}: stop it first, or wait for it") from None
        print(f"{holder}: waiting for it to end", file=sys.stderr, flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


class Interrupted(Exception):
    """A signal asked the training to stop, and its checkpoint is saved."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint file is whole or not there: Lightning's own passes through another folder.

    A large one is written while training goes on, from a copy on the CPU.
    """

    writing: Future | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes it beside its place and renames it once it is on the disk.

        Raises:
            UserError: the disk is full, or can't be written for another reason; this one, or the one before.
        """
        self.teardown()
        if is_large(checkpoint) and Path(path).name != "final.ckpt":
            self.writing = ThreadPoolExecutor(1).submit(write, copied(checkpoint), Path(path))
        else:
            write(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return filled(path, opened(path))

    def teardown(self) -> None:
        """Waits for what is being written."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()


def is_large(checkpoint: dict[str, Any]) -> bool:
    """Whether it is written while training goes on."""
    return sum(weight.nbytes for weight in checkpoint["state_dict"].values()) >= ASIDE_BYTES


def opened(path: str | Path) -> dict[str, Any]:
    """What `mapped` gives, with the best weights in the first process alone, which keeps them."""
    checkpoint = mapped(path)
    if dist.is_initialized() and dist.get_rank():
        checkpoint["callbacks"][BestWeights().state_key]["weights"] = None
    return checkpoint


def write(checkpoint: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, temporary)
        sync(temporary)
        put(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise not_written(path, error) from None


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same on the CPU, which no later step changes; tied weights stay one."""
    copies: dict[Any, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return apply_to_collection(checkpoint, torch.Tensor, copy)


class Signals:
    """SIGTERM, SIGINT and SIGUSR1: what came, agreed on by all processes."""

    def __init__(self):
        self.received, self.group = 0, None

    def listen(self, trainer: Trainer, identity: str) -> None:
        """Takes the place of Lightning's handlers: at SIGUSR1 under SLURM they'd save a checkpoint of their own.

        Raises:
            UserError: the processes that train together are not at the same step of the same run.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        if trainer.world_size == 1:
            return
        # Not NCCL's: a process waits here for the others, but not for its GPU.
        self.group = torch.distributed.new_group(backend="gloo")
        mine = torch.tensor([trainer.global_step, int(identity[:12], 16)])
        seen = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(seen, mine, group=self.group)
        if any(not torch.equal(mine, other) for other in seen):
            raise UserError(
                "the processes disagree on settings, data or checkpoint: all machines need the same files, "
                "so keep the project on a file system that they share"
            )

    def receive(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: don't wait for the step to end
        self.received = number

    def agree(self, elapsed: float) -> tuple[int, float]:
        """Signals and clocks (seconds) differ between processes, but all must save at the same step."""
        if self.group is None:
            return self.received, elapsed
        seen = torch.tensor([self.received, elapsed], dtype=torch.float64)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX, group=self.group)
        received, elapsed = seen.tolist()
        return int(received), elapsed


class Checkpoints(Callback):
    """Keeps what a killed run needs to go on.

    A resume checkpoint is made between two optimizer steps, after the validation that the first
    of them may have brought, so nothing is done twice or left out. The last one, final.ckpt,
    stays until DVC has recorded the stage: killed before that, the next run has only to export it.
    """

    # Not Lightning's ModelCheckpoint (2.6): at train_time_interval it saves after any batch, also before the last one
    # of an optimizer step, whose gradients would be lost, and before the validation that the step brings; with
    # save_on_exception wherever the exception falls. It decides in the first process, where a signal must be agreed
    # on by all, and its files know no identity, no trunk, and none that serves when the newest is damaged.

    def __init__(self, identity: str, tokenizer: str, settings: Runtime, best: BestWeights):
        self.folder, self.identity, self.tokenizer = CHECKPOINTS / identity[:16], identity, tokenizer
        self.final = self.folder / "final.ckpt"
        self.trunk, self.trunk_identity, self.cooldown = None, None, -1
        self.keep_trunks, self.ended = settings.keep_trunks, False
        self.every_steps = settings.checkpoint_every_n_steps
        self.every_seconds = settings.checkpoint_every_n_minutes * 60
        self.best, self.signals = best, Signals()
        self.steps = 0
        self.seconds = self.validation_seconds = 0.0
        self.last_validation = float("inf")  # seconds; how long the first one takes isn't known
        self.random, self.metrics = None, {}

    def share_trunk(self, identity: str, settings: Optimizer, steps: float) -> None:
        """With schedule wsd, steps up to the start of the cooldown are of this identity.

        Args:
            settings: the optimizer group.
            steps: of the whole training.
        """
        total = settings.num_training_steps or steps
        # A training that ends before its warm-up takes a shorter one, which is no other's trunk.
        if settings.schedule == "wsd" and settings.num_warmup_steps < total < math.inf:
            self.trunk, self.trunk_identity = CHECKPOINTS / identity[:16], identity
            self.cooldown = cooldown_start(total, settings)

    def resumable(self) -> list[Path]:
        """Checkpoints that this run can go on from, the newest first."""
        own = [*self.folder.glob("final.ckpt"), *sorted(self.folder.glob("step-*.ckpt"), reverse=True)]
        trunk = [path for path in self.trunk.glob("*-*.ckpt") if step_of(path) <= self.cooldown] if self.trunk else []
        return own + sorted(trunk, key=step_of, reverse=True)

    def newest(self, trainer: Trainer) -> Path | None:
        """The newest whole checkpoint of this very run. The first process looks for it, and the others take its word.

        Those that a launcher started are one group by now. Lightning starts the others later, and they have its
        environment.
        """
        if dist.is_initialized():
            said = [str(self.newest_whole() or "") if trainer.is_global_zero else ""]
            dist.broadcast_object_list(said, device=trainer.strategy.root_device)
            path = said[0]
        elif SAID in os.environ:
            path = os.environ[SAID]
        else:
            path = str(self.newest_whole() or "")
            if trainer.world_size > 1:
                os.environ[SAID] = path
        return Path(path) if path else None

    def newest_whole(self) -> Path | None:
        """The newest checkpoint of this run whose bytes are those that were written; damaged ones are passed over."""
        for folder in filter(None, (self.folder, self.trunk)):
            for unfinished in folder.glob(".*.tmp"):
                delete(unfinished)
        for path in self.resumable():
            identity = self.trunk_identity if path.parent == self.trunk else self.identity
            try:
                verify(path)
                if mapped(path)["identity"] != identity:
                    raise ValueError("it belongs to another run")
                return path
            except Exception as error:  # a damaged file can fail in any way
                note(f"{path} is passed over: {one_line(error)}")
        return None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # What it takes to be resumed by its own run only, and to be measured on its own.
        shared = trainer.global_step <= self.cooldown and not self.ended
        checkpoint |= {"identity": self.trunk_identity if shared else self.identity, "tokenizer": self.tokenizer}
        checkpoint["gpt2_config"] = module.model.config.to_dict()
        # A callback may have asked for an end that min_steps or min_epochs puts off, or look at a metric once an epoch.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint |= {"should_stop": trainer.should_stop, "metrics": metrics}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        trainer.should_stop, self.metrics = checkpoint["should_stop"], checkpoint["metrics"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": self.seconds + time.monotonic() - self.started,
            "validation_seconds": self.validation_seconds,
            "random": random_state(),
            "machine": machine(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state.pop("machine")
        vars(self).update(state)
        changed = [f"{key} {before[key]}, now {value}" for key, value in machine().items() if before[key] != value]
        if changed and os.environ.get("LOCAL_RANK", "0") == "0":
            note(
                f"the checkpoint was made with {'; '.join(changed)}: the result may differ in its last bits "
                "from that of a run never interrupted"
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.started = self.last_saved = time.monotonic()
        self.last_step, self.planned = trainer.global_step, trainer.datamodule.planned_steps(trainer)
        internals.begin_batch_again(trainer)
        internals.put_metrics_back(trainer, self.metrics)  # before, Lightning would forget them
        self.signals.listen(trainer, self.identity)
        internals.repeat_epoch_start(trainer)
        if self.random is not None:
            set_random_state(self.random)
            copy_from_file(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        received, elapsed = self.signals.agree(time.monotonic() - self.last_saved)
        due = self.every_steps and trainer.global_step % self.every_steps == 0
        due = due or self.every_seconds and elapsed >= self.every_seconds
        due = due or self.long_validation(trainer) and internals.validation_follows(trainer, batch_idx, self.planned)
        due = due or self.keep_trunks and trainer.global_step == self.cooldown
        if (due or received) and trainer.global_step > self.last_step:
            self.save(trainer)
        if received:
            raise Interrupted(received)

    def long_validation(self, trainer: Trainer) -> bool:
        """Whether a validation is to be broken off by a signal.

        In the middle of one no checkpoint can be made. With one from a step before, it can be broken off. With
        several processes it is done to its end: they don't have equally many batches to agree at.
        """
        return trainer.world_size == 1 and self.last_validation >= LONG_VALIDATION_SECONDS

    def save(self, trainer: Trainer) -> None:
        """Saves a resume checkpoint, and deletes those that it makes superfluous."""
        finite = all(here(weight).isfinite().all() for weight in trainer.lightning_module.parameters())
        if not trainer.strategy.reduce_boolean_decision(finite):
            return  # the next loss ends the training; the checkpoints from before stay
        step = trainer.global_step
        folder = self.trunk if self.trunk and step <= self.cooldown else self.folder
        kind = "trunk" if self.keep_trunks and step == self.cooldown else "step"
        self.remove_superfluous(trainer, folder)  # one may have been written since
        trainer.save_checkpoint(folder / f"{kind}-{step:09d}.ckpt")
        self.last_step, self.last_saved = step, time.monotonic()
        self.remove_superfluous(trainer, folder)

    def remove_superfluous(self, trainer: Trainer, folder: Path) -> None:
        if trainer.is_global_zero:
            trunks = sorted(CHECKPOINTS.glob("*/trunk-*.ckpt"), key=os.path.getmtime)
            # A longer training may have left later ones in the trunk.
            steps = [path for path in sorted(folder.glob("step-*.ckpt")) if step_of(path) <= trainer.global_step]
            for old in [*steps[:-KEPT], *trunks[: -self.keep_trunks or None]]:
                remove(old)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.validation_started = time.monotonic()

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # A checkpoint from before the last step is there only where one was due to `long_validation`.
        if self.signals.received and self.long_validation(trainer) and self.last_step == trainer.global_step - 1:
            raise Interrupted(self.signals.received)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.last_validation = time.monotonic() - self.validation_started
            self.validation_seconds += self.last_validation

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.best.validated_step != trainer.global_step and trainer.enable_validation:
            internals.validate(trainer)  # val_check_interval need not divide the steps, but the last weights count too
        if self.best.step is None:  # without validation, the last weights are the best known
            self.best.keep(trainer)
        self.steps, self.ended = trainer.global_step, True
        trainer.save_checkpoint(self.final)
        if self.trunk and trainer.is_global_zero:
            for served in self.trunk.glob("step-*.ckpt"):
                if step_of(served) <= self.cooldown:  # a longer training's later ones serve it still
                    delete(served)
        self.seconds += time.monotonic() - self.started

    def end_where_it_is(self, trainer: Trainer) -> None:
        """What is left to do where the time was over before a resumed training's next step: then nothing was ended.

        Raises:
            UserError: it was over before the first step.
        """
        if not trainer.global_step:
            raise UserError("trainer.max_time: it is over before the first step: raise it")
        if self.best.step is None:
            self.best.keep(trainer)
        self.steps, self.ended = trainer.global_step, True

    def load_final(self, history: History) -> None:
        """The state at the end of a run that DVC has not recorded."""
        states = filled(self.final, mapped(self.final)["callbacks"])
        for callback in (self, self.best, history):
            callback.load_state_dict(states[callback.state_key])


def copy_from_file(optimizers: list[torch.optim.Optimizer]) -> None:
    """Replaces what they hold of a mapped checkpoint, which would stay on the disk after it is deleted."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)})


def step_of(path: Path) -> int:
    """The optimizer steps that a checkpoint was made after: step-000000050.ckpt, trunk-000000050.ckpt."""
    return int(path.stem.split("-")[1])


def machine() -> dict[str, Any]:
    """What of this machine decides the last bits of a sum."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
    asked = {name: os.environ[name] for name in names if name in os.environ}
    kind = {"Intel": ops.INTEL, "AMX": ops.AMX}  # which products are whose
    cpu = " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, there in kind.items() if there)])
    return {"threads": torch.get_num_threads(), "cpu": cpu, "asked for": asked}


def random_state() -> dict[str, Any]:
    """The global random numbers' state, in types that torch.load(weights_only=True) takes."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    return state | {"cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def remove_older_finished(run: Path) -> None:
    """Deletes the checkpoints of other finished runs: this one's model has taken their models' place."""
    for final in CHECKPOINTS.glob("*/final.ckpt"):
        if final.parent != run:
            for file in [*final.parent.glob("step-*.ckpt"), final]:
                erase(file)


def remove(checkpoint: Path) -> None:
    """As `erase`; a folder while training goes on, as that takes seconds."""
    if checkpoint.is_dir():
        Thread(target=erase, args=[hide(checkpoint)]).start()
    else:
        erase(checkpoint)


def erase(checkpoint: Path) -> None:
    """Deletes a checkpoint, and its run's folder when it was the last one there."""
    delete(checkpoint)
    with suppress(OSError):  # it isn't empty
        checkpoint.parent.rmdir()
