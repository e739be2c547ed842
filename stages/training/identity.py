"""What a run is: its resume checkpoints belong to it alone."""

import ast
import hashlib
import json
import os
from pathlib import Path

from stages.common.settings import Settings, as_list
from stages.text.streams import Split

import numpy as np
import pytorch_lightning as pl
import torch
import transformers
import yaml

ROOT = Path(__file__).parents[2]


# What decides where a training ends, and nothing before its cooldown.
HORIZON = {
    "optimizer": ("num_training_steps", "decay_fraction", "min_lr_ratio"),
    "trainer": ("max_epochs", "max_steps"),
}


def run_identity(settings: Settings, train: Split, valid: Split) -> tuple[str, str]:
    """SHA-256 of all that decides the bytes of the run's result, except how many devices share the work.

    Args:
        settings: all settings.
        train, valid: the token streams.
    Returns:
        the run's, and that of what comes before the cooldown of schedule wsd: of all but the horizon.
    """
    plain = settings.plain()
    decides = {key: plain[key] for key in ("model", "optimizer", "trainer", "seed_everything")}
    for key in ("devices", "num_nodes", "strategy", "logger"):
        decides["trainer"].pop(key)
    decides["data"] = [train.sha256, valid.sha256, train.tokenizer]
    decides["versions"] = [library.__version__ for library in (torch, pl, np, transformers)]
    decides["code"] = code_digest()
    pretrained = Path(settings.model.from_pretrained or os.devnull)
    for path in sorted([*pretrained.glob("*.safetensors"), *pretrained.glob("config.json")]):
        with path.open("rb") as file:
            decides[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    run = digest(decides)
    if not any(map(may_know_horizon, as_list(decides["trainer"]["callbacks"]))):
        for group, keys in HORIZON.items():
            decides[group] = {key: value for key, value in decides[group].items() if key not in keys}
    return run, digest(decides)


def digest(decides: dict) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def may_know_horizon(callback: dict) -> bool:
    """Whether what a callback does may depend on where training ends: of the user's own nothing is known."""
    return "." in callback["class_path"] and not callback["class_path"].startswith("pytorch_lightning.callbacks.")


def code_digest(root: Path = ROOT) -> str:
    """SHA-256 of the code that dvc.yaml names among the deps of `train`, the users' own too: comments and docstrings
    don't count."""
    deps = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["deps"]
    digest = hashlib.sha256()
    for dep in sorted(deps):
        for file in sorted([root / dep] if dep.endswith(".py") else (root / dep).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n{what_runs(file.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def what_runs(source: str) -> str:
    """Python source without comments, docstrings and layout."""

    tree = ast.parse(source)
    for node in ast.walk(tree):
        for _, parts in ast.iter_fields(node):
            if isinstance(parts, list):
                # A string that stands alone does nothing, wherever it is.
                parts[:] = [part for part in parts if not is_string(part)]
    return ast.dump(tree)


def is_string(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
