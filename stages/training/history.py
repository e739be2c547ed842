"""The history of a training: metrics/train.csv and valid.csv."""

import math
from pathlib import Path
from typing import Any

from stages.common.errors import UserError
from stages.common.files import write_text
from stages.training.lightning_internals import batches_seen, steps_after
from stages.training.module import LanguageModel

import pandas as pd
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

HISTORY_POINTS = 200


class History(Callback):
    """Loss, learning rate and gradient norm, at points that no logging setting moves; stops at NaN.

    The points lie a step apart at first. Whenever there are HISTORY_POINTS of them, each two become one:
    where they lie depends on the steps done, and not on those to come.
    """

    def __init__(self):
        self.train, self.valid, self.losses, self.interval = [], [], [], 1

    def on_train_start(self, trainer: Trainer, module: LanguageModel) -> None:
        # Looking at a loss makes the host wait for a GPU or for other processes: there at the points only.
        self.each_step = module.device.type == "cpu" and trainer.world_size == 1
        self.losses = [loss.to(module.device) for loss in self.losses]  # a checkpoint's are on the CPU

    def on_before_optimizer_step(self, trainer: Trainer, module: LanguageModel, optimizer: Optimizer) -> None:
        step = trainer.global_step + 1
        if step % self.interval == 0 or step % trainer.log_every_n_steps == 0:
            self.grad_norm = module.grad_norm()

    def on_train_batch_end(
        self, trainer: Trainer, module: LanguageModel, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.losses.append(self.loss)
        if self.each_step:
            self.check(trainer)
        if steps_after(trainer, batch_idx) and trainer.global_step % self.interval == 0:
            self.share(trainer)
            self.check(trainer)
            loss = torch.stack(self.losses).double().mean().item()
            self.train.append(
                {
                    "step": trainer.global_step,
                    "tokens": self.tokens(trainer),
                    "train_loss": loss,
                    "lr": trainer.optimizers[0].param_groups[0]["lr"],
                    "grad_norm": self.grad_norm.item(),
                }
            )
            self.losses = []
            if len(self.train) == HISTORY_POINTS:
                self.thin_out()

    def thin_out(self) -> None:
        self.interval *= 2
        self.train = [
            later | {"train_loss": (earlier["train_loss"] + later["train_loss"]) / 2}
            for earlier, later in zip(self.train[::2], self.train[1::2], strict=True)
        ]

    def tokens(self, trainer: Trainer) -> int:
        """Tokens that the training has seen."""
        return batches_seen(trainer) * trainer.datamodule.T * trainer.datamodule.batch_size

    def on_save_checkpoint(self, trainer: Trainer, module: LanguageModel, checkpoint: dict) -> None:
        if self.losses:
            self.share(trainer)
            self.check(trainer)  # a checkpoint made after it would never get past it
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def share(self, trainer: Trainer) -> None:
        """Makes the losses the means over all processes, so that all of them, and any number of others, go on alike."""
        self.losses = list(trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean"))

    def check(self, trainer: Trainer) -> None:
        """Raises UserError when a loss that hasn't been looked at yet is not a finite number."""
        if self.each_step and math.isfinite(self.losses[-1]):
            return
        finite = torch.isfinite(torch.stack(self.losses[-1:] if self.each_step else self.losses))
        if not finite.all():
            behind = len(finite) - int(finite.logical_not().nonzero()[0]) - 1
            step = trainer.global_step - behind // trainer.accumulate_grad_batches
            raise UserError(
                f"loss is not a finite number at step {step}: lower optimizer.lr, or set "
                "trainer.gradient_clip_val (checkpoints made before it are kept)"
            )

    def on_validation_end(self, trainer: Trainer, module: LanguageModel) -> None:
        if not trainer.sanity_checking:
            self.valid.append(
                {"step": trainer.global_step, "tokens": self.tokens(trainer), "valid_loss": module.valid_loss}
            )

    def state_dict(self) -> dict:
        losses = [loss.cpu() for loss in self.losses]
        return {"train": self.train, "valid": self.valid, "losses": losses, "interval": self.interval}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def write(self, folder: Path) -> None:
        columns = {
            "train": ["step", "tokens", "train_loss", "lr", "grad_norm"],
            "valid": ["step", "tokens", "valid_loss"],
        }
        for name, rows in (("train", self.train), ("valid", self.valid)):
            write_text(folder / f"{name}.csv", pd.DataFrame(rows, columns=columns[name]).to_csv(index=False))
