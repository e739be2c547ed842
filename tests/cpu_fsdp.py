"""FSDP between CPU processes, for machines without a GPU.

Lightning refuses FSDPStrategy itself without a GPU. PyTorch refuses only when no device is named,
and moving a full state to the CPU frees it there, so these two are done here.
"""

import torch
from pytorch_lightning.strategies import FSDPStrategy, fsdp
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)


def full_state(module, world_size, rank0_only=True):
    stay = {"offload_to_cpu": False, "rank0_only": False}
    configs = FullStateDictConfig(**stay), FullOptimStateDictConfig(**stay)
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *configs)


fsdp._get_full_state_dict_context = full_state


class CPUFSDP(FSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
        )
