"""FSDP2: weights, gradients and optimizer state in parts over all processes; others can go on from its checkpoints."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.common.checkpoint_files import filled, in_parts
from stages.common.settings import Settings
from stages.model.gpt2 import call_blocks
from stages.model.optimizers import whole
from stages.training import checkpoints
from stages.training import lightning_internals as internals
from stages.training.module import LanguageModel
from stages.training.parts import apart, write_parts

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GPT2LMHeadModel


class ShardedModel(LanguageModel):
    """A GPT-2 each of whose blocks is whole on a device only while it computes."""

    def configure_model(self) -> None:
        if isinstance(next(self.parameters()), DTensor):
            return
        call_blocks(self.model)
        mesh = init_device_mesh(self.trainer.strategy.root_device.type, (self.trainer.world_size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in (*self.model.transformer.h, self):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for name in ("training_step", "validation_step"):
            register_fsdp_forward_method(self, name)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.set_requires_gradient_sync(internals.steps_after(self.trainer, batch_idx))


def module_of(model: GPT2LMHeadModel, settings: Settings) -> LanguageModel:
    """The model as Lightning trains it with `trainer.strategy`."""
    return (ShardedModel if settings.trainer.strategy == "fsdp" else LanguageModel)(model, settings)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's for FSDP2, with small checkpoints as those of one process, and large ones in parts."""

    group: dist.ProcessGroup | None = None  # for what is written in parts while training goes on

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # Lightning's own way has the optimizer's state under other numbers than one process has it

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict(keep_vars=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As one file of the first process where it is small, else a part of each process, while training goes on."""
        if not checkpoints.is_large(checkpoint):
            large = ("state_dict", "optimizer_states")
            gathered = {name: self.gathered(checkpoint[name]) for name in large if name in checkpoint}
            super().save_checkpoint(checkpoint | gathered, filepath, storage_options)
            return
        self.checkpoint_io.teardown()
        self.group = self.group or dist.new_group(backend="gloo")
        rest, parts = apart(checkpoint)
        path = Path(self.broadcast(filepath))
        rest = checkpoints.copied(rest) if self.is_global_zero else {}
        self.checkpoint_io.writing = ThreadPoolExecutor(1).submit(write_parts, parts, rest, path, self.group)
        if path.name == "final.ckpt":
            self.checkpoint_io.teardown()

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with whole tensors on the CPU, in the first process; with none in the others."""
        seen: dict[int, Tensor | None] = {}  # tied weights are one tensor

        def first_only(tensor: Tensor) -> Tensor | None:
            if id(tensor) not in seen:
                full = whole(tensor.detach())
                seen[id(tensor)] = full.cpu() if self.is_global_zero else None
            return seen[id(tensor)]

        return apply_to_collection(state, Tensor, first_only)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if not in_parts(checkpoint_path):
            return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)
        checkpoint, weights = checkpoints.opened(checkpoint_path), self.lightning_module.state_dict()
        own = {key: weights[name] for name, key in checkpoint["state_dict"].items()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for _, weight, state in states(optimizer, saved):
                own |= {key: torch.empty_like(weight) for key in state.values() if isinstance(key, str)}
        return filled(checkpoint_path, checkpoint, own)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        self.lightning_module.load_state_dict(
            {name: part(weight, own[name]) for name, weight in checkpoint["state_dict"].items()}, strict
        )

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = {
                number: {name: part(value, weight) for name, value in values.items()}
                for number, weight, values in states(optimizer, saved)
            }
            optimizer.load_state_dict(saved | {"state": state})

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()


def states(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """The number of each weight in an optimizer's saved state, the weight, and its state there."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        yield number, weight, saved["state"][number]


def part(value: Any, like: Tensor) -> Any:
    """What this process holds of what has the shape of a weight; each process cuts it out itself."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
