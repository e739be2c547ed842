"""Muon's update of one matrix in float64, by singular values."""

from stages.model.optimizers import POLYNOMIALS

import torch


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """A matrix with its singular values, of 1.02 times the Schatten 4-norm, put through the polynomials."""
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    values = values / (1.02 * (values**4).sum() ** 0.25)
    for a, b, c in POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right
