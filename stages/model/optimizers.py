"""How weights are updated: AdamW, Muon beside AdamW, and the learning rate's schedule."""

import math
from collections import defaultdict
from collections.abc import Callable

from stages.common.devices import multiplies_bf16
from stages.common.settings import Optimizer

import torch
from torch import Tensor


def make_optimizer(
    settings: Optimizer, matrices: list[Tensor], vectors: list[Tensor], hidden: list[Tensor], fused: bool
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
            Muon(hidden, lr=settings.lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW([{"params": others, "weight_decay": settings.weight_decay}, no_decay], **adamw),
        )
    else:
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay}, no_decay], **adamw)
    return optimizer


def lr_factor(step: int, total: float, settings: Optimizer) -> float:
    """Learning rate of an optimizer step, counted from 0, as a fraction of the peak."""
    if step < settings.num_warmup_steps:
        return (step + 1) / settings.num_warmup_steps
    if settings.schedule == "constant":
        return 1.0
    wsd = settings.schedule == "wsd"
    first, least = (cooldown_start(total, settings), 0.0) if wsd else (settings.num_warmup_steps, 0.1)
    least = least if settings.min_lr_ratio is None else settings.min_lr_ratio
    done = min(1.0, max(0, step - first) / max(1, total - first))
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "wsd": 1 - math.sqrt(done)}
    return least + (1 - least) * shapes[settings.schedule]


def cooldown_start(total: float, settings: Optimizer) -> float:
    """The optimizer step, counted from 0, with which the cooldown of schedule wsd begins.

    Until then the learning rate doesn't depend on `total` (Hägele et al. 2024, https://arxiv.org/abs/2405.18392,
    whose cooldown is 1 - sqrt too).
    """
    return max(settings.num_warmup_steps, total - max(1, round(settings.decay_fraction * total)))


class Muon(torch.optim.Optimizer):
    """Muon for all matrices of one shape at once, with updates of one size for every neuron.

    The momentum's matrix is replaced by one with the same singular vectors and singular values near 1
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). A hidden layer's neurons, the columns of the
    wide form, are divided by their running root mean square (NorMuon: Li et al. 2025,
    https://arxiv.org/abs/2510.05491). The whole is scaled to the size of AdamW's updates (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982).
    """

    def __init__(
        self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95, beta2: float = 0.95
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for p in matrices:
                if not self.state[p]:
                    squares = p.new_zeros(1, max(p.shape))
                    self.state[p].update(momentum_buffer=torch.zeros_like(p), neuron_squares=squares)
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(momenta, [p.grad for p in matrices], 1 - group["momentum"])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            same = defaultdict(list)  # a matrix and its transpose have the same singular values
            for p, momentum in zip(matrices, momenta):
                same[min(p.shape), max(p.shape), p.device].append((p, p.grad.lerp(momentum, group["momentum"])))
            for (_, long, device), pairs in same.items():
                dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
                updates = orthogonal(torch.stack([wide(update).to(dtype) for _, update in pairs])).float()
                squares = [self.state[p]["neuron_squares"] for p, _ in pairs]
                new = updates.square().mean(-2, keepdim=True).to(squares[0].dtype)
                torch._foreach_lerp_(squares, list(new), 1 - group["beta2"])
                updates = same_norm(updates / (torch.stack(squares).float().sqrt() + 1e-8), updates)
                torch._foreach_add_(
                    [wide(p) for p, _ in pairs], list(updates), alpha=-0.2 * math.sqrt(long) * group["lr"]
                )
        return loss


def wide(matrix: Tensor) -> Tensor:
    """A matrix as (n, m), n <= m."""
    return matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix


def same_norm(x: Tensor, of: Tensor) -> Tensor:
    """(N, n, m) matrices, each scaled to the Frobenius norm of its counterpart."""
    norm = torch.linalg.matrix_norm
    return x * (norm(of, keepdim=True) / norm(x, keepdim=True).clamp(min=1e-7))


def orthogonal(x: Tensor) -> Tensor:
    """(N, n, m) matrices, n <= m, with all their singular values brought near 1 (0.7 to 1.2)."""
    x = x / torch.linalg.matrix_norm(x, dtype=torch.float32, keepdim=True).clamp(min=1e-7).to(x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that Lightning and the schedule see as one."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([p for part in self.parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
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
