"""Which device computes, and in which number format."""

from typing import Any

from stages.common.errors import UserError

import torch

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def device_of(accelerator: str) -> torch.device:
    """The device of evaluate.accelerator: cuda, mps, cpu, or auto for the first of them that is there.

    Raises:
        UserError: this machine has none.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in there if there[kind]) if accelerator == "auto" else accelerator
    if not there[kind]:
        raise UserError(
            f"evaluate.accelerator: {kind}: this machine has none that PyTorch can use: set it to auto or cpu"
        )
    return torch.device(kind)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def auto_precision(accelerator: Any) -> str:
    """What trainer.precision auto stands for on the device that Lightning chooses for an accelerator."""
    device = torch.device("cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")
    other = accelerator not in ("auto", "gpu", "cuda", "cpu")
    return "bf16-mixed" if multiplies_bf16(device) and not other else "32-true"


def autocast(device: torch.device, precision: str | None) -> torch.autocast:
    """A context in which products are computed in `precision`, one of Lightning's names; the others are float32."""
    return torch.autocast(device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)
