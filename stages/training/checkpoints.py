"""Checkpoints of a training in models/checkpoints/, and how it goes on from one.

A run has a folder there. Its name starts the run's identity, a hash of all the settings, data and
code that decide the run's result, so that only the same run goes on from it.
"""

import fcntl
import math
import os
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import TextIO

from stages.common.errors import UserError
from stages.common.paths import CHECKPOINTS

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO

KEPT = 2  # when the newest is damaged, the one before it serves
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
    """A checkpoint file is whole or not there: Lightning's own passes through another folder."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Writes it beside its place and renames it once it is on the disk.

        Raises:
            UserError: the disk is full, or can't be written for another reason.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            why = str(error).strip().split("\n")[0]
            raise UserError(
                f"{path}: can't be written ({why}): free some disk space, then `dvc repro` goes on"
            ) from None


class Checkpoints(Callback):
    """Keeps what a killed run needs to go on, the weights with the best validation loss among it.

    A resume checkpoint is made between two optimizer steps, after the validation that the first
    of them may have brought, so nothing is done twice or left out. The last one, final.ckpt,
    stays until DVC has recorded the stage: killed before that, the next run has only to export it.
    """

    def __init__(self, identity: str, tokenizer: str, settings):
        self.folder, self.identity, self.tokenizer = CHECKPOINTS / identity[:16], identity, tokenizer
        self.final = self.folder / "final.ckpt"
        self.every_steps = settings.checkpoint_every_n_steps
        self.every_seconds = settings.checkpoint_every_n_minutes * 60
        self.best_loss, self.best_step, self.best_weights, self.validated_step = math.inf, None, None, None
        self.steps = 0
        self.seconds = self.validation_seconds = 0.0
        self.last_validation = math.inf  # seconds; how long the first one takes isn't known
        self.received = None

    def newest(self, trainer) -> Path | None:
        """The newest whole checkpoint of this very run; damaged ones are passed over."""
        if trainer.is_global_zero:
            for unfinished in self.folder.glob(".*.tmp"):
                unfinished.unlink()
        for path in [*self.folder.glob("final.ckpt"), *sorted(self.folder.glob("step-*.ckpt"), reverse=True)]:
            try:
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"{damaged} doesn't match its checksum")
                if torch.load(path, map_location="cpu", weights_only=True)["identity"] != self.identity:
                    raise ValueError("it belongs to another run")
                return path
            except Exception as error:  # a damaged file can fail in any way
                why = str(error).strip().split("\n")[0]
                if trainer.is_global_zero:
                    print(f"note: {path} is passed over: {why}", file=sys.stderr)
        return None

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        # What it takes to be resumed by its own run only, and to be measured on its own.
        checkpoint |= {"identity": self.identity, "tokenizer": self.tokenizer}
        checkpoint["gpt2_config"] = module.model.config.to_dict()

    def state_dict(self) -> dict:
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "best_weights": self.best_weights,
            "validated_step": self.validated_step,
            "steps": self.steps,
            "seconds": self.seconds + time.monotonic() - self.started,
            "validation_seconds": self.validation_seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def on_train_start(self, trainer, module) -> None:
        self.started = self.last_saved = time.monotonic()
        self.last_step = trainer.global_step
        # Lightning had counted the batch that was about to begin; it begins again.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total
        batches.ready = batches.started = batches.completed
        # In place of Lightning's handlers: at SIGUSR1 under SLURM they would save a checkpoint of their own.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        if trainer.world_size > 1:
            # Not NCCL's: a process waits here for the others, but not for its GPU.
            self.group = torch.distributed.new_group(backend="gloo")
            mine = torch.tensor([trainer.global_step, int(self.identity[:12], 16)])
            seen = [torch.empty_like(mine) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(seen, mine, group=self.group)
            if any(not torch.equal(mine, other) for other in seen):
                raise UserError(
                    "the processes disagree on settings, data or checkpoint: all machines need the same files, "
                    "so keep the project on a file system that they share"
                )

    def receive(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: don't wait for the step to end
        self.received = number

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        received, elapsed = self.agree(trainer, time.monotonic() - self.last_saved)
        due = self.every_steps and trainer.global_step % self.every_steps == 0
        due = due or self.every_seconds and elapsed >= self.every_seconds
        due = due or self.long_validation_follows(trainer, batch_idx)
        if (due or received) and trainer.global_step > self.last_step:
            self.save(trainer)
        if received:
            raise Interrupted(received)

    def long_validation_follows(self, trainer, batch_idx: int) -> bool:
        """Whether the optimizer step that begins is the last one before a validation that takes long.

        In the middle of a validation no checkpoint can be made. With one from a step before, it can be broken off.
        """
        interval, epoch_loop = trainer.val_check_batch, trainer.fit_loop.epoch_loop
        first = batch_idx if trainer.check_val_every_n_epoch else epoch_loop.total_batch_idx
        last = min(first + trainer.accumulate_grad_batches, first - batch_idx + trainer.num_training_batches)
        ends = trainer.global_step + 1 >= trainer.estimated_stepping_batches
        follows = ends or isinstance(interval, int) and last // interval > first // interval
        return follows and trainer.world_size == 1 and self.last_validation >= LONG_VALIDATION_SECONDS

    def agree(self, trainer, elapsed: float) -> tuple[int, float]:
        """Signals and clocks differ between processes, but all must save at the same step."""
        if trainer.world_size == 1:
            return self.received or 0, elapsed
        seen = torch.tensor([self.received or 0, elapsed], dtype=torch.float64)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX, group=self.group)
        received, elapsed = seen.tolist()
        return int(received), elapsed

    def save(self, trainer) -> None:
        finite = all(weight.isfinite().all() for weight in trainer.lightning_module.parameters())
        if not trainer.strategy.reduce_boolean_decision(finite):
            return  # the next loss ends the training; the checkpoints from before stay
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:09d}.ckpt")
        self.last_step, self.last_saved = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[:-KEPT]:
                old.unlink()

    def on_validation_start(self, trainer, module) -> None:
        self.validation_started = time.monotonic()

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        # With several processes it is done to its end: they don't have equally many batches to agree at.
        long = trainer.world_size == 1 and self.last_validation >= LONG_VALIDATION_SECONDS
        if self.received and long and self.last_step == trainer.global_step - 1:
            raise Interrupted(self.received)

    def on_validation_end(self, trainer, module) -> None:
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        if module.valid_loss < self.best_loss:
            self.best_loss, self.best_step = module.valid_loss, trainer.global_step
            self.keep_weights(trainer)
        self.last_validation = time.monotonic() - self.validation_started
        self.validation_seconds += self.last_validation

    def keep_weights(self, trainer) -> None:
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            del weights["model.lm_head.weight"]  # tied to the embeddings
            self.best_weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}

    def on_train_end(self, trainer, module) -> None:
        if self.validated_step != trainer.global_step and trainer.enable_validation:
            validate(trainer)  # val_check_interval need not divide the steps, but the last weights count too
        if self.best_step is None:  # without validation, the last weights are the best known
            self.keep_weights(trainer)
        self.steps = trainer.global_step
        trainer.save_checkpoint(self.final)
        self.seconds += time.monotonic() - self.started

    def load_final(self, history: Callback) -> None:
        """The state at the end of a run that DVC has not recorded."""
        checkpoint = torch.load(self.final, map_location="cpu", weights_only=True)
        for callback in (self, history):
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])

    def export(self, model, folder: Path) -> None:
        """Writes a Hugging Face folder with the weights of the best validation loss."""
        weights = {name.removeprefix("model."): weight for name, weight in self.best_weights.items()}
        model.save_pretrained(folder, state_dict=weights)


def validate(trainer) -> None:
    """Runs a whole validation at this point of a training, as Lightning does between two batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
