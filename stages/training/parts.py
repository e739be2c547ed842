"""Large checkpoints of several processes: each writes its own part, with torch.distributed.checkpoint (DCP)."""

import shutil
from pathlib import Path
from typing import Any

from stages.common.checkpoint_files import METADATA, REST, SUMS, checksum, first_failure, put, sync
from stages.common.errors import not_written
from stages.common.files import write_json
from stages.training.best import BestWeights

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future


def apart(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint with keys in place of its large tensors, and what this process has of these, on the CPU.

    They are copies of what is shared out between the processes, which no later step changes, and the best weights,
    which only the first process has, and never changes.
    """
    keys: dict[int, str] = {}  # tied weights are one tensor
    parts: dict[str, Tensor] = {}

    def take(place: str, tensors: dict[str, Any]) -> dict[str, Any]:
        taken = dict(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                key = keys.setdefault(id(tensor), f"{place}.{name}")
                if key not in parts:
                    parts[key] = tensor.detach().to("cpu", copy=True)
                taken[name] = key
        return taken

    rest = checkpoint | {"state_dict": take("weights", checkpoint["state_dict"]), "optimizer_states": []}
    for i, saved in enumerate(checkpoint.get("optimizer_states", [])):
        state = {number: take(f"optimizer.{i}.{number}", values) for number, values in saved["state"].items()}
        rest["optimizer_states"].append(saved | {"state": state})
    callbacks, key = checkpoint.get("callbacks", {}), BestWeights().state_key
    if (best := callbacks.get(key)) and best["weights"]:
        parts |= {f"best.{name}": weight for name, weight in best["weights"].items()}
        rest["callbacks"] = callbacks | {key: best | {"weights": {name: f"best.{name}" for name in best["weights"]}}}
    return rest, parts


def write_parts(parts: dict[str, Tensor], rest: dict[str, Any], path: Path, group: dist.ProcessGroup) -> None:
    """Writes a checkpoint as a folder, together with the other processes.

    Args:
        parts: this process's, by their keys.
        rest: the first process's is written.
        group: of all processes, on CPUs, that nothing else uses meanwhile.
    Raises:
        UserError: one of them can't write its part; the checkpoint before this one is there still.
        RuntimeError: another process has ended.
    """
    writer = Writer(path, rest)
    try:
        dcp.save(parts, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        shutil.rmtree(writer.path, ignore_errors=True)  # no process writes any more
        raise not_written(path, first_failure(error)) from None


class Writer(dcp.FileSystemWriter):
    """DCP's: what a process has written, it sums up too; the first one gives the folder its name when all have."""

    def __init__(self, path: Path, rest: dict[str, Any]):
        self.target, self.rest = path, rest
        super().__init__(path.with_name(f".{path.name}.tmp"))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner).value()
        names = sorted({result.storage_data.relative_path for result in written})
        # DCP brings the results to the first process: sums go with them, as the sizes of what is stored nowhere.
        sums = [WriteResult(MetadataIndex(name), checksum(Path(self.path, name)), None) for name in names]
        done: Future[list[WriteResult]] = Future()
        done.set_result(written + sums)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        folder = Path(self.path)
        sums = {each.index.fqn: each.size_in_bytes for some in results for each in some if each.storage_data is None}
        super().finish(metadata, [[each for each in some if each.storage_data is not None] for some in results])
        torch.save(self.rest, folder / REST)
        sums |= {name: checksum(folder / name) for name in (METADATA, REST)}
        write_json(folder / SUMS, sums)
        for path in (folder / REST, folder / SUMS, folder):
            sync(path)
        put(folder, self.target)
        sync(self.target.parent)
