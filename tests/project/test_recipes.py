"""The recipes of the pages, trained at small size: none ends worse than the defaults by more than stands here."""

import shutil
from pathlib import Path

from tools.plan import usual_lr

import pandas as pd
import pytest
import yaml
from conftest import run_stage, train_inputs
from test_docs import PAGES, PARAMS, blocks, name_of

WIDTH = 32
SIZE = f"""
model: {{block_size: 32, n_layer: 2, n_head: 2, n_embd: {WIDTH}}}
trainer: {{max_epochs: null, max_steps: 150, val_check_interval: 30, check_val_every_n_epoch: null}}
runtime: {{enable_progress_bar: false}}
"""
# Nats a token that a page's recipe may lose on the defaults.
MAY_LOSE = {"docs/migrate.md": 0.8}  # Adam as it was before Muon: the page says so
RECIPES = {
    f"{name_of(page)}-{i}": yaml.safe_load(block)
    for page in PAGES
    for i, block in enumerate(blocks(page, "yaml"))
    if "\noptimizer:" in f"\n{block}"
}


def valid_loss(project: Path, optimizer: dict, dropout: float = 0.0, *arguments: str) -> float:
    """Nats a token of the small training with these settings."""
    small = yaml.safe_load(SIZE) | {"optimizer": {**optimizer, "batch_size": 8, "num_warmup_steps": 10}}
    small["model"]["dropout"] = dropout
    (project / "small.yaml").write_text(yaml.safe_dump(small))
    status, _, err = run_stage(project, "train", "--config", "small.yaml", *arguments)
    assert status == 0, err
    return pd.read_csv(project / "metrics/valid.csv").valid_loss.min()


@pytest.fixture(scope="module")
def at_defaults(built, tmp_path_factory) -> tuple[Path, float]:
    project = train_inputs(built, tmp_path_factory.mktemp("recipes") / "project")
    return project, valid_loss(project, PARAMS["optimizer"])


def test_every_page_with_a_rate_is_here():
    assert {name.rsplit("-", 1)[0] for name in RECIPES} >= {
        *("docs/fine-tune.md", "docs/longer.md", "docs/migrate.md", "docs/model-sizes.md", "docs/quality.md"),
        "docs/small-text.md",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(at_defaults, tmp_path, name):
    recipe, page = RECIPES[name], name.rsplit("-", 1)[0]
    project, best = shutil.copytree(at_defaults[0], tmp_path / "project"), at_defaults[1]
    optimizer, model = {**PARAMS["optimizer"], **recipe["optimizer"]}, recipe.get("model", {})
    if "n_embd" in model:  # a larger model's rate, as the rule has it for the small one
        width, muon = model["n_embd"], optimizer["name"] == "muon"
        assert muon, "scale AdamW's rates too"
        optimizer["lr"] = float(optimizer["lr"]) * usual_lr("muon", WIDTH, 0) / usual_lr("muon", width, 0)
    arguments = []
    if "from_pretrained" in model:
        shutil.copytree(project / "models/gpt2", project / "data/my/before")
        arguments = ["--model.from_pretrained", "data/my/before"]
    loss = valid_loss(project, optimizer, model.get("dropout", 0.0), *arguments)
    assert loss <= best + MAY_LOSE.get(page, 0.1)
