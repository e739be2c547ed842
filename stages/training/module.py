"""A GPT-2 as Lightning trains it: its loss, its validation, its optimizer."""

import math

from stages.common.errors import UserError, note
from stages.common.settings import Optimizer, Settings
from stages.model import gpt2
from stages.model.intervals import perplexity
from stages.model.optimizers import lr_factor, make_optimizer, whole
from stages.training import lightning_internals as internals

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel


def with_room_after_warmup(settings: Optimizer, total: float, say: bool) -> Optimizer:
    """The optimizer group; its warm-up is a tenth of a training that would end before it does."""
    if settings.num_warmup_steps < total:
        return settings
    steps = int(total) // 10
    if say:
        note(
            f"optimizer.num_warmup_steps: {settings.num_warmup_steps} leaves nothing of {total} training steps: "
            f"it takes {steps}"
        )
    return settings.model_copy(update={"num_warmup_steps": steps})


class LanguageModel(internals.QuickAttributes):
    """A GPT-2 and how its loss is computed and its weights are updated."""

    valid_loss: float
    valid_tokens: int

    def __init__(self, model: GPT2LMHeadModel, settings: Settings):
        super().__init__()
        self.model = model
        self.settings = settings
        if settings.model.gradient_checkpointing:
            gpt2.call_blocks(model)
            model.activation_checkpointing_enable()
        self.loss = torch.compile(gpt2.loss) if settings.model.compile else gpt2.loss
        self.norm: Tensor | None = None

    def on_fit_start(self) -> None:
        self.loss_is_monitored = any(getattr(c, "monitor", None) == "loss" for c in self.trainer.callbacks)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Frees the gradients of the step before, so that the forward pass has their memory."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.norm = None
            self.optimizers().zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning would do it after the forward pass."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss (nats a token) of (B, T + 1) int64 token ids."""
        if self.settings.model.dropout > 0:
            # Dropout draws from the step's own seed, so that a resumed run draws the same.
            step = internals.batches_begun(self.trainer)
            torch.manual_seed((self.settings.seed_everything << 32) + step * self.trainer.world_size + self.global_rank)
        loss = self.loss(self.model, batch)
        if self.loss_is_monitored:  # takes a millisecond, and the loggers don't need it
            self.log("loss", loss.detach(), sync_dist=True, logger=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.nll = self.predicted = 0.0

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """(B, T) float32, nats, of (B, T + 1) int64 token ids."""
        nll = gpt2.token_losses(self.model, batch)
        if batch_idx < self.trainer.datamodule.valid_batches:
            self.nll += nll.double().sum()
            self.predicted += nll.numel()
        return nll

    def finish_validation(self) -> None:
        """Sets valid_loss (nats a token) and valid_tokens, how many were predicted, over all processes."""
        sums = [torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in (self.nll, self.predicted)]
        nll, tokens = self.trainer.strategy.reduce(torch.stack(sums), reduce_op="sum").tolist()
        # Lightning keeps what is logged in float32; the history and the choice of the best need it all.
        self.valid_loss, self.valid_tokens = nll / tokens, int(tokens)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(valid_metrics(self.valid_loss), sync_dist=True, logger=False)

    def configure_optimizers(self) -> dict:
        total = self.training_steps()
        settings = with_room_after_warmup(self.settings.optimizer, total, say=self.trainer.is_global_zero)
        self.trained = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in self.trained if p.ndim >= 2]
        vectors = [p for p in self.trained if p.ndim < 2]
        hidden = [p for p in self.model.transformer.h.parameters() if p.ndim == 2]
        # With fp16 the fused step would unscale the gradients itself, after they were clipped.
        fused = str(self.settings.trainer.precision) not in ("16", "16-mixed")
        optimizer = make_optimizer(settings, matrices, vectors, hidden, fused)
        internals.clips_itself(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_steps(self) -> float:
        """Optimizer steps of the learning rate's schedule.

        Raises:
            UserError: the schedule has no end.
        """
        settings = self.settings.optimizer
        total = settings.num_training_steps or self.trainer.datamodule.planned_steps(self.trainer)
        if math.isinf(total) and settings.schedule != "constant":
            raise UserError(
                f"optimizer.num_training_steps: null, but {settings.schedule} needs to know where training ends"
            )
        return total

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norm = self.grad_norm()
        # Most often there is nothing to clip, and a CPU needn't then multiply all gradients by 1.
        if self.device.type != "cpu" or not norm <= gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.trained, gradient_clip_val, norm)

    def grad_norm(self) -> Tensor:
        """() norm of all gradients of this optimizer step before they are clipped, over all processes that hold
        parts of them."""
        if self.norm is None:
            self.norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        return self.norm


def valid_metrics(loss: float) -> dict[str, float]:
    """What is logged of a validation: its loss, in nats a token, and its perplexity."""
    return {"valid_loss": loss, "valid_ppl": perplexity(loss)}
