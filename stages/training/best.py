"""The weights with the best validation loss: what is kept, exported, and measured once more before it is given out."""

import math
from pathlib import Path
from typing import Any

from stages.common.errors import UserError
from stages.model import gpt2
from stages.model.optimizers import whole

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from transformers import GPT2LMHeadModel

# Nats a token by which the exported weights may miss what was recorded: rounding, in float32 and in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-4, 3e-2


class BestWeights(Callback):
    """Keeps the weights of the best validation, as they were validated.

    It has to come before the users' callbacks: WeightAveraging puts its average in the model's place for a
    validation, and takes it out in the same hook.
    """

    kept = ("loss", "step", "weights", "validated_step", "tokens", "first_batch", "first_loss")

    def __init__(self):
        self.loss: float = math.inf
        self.step, self.weights = None, None
        self.validated_step, self.tokens = None, 0
        self.first_batch: Any = None
        self.first_loss: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Tensor, batch: Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            self.seen = batch.to("cpu", copy=True), float(outputs.double().mean())

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        module.finish_validation()
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        if module.valid_loss < self.loss:
            self.loss, self.step, self.tokens = module.valid_loss, trainer.global_step, module.valid_tokens
            self.first_batch, self.first_loss = self.seen
            self.keep(trainer)

    def keep(self, trainer: Trainer) -> None:
        """Copies the weights, whole and on the CPU, in the first process."""
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.lightning_module.model.config.tie_word_embeddings:
            del weights["model.lm_head.weight"]  # the embeddings are the same tensor
        kept = {}
        for name, weight in weights.items():
            weight = whole(weight.detach())
            if trainer.is_global_zero:
                kept[name] = weight.to("cpu", copy=True)
        self.weights = kept or None

    def export(self, model: GPT2LMHeadModel, folder: Path) -> None:
        """Writes a Hugging Face folder with the weights."""
        weights = {name.removeprefix("model."): weight for name, weight in self.weights.items()}
        model.save_pretrained(folder, state_dict=weights)

    def check(self, trainer: Trainer, folder: Path) -> None:
        """Loads the exported folder anew and scores the first batch of the validation text with it.

        Raises:
            UserError: its loss is not the one that training recorded.
        """
        if self.first_batch is None:
            return
        device = trainer.strategy.root_device
        model = gpt2.load_model(folder).to(device).eval()
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            loss = float(gpt2.token_losses(model, self.first_batch.to(device)).double().mean())
        half = str(trainer.precision).startswith(("16", "bf16", "transformer"))
        if not abs(loss - self.first_loss) <= (HALF_TOLERANCE if half else TOLERANCE):
            raise UserError(
                f"{folder}: the exported model's loss on the first validation batch is {loss:.5f}, where training "
                f"recorded {self.first_loss:.5f}: the last model is kept; please report this"
            )
