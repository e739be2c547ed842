"""Makes a Hugging Face folder, or a file for llama.cpp, of any checkpoint.

python -m tools.export models/gpt2 --output exported
python -m tools.export models/gpt2 --output exported --format gguf

Takes a GPT-2 folder or a training checkpoint. The folder samples by the generate group. `--format gguf` makes
model.gguf in it instead, reads that file back, and compares its token ids and its perplexity with the
checkpoint's, on test_file.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from stages.common.errors import UserError, run
from stages.common.files import new_folder
from stages.common.params import load
from stages.common.settings import Generate, Group, Settings, about
from stages.evaluate import fresh_blocks, load_checkpoint
from stages.model.gpt2 import block_size_of, sampling
from stages.model.intervals import perplexity
from stages.model.scoring import checked_stride, token_losses
from stages.text.tokenizers import HARD_TEXTS, JsonTokenizer, TextTokenizer, copy_tokenizer, load_tokenizer

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

# GPT-2 keeps these matrices as (in, out), llama.cpp all of them as (out, in).
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class Options(Group):
    """What its command line takes beside the settings."""

    POSITIONAL = "checkpoint"
    checkpoint: str = about("GPT-2 folder or training checkpoint")
    output: str = about("the folder to make")
    format: Literal["huggingface", "gguf"] = about("what to make", default="huggingface")


def main() -> None:
    settings = load("tools.export", __doc__, Options)
    options = settings.options
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output: {output} exists: name a new folder")
    model, tokenizer_folder = load_checkpoint(Path(options.checkpoint))
    with new_folder(output) as folder:
        if options.format == "gguf":
            tokenizer = load_tokenizer(tokenizer_folder)
            write_gguf(model, tokenizer, folder / "model.gguf")
            compare(model, tokenizer, tokenizer_folder, folder, settings)
        else:
            save(model, tokenizer_folder, folder, settings.generate)
    print(f"made {output}")


def save(model: GPT2LMHeadModel, tokenizer_folder: Path, folder: Path, generate: Generate) -> None:
    """Writes what AutoModelForCausalLM and AutoTokenizer read."""
    options = {"temperature": generate.temperature, "top_k": generate.top_k, "top_p": generate.top_p}
    # The likeliest token always: transformers takes no temperature of 0.
    options = options if generate.temperature else {"do_sample": False}
    model.generation_config = sampling(model, block_size_of(model.config), **options)
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer_folder, folder, block_size_of(model.config))


def write_gguf(model: GPT2LMHeadModel, tokenizer: TextTokenizer, path: Path) -> None:
    """Writes a model in the format of llama.cpp, in float32
    (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Raises:
        UserError: the tokenizer is of another kind than GPT-2's.
    """
    import gguf

    state = tokenizer.state if isinstance(tokenizer, JsonTokenizer) else None
    if not (tokenizer.cut and state["normalizer"] is None and state["model"].get("merges")):  # byte has none
        raise UserError("--format gguf: the tokenizer is no byte-level BPE with GPT-2's pattern: leave --format out")
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    names = {i: token for token, i in tokenizer.vocab.items()}
    tokens = [names.get(i, f"[UNUSED_{i}]") for i in range(config.vocab_size)]
    control = set(tokenizer.control)
    types = [
        gguf.TokenType.UNUSED
        if i not in names
        else gguf.TokenType.CONTROL
        if token in control
        else gguf.TokenType.NORMAL
        for i, token in enumerate(tokens)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)  # a prompt starts a document, as in training
    add_weights(writer, gguf, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_weights(writer: Any, gguf: ModuleType, model: GPT2LMHeadModel) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embeddings
            weight = weight.t() if name.endswith(TURNED) else weight
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.contiguous().numpy())


def compare(
    model: GPT2LMHeadModel, tokenizer: TextTokenizer, tokenizer_folder: Path, folder: Path, settings: Settings
) -> None:
    """Reads the file back, its tokenizer by transformers, and prints how it does on test_file beside the checkpoint.

    Raises:
        UserError: its token ids or its perplexity are others.
    """
    with fresh_blocks(settings.data, ["test"], tokenizer_folder) as splits:
        split = splits["test"]
        tokens = split.tokens[:]
        its = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text))[1:-1]
        texts = [*HARD_TEXTS, *tokenizer.decode_batch([ids[1:].tolist() for ids in documents])]
        same = sum(
            its.encode(text, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(text)
            for text in texts
        )
        T, batch_size = checked_stride(model, split, None), settings.evaluate.batch_size
        nll = sum(part[2].astype(np.float64).sum() for part in token_losses(model, split, T, batch_size))
        its_nll = file_nll(folder / "model.gguf", tokens, T)
    ppl, its_ppl = (perplexity(total / (len(tokens) - 1)) for total in (nll, its_nll))
    print(f"token ids: {same:,} of {len(texts):,} texts the same   test ppl: checkpoint {ppl:.4f}, file {its_ppl:.4f}")
    if same < len(texts) or not math.isclose(ppl, its_ppl, rel_tol=1e-4):
        raise UserError("--format gguf: the file isn't the checkpoint: nothing is kept of it")


@torch.inference_mode()
def file_nll(path: Path, tokens: np.ndarray, block_size: int) -> float:
    """Total loss (nats) of a token stream by the tensors of a GGUF file, in blocks as evaluate has them.

    GPT-2 written out from llama.cpp's names, so that it shares nothing with the model that was written.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    w = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    heads, layers, eps = (
        reader.get_field(f"gpt2.{key}").contents()
        for key in ("attention.head_count", "block_count", "attention.layer_norm_epsilon")
    )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    total = 0.0
    for start in range(0, len(tokens) - 1, block_size):
        block = torch.from_numpy(tokens[start : start + block_size + 1].astype(np.int64))
        x = w["token_embd.weight"][block[:-1]] + w["position_embd.weight"][: len(block) - 1]
        for i in range(layers):
            q, k, v = (
                part.unflatten(-1, (heads, -1)).transpose(0, 1)
                for part in linear(norm(x, f"blk.{i}.attn_norm"), f"blk.{i}.attn_qkv").chunk(3, -1)
            )
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            scores += torch.full(scores.shape[1:], -math.inf).triu(1)
            x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"blk.{i}.attn_output")
            inner = F.gelu(linear(norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up"), approximate="tanh")
            x = x + linear(inner, f"blk.{i}.ffn_down")
        logits = norm(x, "output_norm") @ w["token_embd.weight"].T
        total += F.cross_entropy(logits, block[1:], reduction="sum").item()
    return total


if __name__ == "__main__":
    run(main)
