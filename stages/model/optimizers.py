"""How weights are updated: AdamW, Muon beside AdamW, and the learning rate's schedule."""

import math

import torch
from torch import Tensor


def make_optimizer(
    settings, matrices: list[Tensor], vectors: list[Tensor], hidden: list[Tensor], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of the optimizer group.

    Args:
        settings: the optimizer group.
        matrices: parameters that weight decay acts on.
        vectors: biases and norms, which have none.
        hidden: those of the matrices, inside the transformer's layers, that Muon may take.
        fused: whether AdamW's step is one kernel.
    """
    adamw = {"lr": settings.lr, "betas": tuple(settings.betas), "fused": fused}
    no_decay = {"params": vectors, "weight_decay": 0.0}
    if settings.name == "muon":
        others = [p for p in matrices if all(p is not h for h in hidden)]
        optimizer = MuonAndAdamW(
            torch.optim.Muon(
                hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW([{"params": others, "weight_decay": settings.weight_decay}, no_decay], **adamw),
        )
    else:
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay}, no_decay], **adamw)
    # Under mixed precision Lightning clips no gradients of an optimizer that says it unscales them itself.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def lr_factor(step: int, total: float, settings) -> float:
    """Learning rate of an optimizer step, counted from 0, as a fraction of the peak."""
    if step < settings.num_warmup_steps:
        return (step + 1) / settings.num_warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = min(1.0, (step - settings.num_warmup_steps) / max(1, total - settings.num_warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that Lightning and the schedule see as one."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([p for part in self.parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
