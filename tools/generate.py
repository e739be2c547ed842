"""Prints continuations of a prompt by the trained model.

python -m tools.generate --prompt "In the beginning" --generate.temperature 0.7

With --model DIR it takes another GPT-2 folder than models/gpt2.
"""

from stages.common.errors import UserError, run
from stages.common.paths import MODEL
from stages.common.settings import Count, load, make_parser, take_option
from stages.model.gpt2 import load_model
from stages.model.sampling import continuation
from stages.text.tokenizers import load_tokenizer


def main() -> None:
    parser = make_parser("tools.generate", __doc__)
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
    if (size := tokenizer.vocab_size) > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {size:,} tokens, its model only {model.config.vocab_size:,}")
    for i in range(settings.samples):
        print(continuation(model, tokenizer, settings.prompt, settings.generate, settings.generate.seed + i))


if __name__ == "__main__":
    run(main)
