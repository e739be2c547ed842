"""How weights are updated: AdamW, Muon beside AdamW, and the learning rate's schedule."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from stages.common.devices import multiplies_bf16
from stages.common.settings import Optimizer

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


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
    lr, betas, decay = settings.lr, tuple(settings.betas), settings.weight_decay
    muon = settings.name == "muon"
    decayed = [p for p in matrices if all(p is not h for h in hidden)] if muon else matrices
    groups = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay, fused=fused)
    return MuonAndAdamW(Muon(hidden, lr, decay, betas), adamw) if muon else adamw


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

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, betas: tuple[float, float]):
        """
        Args:
            betas: the momentum, and the decay rate of the neurons' running mean square.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            self.update(group)

    def update(self, group: dict[str, Any]) -> None:
        """The step of a group's matrices."""
        matrices = [p for p in group["params"] if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                squares = here(p).new_zeros(1, max(p.shape))
                self.state[p].update(momentum_buffer=torch.zeros_like(p), neuron_squares=squares)
        beta1, beta2 = group["betas"]
        weights, gradients = [here(p) for p in matrices], [here(p.grad) for p in matrices]
        momenta = [here(self.state[p]["momentum_buffer"]) for p in matrices]
        squares = [self.state[p]["neuron_squares"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - beta1)
        work = SharedWork(matrices)
        dtype = torch.bfloat16 if multiplies_bf16(weights[0].device) else torch.float32
        whole_update = work.to_owners(lambda i: gradients[i].lerp(momenta[i], beta1), dtype)
        same = defaultdict(list)  # a matrix and its transpose have the same singular values
        for i in work.owned[work.rank]:
            same[min(matrices[i].shape), max(matrices[i].shape)].append(i)
        updates = {}
        for shape, members in same.items():
            momentum = torch.empty(len(members), *shape, dtype=dtype, device=work.device)
            for row, i in zip(momentum, members):
                row.copy_(wide(whole_update(i)))
            size = -0.2 * math.sqrt(shape[1]) * group["lr"]
            even = self.even(momentum, [squares[i] for i in members], beta2, size)
            for i, update in zip(members, even):
                updates[i] = update.t() if matrices[i].shape[0] > matrices[i].shape[1] else update
        for weight, update in zip(weights, work.to_all(updates, squares)):
            torch.add(update, weight, alpha=1 - group["lr"] * group["weight_decay"], out=weight)

    @staticmethod
    def even(momentum: Tensor, squares: list[Tensor], beta2: float, size: float) -> Tensor:
        """The updates of (N, n, m) matrices, n <= m, times `size`; their (1, m) running mean squares take them in."""
        updates = orthogonal(momentum).float()
        new = updates.square().mean(-2, keepdim=True)
        torch._foreach_lerp_(squares, list(new.to(squares[0].dtype)), 1 - beta2)
        scale = 1 / (torch.stack(squares).float().sqrt() + 1e-8)
        # The Frobenius norm stays what it was: of all neurons, `new` is the mean square, and scale**2 * new of those.
        norms = [each.sum(-1, keepdim=True) for each in (new, new * scale.square())]
        return updates.mul_(size * scale * (norms[0] / norms[1].clamp(min=1e-14)).sqrt())


class SharedWork:
    """Which of several processes computes the update of which matrix, and how matrices get there and back.

    Under DDP each process has all of every matrix, under FSDP some rows of it.
    """

    def __init__(self, matrices: list[Tensor]):
        together = dist.is_initialized()
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.shapes, self.device = [p.shape for p in matrices], matrices[0].device
        self.sharded = any(isinstance(p, DTensor) for p in matrices)
        costs = [min(shape) ** 2 * max(shape) for shape in self.shapes]
        loads, self.owned = [0] * self.processes, [[] for _ in range(self.processes)]
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner = loads.index(min(loads))
            loads[owner] += costs[i]
            self.owned[owner].append(i)

    def rows(self, i: int, process: int) -> slice:
        """The rows of a matrix that a process has."""
        rows = self.shapes[i][0]
        share = -(-rows // self.processes) if self.sharded else rows
        first = min(rows, process * share) if self.sharded else 0
        return slice(first, min(rows, first + share))

    def elements(self, i: int, process: int) -> int:
        rows = self.rows(i, process)
        return (rows.stop - rows.start) * self.shapes[i][1]

    def to_owners(self, part: Callable[[int], Tensor], dtype: torch.dtype) -> Callable[[int], Tensor]:
        """The whole of a matrix that this process computes, from `part`, what each process has of it."""
        if not self.sharded:
            return part
        mine = self.owned[self.rank]
        sent = [self.message([part(i) for i in each], dtype) for each in self.owned]
        sizes = [[self.elements(i, process) for i in mine] for process in range(self.processes)]
        parts = [received.split(each) for received, each in zip(self.exchange(sent, sizes), sizes)]
        return {i: torch.cat(rows).view(self.shapes[i]) for i, rows in zip(mine, zip(*parts))}.pop

    def to_all(self, updates: dict[int, Tensor], squares: list[Tensor]) -> list[Tensor]:
        """From the updates of this process's matrices, what it has of all of them; `squares` become all processes'."""
        if self.processes == 1:
            return [updates[i] for i in range(len(self.shapes))]
        mine, result = self.owned[self.rank], list(squares)
        sizes = [
            [self.elements(i, self.rank) for i in each] + [squares[i].numel() for i in each] for each in self.owned
        ]

        def to(process: int) -> Tensor:
            parts = [updates[i][self.rows(i, process)] for i in mine]
            return self.message([*parts, *(squares[i] for i in mine)], torch.float32)

        if self.sharded:
            received = self.exchange([to(process) for process in range(self.processes)], sizes)
        else:
            received = [torch.empty(sum(each), device=self.device) for each in sizes]
            received[self.rank] = to(self.rank)
            for process, message in enumerate(received):
                dist.broadcast(message, process)
        for each, message, size in zip(self.owned, received, sizes):
            parts = message.split(size)
            for i, update, its_squares in zip(each, parts, parts[len(each) :]):
                result[i] = update.view(-1, self.shapes[i][1])
                squares[i].copy_(its_squares.view_as(squares[i]))
        return result

    def message(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return torch.cat([empty, *(tensor.flatten().to(dtype) for tensor in tensors)])

    def exchange(self, sent: list[Tensor], sizes: list[list[int]]) -> list[Tensor]:
        """What each process has sent to this one, of as many elements in all; the messages go to each process."""
        lengths = [sum(each) for each in sizes]
        received = torch.empty(sum(lengths), dtype=sent[0].dtype, device=self.device)
        dist.all_to_all_single(received, torch.cat(sent), lengths, [len(message) for message in sent])
        return list(received.split(lengths))


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which FSDP may have shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process: all have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wide(matrix: Tensor) -> Tensor:
    """A matrix as (n, m), n <= m."""
    return matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonal(x: Tensor) -> Tensor:
    """(N, n, m) matrices, n <= m, with all their singular values brought near 1 (0.7 to 1.2).

    Fewer and steeper polynomials cost more loss than time: docs/quality.md.
    """
    gram = x @ x.mT
    # The Schatten 4-norm: at least the largest singular value, and nearer to it than the Frobenius norm.
    norm = torch.linalg.matrix_norm(gram, dtype=torch.float32, keepdim=True).clamp(min=1e-14).sqrt()
    x, gram = x / norm.to(x.dtype), gram / norm.square().to(x.dtype)
    for i in range(5):
        gram = x @ x.mT if i else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that Lightning, the schedule and checkpoints see as one: its groups and states are theirs."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        # A state that was loaded has taken the place of what they had.
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        for part in (self.muon, self.adamw):
            part.state = self.state
            part.step()
        return loss
