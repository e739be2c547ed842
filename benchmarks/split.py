"""Where a training step's time goes, and what its matrix products take alone: run by benchmarks/run.py.

The working directory is a project with params.yaml and data/blocks/. Prints one JSON object.
"""

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.contenders import own_steps
from stages.common.params import load

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

STEPS, PROFILED, ALONE = 20, 4, 15
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
KINDS = {
    "matrix products": PRODUCTS,
    "attention": ("aten::_scaled_dot_product",),
    "softmax": ("aten::_softmax", "aten::softmax"),
    "GELU": ("aten::gelu", "Gelu", "aten::sigmoid", "aten::addcmul"),
    "layer norm": ("aten::native_layer_norm",),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_"),
    "sums of gradients, residuals, biases": ("aten::add", "aten::sum", "aten::embedding_dense_backward"),
    "clipping and optimizer": ("aten::_foreach", "aten::_fused", "aten::linalg_vector_norm", "Optimizer"),
}


def main() -> None:
    settings = load("stages.train", __doc__, argv=sys.argv[1:])
    torch.manual_seed(settings.seed_everything)
    steps = own_steps(settings)
    for _ in range(5):
        next(steps)
    seconds = statistics.median(timed(lambda: next(steps)) for _ in range(STEPS))
    with Products() as products:
        next(steps)
    alone = sum(count * best_seconds(*product) for product, count in products.seen.items())
    print(json.dumps({"step": seconds, "products alone": alone, "flops": products.flops, "kinds": kinds(steps)}))


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def kinds(steps: Iterator) -> dict[str, float]:
    """The share of each kind of operation in the steps' time, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            next(steps)
    shares: dict[str, float] = defaultdict(float)
    events = profile.key_averages()
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "the rest")
        shares[kind] += event.self_cpu_time_total
    whole = sum(shares.values())
    return {kind: shares[kind] / whole for kind in [*KINDS, "the rest"] if shares[kind]}


class Products(TorchDispatchMode):
    """The matrix products of what runs inside: how often each, by its operation and its tensors' layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in PRODUCTS:
            layouts = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args[:3])
            self.seen[func, layouts] += 1
            inner = (args[1] if "add" in func.name() else args[0]).shape[-1]
            self.flops += 2 * result.numel() * inner
        return result


def best_seconds(func: Any, layouts: tuple) -> float:
    """The least time of a product alone, with its factors in the cache where they fit."""
    arguments: list[Any] = [
        torch.empty_strided(each[0], each[1], dtype=each[2]).normal_() if isinstance(each, tuple) else each
        for each in layouts
    ]
    rest = ["none", [], ""] if "linear_pointwise" in func.name() else []
    return min(timed(lambda: func(*arguments, *rest)) for _ in range(ALONE))


if __name__ == "__main__":
    main()
