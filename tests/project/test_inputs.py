"""Bad input: one clear line on standard error, exit status 1, and every output as it was.

A row of BAD is a stage, what a user does wrong, and what the line must say. The stages run in
this process on a project that is built; a few rows at the end run as real processes.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from conftest import ROOT, run, run_stage, set_params
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

OUTPUTS = ("data/corpus", "data/blocks", "models/tokenizer", "models/gpt2", "metrics")


@pytest.fixture
def files(built, tmp_path) -> Path:
    """The built project without its history: what a stage reads and writes."""
    target = tmp_path / "project"
    shutil.copytree(built, target, ignore=shutil.ignore_patterns(".git", ".dvc", "sample", "logs", "stages", "tests"))
    return target


def outputs(project: Path) -> dict[str, str]:
    found = [file for output in OUTPUTS for file in sorted((project / output).rglob("*")) if file.is_file()]
    return {str(file.relative_to(project)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def write(name: str, content: bytes | str):
    def edit(project: Path) -> None:
        (project / name).unlink(missing_ok=True)
        (project / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def replace(old: str, new: str, name: str = "params.yaml"):
    def edit(project: Path) -> None:
        text = (project / name).read_text()
        assert old in text
        (project / name).write_text(text.replace(old, new, 1))

    return edit


def append(text: str):
    return lambda project: (project / "params.yaml").open("a").write(text)


def folder(name: str):
    def edit(project: Path) -> None:
        (project / name).unlink()
        (project / name).mkdir()

    return edit


def linked(there: str, name: str):
    return lambda project: (project / name).symlink_to(project / there)


def parquet(name: str, *twice: str, **columns):
    def edit(project: Path) -> None:
        names = [*columns, *twice]
        pq.write_table(pa.table([columns[column] for column in names], names=names), project / name)

    return edit


def word_tokenizer(name: str, unknown: str):
    def edit(project: Path) -> None:
        tokenizer = Tokenizer(WordLevel({"<|endoftext|>": 0, "and": 1, "the": 2}, unk_token=unknown))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token=unknown)
        fast.save_pretrained(project / name)

    return edit


def remove(name: str):
    return lambda project: (project / name).unlink()


def cut(name: str, keep: float):
    """A download or a copy that broke off."""

    def edit(project: Path) -> None:
        content = (project / name).read_bytes()
        (project / name).write_bytes(content[: int(len(content) * keep)])

    return edit


def weights(change):
    def edit(project: Path) -> None:
        file = project / "models/gpt2/model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file, {"format": "pt"})

    return edit


def json_file(name: str, **changes):
    def edit(project: Path) -> None:
        content = json.loads((project / name).read_text())
        (project / name).write_text(json.dumps(content | changes))

    return edit


class Payload:
    """Unpickled by anything that runs code, it leaves a file."""

    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


def hostile_pickle(name: str):
    def edit(project: Path) -> None:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"gpt2_config": Payload()}, project / name)

    return edit


def pickled_weights(project: Path) -> None:
    (project / "models/gpt2/model.safetensors").unlink()
    (project / "models/gpt2/pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def other_tokenizer(name: str):
    """A byte tokenizer in the place of the one that made the blocks."""

    def edit(project: Path) -> None:
        keep = project / "kept"
        shutil.copytree(project / "models/tokenizer", keep)
        assert run_stage(project, "train_tokenizer", "--tokenizer.algorithm", "byte")[0] == 0
        if name != "models/tokenizer":
            shutil.copytree(project / "models/tokenizer", project / name, dirs_exist_ok=True)
            shutil.rmtree(project / "models/tokenizer")
            shutil.copytree(keep, project / "models/tokenizer")

    return edit


def token_ids(split: str, value: int):
    def edit(project: Path) -> None:
        file = project / f"data/blocks/{split}.npy"
        tokens = np.load(file)
        tokens[len(tokens) // 2] = value
        np.save(file, tokens)

    return edit


def tokenizer_without(key: str):
    def edit(project: Path) -> None:
        file = project / "models/tokenizer/tokenizer_config.json"
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))

    return edit


def callback(path: str, **arguments) -> str:
    return f"trainer.callbacks={json.dumps([{'class_path': path, 'init_args': arguments}])}"


LIGHTNING = "pytorch_lightning.callbacks"
TEST_PARQUET = "data.test_file=data/test.parquet"
ANCHOR_BOMB = "bomb:\n  - &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  - &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)

ENDLESS, ENDLESS_LATER = (
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    for pattern in (r"(\w+\s?)+$", r"And (\w+\s?)+$")
)

# name: (stage, settings as group.key=value / an edit / command line, what the line says)
TEXT = {
    "file is missing": ("prepare_corpus", ["data.valid_file=data/none.txt"], r"data/none\.txt: no such file"),
    "training text is missing": ("prepare_corpus", ["data.train_file=none.txt"], r"none\.txt: no such file"),
    "file is empty": ("prepare_corpus", [write("data/test.txt", "")], r"data/test\.txt: empty file"),
    "training text is empty": ("prepare_corpus", [write("data/train.txt", "")], r"data/train\.txt: empty file"),
    "file is blank": (
        "prepare_corpus",
        [write("data/valid.txt", " \n\t\n\r\n")],
        r"data/valid\.txt: only white space",
    ),
    "folder is empty": ("prepare_corpus", [folder("data/test.txt")], r"data/test\.txt: no file in it that can be read"),
    "Latin-1": (
        "prepare_corpus",
        [write("data/valid.txt", "Grüße\n\nDie Straße".encode("latin-1"))],
        r"data/valid\.txt: not UTF-8 at byte offset 2: convert",
    ),
    "Latin-1 to train on": (
        "prepare_corpus",
        [write("data/train.txt", b"a" * 300_000 + b"\n\xe9t\xe9")],
        r"data/train\.txt: not UTF-8 at byte offset 300,001: convert",
    ),
    "UTF-16": ("prepare_corpus", [write("data/test.txt", "Text".encode("utf-16"))], r"not UTF-8 at byte offset 0"),
    "cut inside a character": (
        "prepare_corpus",
        [write("data/test.txt", "Straße".encode()[:-2])],
        r"data/test\.txt: not UTF-8 at byte offset 4",
    ),
    "empty file name": (
        "prepare_corpus",
        ["data.train_file=''"],
        r"params\.yaml:5: data\.train_file: got '', must be the path",
    ),
    "name with shell characters": (
        "prepare_corpus",
        ["data.test_file='$(touch shell-was-run); `touch shell-was-run` | & > x.txt'"],
        r"touch shell-was-run.*no such file",
    ),
    "name with a line end": ("prepare_corpus", ['data.test_file="a\\nb"'], r"a\\nb: no such file"),
    "folder with a linked folder": (
        "prepare_corpus",
        [folder("data/test.txt"), linked("models", "data/test.txt/more")],
        r"data/test\.txt/more: a link to a folder or nowhere, which DVC doesn't watch: put a copy there",
    ),
    "Parquet that isn't UTF-8": (
        "prepare_corpus",
        [parquet("data/test.parquet", text=pa.array([b"good", b"caf\xe9"]).view(pa.string())), TEST_PARQUET],
        r"data/test\.parquet: row 2: not UTF-8: convert",
    ),
    "Parquet with a field twice": (
        "prepare_corpus",
        [parquet("data/test.parquet", "text", text=["a"]), TEST_PARQUET],
        r"data/test\.parquet: 2 fields are called 'text': rename one",
    ),
}
TOKENIZER = {
    "tokenizer that ends documents with unknown words": (
        "train_tokenizer",
        [word_tokenizer("words", "<|endoftext|>"), "tokenizer.tokenizer_model=words"],
        r"'words' has one token for end-of-text and for what it doesn't know: set another eos_token",
    ),
    "vocab_size below the bytes": (
        "train_tokenizer",
        ["tokenizer.vocab_size=256"],
        r"params\.yaml:\d+: tokenizer\.vocab_size: 256 is below the byte alphabet: at least 257",
    ),
    "vocabulary without end": (
        "train_tokenizer",
        ["tokenizer.vocab_size=4294967295"],
        r"tokenizer\.vocab_size: 4,294,967,295 entries would need about 429 GB, this machine has \d+: lower it",
    ),
    "tokenizer folder is missing": (
        "train_tokenizer",
        ["tokenizer.tokenizer_model=./none"],
        r"tokenizer\.tokenizer_model: '\./none' is neither a folder nor a Hugging Face id",
    ),
    "tokenizer id is not cached": (
        "train_tokenizer",
        ["tokenizer.tokenizer_model=gpt2"],
        r"tokenizer\.tokenizer_model: 'gpt2' is neither a folder nor .* offline mode",
    ),
    "tokenizer folder holds none": (
        "train_tokenizer",
        ["tokenizer.tokenizer_model=data"],
        r"tokenizer\.tokenizer_model: 'data' holds no working tokenizer",
    ),
    "tokenizer folder is broken": (
        "train_tokenizer",
        [cut("models/gpt2/tokenizer.json", 0.5), "tokenizer.tokenizer_model=models/gpt2"],
        r"tokenizer\.tokenizer_model: 'models/gpt2' holds no working tokenizer",
    ),
    "tokenizer whose pattern never ends": (
        "tokenize_blocks",
        [json_file("models/tokenizer/tokenizer.json", pre_tokenizer=ENDLESS)],
        r"the tokenizer gave up on this text \(Onig: .*retry-limit.*\): set another tokenizer\.tokenizer_model",
    ),
    "tokenizer whose pattern never ends in a text": (
        "tokenize_blocks",
        [json_file("models/tokenizer/tokenizer.json", pre_tokenizer=ENDLESS_LATER)],
        r"the tokenizer gave up on this text \(Onig: .*retry-limit.*\): set another tokenizer\.tokenizer_model",
    ),
    "tokenizer folder whose pattern never ends": (
        "train_tokenizer",
        [json_file("models/gpt2/tokenizer.json", pre_tokenizer=ENDLESS), "tokenizer.tokenizer_model=models/gpt2"],
        r"the tokenizer gave up on this text \(Onig: .*retry-limit.*\): set another tokenizer\.tokenizer_model",
    ),
    "tokenizer is cut short": (
        "tokenize_blocks",
        [cut("models/tokenizer/tokenizer.json", 0.5)],
        r"models/tokenizer: no working tokenizer .*make it again",
    ),
    "tokenizer is empty": (
        "tokenize_blocks",
        [write("models/tokenizer/tokenizer.json", "")],
        r"models/tokenizer: no working tokenizer",
    ),
    "tokenizer lacks its configuration": (
        "tokenize_blocks",
        [remove("models/tokenizer/tokenizer_config.json")],
        r"models/tokenizer: no working tokenizer",
    ),
    "tokenizer has no end-of-text": (
        "tokenize_blocks",
        [tokenizer_without("eos_token")],
        r"models/tokenizer: no working tokenizer .*eos_token",
    ),
    "end-of-text is not in the vocabulary": (
        "tokenize_blocks",
        [json_file("models/tokenizer/tokenizer_config.json", eos_token="</s>")],
        r"models/tokenizer: its end-of-text token '</s>' is not in its vocabulary",
    ),
}
MODEL = {
    "split too short for a block": (
        "train",
        ["model.block_size=100000"],
        r"model\.block_size: 100000 is more than the [\d,]+ tokens to predict in train",
    ),
    "text too short for a batch": (
        "train",
        ["optimizer.batch_size=100000"],
        r"optimizer\.batch_size: train has only \d+ blocks",
    ),
    "n_embd is not divisible": (
        "train",
        ["model.n_head=3"],
        r"params\.yaml:\d+: model\.n_embd: 16 is not divisible by model\.n_head 3",
    ),
    "model without end": (
        "train",
        ["model.n_embd=1000000000000000"],
        r"model: one of [\d,]+ parameters would need about",
    ),
    "layers without end": (
        "train",
        ["model.n_layer=1000000000"],
        r"model: one of [\d,]+ parameters would need about [\d,]+ GB, this machine has \d+: lower model\.n_layer",
    ),
    "blocks of another tokenizer": (
        "train",
        [other_tokenizer("models/tokenizer")],
        r"data/blocks was made by another tokenizer than models/tokenizer: run",
    ),
    "blocks of another tokenizer than the model's": (
        "evaluate",
        [other_tokenizer("models/gpt2")],
        r"data/blocks was made by another tokenizer than models/gpt2's: run",
    ),
    "token outside the vocabulary": (
        "train",
        [token_ids("train", 60_000)],
        r"data/blocks/train\.npy: .*60000",
    ),
    "token outside the vocabulary, validation": ("train", [token_ids("valid", 300)], r"data/blocks/valid\.npy: .*300"),
    "token outside the vocabulary, evaluation": ("evaluate", [token_ids("test", 300)], r"data/blocks/test\.npy: .*300"),
    "blocks are missing": ("train", [remove("data/blocks/train.npy")], r"data/blocks/train\.npy: can't be read"),
    "blocks are cut short": ("train", [cut("data/blocks/train.npy", 0.5)], r"data/blocks/train\.npy: can't be read"),
    "blocks are empty": ("train", [write("data/blocks/valid.npy", "")], r"data/blocks/valid\.npy: can't be read"),
    "blocks are a pickle": (
        "train",
        [lambda project: np.save(project / "data/blocks/train.npy", np.array([Payload()]), allow_pickle=True)],
        r"data/blocks/train\.npy: can't be read as token blocks",
    ),
    "blocks of another length": (
        "train",
        [lambda project: np.save(project / "data/blocks/train.npy", np.zeros(99, np.uint16))],
        r"data/blocks/train\.npy: .* is not what its \.json files say",
    ),
    "blocks without a record": ("train", [remove("data/blocks/train.json")], r"data/blocks/train\.npy: can't be read"),
    "blocks without their tokenizer": (
        "train",
        [remove("data/blocks/meta.json")],
        r"data/blocks/train\.npy: can't be read",
    ),
    "loss turns NaN": (
        "train",
        ["optimizer.lr=1e30", "trainer.gradient_clip_val=null"],
        r"loss is not a finite number at step \d+: lower optimizer\.lr",
    ),
    "no such model to fine-tune": (
        "train",
        ["model.from_pretrained=./none"],
        r"model\.from_pretrained: '\./none' is neither a folder nor a Hugging Face id",
    ),
    "model to fine-tune is not cached": (
        "train",
        ["model.from_pretrained=gpt2"],
        r"model\.from_pretrained: 'gpt2' is neither a folder nor .* offline mode",
    ),
    "folder to fine-tune holds no model": (
        "train",
        ["model.from_pretrained=data"],
        r"model\.from_pretrained: 'data' holds no working model",
    ),
    "model to fine-tune is no GPT-2": (
        "train",
        [json_file("models/gpt2/config.json", model_type="bert"), "model.from_pretrained=models/gpt2"],
        r"model\.from_pretrained: 'models/gpt2' is a bert model: only gpt2",
    ),
    "block_size above the positions": (
        "train",
        ["model.from_pretrained=models/gpt2", "model.block_size=17"],
        r"model\.block_size: 17 is above the 16 positions of 'models/gpt2'",
    ),
    "vocabulary of the model to fine-tune is smaller": (
        "train",
        [json_file("models/gpt2/config.json", vocab_size=299), "model.from_pretrained=models/gpt2"],
        r"model\.from_pretrained: 'models/gpt2' has 299 tokens, the tokenizer 300: set tokenizer\.tokenizer_model",
    ),
    "vocabulary of the model to fine-tune is another": (
        "train",
        [other_tokenizer("models/gpt2"), "model.from_pretrained=models/gpt2"],
        r"'models/gpt2' was trained with another tokenizer than models/tokenizer's",
    ),
    "weights of the model to fine-tune are cut short": (
        "train",
        [cut("models/gpt2/model.safetensors", 0.5), "model.from_pretrained=models/gpt2"],
        r"models/gpt2: no working GPT-2",
    ),
}
MODEL_FOLDER = {
    "weights are missing": ([remove("models/gpt2/model.safetensors")], r"models/gpt2: no working GPT-2"),
    "weights are cut short": ([cut("models/gpt2/model.safetensors", 0.9)], r"models/gpt2: no working GPT-2"),
    "weights are empty": ([write("models/gpt2/model.safetensors", "")], r"models/gpt2: no working GPT-2"),
    "weights lack a tensor": (
        [weights(lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))],
        r"models/gpt2: its weight file lacks transformer\.h\.1\.mlp\.c_fc\.bias",
    ),
    "weights of another shape": (
        [weights(lambda tensors: tensors.update({"transformer.wpe.weight": torch.zeros(8, 16)}))],
        r"models/gpt2: (no working GPT-2|its weight file lacks)",
    ),
    "weights are a pickle": ([pickled_weights], r"models/gpt2: no working GPT-2"),
    "config is cut short": ([cut("models/gpt2/config.json", 0.5)], r"models/gpt2: no working GPT-2"),
    "config is of another model": (
        [json_file("models/gpt2/config.json", model_type="bert")],
        r"no working GPT-2 .*bert",
    ),
    "config is of another size": (
        [json_file("models/gpt2/config.json", n_embd=32)],
        r"models/gpt2: (no working GPT-2|its weight file lacks)",
    ),
    "tokenizer is missing": ([remove("models/gpt2/tokenizer.json")], r"models/gpt2: no working tokenizer"),
}
CHECKPOINT = {
    "no such checkpoint": (["--model", "none.ckpt"], r"--model: none\.ckpt: no such file or folder"),
    "checkpoint is text": (["--model", "params.yaml"], r"--model: params\.yaml is no checkpoint"),
    "checkpoint with code": (
        [hostile_pickle("hostile.ckpt"), "--model", "hostile.ckpt"],
        r"--model: hostile\.ckpt is no checkpoint of this project's train stage",
    ),
    "no such model folder": (["--model", "data"], r"data: no working GPT-2"),
    "no value": (["--model"], r"--model: needs one value"),
}
SETTINGS = {
    "unknown setting": (
        ["model.n_layr=3"],
        r"params\.yaml:\d+: model\.n_layr: no such setting: did you mean model\.n_layer\?",
    ),
    "unknown group": (["modle.n_layer=3"], r"params\.yaml:\d+: modle: no such setting: did you mean model\?"),
    "unknown trainer argument": (
        ["trainer.max_epoch=3"],
        r"trainer\.max_epoch: no such setting: did you mean trainer\.max_epochs\?",
    ),
    "runtime setting in trainer": (
        ["trainer.profiler=simple"],
        r"trainer\.profiler: stands in the runtime group here: move it to runtime\.profiler",
    ),
    "setting in the wrong group": (
        ["optimizer.n_layer=3"],
        r"optimizer\.n_layer: no such setting: did you mean model\.n_layer\?",
    ),
    "bool for int": (
        ["model.n_layer=true"],
        r"params\.yaml:\d+: model\.n_layer: got true, must be a whole number of 1 or more",
    ),
    "text for int": (["model.n_layer=four"], r"params\.yaml:\d+: model\.n_layer: got four, must be a whole number"),
    "float for int": (
        ["optimizer.batch_size=2.5"],
        r"optimizer\.batch_size: got 2\.5, must be a whole number of 1 or more",
    ),
    "null for int": (
        ["model.n_embd=null"],
        r"params\.yaml:\d+: model\.n_embd: got null, must be a whole number of 1 or more",
    ),
    "zero": (["model.n_layer=0"], r"model\.n_layer: got 0, must be a whole number of 1 or more"),
    "negative": (["optimizer.num_warmup_steps=-1"], r"num_warmup_steps: got -1, must be a whole number of 0 or more"),
    "huge": ([f"tokenizer.vocab_size=1{'0' * 400}"], r"tokenizer\.vocab_size: got 10+\.\.\., must be a whole number"),
    "text for float": (["optimizer.lr=fast"], r"optimizer\.lr: got fast, must be a number above 0"),
    "infinite": (["optimizer.lr=.inf"], r"optimizer\.lr: got \.inf, must be a number above 0"),
    "not a number": (
        ["optimizer.weight_decay=.nan"],
        r"optimizer\.weight_decay: got \.nan, must be a number of 0 or more",
    ),
    "int for text": (
        ["data.train_file=3"],
        r"data\.train_file: got 3, must be the path of a file or folder \(try quotes\)",
    ),
    "name of a split for a test set": (
        ["data.test_files={train: data/test.txt}"],
        r"params\.yaml:\d+: data\.test_files: got .*, must be .* each name of letters.* none of train",
    ),
    "everything held out": (
        ["data.valid_fraction=0.6", "data.test_fraction=0.4"],
        r"params\.yaml:\d+: data\.valid_fraction: with data\.test_fraction, it leaves nothing to train on",
    ),
    "bool for text": (
        ["tokenizer.tokenizer_model=no"],
        r"tokenizer_model: got (no|false), must be text \(try quotes\) or null",
    ),
    "text for bool": (["runtime.enable_progress_bar=maybe"], r"enable_progress_bar: got maybe, must be true or false"),
    "text for list": (["generate.prompts=Hello"], r"generate\.prompts: got Hello, must be a list of text"),
    "number in a list of text": (["generate.prompts=[1]"], r"generate\.prompts: got - 1, must be a list of text"),
    "list too short": (
        ["optimizer.betas=[0.9]"],
        r"optimizer\.betas: got - 0\.9, must be a list of 2, each a number from 0",
    ),
    "not a choice": (["optimizer.name=sgd"], r"optimizer\.name: got sgd, must be one of adamw, muon"),
    "number for a group": (["model=3"], r"params\.yaml:\d+: model: got 3, must hold settings"),
    "seed too large": (
        ["seed_everything=4294967296"],
        r"seed_everything: got 4294967296, must be a whole number from 0",
    ),
    "half a character": (
        [replace("prompts: [", 'prompts: ["\\ud800", ')],
        r"params\.yaml:\d+: half a character",
    ),
    "stride above block_size": (["evaluate.stride=17"], r"evaluate\.stride: 17 is above model\.block_size 16"),
    "warm-up without end": (
        ["optimizer.num_training_steps=10", "optimizer.num_warmup_steps=10"],
        r"optimizer\.num_warmup_steps: 10 leaves no step after the warm-up",
    ),
    "no end of training": (["trainer.max_epochs=-1"], r"trainer\.max_epochs: no end of training"),
    "nothing to train": (["trainer.max_steps=0"], r"trainer\.max_steps: 0 trains nothing"),
    "negative clipping": (["trainer.gradient_clip_val=-1"], r"trainer\.gradient_clip_val: -1: must be 0 or more"),
    "no accumulation": (["trainer.accumulate_grad_batches=0"], r"accumulate_grad_batches: 0: must be 1 or more"),
    "missing setting": ([replace("  n_layer: 2\n", "")], r"params\.yaml: model\.n_layer: missing"),
    "set twice": (
        [replace("  n_layer: 2\n", "  n_layer: 2\n  n_layer: 3\n")],
        r"params\.yaml:\d+: model\.n_layer: set twice, first at params\.yaml:\d+",
    ),
    "group twice": ([append("model: {n_layer: 2}\n")], r"params\.yaml:\d+: model: set twice"),
    "tab": ([replace("  n_layer", "\tn_layer")], r"params\.yaml:\d+: not valid YAML: .*indent with spaces"),
    "bracket": ([append("x: [1, 2\n")], r"params\.yaml:\d+: not valid YAML"),
    "anchor bomb": ([append(ANCHOR_BOMB)], r"params\.yaml:\d+: aliases \(\*\) aren't allowed"),
    "10 MB": ([append(f"x: {'y' * 10_000_000}\n")], r"params\.yaml: larger than 1,048,576 bytes"),
    "deeply nested": ([append(f"x: {'[' * 20_000}\n")], r"params\.yaml:\d+: more than 20 lists and groups"),
    "python object as a value": (
        [replace("n_layer: 2", "n_layer: !!python/object/apply:os.system ['touch shell-was-run']")],
        r"params\.yaml:\d+: tags \(!\) aren't allowed: write the plain value",
    ),
    "empty params.yaml": ([write("params.yaml", "")], r"params\.yaml: not a list of `name: value` settings"),
    "params.yaml is a list": ([write("params.yaml", "- 1\n")], r"params\.yaml: not a list of `name: value` settings"),
    "params.yaml is binary": ([write("params.yaml", b"data: \xff\n")], r"params\.yaml: not UTF-8 at byte offset 6"),
    "params.yaml has a zero byte": ([append("x: \0\n")], r"params\.yaml.*not valid YAML"),
    "params.yaml is missing": ([remove("params.yaml")], r"params\.yaml: No such file or directory: `git checkout"),
    "option": (["--model.n_layer", "x"], r"--model\.n_layer: got x, must be a whole number of 1 or more"),
    "unknown option": (["--model.n_layr=3"], r"--model\.n_layr: no such setting: did you mean model\.n_layer\?"),
    **{
        f"old name {name}": ([f"{group}.{name}=1"], rf"params\.yaml:\d+: {group}\.{name}: {text}")
        for group, name, text in (
            ("trainer", "gpus", "is trainer.devices now"),
            ("trainer", "auto_lr_find", "not needed any more, because"),
            ("trainer", "checkpoint_callback", "not needed any more, because"),
            ("data", "prefetch_factor", "not needed any more, because"),
            ("data", "shuffle_buffer_size", "not needed any more, because"),
            ("data", "logger", "no such setting: did you mean trainer.logger"),
        )
    },
    "logger that is none": (
        ["trainer.logger=true"],
        r"trainer\.logger: TensorBoard and DVCLive are always there: name",
    ),
    "run that keeps nothing": (["trainer.fast_dev_run=true"], r"trainer\.fast_dev_run: would leave no model: set"),
    "abbreviated option": (["--seed", "3"], r"--seed: no such setting"),
    "word": (["fast"], r"fast: not a setting: write --NAME VALUE"),
    "option without a value": (["--model.n_layer"], r"--model\.n_layer: needs one value"),
    "no such config": (["--config", "none.yaml"], r"none\.yaml: No such file"),
    "unknown setting in a config": (
        [write("other.yaml", "model:\n  depth: 3\n"), "--config", "other.yaml"],
        r"other\.yaml:2: model\.depth: no such setting",
    ),
    "wrong type in a config": (
        [write("other.yaml", "\nmodel:\n  n_layer: deep\n"), "--config=other.yaml"],
        r"other\.yaml:3: model\.n_layer: got deep, must be a whole number",
    ),
}
TRAINER = {
    "precision": (
        ["trainer.precision=8"],
        r"params\.yaml:\d+: trainer\.precision: got 8, must be one of auto, 32-true",
    ),
    "accelerator that is not there": (["trainer.accelerator=tpu"], r"trainer: .+: change the trainer group"),
    "unknown accelerator": (["trainer.accelerator=abacus"], r"trainer: .*invalid accelerator name"),
    "unknown strategy": (["trainer.strategy=magic"], r"trainer: .*invalid strategy name"),
    "no devices": (["trainer.devices=-5"], r"trainer: `devices`"),
    "max_time": (["trainer.max_time=soon"], r"trainer: .*not a valid duration"),
    "val_check_interval": (
        ["trainer.val_check_interval=often"],
        r"trainer\.val_check_interval: often: the clock would decide",
    ),
    "val_check_interval beyond an epoch": (
        ["trainer.val_check_interval=1000"],
        r"trainer\.val_check_interval: 1000 is more than the \d+ batches of an epoch: lower it",
    ),
    "val_check_interval beyond what is left of an epoch": (
        ["trainer.val_check_interval=11", "trainer.limit_train_batches=10"],
        r"trainer\.val_check_interval: 11 is more than the 10 batches of an epoch: lower it",
    ),
    "val_check_interval of nothing": (["trainer.val_check_interval=0"], r"trainer\.val_check_interval: 0: set"),
    "no epoch to validate in": (
        ["trainer.check_val_every_n_epoch=0"],
        r"trainer\.check_val_every_n_epoch: 0: must be 1 or more, or null",
    ),
    "half precision in which little is learned": (
        ["trainer.precision=16-true"],
        r"trainer\.precision: 16-true: .*: set bf16-true or 16-mixed",
    ),
    "two that say how many batches a step has": (
        [
            callback(f"{LIGHTNING}.GradientAccumulationScheduler", scheduling={0: 2}),
            "trainer.accumulate_grad_batches=2",
        ],
        r"trainer\.accumulate_grad_batches: GradientAccumulationScheduler says it: set it to 1",
    ),
    "average of weights that begins late": (
        [callback(f"{LIGHTNING}.EMAWeightAveraging", update_starting_at_step=5)],
        r"EMAWeightAveraging: update_starting_at_step: until then the untrained model would be validated",
    ),
    "metric that an epoch has not": (
        [
            callback(f"{LIGHTNING}.EarlyStopping", monitor="valid_loss", check_on_train_epoch_end=True),
            "trainer.check_val_every_n_epoch=2",
            "trainer.max_epochs=2",
        ],
        r"trainer\.callbacks: EarlyStopping: Early stopping conditioned on metric `valid_loss` which is not available",
    ),
    "batch that devices can't share": (["trainer.devices=3"], r"optimizer\.batch_size: 4 can't be shared evenly"),
    "callback that is not there": ([callback("nope.Nope")], r"trainer\.callbacks: got .*No module named 'nope'"),
    "callback without a path": (
        [callback("Nope")],
        r"trainer\.callbacks: got .*Expected a dot import path string: Nope",
    ),
    "logger that isn't installed, beside one that is": (
        ["trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: logs}}, {class_path: MLFlowLogger}]"],
        r"trainer: .*MLFlowLogger.*Requirement 'mlflow",
    ),
    "callback that is none": (
        [callback("os.system")],
        r"trainer\.callbacks: got .*os\.system does not correspond to a subclass of Callback",
    ),
    "unknown init_args": (
        [callback(f"{LIGHTNING}.EarlyStopping", monitr="valid_loss")],
        r"trainer\.callbacks: got .*Option 'monitr' is not accepted",
    ),
    "missing init_args": (
        [callback(f"{LIGHTNING}.EarlyStopping")],
        r"trainer\.callbacks: got .*required: monitor",
    ),
    "impossible init_args": (
        [callback(f"{LIGHTNING}.EarlyStopping", monitor="valid_loss", mode="up")],
        r"trainer: `mode` can be min, max, got up",
    ),
    **{
        f"refused: {name}": ([callback(f"{LIGHTNING}.{name}", **arguments)], rf"trainer\.callbacks: {name}: {text}")
        for name, arguments, text in (
            ("LearningRateFinder", {}, r"the rate is optimizer\.lr"),
            ("BatchSizeFinder", {}, r"the batch is optimizer\.batch_size"),
            ("ModelPruning", {"pruning_fn": "l1_unstructured"}, "its masks are no part of a GPT-2"),
            ("BackboneFinetuning", {}, "GPT-2 has no backbone"),
            ("SpikeDetection", {}, "it can't go on in a resumed run"),
            ("OnExceptionCheckpoint", {"dirpath": "logs"}, "a stopped training has its own checkpoint"),
        )
    },
    "refused: AsyncCheckpointIO": (
        ['trainer.plugins=[{"class_path": "pytorch_lightning.plugins.io.AsyncCheckpointIO"}]'],
        r"trainer\.plugins: AsyncCheckpointIO: the train stage writes checkpoints itself",
    ),
    "metric that is not logged": (
        [callback(f"{LIGHTNING}.EarlyStopping", monitor="val_loss")],
        r"trainer\.callbacks: EarlyStopping monitors 'val_loss': the metrics are loss, valid_loss, valid_ppl",
    ),
}
PROMPT = {
    "no prompt": ([], r"--prompt: missing"),
    "no value": (["--prompt"], r"--prompt: needs one value"),
    "not UTF-8": (["--prompt", "caf\udce9"], r"--prompt: not UTF-8 text"),
    "no samples": (["--prompt", "a", "--samples", "0"], r"--samples: got 0, must be a whole number of 1 or more"),
    "model folder": (["--prompt", "a", "--model", "none"], r"none: no such model folder"),
    "temperature": (
        ["--prompt", "a", "--generate.temperature", "-1"],
        r"--generate\.temperature: got -1, must be a number of 0",
    ),
    "top_p": (
        ["--prompt", "a", "--generate.top_p", "1.5"],
        r"--generate\.top_p: got 1\.5, must be a number above 0, up to 1",
    ),
}

BAD = {
    **TEXT,
    **TOKENIZER,
    **MODEL,
    **{f"evaluate: {name}": ("evaluate", *row) for name, row in MODEL_FOLDER.items()},
    **{
        f"generate: {name}": ("tools.generate", ["--prompt", "a", *row[0]], row[1])
        for name, row in MODEL_FOLDER.items()
    },
    **{f"--model: {name}": ("evaluate", *row) for name, row in CHECKPOINT.items()},
    **{f"settings: {name}": ("tokenize_blocks", *row) for name, row in SETTINGS.items()},
    **{f"trainer: {name}": ("train", *row) for name, row in TRAINER.items()},
    **{f"prompt: {name}": ("tools.generate", *row) for name, row in PROMPT.items()},
}


def do(project: Path, steps: list) -> list[str]:
    """Edits the project as a row says; returns what is left for the command line."""
    arguments = []
    for step in steps:
        if callable(step):
            step(project)
        elif re.match(r"[a-z_.]+=", step):
            set_params(project, step)
        else:
            arguments.append(step)
    return arguments


def test_docs_count_them():
    text = (ROOT / "docs/reliability.md").read_text()
    counts = [len(TEXT), len(TOKENIZER), len(MODEL), 2 * len(MODEL_FOLDER), len(CHECKPOINT)]
    counts += [len(SETTINGS), len(TRAINER), len(PROMPT)]
    table = text.split("| bad input | how many |")[1].split("\n\n")[0]
    assert [int(number) for number in re.findall(r"\| (\d+) \|", table)] == counts
    assert f"the stages {len(BAD)} bad inputs" in text and sum(counts) == len(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_changes_nothing(files, name):
    stage, steps, pattern = BAD[name]
    arguments = do(files, steps)
    before = outputs(files)
    status, _, err = run_stage(files, stage, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(pattern, lines[0]), lines[0]
    assert len(lines[0]) < 600
    assert outputs(files) == before
    assert not list(files.rglob("*-was-run"))


@pytest.mark.parametrize(
    "name",
    [
        "file is missing",
        "tokenizer whose pattern never ends",
        "tokenizer whose pattern never ends in a text",
        "tokenizer folder whose pattern never ends",
        "loss turns NaN",
        "evaluate: weights are a pickle",
        "settings: tab",
    ],
)
def test_bad_input_in_a_real_process(files, built, name):
    """Nothing else reaches the terminal either: no warning, no traceback."""
    stage, steps, pattern = BAD[name]
    shutil.copytree(built / "stages", files / "stages")
    arguments = do(files, steps)
    before = outputs(files)
    done = run("python", "-m", f"stages.{stage}", *arguments, cwd=files, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert re.search(pattern, done.stderr)
    assert outputs(files) == before
    assert not list(files.rglob("*-was-run"))


def test_a_mistake_under_dvc_costs_nothing(built, tmp_path):
    """The stage that stops had its outputs taken away by DVC; the corrected run has them back without any work."""
    project = tmp_path / "project"
    shutil.copytree(built, project)
    before = outputs(project)
    set_params(project, "model.n_layr=3")
    failed = run("dvc", "repro", cwd=project, check=False)
    assert failed.returncode != 0
    assert re.search(r"^error: params\.yaml:\d+: model\.n_layr: no such setting: did you mean", failed.stderr, re.M)
    assert "Traceback" not in failed.stderr
    run("git", "checkout", "params.yaml", cwd=project)
    done = run("dvc", "repro", cwd=project)
    assert "Running stage" not in done.stdout
    assert outputs(project) == before


@pytest.mark.parametrize("name", ["tab", "set twice", "params.yaml is binary", "params.yaml is a list"])
def test_params_that_dvc_itself_refuses(built, tmp_path, name):
    """DVC reads params.yaml before any stage starts: it names the file, and touches nothing."""
    project = tmp_path / "project"
    shutil.copytree(built, project)
    before = outputs(project)
    do(project, SETTINGS[name][0])
    failed = run("dvc", "repro", cwd=project, check=False)
    assert failed.returncode != 0
    assert "params.yaml" in failed.stderr and "Traceback" not in failed.stderr
    assert outputs(project) == before


def test_a_pickle_among_the_checkpoints_is_not_run(built, tmp_path):
    """Put in the place of a run's own checkpoint, it is passed over, and the training starts anew."""
    project = tmp_path / "project"
    shutil.copytree(built, project, ignore=shutil.ignore_patterns(".git", ".dvc", "sample", "logs", "stages", "tests"))
    shutil.rmtree(project / "models/checkpoints", ignore_errors=True)
    short = ["--trainer.max_steps", "4", "--runtime.checkpoint_every_n_steps", "1"]
    assert run_stage(project, "train", *short)[0] == 0
    expected = outputs(project)
    for checkpoint in project.glob("models/checkpoints/*/*.ckpt"):
        hostile_pickle(str(checkpoint.relative_to(project)))(project)
    status, _, err = run_stage(project, "train", *short)
    assert status == 0
    assert "passed over" in err
    changed = {name for name, digest in outputs(project).items() if digest != expected[name]}
    assert changed <= {"metrics/run.json"}
    assert not list(project.rglob("*-was-run"))
