"""The operations that take nearly all of the time: matrix products, GELU, and the loss over the vocabulary.

They compute what torch.nn.functional computes; tests hold them against it.
"""

import ctypes
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

# PyTorch sends float32 products to MKL, which uses half the width of an AMD processor with AVX-512: oneDNN
# uses all of it. On Intel's, MKL is the faster one.
INTEL = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
ONEDNN = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX") and not INTEL
)

AMX = torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16"))

# Logits are made for so many bytes' worth of tokens at a time: a piece that fits the cache is read and
# written several times without going to memory. On a GPU pieces only keep the peak memory low.
LOGITS_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
AMX_LOGITS_BYTES = 1 << 26  # its products are so quick that adding up the gradients of small pieces shows

# A float32 softmax on a CPU takes so many bytes at a time.
CACHE_BYTES = 1 << 21

# Where memory that isn't in the cache costs as much as computing does, and looking at a value costs nothing.
IN_PLACE = {"cpu"}

# A GPU's products are fastest when the vocabulary is a multiple of this. The rows that fill it up are there only
# while logits are made.
VOCABULARY_MULTIPLE = {"cuda": 128}

# Where float32 is asked for, a GPU's products round their factors to TF32, ten times as fast.
torch.backends.cuda.matmul.allow_tf32 = True

# Elements of a GELU at a time, so that its float32 intermediates stay in the cache.
GELU_PIECE = 1 << 18


def reuse_memory() -> None:
    """Leaves freed memory to the next step, as it is, for the rest of this process, and has it in large pages.

    By default glibc gives large pieces back to the system, which fills them with zeros when they are
    wanted again; and PyTorch, told to be deterministic, fills them with NaN. Together a tenth of a step.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        ask_for_large_pages(libc)


def ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Has Linux, where it may, give 2 MiB and not 4 KiB at a time of the next 4 GiB that this process uses.

    So a processor seldom has to look an address up: 2 to 6 % of a step. Nothing is used by asking, but where
    addresses themselves are limited it would take them from others.
    """
    limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    strict = OVERCOMMIT.exists() and OVERCOMMIT.read_text().strip() == "2"
    if strict or any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    pieces = [libc.malloc(1 << 29) for _ in range(8)]
    end = libc.sbrk(0)
    heap = [piece for piece in pieces if piece and piece < end]  # the others are elsewhere
    if heap:
        start = min(heap) // resource.getpagesize() * resource.getpagesize()
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    for piece in pieces:
        libc.free(ctypes.c_void_p(piece))


# malloc.h, sys/mman.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MADV_HUGEPAGE = -1, -3, 14
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: address space has to be there as memory


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, unary: str = "none", algorithm: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, unary, [], algorithm)


# torch.compile takes it only under a name of our own: its rule for the original wants constant weights.
torch.library.define("stages::onednn_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("stages::onednn_linear", "CPU", _onednn_linear)


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# register_fake would look through all modules for this line of source.
torch.library.impl("stages::onednn_linear", "Meta", _shape_of_linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear of (N, in) rows with (out, in) weights, with a gradient: (N, out)."""
    if uses_onednn(x):
        return OneDNNLinear.apply(x, weight, bias)
    if bias is not None and uses_tiles(x):
        return _onednn_linear(autocast(x), autocast(weight), autocast(bias))
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(linear(x, weight, bias)), with a gradient: (N, out)."""
    if uses_tiles(x):
        return _onednn_linear(autocast(x), autocast(weight), autocast(bias), "gelu", "tanh")
    return gelu(linear(x, weight, bias))


def uses_tiles(x: Tensor) -> bool:
    """Whether bias and GELU are best made while a product is in AMX's registers."""
    # Where a gradient is wanted, what GELU was made of is kept, and to make it a second time gains nothing.
    return on_amx(x) and not torch.is_grad_enabled()


def on_amx(x: Tensor) -> bool:
    return AMX and x.device.type == "cpu" and autocast_dtype(x) == torch.bfloat16


def uses_onednn(x: Tensor) -> bool:
    # Under autocast PyTorch itself takes oneDNN.
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias without a gradient."""
    if not uses_onednn(x):
        return F.linear(x, weight, bias)
    return (torch.ops.stages.onednn_linear if torch.compiler.is_compiling() else _onednn_linear)(x, weight, bias)


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        # oneDNN copies a transposed first factor: let it be the smaller one.
        if x.shape[1] <= grad.shape[1]:
            grad_weight = product(x.t(), grad.t()).t()
        else:
            grad_weight = product(grad.t(), x.t())
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def gelu(x: Tensor) -> Tensor:
    """torch.nn.functional.gelu(x, approximate="tanh") of any shape and float dtype, with a gradient.

    (1 + tanh(u)) / 2 is sigmoid(2 u), which a CPU computes several times as fast.
    """
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.sigmoid(wide * (GELU_1 + GELU_3 * wide.square()))).to(x.dtype)
    if INTEL and x.numel() <= 2 * GELU_PIECE:  # of few elements, one call takes less there
        return F.gelu(x, approximate="tanh")
    return Gelu.apply(x)


# 2 u = GELU_1 x + GELU_3 x^3 (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415).
GELU_1 = 2 * math.sqrt(2 / math.pi)
GELU_3 = 0.044715 * GELU_1


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = torch.tensor(GELU_1, dtype=wide)
        for part, y_part in zip(x.flatten().split(GELU_PIECE), y.view(-1).split(GELU_PIECE), strict=True):
            part = part.to(wide)
            sigmoid = torch.addcmul(factor, part, part, value=GELU_3).mul_(part).sigmoid_()
            if y.dtype == wide:
                torch.mul(sigmoid, part, out=y_part)
            else:  # a product with an output of another dtype takes several times as long
                y_part.copy_(sigmoid.mul_(part))
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, *ctx.saved_tensors, approximate="tanh")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of F.cross_entropy(F.linear(x, weight), targets), without all the logits at once.

    Args:
        x: (N, C) hidden states.
        weight: (V, C) output embeddings.
        targets: (N,) int64 token ids.
    Returns:
        () float32, nats.
    """
    if x.device.type in IN_PLACE:
        return _uncompiled_cross_entropy(x, weight, targets)
    return LinearCrossEntropy.apply(x, weight, targets)


@torch.compiler.disable
def _uncompiled_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return LinearCrossEntropy.apply(x, weight, targets)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of softmax and cross-entropy is softmax(logits) - onehot(targets): known as soon as
    the logits are, so each piece of them is used up at once."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x, grad_weight, wide = torch.empty_like(x), None, weight.dtype
        x, weight, V = autocast(x), autocast(weight), len(weight)
        if filling := -V % VOCABULARY_MULTIPLE.get(x.device.type, 1):
            weight = F.pad(weight, (0, 0, 0, filling))
        in_place = x.device.type in IN_PLACE
        for rows in pieces(x, weight):
            piece = x[rows], weight, targets[rows]
            loss, grad_logits = loss_and_gradient_in_place(*piece) if in_place else loss_and_gradient(*piece, V)
            total += loss
            grad_x[rows] = product(grad_logits, weight.t())
            more = product(grad_logits.t(), x[rows].t())
            grad_weight = more.to(wide) if grad_weight is None else grad_weight.add_(more)
        ctx.save_for_backward(grad_x, grad_weight[:V])
        return total / len(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_x)
        return grad_x.mul_(grad), grad_weight.mul_(grad), None


def loss_and_gradient(x: Tensor, weight: Tensor, targets: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of a piece, () float32, and its gradient for the logits, (N, len(weight)).

    Args:
        x, weight, targets: as for `linear_cross_entropy`; rows of the weights from V on are only there to fill up.
    """
    logits, target = product(x, weight), targets[:, None]
    logits[:, V:] = -torch.inf
    probabilities = logits.softmax(1, dtype=torch.float32)
    # -log softmax(logits)[target], without a second pass of exponentials: of the largest logit, the probability
    # is at least 1 / V, so its logarithm is exact.
    log_sum_exp = logits.amax(1, keepdim=True).float() - probabilities.amax(1, keepdim=True).log()
    loss = (log_sum_exp - logits.gather(1, target).float()).sum()
    # A scatter that is to be deterministic waits for the GPU.
    ids = torch.arange(len(weight), device=x.device)
    return loss, torch.where(ids == target, probabilities - 1, probabilities).to(x.dtype)


def loss_and_gradient_in_place(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in fewer passes, and in memory that is in the cache, where the host may look at the probabilities."""
    logits, likelihoods = product(x, weight), []
    for part, probabilities, target in cached_parts(logits, targets[:, None]):
        torch.softmax(probabilities, 1, out=probabilities)
        likelihoods.append(probabilities.gather(1, target))
        probabilities.scatter_(1, target, likelihoods[-1] - 1)
        part.copy_(probabilities)
    likelihood = torch.cat(likelihoods).flatten()
    losses, lost = -likelihood.log(), likelihood < torch.finfo(torch.float32).tiny  # float32 takes it for 0
    if lost.any():
        losses[lost] = token_cross_entropy(x[lost], weight, targets[lost])
    return losses.sum(), logits


def token_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(F.linear(x, weight), targets, reduction="none"), without all the logits at once.

    Args:
        x, weight, targets: as for `linear_cross_entropy`; no gradient is kept.
    Returns:
        (N,) float32, nats.
    """
    x, weight = autocast(x), autocast(weight)
    losses = []
    for rows in pieces(x, weight):
        for _, logits, target in cached_parts(product(x[rows], weight), targets[rows, None]):
            torch.log_softmax(logits, 1, out=logits)
            losses.append(-logits.gather(1, target)[:, 0])
    return torch.cat(losses)


def cached_parts(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows of (N, V) logits at a time, as they are and in float32, and their targets.

    On a CPU they stay in the cache, and all float32 rows, which a caller may write to, take the same memory.
    """
    rows = max(1, CACHE_BYTES // (4 * logits.shape[1])) if logits.device.type in IN_PLACE else len(logits)
    memory = logits if logits.dtype == torch.float32 else torch.empty_like(logits[:rows], dtype=torch.float32)
    for part, target in zip(logits.split(rows), targets.split(rows)):
        yield part, part if memory is logits else memory[: len(part)].copy_(part), target


def autocast(x: Tensor) -> Tensor:
    """What autocast would make of it for every piece anew."""
    return x.to(autocast_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def pieces(x: Tensor, weight: Tensor) -> list[slice]:
    """The rows of (N, C) hidden states whose logits are made at a time."""
    most = AMX_LOGITS_BYTES if on_amx(x) else LOGITS_BYTES.get(x.device.type, 1 << 28)
    rows = max(1, most // (4 * len(weight)))
    return [slice(i, i + rows) for i in range(0, len(x), rows)]
