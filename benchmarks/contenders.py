"""The contenders, each a process of its own: `python -m benchmarks.contenders NAME`, run by benchmarks/run.py.

The working directory is a project with params.yaml and data/blocks/. All of them read the same
blocks in the same order, in the same shape, batch, precision and number of threads.
"""

import os
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from benchmarks.compact_gpt import CompactGPT, make_optimizer
from benchmarks.turns import Turns
from stages import train_tokenizer
from stages.common.devices import autocast
from stages.common.params import load
from stages.model import gpt2, ops, scoring
from stages.model.optimizers import lr_factor
from stages.model.sampling import continuation
from stages.text.corpus import Documents
from stages.text.streams import load_split, write_blocks
from stages.text.tokenizers import load_tokenizer
from stages.training.data import permuted
from stages.training.module import LanguageModel
from stages.training.trainer import quiet_libraries

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

GENERATED = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    name, argv = sys.argv[1], sys.argv[2:]
    settings = load("stages.train", __doc__, argv=argv)
    torch.manual_seed(settings.seed_everything)
    CONTENDERS[name](settings)


# Training


def batches(settings) -> Iterator[Tensor]:
    """(B, T + 1) int64 token ids, in the order in which the train stage reads them."""
    tokens, T, B = load_split("train").tokens, settings.model.block_size, settings.optimizer.batch_size
    blocks = (len(tokens) - 1) // T
    for epoch in count():
        for i in range(0, blocks - B + 1, B):
            order = permuted(np.arange(i, i + B), blocks, [settings.seed_everything, epoch])
            batch = np.stack([tokens[k * T : k * T + T + 1] for k in order]).astype(np.int64)
            yield torch.from_numpy(batch).to(DEVICE, non_blocking=True)


def loop(settings, model: torch.nn.Module, loss_of: Callable[[Tensor], Tensor], optimizer, schedule=None) -> Iterator:
    """A bare training loop, one step at a time."""
    parameters = list(model.parameters())
    for batch in batches(settings):
        with autocast(DEVICE, settings.trainer.precision):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule is not None:
            schedule.step()
        yield loss.detach()


def take_turns(steps: Iterator) -> None:
    turns = Turns()
    while True:
        turns.next_step()
        next(steps)


def own_steps(settings) -> Iterator[Tensor]:
    """The train stage's own step without Lightning's loop, logging, progress line and checkpoints."""
    quiet_libraries()
    ops.reuse_memory()
    torch.use_deterministic_algorithms(bool(settings.trainer.deterministic))
    split = load_split("train")
    model = gpt2.new_model(settings.model, split.vocab_size, 0)
    settings = settings.model_copy(
        update={"optimizer": settings.optimizer.model_copy(update={"num_training_steps": 100_000})}
    )
    module = LanguageModel(model, settings).to(DEVICE)
    module.loss_is_monitored, module.trainer = False, pl.Trainer(logger=False, enable_checkpointing=False)
    parts = module.configure_optimizers()
    step = count()
    return loop(
        settings,
        module,
        lambda batch: module.training_step(batch, next(step)),
        parts["optimizer"],
        parts["lr_scheduler"]["scheduler"],
    )


def transformers_model(settings) -> GPT2LMHeadModel:
    return gpt2.new_model(settings.model, load_split("train").vocab_size, 0).to(DEVICE).train()


def transformers_loop(settings, compiled: bool, model=None, optimizer=None, schedule=None) -> Iterator[Tensor]:
    model = model or transformers_model(settings)

    def loss_of(batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    optimizer = optimizer or make_optimizer(model, settings.optimizer)
    return loop(settings, model, torch.compile(loss_of) if compiled else loss_of, optimizer, schedule)


def compact_loop(settings, compiled: bool) -> Iterator[Tensor]:
    shape = settings.model
    model = CompactGPT(load_split("train").vocab_size, shape.block_size, shape.n_layer, shape.n_head, shape.n_embd)
    model.to(DEVICE)
    forward = torch.compile(model) if compiled else model
    return loop(
        settings, model, lambda batch: forward(batch[:, :-1], batch[:, 1:]), make_optimizer(model, settings.optimizer)
    )


def nanogpt(settings, bias: bool = False, compiled: bool = False) -> None:
    """train.py of a checkout of nanoGPT that the environment variable NANOGPT names, as it is: it clips once a step.

    By default its model has no biases, which GPT-2 and all other contenders have.
    """
    split, shape, checkout = load_split("train"), settings.model, Path(os.environ["NANOGPT"])
    data = Path(f"data/nanogpt-{bias}-{compiled}")
    data.mkdir()
    for name in ("train", "val"):
        split.tokens[:].astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": split.vocab_size}))
    shutil.copy(checkout / "configurator.py", ".")
    bf16 = settings.trainer.precision == "bf16-mixed"
    given = {
        **{name: getattr(shape, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")},
        **{"dataset": data.name, "batch_size": settings.optimizer.batch_size, "gradient_accumulation_steps": 1},
        **{"eval_iters": 1, "eval_interval": 10**9, "compile": compiled, "device": DEVICE.type, "max_iters": 10**9},
        **{"dtype": "bfloat16" if bf16 else "float32", "log_interval": settings.runtime.log_every_n_steps},
        **{"bias": bias, "learning_rate": settings.optimizer.lr, "beta2": settings.optimizer.betas[1]},
    }
    turns, clip = Turns(), torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda *arguments: (turns.next_step(), clip(*arguments))[1]
    sys.path.insert(0, str(checkout))
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in given.items())]
    runpy.run_path(str(checkout / "train.py"), run_name="__main__")


def transformers_trainer(settings) -> None:
    """As its documentation shows it: blocks with labels, the default logging, saving and progress bar."""
    split, T = load_split("train"), settings.model.block_size
    blocks = (len(split.tokens) - 1) // T
    order = permuted(np.arange(blocks), blocks, [settings.seed_everything, 0])

    class BlockDataset(torch.utils.data.Dataset):
        def __len__(self):
            return blocks

        def __getitem__(self, i):
            ids = torch.from_numpy(split.tokens[order[i] * T : (order[i] + 1) * T].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    class TakesTurns(TrainerCallback):
        turns = Turns()

        def on_step_begin(self, args, state, control, **kwargs):
            self.turns.next_step()

    arguments = TrainingArguments(
        output_dir="trainer",
        num_train_epochs=1000,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.optimizer.batch_size,
        learning_rate=settings.optimizer.lr,
        weight_decay=settings.optimizer.weight_decay,
        bf16=settings.trainer.precision == "bf16-mixed",
        use_cpu=DEVICE.type == "cpu",
    )
    trainer = Trainer(transformers_model(settings), arguments, train_dataset=BlockDataset(), callbacks=[TakesTurns()])
    trainer.train()


def plain_curve(settings) -> None:
    """Prints the loss of each step of a plain float32 eager run, with the train stage's schedule."""
    model, steps = transformers_model(settings), settings.trainer.max_steps
    optimizer = make_optimizer(model, settings.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, settings.optimizer))
    for loss, _ in zip(transformers_loop(settings, False, model, optimizer, schedule), range(steps)):
        print(loss.item())


# Evaluation


def evaluate_stage(settings) -> None:
    """The evaluate stage's losses of a split, again and again, with a turn's end between two batches."""
    ops.reuse_memory()
    turns, losses = Turns(), scoring.token_losses

    def in_turns(*arguments):
        for batch in losses(*arguments):
            turns.next_step()
            yield batch

    scoring.token_losses = in_turns
    split = load_split("train")
    model = gpt2.new_model(settings.model, split.vocab_size, 0).to(DEVICE).eval()
    model.config.precision = settings.trainer.precision
    how = settings.evaluate.model_copy(update={"batch_size": settings.optimizer.batch_size})
    while True:
        scoring.losses_of(model, split, settings.model.block_size, how)


def generate_samples(settings) -> None:
    """A step adds up to GENERATED tokens to a prompt, as the evaluate stage does, by a model with random weights."""
    tokenizer = load_tokenizer("models/tokenizer")
    model = gpt2.new_model(settings.model, load_split("train").vocab_size, -1).to(DEVICE).eval()
    how = settings.generate.model_copy(update={"max_new_tokens": GENERATED})
    take_turns(continuation(model, tokenizer, "In the beginning", how, seed) for seed in count())


@torch.inference_mode()
def forward_loop(settings, compiled: bool) -> None:
    """The logits of `transformers`, and nothing computed from them."""
    model = transformers_model(settings).eval()
    forward = torch.compile(model) if compiled else model
    with autocast(DEVICE, settings.trainer.precision):
        take_turns(forward(batch[:, :-1], use_cache=False).logits for batch in batches(settings))


# Tokenizing


def documents(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").split("\n\n")


def tokenize_stage(settings) -> None:
    """One step is the whole work of the tokenize_blocks stage on the train split."""
    splits = {"train": Documents("train")}
    take_turns(write_blocks(splits, "models/tokenizer", "scratch") for _ in count())


def encode_batch(settings, fast: bool) -> None:
    """One step encodes all documents of train_file, a thousand at a time, and keeps nothing."""
    tokenizer = Tokenizer.from_file("models/tokenizer/tokenizer.json")
    encode = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    texts = documents(settings.data.train_file)

    def steps():
        while True:
            for i in range(0, len(texts), 1000):
                encode(texts[i : i + 1000], add_special_tokens=False)
            yield

    take_turns(steps())


def train_tokenizer_stage(settings) -> None:
    take_turns(train_tokenizer.train(Documents("train"), settings.tokenizer) for _ in count())


def bare_tokenizer_trainer(settings) -> None:
    texts = documents(settings.data.train_file)

    def steps():
        while True:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            trainer = trainers.BpeTrainer(
                vocab_size=settings.tokenizer.vocab_size,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            tokenizer.train_from_iterator(texts, trainer)
            yield

    take_turns(steps())


# The machine


def matrix_product(settings) -> None:
    """The rate of a large square matrix product, for the utilisation: one step is `matrix_flops(...)`."""
    size = matrix_size()
    dtype = torch.bfloat16 if settings.trainer.precision == "bf16-mixed" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    take_turns(iter(lambda: torch.matmul(a, b, out=out), None))


def onednn_matrix_product(settings) -> None:
    """The same through oneDNN, which PyTorch's float32 products don't use by default."""
    a, b = (torch.randn(matrix_size(), matrix_size()) for _ in range(2))
    take_turns(iter(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), None))


def matrix_size() -> int:
    return 8192 if DEVICE.type == "cuda" else 2048


def matrix_flops() -> int:
    return 2 * matrix_size() ** 3


CONTENDERS = {
    "own_step": lambda settings: take_turns(own_steps(settings)),
    "transformers_eager": lambda settings: take_turns(transformers_loop(settings, compiled=False)),
    "transformers_compiled": lambda settings: take_turns(transformers_loop(settings, compiled=True)),
    "nanogpt": nanogpt,
    "nanogpt_with_biases": lambda settings: nanogpt(settings, bias=True),
    "nanogpt_compiled": lambda settings: nanogpt(settings, compiled=True),
    "transformers_trainer": transformers_trainer,
    "compact_eager": lambda settings: take_turns(compact_loop(settings, compiled=False)),
    "compact_compiled": lambda settings: take_turns(compact_loop(settings, compiled=True)),
    "plain_curve": plain_curve,
    "evaluate_stage": evaluate_stage,
    "generate_samples": generate_samples,
    "forward_eager": lambda settings: forward_loop(settings, compiled=False),
    "forward_compiled": lambda settings: forward_loop(settings, compiled=True),
    "tokenize_stage": tokenize_stage,
    "encode_batch": lambda settings: encode_batch(settings, fast=False),
    "encode_batch_fast": lambda settings: encode_batch(settings, fast=True),
    "train_tokenizer_stage": train_tokenizer_stage,
    "bare_tokenizer_trainer": bare_tokenizer_trainer,
    "matrix_product": matrix_product,
    "onednn_matrix_product": onednn_matrix_product,
}

if __name__ == "__main__":
    main()
