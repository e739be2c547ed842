"""Makes metrics/eval.json, what stands beside it, and metrics/samples.md from models/gpt2/.

details.json holds counts, intervals and what was scored, documents.csv the loss of each document,
from which `python -m tools.compare` says whether a model got better.

torchrun or srun may start it several times: the processes share the windows, and the first one writes.

With --model DIR_OR_CKPT it measures any GPT-2 folder or training checkpoint instead, on
the text that the settings name, and prints the figures without writing a file. The definitions of the
figures stand in stages/model/scoring.py.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.common.checkpoint_files import filled, in_parts, mapped
from stages.common.devices import device_of
from stages.common.errors import UserError, note, one_line, run
from stages.common.files import write_json, write_text
from stages.common.params import load
from stages.common.paths import BLOCKS, CHECKPOINTS, METRICS, MODEL, SPLITS, TOKENIZER
from stages.common.processes import launched, together
from stages.common.settings import Data, Group, Settings, about
from stages.model import ops
from stages.model.gpt2 import load_model
from stages.model.sampling import continuation
from stages.model.scoring import figures_of, token_counts, unigram_ppl
from stages.text.corpus import Documents
from stages.text.splits import sources_of, written_splits
from stages.text.streams import Split, load_split, write_blocks
from stages.text.tokenizers import TextTokenizer, load_tokenizer

import pandas as pd
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

SHOWN = ("ppl_low", "ppl_high", "word_ppl", "unigram_ppl")


class Options(Group):
    """What its command line takes beside the settings."""

    model: str | None = about("GPT-2 folder or training checkpoint to measure instead of models/gpt2", default=None)


def main() -> None:
    settings = load("stages.evaluate", __doc__, Options)
    with together("this evaluation"):
        evaluate(settings)


def evaluate(settings: Settings) -> None:
    """What main does, in each of the processes that do it together."""
    ops.reuse_memory()
    rank, local_rank, _ = launched()
    device = device_of(settings.evaluate.accelerator)
    if device.type == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())  # srun may show each process its own GPU alone
    if settings.options.model is not None:
        scores = scores_of_another(settings, device)
        if rank == 0:
            print(json.dumps({name: figures | details for name, (figures, details, _) in scores.items()}, indent=2))
        return

    model = load_model(MODEL).to(device)
    tokenizer = load_tokenizer(MODEL)
    train = load_split("train")
    if train.tokenizer != tokenizer.fingerprint:
        raise UserError(f"{BLOCKS} was made by another tokenizer than {MODEL}'s: run `dvc repro`")
    figures, details, tables, counts = {}, {}, {}, token_counts(train)
    for name in test_sets(file.stem for file in BLOCKS.glob("*.json") if file.stem != "meta"):
        split = load_split(name)
        figures[name], details[name], tables[name] = figures_of(model, split, settings.evaluate)
        details[name]["unigram_ppl"] = unigram_ppl(counts, split)
    if rank == 0:
        write(settings, model, tokenizer, figures, details, tables)


def scores_of_another(settings: Settings, device: torch.device) -> dict[str, tuple[dict, dict, dict]]:
    """What `figures_of` says of the model that --model names, for each text that the settings name."""
    model, tokenizer_folder = load_checkpoint(Path(settings.options.model))
    model.to(device)
    with fresh_blocks(settings.data, test_sets(sources_of(settings.data)), tokenizer_folder) as splits:
        return {name: figures_of(model, split, settings.evaluate) for name, split in splits.items()}


@contextmanager
def fresh_blocks(settings: Data, names: list[str], tokenizer_folder: Path) -> Iterator[dict[str, Split]]:
    """The token streams of some splits, made of the text that the settings name, in a folder for the time being.

    Args:
        settings: the data group.
    """
    with tempfile.TemporaryDirectory() as folder, written_splits(settings, Path(folder), names):
        blocks = Path(folder, "blocks")
        write_blocks({name: Documents(name, folder) for name in names}, tokenizer_folder, blocks)
        yield {name: load_split(name, blocks) for name in names}


def write(
    settings: Settings, model: GPT2LMHeadModel, tokenizer: TextTokenizer, figures: dict, details: dict, tables: dict
) -> None:
    """Writes the figures of each set, and samples of the model, and prints the figures."""
    documents = pd.concat([table["documents"].assign(set=name) for name, table in tables.items()])
    samples = [
        continuation(model, tokenizer, prompt, settings.generate, settings.generate.seed)
        for prompt in settings.generate.prompts
    ]
    write_json(METRICS / "eval.json", figures)
    write_json(METRICS / "details.json", details)
    write_text(METRICS / "documents.csv", documents[["set", *documents.columns[:-1]]].to_csv(index=False))
    write_text(METRICS / "loss_by_position.csv", tables["test"]["loss_by_position"].to_csv(index=False))
    write_text(METRICS / "samples.md", samples_page(settings.generate.prompts, samples))
    remove_checkpoints()
    for name, row in details.items():
        if row["changed_documents"]:
            lost = f"the tokenizer changes the text of {row['changed_documents']:,} {name} documents"
            note(f"{lost}: bits per byte is not exact")
    shown = {name: figures[name] | {key: details[name].get(key) for key in SHOWN} for name in figures}
    print(pd.DataFrame(shown).T.to_string(float_format="{:,.4f}".format, na_rep=""))
    print(f"figures: {METRICS}/eval.json   samples: {METRICS}/samples.md   plots: `dvc plots show`")


def test_sets(splits: Iterable[str]) -> list[str]:
    """What is measured: test, the named test sets, valid."""
    return ["test", *sorted(set(splits).difference(SPLITS)), "valid"]


def load_checkpoint(path: Path) -> tuple[GPT2LMHeadModel, Path]:
    """The model of a GPT-2 folder or Lightning checkpoint, and the folder of its tokenizer.

    Raises:
        UserError: it is neither, or damaged, or a pickle that would run code.
    """
    if path.is_dir() and not in_parts(path):
        return load_model(path), path
    try:
        checkpoint = mapped(path)
        model = GPT2LMHeadModel(GPT2Config.from_dict(checkpoint["gpt2_config"]))
        weights = filled(path, checkpoint["state_dict"])
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"--model: {path}: no such file or folder") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise UserError(f"--model: {path} is no checkpoint of this project's train stage: {one_line(error)}") from None
    if checkpoint["tokenizer"] != load_tokenizer(TOKENIZER).fingerprint:
        raise UserError(f"--model: {path} was trained with another tokenizer than {TOKENIZER}")
    return model, TOKENIZER


def remove_checkpoints() -> None:
    """Deletes the checkpoints of the finished training, once DVC has recorded what it made."""
    try:
        figures = (METRICS / "run.json").read_bytes()
        outs = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["train"]["outs"]
        recorded = {out["path"]: out["md5"] for out in outs}[f"{METRICS}/run.json"]
        run = json.loads(figures)["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not run by DVC yet, or the model came from its cache
    if hashlib.md5(figures).hexdigest() != recorded:
        return
    for finished in CHECKPOINTS.glob("*/final.ckpt"):
        if finished.parent.name == run:
            shutil.rmtree(finished.parent)


def samples_page(prompts: list[str], samples: list[str]) -> str:
    parts = ["# Samples of the trained model\n"]
    for prompt, text in zip(prompts, samples, strict=True):
        quoted = "\n".join(f"    {line}" for line in text.split("\n"))
        parts.append(f"Prompt: {json.dumps(prompt, ensure_ascii=False)}\n\n{quoted}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    run(main)
