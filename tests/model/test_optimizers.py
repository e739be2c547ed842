"""Muon against its definition in float64, and against torch's own."""

import os
import subprocess
import sys
from pathlib import Path

from stages.model import optimizers

import pytest
import torch
from conftest import ROOT
from muon import orthogonal

SHAPES = [(16, 48), (16, 16), (64, 16), (16, 64), (16, 48)]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    # As a model's: some directions are much stronger than others.
    return [torch.randn(shape, generator=generator) @ torch.diag(torch.logspace(0, -2, shape[1])) for shape in SHAPES]


def written_out(matrices: list[torch.Tensor], steps: int, lr: float, decay: float) -> list[torch.Tensor]:
    """Muon of Jordan et al. with the neurons of NorMuon and the step size of Liu et al., one matrix at a time, in
    float64."""
    momenta, squares = [0.0] * len(matrices), [0.0] * len(matrices)
    for step in range(steps):
        for i, gradient in enumerate(gradients(step)):
            gradient = gradient.double()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            update = 0.1 * gradient + 0.9 * momenta[i]
            update = orthogonal(update)
            short = 0 if update.shape[0] <= update.shape[1] else 1
            squares[i] = 0.95 * squares[i] + 0.05 * (update**2).mean(short, keepdim=True)
            even = update / squares[i].sqrt()
            update = even * update.norm() / even.norm()
            matrices[i] = matrices[i] * (1 - lr * decay) - lr * 0.2 * max(update.shape) ** 0.5 * update
    return matrices


def stepped(optimizer: torch.optim.Optimizer, matrices: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for matrix, gradient in zip(matrices, gradients(step)):
            matrix.grad = gradient
        optimizer.step()


def start() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(100)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def moved(matrices: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(now.detach().double() - then.double()).flatten() for now, then in zip(matrices, start())])


def test_muon_is_its_definition(monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: False)
    matrices = start()
    stepped(optimizers.Muon(matrices, 0.02, 0.1, (0.9, 0.95)), matrices, range(6))
    expected = moved(written_out([matrix.detach().double() for matrix in start()], 6, 0.02, 0.1))
    assert (moved(matrices) - expected).norm() < 1e-4 * expected.norm()


def test_muon_in_bf16_is_nearly_as_exact(monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: True)
    expected = moved(written_out([matrix.detach().double() for matrix in start()], 6, 0.02, 0.1))
    matrices = start()
    stepped(optimizers.Muon(matrices, 0.02, 0.1, (0.9, 0.95)), matrices, range(6))
    assert (moved(matrices) - expected).norm() < 0.05 * expected.norm()


def test_muon_without_its_neurons_is_torchs(monkeypatch):
    """And with the Frobenius norm, with which torch's begins."""

    def even(self, momentum, squares, beta2, size):
        matrices = [orthogonal(x, norm=x.double().norm()) for x in momentum]
        return size * torch.stack(matrices).to(momentum.dtype)

    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(optimizers.Muon, "even", even)
    ours, theirs = start(), start()
    stepped(optimizers.Muon(ours, 0.02, 0.1, (0.9, 0.95)), ours, range(6))
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    stepped(torchs, theirs, range(6))
    assert (moved(ours) - moved(theirs)).norm() < 0.05 * moved(theirs).norm()


def test_muon_goes_on_from_its_state(tmp_path):
    straight, resumed = start(), start()
    stepped(optimizers.Muon(straight, 0.02, 0.1, (0.9, 0.95)), straight, range(4))
    first = optimizers.Muon(resumed, 0.02, 0.1, (0.9, 0.95))
    stepped(first, resumed, range(2))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = optimizers.Muon(resumed, 0.5, 0.3, (0.5, 0.5))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    stepped(second, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


@pytest.mark.parametrize("frozen", [0, 2])
def test_muon_leaves_what_has_no_gradient(frozen):
    matrices = start()
    matrices[frozen].requires_grad_(False)
    optimizer = optimizers.Muon(matrices, 0.02, 0.1, (0.9, 0.95))
    for i, (matrix, gradient) in enumerate(zip(matrices, gradients(0))):
        matrix.grad = None if i == frozen else gradient
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(matrices, start())] == [i == frozen for i in range(len(SHAPES))]


THREE = """
import sys, torch, torch.distributed as dist
from test_optimizers import gradients, moved, start, written_out
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from stages.model import optimizers

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=3)
optimizers.multiplies_bf16 = lambda device: False
mesh = init_device_mesh("cpu", (3,))
expected = moved(written_out([matrix.detach().double() for matrix in start()], 6, 0.02, 0.1))
for split in (lambda matrix: matrix, lambda matrix: distribute_tensor(matrix, mesh, [Shard(0)])):
    matrices = [torch.nn.Parameter(split(matrix.detach())) for matrix in start()]
    muon = optimizers.Muon(matrices, 0.02, 0.1, (0.9, 0.95))
    for step in range(6):
        for matrix, gradient in zip(matrices, gradients(step)):
            matrix.grad = split(gradient)
        muon.step()
    error = (moved([optimizers.whole(matrix) for matrix in matrices]) - expected).norm() / expected.norm()
    squares = torch.cat([muon.state[matrix]["neuron_squares"].flatten() for matrix in matrices])
    print(error.item(), squares.numpy().tobytes().hex())
"""


def test_muon_of_three_processes_is_its_definition(tmp_path):
    """Whole matrices, as DDP has them, then in rows, as FSDP: 16 rows are no multiple of three."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{Path(__file__).parent}"}
    processes = [
        subprocess.Popen([sys.executable, "-c", THREE, str(tmp_path / "meet"), str(rank)], env=environment,
                         stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]  # fmt: skip
    printed = [process.communicate(timeout=300)[0].split() for process in processes]
    assert all(float(error) < 1e-4 for each in printed for error in each[::2]), printed
    assert [len(each) for each in printed] == [4, 4, 4]
    assert printed[0][1::2] == printed[1][1::2] == printed[2][1::2]  # each has the running squares of all
