"""GPT-2 as transformers defines and initialises it, with a leaner forward pass of our own.

Training and evaluation need next-token losses and nothing else: no attention mask, no output objects,
and never all the logits at once. They compute what `GPT2LMHeadModel.forward` does from
the same weights; a test holds the two against each other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.common.errors import UserError, one_line
from stages.common.hub import is_local
from stages.common.memory import check_memory
from stages.common.settings import Model
from stages.model import ops
from stages.text.tokenizers import TextTokenizer, encodes_alike, existing

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

# Its notes and loading bars are about choices made here on purpose.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Up to so many tokens of bf16 on a CPU, products of whole matrices beat PyTorch's flash attention by three.
WHOLE_ATTENTION = 512
LAYER_BYTES = 100_000  # the objects of a layer, beside its weights


def new_model(settings: Model, vocab_size: int, end_of_text: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights (from torch's global seed), of the shape in the model group.

    Raises:
        UserError: it doesn't fit into memory.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=settings.block_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    C, layers = config.n_embd, config.n_layer
    parameters = (vocab_size + config.n_positions) * C + layers * (12 * C * C + 13 * C)
    check_memory(
        4 * parameters + layers * LAYER_BYTES,
        f"model: one of {parameters:,} parameters: lower model.n_layer, model.n_embd or tokenizer.vocab_size",
    )
    try:
        return GPT2LMHeadModel(config)
    except (RuntimeError, MemoryError):
        raise UserError(f"model: no memory for {parameters:,} parameters: lower model.n_layer or n_embd") from None


def pretrained_model(settings: Model, tokenizer: TextTokenizer) -> GPT2LMHeadModel:
    """The GPT-2 of model.from_pretrained, ready to be fine-tuned.

    Raises:
        UserError: it can't be had, is no GPT-2, has too few positions, or another tokenizer.
    """
    name, key = settings.from_pretrained, "model.from_pretrained"
    options = {"local_files_only": is_local(key, name, "model.safetensors"), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # the hub, the files and the config's own code each raise their own
        raise UserError(f"{key}: {name!r} holds no working model ({one_line(error)}): use another, or null") from None
    if config.model_type != "gpt2":
        raise UserError(f"{key}: {name!r} is a {config.model_type} model: only gpt2 can be trained")
    if settings.block_size > config.n_positions:
        raise UserError(
            f"model.block_size: {settings.block_size} is above the {config.n_positions} positions of {name!r}: lower it"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{key}: {name!r} has {config.vocab_size:,} tokens, the tokenizer {tokenizer.vocab_size:,}: "
            f"set tokenizer.tokenizer_model to {name!r} too"
        )
    try:
        same = encodes_alike(tokenizer, existing(key, name)[0])
    except UserError:
        same = True  # a model saved without its tokenizer: only the size can be compared
    if not same:
        raise UserError(
            f"{key}: {name!r} was trained with another tokenizer than models/tokenizer's: "
            f"set tokenizer.tokenizer_model to {name!r} too"
        )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = settings.dropout
    config.bos_token_id = config.eos_token_id = tokenizer.end_of_text
    config.block_size = settings.block_size  # figures are measured at the length that was trained
    # from_pretrained leaves a model in evaluation mode, where dropout does nothing.
    return load_model(name, config, local_files_only=options["local_files_only"]).train()


def block_size_of(config: GPT2Config) -> int:
    """Tokens of context at which a model's figures are measured: what it was trained or fine-tuned with here."""
    return getattr(config, "block_size", config.n_positions)


def load_model(folder: Any, config: Any = None, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 folder, or with its config a Hugging Face id, in float32.

    Raises:
        UserError: a file is missing, cut short, or holds other weights than config.json says.
    """
    if config is None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such model folder: make it with `dvc repro`")
    try:
        config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type != "gpt2":
            raise ValueError(f"a {config.model_type} model, not gpt2")
        options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        loaded: Any = GPT2LMHeadModel.from_pretrained(folder, config=config, **options)
        model, report = loaded
    except Exception as error:  # safetensors, transformers and json each raise their own
        raise UserError(f"{folder}: no working GPT-2 ({one_line(error)}): make or fetch it again") from None
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise UserError(f"{folder}: its weight file lacks {missing[0]}: make or fetch it again")
    return model


def sampling(model: GPT2LMHeadModel, max_length: int, **options: Any) -> GenerationConfig:
    """How `generate` and the pipelines of transformers take texts from a model, unless they are told otherwise:
    they draw each token, and stop where the model's positions end.

    Args:
        max_length: tokens of a text, its prompt included.
        options: of GenerationConfig, such as temperature.
    """
    end_of_text = model.config.eos_token_id
    return GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        max_length=max_length,
        **{"do_sample": True, **options},
    )


def next_logits(model: GPT2LMHeadModel, input_ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Logits of the one token that follows.

    Args:
        input_ids: (B, T) int64. With a cache that holds tokens already: one more, T = 1.
    Returns:
        (B, V) float32.
    """
    return ops.linear(hidden_states(model, input_ids, cache)[:, -1], model.lm_head.weight).float()


def loss(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of next-token prediction.

    Args:
        tokens: (B, T + 1) int64: T inputs and, one further, their T targets.
    Returns:
        () float32, nats a token, with a gradient.
    """
    x = hidden_states(model, tokens[:, :-1])
    return ops.linear_cross_entropy(x.flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten())


def token_losses(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next-token prediction.

    Args:
        tokens: (B, T + 1) int64: T inputs and, one further, their T targets.
    Returns:
        (B, T) float32, nats, without a gradient.
    """
    x = hidden_states(model, tokens[:, :-1])
    nll = ops.token_cross_entropy(x.flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten())
    return nll.view(*x.shape[:2])


def hidden_states(model: GPT2LMHeadModel, input_ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """The last layer's output after its norm: (B, T, n_embd)."""
    body, config = model.transformer, model.config
    seen = 0 if cache is None else cache.get_seq_length()
    x = body.wte(input_ids) + body.wpe.weight[seen : seen + input_ids.shape[1]]
    x = F.dropout(x, config.embd_pdrop, model.training)
    for i, block in enumerate(body.h):
        x = block(x, cache, i) if isinstance(block, Layer) else layer(block, x, cache, i)
    return body.ln_f(x)


def layer(block: GPT2Block, x: Tensor, cache: DynamicCache | None = None, i: int = 0) -> Tensor:
    """The output of the i-th transformer block: (B, T, n_embd) to the same shape."""
    x = x + attention(block.attn, block.ln_1(x), cache, i)
    return x + mlp(block.mlp, block.ln_2(x))


class Layer(GPT2Block):
    """A block that is called as a module, so that hooks on it run."""

    forward: Any = layer


def call_blocks(model: GPT2LMHeadModel) -> None:
    """Makes the blocks `Layer`s, as FSDP and activation checkpointing need it."""
    for block in model.transformer.h:
        block.__class__ = Layer


def attention(attn: GPT2Attention, x: Tensor, cache: DynamicCache | None = None, layer: int = 0) -> Tensor:
    """Causal self-attention of (B, T, n_embd), with the same shape; with a cache, over the tokens before too."""
    config = attn.config
    B, T, C = x.shape
    q, k, v = conv1d(attn.c_attn, x).view(B, T, 3, config.n_head, C // config.n_head).permute(2, 0, 3, 1, 4)
    dropout = config.attn_pdrop if attn.training else 0.0
    if cache is not None:
        k, v = cache.update(k, v, layer)
    if k.shape[2] > T:  # one token more, and it may look at all
        y = F.scaled_dot_product_attention(q, k, v, scale=attn.scaling)
    elif x.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= WHOLE_ATTENTION:
        future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        q, k, v = (part.reshape(-1, T, C // config.n_head) for part in (q, k, v))
        weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=attn.scaling).softmax(-1)
        y = torch.bmm(F.dropout(weights, dropout), v).view(B, config.n_head, T, -1)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=attn.scaling)
    y = conv1d(attn.c_proj, y.transpose(1, 2).reshape(B, T, C))
    return F.dropout(y, config.resid_pdrop, attn.training)


def mlp(mlp: GPT2MLP, x: Tensor) -> Tensor:
    """The two layers between attentions: (B, T, n_embd) to the same shape."""
    # gelu_new is this very function, in one kernel instead of eight.
    known = isinstance(mlp.act, NewGELUActivation)
    x = conv1d(mlp.c_fc, x, ops.linear_gelu) if known else mlp.act(conv1d(mlp.c_fc, x))
    return F.dropout(conv1d(mlp.c_proj, x), mlp.dropout.p, mlp.training)


def conv1d(layer: Conv1D, x: Tensor, linear: Callable[..., Tensor] = ops.linear) -> Tensor:
    """GPT-2 keeps its weights as (in, out), the transpose of torch's Linear."""
    return linear(x.reshape(-1, x.shape[-1]), layer.weight.t(), layer.bias).view(*x.shape[:-1], -1)
