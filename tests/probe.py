"""A user's own Lightning callbacks and logger: the tests name them by class_path, to see a training from outside."""

import json
import os
import random
import signal
from pathlib import Path

from stages.model import optimizers
from stages.training import history

import numpy as np
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from torch.distributed.tensor import DTensor


class Probe(Callback):
    """Keeps what a training starts from, what it sees, and where it ends.

    Args:
        folder: where it writes, at the end.
        poison: the optimizer step after which it makes a weight NaN; 0: never.
    """

    def __init__(self, folder: str, poison: int = 0):
        self.folder, self.poison = Path(folder), poison
        self.batches, self.rates, self.groups = [], [], []

    def weights(self, module) -> dict:
        return {name: weight.detach().clone() for name, weight in module.model.state_dict().items()}

    def on_train_start(self, trainer, module) -> None:
        self.first = self.weights(module)
        names = {id(weight): name for name, weight in module.model.named_parameters()}
        for group in trainer.optimizers[0].param_groups:
            self.groups.append([group["weight_decay"], [names[id(weight)] for weight in group["params"]]])

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.batches.append(batch.clone())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.poison and trainer.global_step == self.poison:
            with torch.no_grad():
                module.model.transformer.ln_f.bias.fill_(torch.nan)

    def on_train_end(self, trainer, module) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.save(
            {"first": self.first, "last": self.weights(module), "batches": self.batches}, self.folder / "seen.pt"
        )
        (self.folder / "seen.json").write_text(json.dumps({"rates": self.rates, "groups": self.groups}))


class Noise(Callback):
    """Draws from the global random numbers of torch, NumPy and Python at each step, as a user's own callback may."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        with torch.no_grad():
            module.model.transformer.ln_f.bias.add_((torch.randn(1) + np.random.rand() + random.random()) * 1e-3)


class Epochs(Callback):
    """Sets something at the start of each epoch, and keeps no state of its own."""

    def on_train_epoch_start(self, trainer, module) -> None:
        self.scale = 0.5 ** (trainer.current_epoch + 1)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        for parameter in module.parameters():
            parameter.grad.mul_(self.scale)


class Die(Callback):
    """Kills the process of the rank that the environment names in DIE, in the middle of its first start."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and trainer.global_step == 5 and str(trainer.global_rank) == os.environ.get("DIE"):
            os.kill(os.getpid(), signal.SIGKILL)


class FewPoints(Callback):
    """A history of two points: steps between them are pending when a checkpoint is made."""

    def __init__(self):
        history.HISTORY_POINTS = 2


class Shares(Callback):
    """Writes what each process did for a training: in shares.RANK.json, at its end.

    reduced: for each batch, how many gradients of which format processes added up; matrices: of how many
    matrices it computed Muon's update; whole: of how many blocks it had all weights while one computed, and how
    many weights it had between two steps.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_start(self, trainer, module) -> None:
        self.reduced, self.now, self.matrices, self.whole = [], [], 0, []
        reduce, orthogonal = torch.distributed.reduce_scatter_single, optimizers.orthogonal

        def watched_reduce(**options):
            self.now.append(str(options["input"].dtype))
            return reduce(**options)

        def watched_orthogonal(x):
            self.matrices += len(x)
            return orthogonal(x)

        def watched_block(block, *rest):
            blocks = module.model.transformer.h
            self.whole.append(sum(not isinstance(next(b.parameters()), DTensor) for b in blocks))

        torch.distributed.reduce_scatter_single, optimizers.orthogonal = watched_reduce, watched_orthogonal
        for block in module.model.transformer.h:
            block.ln_1.register_forward_hook(watched_block)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.reduced.append(self.now)
        self.now = []

    def on_train_end(self, trainer, module) -> None:
        held = sum(optimizers.here(p).numel() for p in module.parameters())
        seen = {"reduced": self.reduced, "matrices": self.matrices, "whole": self.whole, "held": held}
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"shares.{trainer.global_rank}.json").write_text(json.dumps(seen))


class Lines(Logger):
    """Writes what it is told as lines of JSON."""

    name, version = "lines", 0

    def __init__(self, file: str):
        super().__init__()
        self.file = Path(file)

    def log_hyperparams(self, params, *rest, **more) -> None:
        pass

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def blocks(batch) -> int:
    """For ThroughputMonitor."""
    return len(batch)
