"""The fast operations against torch.nn.functional in float64."""

import pytest
import torch
import torch.nn.functional as F

from stages import ops


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


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_cross_entropy_over_the_vocabulary_in_pieces(either_library, monkeypatch, pieces):
    rows, width, vocabulary = 50, 16, 300
    monkeypatch.setitem(ops.LOGITS_BYTES, "cpu", 4 * vocabulary * -(-rows // pieces))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    measured = ops.linear_cross_entropy(x, weight, targets)
    (3 * measured).backward()
    (3 * expected.mean()).backward()
    assert measured.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert relative_error(x.grad, exact[0].grad) < 1e-6
    assert relative_error(weight.grad, exact[1].grad) < 1e-6
    with torch.no_grad():
        assert relative_error(ops.token_cross_entropy(x, weight, targets), expected) < 1e-6
