"""Text from a model: one token after another, until end-of-text."""

from stages.common.settings import Generate
from stages.model.gpt2 import next_logits
from stages.text.tokenizers import TextTokenizer

import torch
from transformers import DynamicCache, GPT2LMHeadModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@torch.inference_mode()
def continuation(model: GPT2LMHeadModel, tokenizer: TextTokenizer, prompt: str, settings: Generate, seed: int) -> str:
    """A prompt and what the model adds to it, up to end-of-text or max_new_tokens.

    Args:
        model: in evaluation mode.
        prompt: any text; it starts a document. The model sees the last n_positions tokens.
        settings: the generate group.
        seed: of torch's random numbers.
    """
    choose = LogitsProcessorList()
    if settings.temperature not in (0.0, 1.0):
        choose.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        choose.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        choose.append(TopPLogitsWarper(settings.top_p))
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    positions, cache = model.config.n_positions, DynamicCache()
    for _ in range(settings.max_new_tokens):
        if len(ids) > positions:
            cache = None  # with each token now, all of them move by a position
        context = torch.tensor([ids[-positions:]], device=model.device)
        scores = next_logits(model, context if cache is None else context[:, cache.get_seq_length() :], cache)
        if settings.temperature == 0:
            token = int(scores.argmax())
        else:
            probabilities = choose(context, scores).softmax(-1).cpu()
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])
