"""The fast operations against torch.nn.functional in float64."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from stages.model import gpt2, ops, optimizers

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    return ((measured.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[True, False], ids=["oneDNN", "default"])
def either_library(request, monkeypatch):
    monkeypatch.setattr(ops, "ONEDNN", request.param and ops.ONEDNN)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(70, 24, 40), (33, 48, 16), (1, 8, 8)])
@pytest.mark.parametrize("transposed", [True, False])
def test_linear(either_library, rows, inputs, outputs, transposed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight = weight.t().contiguous().t() if transposed else weight
    bias, upstream = torch.randn(outputs, generator=generator), torch.randn(rows, outputs, generator=generator)
    arguments = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    measured, expected = ops.linear(*arguments), F.linear(*exact)
    measured.backward(upstream)
    expected.backward(upstream.double())
    assert relative_error(measured, expected) < 1e-6
    for ours, theirs in zip(arguments, exact):
        assert relative_error(ours.grad, theirs.grad) < 1e-6


BF16_IN_ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("under_autocast", [True, False])
@pytest.mark.parametrize("amx", [pytest.param(True, marks=pytest.mark.skipif(not BF16_IN_ONEDNN, reason="CPU")), False])
def test_linear_and_gelu_of_bf16(monkeypatch, amx, under_autocast):
    """With and without a gradient, as GPT-2 keeps its weights, and where the products are large."""
    monkeypatch.setattr(ops, "AMX", amx)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(70, 24, generator=generator), torch.randn(40, generator=generator)
    weight = torch.randn(24, 40, generator=generator).t()
    x[:5] *= torch.tensor([[1e2], [1e4], [1e10], [torch.inf], [torch.nan]])
    arguments = [
        tensor.bfloat16().to(torch.float32 if under_autocast else torch.bfloat16) for tensor in (x, weight, bias)
    ]
    exact = F.linear(*(tensor.double() for tensor in arguments))
    for operation, expected in ((ops.linear, exact), (ops.linear_gelu, F.gelu(exact, approximate="tanh"))):
        for grad in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast), torch.set_grad_enabled(grad):
                measured = operation(*arguments)
            assert measured.dtype == torch.bfloat16
            torch.testing.assert_close(measured.double(), expected, rtol=1e-2, atol=2e-2, equal_nan=True)
            assert relative_error(measured[5:], expected[5:]) < 3e-3


@pytest.mark.parametrize(("pieces", "size"), [(1, 1), (3, 1), (50, 1), (3, 100)])
@pytest.mark.parametrize("as_on", ["cpu", "gpu"])
def test_cross_entropy_over_the_vocabulary_in_pieces(either_library, monkeypatch, pieces, size, as_on):
    rows, width, vocabulary = 50, 16, 300
    if as_on == "gpu":
        monkeypatch.setitem(ops.VOCABULARY_MULTIPLE, "cpu", 128)
        monkeypatch.setattr(ops, "IN_PLACE", set())
    monkeypatch.setitem(ops.LOGITS_BYTES, "cpu", 4 * vocabulary * -(-rows // pieces))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator).requires_grad_()
    # Of 100, targets have a probability that float32 takes for 0, and still a loss.
    weight = (size * torch.randn(vocabulary, width, generator=generator)).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    measured = ops.linear_cross_entropy(x, weight, targets)
    (3 * measured).backward()
    (3 * expected.mean()).backward()
    assert measured.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    rounding = 1e-6 if size == 1 else 3e-6  # of logits in the hundreds
    assert relative_error(x.grad, exact[0].grad) < rounding
    assert relative_error(weight.grad, exact[1].grad) < rounding
    with torch.no_grad():
        assert relative_error(ops.token_cross_entropy(x, weight, targets), expected) < 1e-6


def test_pieces_of_logits_fit_the_device(monkeypatch):
    """On AMX larger ones than on other processors, and on a GPU the largest, whatever processor is beside it."""
    monkeypatch.setitem(ops.LOGITS_BYTES, "meta", ops.LOGITS_BYTES["cuda"])
    rows = {}
    for device in ("cpu", "meta"):
        for amx in (False, True):
            monkeypatch.setattr(ops, "AMX", amx)
            x, weight = (torch.empty(n, 1, dtype=torch.bfloat16, device=device) for n in (1 << 15, 1 << 14))
            rows[device, amx] = ops.pieces(x, weight)[0].stop
    assert rows == {("cpu", False): 1 << 8, ("cpu", True): 1 << 10, ("meta", False): 1 << 14, ("meta", True): 1 << 14}


@pytest.mark.parametrize("block_size", [24, gpt2.WHOLE_ATTENTION + 8])
def test_bf16_on_a_cpu(block_size):
    """Both ways of attention stay as near to float32 as rounding to bf16 allows."""
    settings = SimpleNamespace(block_size=block_size, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    torch.manual_seed(1)
    model = gpt2.new_model(settings, 100, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # away from the uniform distribution of a fresh model
    tokens = torch.randint(0, 100, (3, block_size + 1))
    expected = gpt2.loss(model, tokens)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        measured = gpt2.loss(model, tokens)
    assert measured.item() == pytest.approx(expected.item(), rel=3e-3)
    for ours, theirs in zip(torch.autograd.grad(measured, list(model.parameters())), gradients):
        assert relative_error(ours, theirs.double()) < 0.05


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 5e-7), (torch.bfloat16, 2e-3), (torch.float64, 3e-15)])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, ops.GELU_PIECE + 1)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("intel", [False, True])
def test_gelu(monkeypatch, dtype, rounding, shape, compiled, intel):
    monkeypatch.setattr(ops, "INTEL", intel)
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs g++ on a CPU")
    torch.manual_seed(0)
    x, grad = (4 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    exact = x.detach().double().requires_grad_()
    gelu = torch.compile(ops.gelu) if compiled else ops.gelu
    measured, expected = gelu(x), F.gelu(exact, approximate="tanh")
    measured.backward(grad)
    expected.backward(grad.double())
    assert measured.dtype == x.grad.dtype == dtype
    assert relative_error(measured, expected) < rounding
    assert relative_error(x.grad, exact.grad) < rounding


def test_gelu_of_extremes():
    x = torch.tensor([-torch.inf, -1e30, -30.0, 0.0, 30.0, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(ops.gelu(x), F.gelu(x, approximate="tanh"), equal_nan=True)


NOT_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")


def without_and_with_reuse(program: str) -> list[list[int]]:
    """The numbers that a program prints, which calls `ops.reuse_memory` when it has an argument."""
    runs = [[sys.executable, "-c", program, *words] for words in ([], ["reuse"])]
    return [[int(word) for word in subprocess.check_output(run, cwd=ROOT).split()] for run in runs]


@NOT_GLIBC
def test_memory_of_a_step_is_there_for_the_next():
    """Of 32 MiB, written 20 times, glibc alone has the system make every page anew each time."""
    program = """if True:
        import resource, sys, torch
        from stages.model import ops
        if sys.argv[1:]:
            ops.reuse_memory()
        torch.use_deterministic_algorithms(True)
        faults = []
        for _ in range(20):
            torch.empty(1 << 23).zero_()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[9])
    """
    without, with_it = without_and_with_reuse(program)
    assert with_it[0] < without[0] / 10


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@NOT_GLIBC
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this system has no large pages to give"
)
def test_memory_comes_in_large_pages():
    """256 MiB are 65,536 pages of 4 KiB, which the system makes one by one."""
    program = """if True:
        import resource, sys, torch
        from stages.model import ops
        if sys.argv[1:]:
            ops.reuse_memory()
        used = [resource.getrusage(resource.RUSAGE_SELF)]
        kept = [torch.empty(1 << 22).zero_() for _ in range(16)]
        used.append(resource.getrusage(resource.RUSAGE_SELF))
        print(used[1].ru_minflt - used[0].ru_minflt, used[1].ru_maxrss - used[0].ru_maxrss)
    """
    without, with_it = without_and_with_reuse(program)
    assert with_it[0] < 65_536 / 4
    assert with_it[1] < without[1] + 2**14  # KiB: the 4 GiB that are asked for are not used


@NOT_GLIBC
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
@pytest.mark.parametrize(("limit", "counted"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_limited_addresses_are_left_to_others(limit, counted):
    """Of 3 GiB that a limit leaves, 2 are there for a thread's stack or a library."""
    program = """if True:
        import mmap, resource, sys, torch
        from stages.model import ops
        limit, counted = getattr(resource, sys.argv[1]), sys.argv[2]
        used = 1024 * int(open("/proc/self/status").read().split(counted + ":")[1].split()[0])
        resource.setrlimit(limit, (used + (3 << 30), resource.getrlimit(limit)[1]))
        ops.reuse_memory()
        mmap.mmap(-1, 2 << 30, flags=mmap.MAP_PRIVATE)
    """
    subprocess.run([sys.executable, "-c", program, limit, counted], cwd=ROOT, check=True)


@pytest.mark.gpu
def test_an_ordinary_step_never_waits_for_the_gpu():
    settings = SimpleNamespace(block_size=64, n_layer=2, n_head=2, n_embd=64, dropout=0.1)
    model = gpt2.new_model(settings, 300, 0).cuda().train()
    hidden = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    steps = [optimizers.Muon(hidden, 1e-3, 0.1, (0.9, 0.95)), torch.optim.AdamW(others, lr=1e-3, fused=True)]
    tokens = torch.randint(300, (4, 65), device="cuda")
    torch.use_deterministic_algorithms(True)
    for step in range(4):
        # The first steps make what the later ones use again.
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = gpt2.loss(model, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in steps:
                optimizer.step()
                optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.use_deterministic_algorithms(step < 3)
