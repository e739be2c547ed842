"""Dropout, the loss at each position and the end of a sample, against transformers or plain arithmetic."""

from types import SimpleNamespace

from stages.model import gpt2, sampling
from stages.training import module

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

KINDS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def model_with(**dropout: float) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=16, **dict.fromkeys(KINDS, 0.0) | dropout)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_dropout_is_transformers(kind):
    """Under one seed the same elements are dropped, and under the next one others."""
    model, ids = model_with(**{kind: 0.5}).train(), torch.randint(0, 50, (3, 16))

    def of(forward, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return forward(ids)

    ours, theirs = (lambda x: gpt2.hidden_states(model, x)), (lambda x: model.transformer(x).last_hidden_state)
    assert torch.allclose(of(ours, 1), of(theirs, 1), atol=1e-5)
    assert not torch.allclose(of(ours, 1), of(ours, 2), atol=0.1)
    model.eval()
    assert torch.allclose(of(ours, 1), of(ours, 2), atol=1e-6)


def test_dropout_of_attention_in_bf16():
    """On a CPU it has a way of its own, which drops what transformers' plain attention does."""
    model, ids = model_with(attn_pdrop=0.5).train(), torch.randint(0, 50, (3, 16))
    model.config._attn_implementation = "eager"

    def of(forward, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            return forward(ids).float()

    ours, theirs = (lambda x: gpt2.hidden_states(model, x)), (lambda x: model.transformer(x).last_hidden_state)
    assert torch.allclose(of(ours, 1), of(theirs, 1), atol=0.05)
    assert not torch.allclose(of(ours, 1), of(theirs, 2), atol=0.1)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """The bytes that a forward pass keeps for the backward pass, beside a model's weights."""

    def __init__(self, model: GPT2LMHeadModel):
        weights, self.kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.kept[storage.data_ptr()] = storage.nbytes(), tensor  # so that no other takes its place
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def test_gradient_checkpointing_keeps_block_inputs_alone():
    """The same loss, gradients and dropout, and between the passes no more than a block's input for each block."""
    ids, found, kept = torch.randint(0, 50, (3, 16)), [], []
    for checkpointing in (False, True):
        model = model_with(attn_pdrop=0.5).train()
        group = SimpleNamespace(compile=False, gradient_checkpointing=checkpointing)
        module.LanguageModel(model, SimpleNamespace(model=group))
        torch.manual_seed(2)
        with (saved := Saved(model)):
            x = gpt2.hidden_states(model, ids)
        kept.append(sum(size for size, _ in saved.kept.values()))
        x.square().sum().backward()
        found.append([x.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found))
    inputs = 3 * 16 * 16 * 4  # a block's input, in bytes
    assert kept[1] < 6 * inputs < 20 * inputs < kept[0]  # beside the blocks' inputs: the embeddings, and ln_f's


def test_new_models_have_the_dropout_of_the_settings():
    shape = SimpleNamespace(block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.3)
    config = gpt2.new_model(shape, 50, 0).config
    assert [getattr(config, kind) for kind in KINDS] == [0.3] * 3


def test_loss_by_position_is_in_order(built):
    """Plainly: at each place of the windows, the mean over all of them, the shorter last one too."""
    model = GPT2LMHeadModel.from_pretrained(built / "models/gpt2").double().eval()
    tokens = np.load(built / "data/blocks/test.npy").astype(np.int64)
    sums, counts = np.zeros(16), np.zeros(16)
    for start in range(0, len(tokens) - 1, 16):
        window = torch.from_numpy(tokens[start : start + 17])[None]
        with torch.no_grad():
            nll = F.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:], reduction="none").numpy()
        sums[: len(nll)] += nll
        counts[: len(nll)] += 1
    measured = pd.read_csv(built / "metrics/loss_by_position.csv")
    assert list(measured.position) == list(range(1, 17))
    assert list(measured.loss) == pytest.approx(list(sums / counts), rel=1e-5)


def test_end_of_text_ends_a_sample(monkeypatch):
    """The prompt, three tokens, end-of-text: it isn't in the sample, and nothing follows it."""
    told = iter([5, 6, 7, 0, 8, 9])

    def logits(model, ids, cache=None):
        return F.one_hot(torch.tensor([next(told)]), 10).float()

    monkeypatch.setattr(sampling, "next_logits", logits)
    tokenizer = SimpleNamespace(end_of_text=0, encode=lambda text: [1, 2], decode=lambda ids: ids)
    settings = SimpleNamespace(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=6)
    assert sampling.continuation(model_with(), tokenizer, "any", settings, 1) == [1, 2, 5, 6, 7]
