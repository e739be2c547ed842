"""Prints continuations of a prompt by the trained model.

python -m stages.generate --prompt "In the beginning" --generate.temperature 0.7

With --model DIR it takes another GPT-2 folder than models/gpt2.
"""

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.blocks import load_tokenizer, vocab_size_of
from stages.gpt2 import load_model, logits
from stages.settings import Count, UserError, load, make_parser, run, take_option

MODEL = Path("models/gpt2")


def main() -> None:
    parser = make_parser("generate", __doc__)
    parser.add_argument("--prompt", type=str, required=True, help="Text to continue.")
    parser.add_argument("--samples", type=Count, default=1, help="How many continuations to print.")
    folder, argv = take_option("--model")
    settings = load(parser, argv)
    folder = folder or MODEL
    try:
        settings.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: not UTF-8 text: write it in the terminal's encoding, UTF-8") from None
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    if (size := vocab_size_of(tokenizer[0])) > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {size:,} tokens, its model only {model.config.vocab_size:,}")
    for i in range(settings.samples):
        print(continuation(model, tokenizer, settings.prompt, settings.generate, settings.generate.seed + i))


@torch.inference_mode()
def continuation(model: GPT2LMHeadModel, tokenizer, prompt: str, settings, seed: int) -> str:
    """A prompt and what the model adds to it, up to end-of-text or max_new_tokens.

    Args:
        model: in evaluation mode.
        tokenizer: what `load_tokenizer` returns.
        prompt: any text; it starts a document. The model sees the last n_positions tokens.
        settings: the generate group.
        seed: of torch's random numbers.
    """
    encoder, end_of_text, _ = tokenizer
    choose = LogitsProcessorList()
    if settings.temperature not in (0.0, 1.0):
        choose.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        choose.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        choose.append(TopPLogitsWarper(settings.top_p))
    generator = torch.Generator().manual_seed(seed)
    ids = [end_of_text, *encoder.encode(prompt, add_special_tokens=False).ids]
    for _ in range(settings.max_new_tokens):
        context = torch.tensor([ids[-model.config.n_positions :]], device=model.device)
        scores = logits(model, context)[:, -1].float()
        if settings.temperature == 0:
            token = int(scores.argmax())
        else:
            probabilities = choose(context, scores).softmax(-1).cpu()
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == end_of_text:
            break
        ids.append(token)
    return encoder.decode(ids[1:], skip_special_tokens=False)


if __name__ == "__main__":
    run(main)
