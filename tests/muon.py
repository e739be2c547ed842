"""Muon's update of one matrix in float64, by singular values."""

import torch


def orthogonal(update: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
    """A matrix whose singular values, divided by a norm (the Schatten 4-norm), went through Jordan's polynomial."""
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    values = values / ((values**4).sum() ** 0.25 if norm is None else norm)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right
