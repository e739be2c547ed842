"""Prints continuations of a prompt by the trained model.

python -m tools.generate --prompt "In the beginning" --generate.temperature 0.7

With --model DIR it takes another GPT-2 folder than models/gpt2.
"""

from stages.common.devices import device_of
from stages.common.errors import UserError, run
from stages.common.params import load
from stages.common.paths import MODEL
from stages.common.settings import Count, Group, about
from stages.model.gpt2 import load_model
from stages.model.sampling import continuation
from stages.text.tokenizers import load_tokenizer


class Options(Group):
    """What its command line takes beside the settings."""

    prompt: str = about("text to continue")
    samples: Count = about("how many continuations to print", default=1)
    model: str = about("GPT-2 folder with its tokenizer", default=str(MODEL))


def main() -> None:
    settings = load("tools.generate", __doc__, Options)
    prompt, folder = settings.options.prompt, settings.options.model
    device = device_of(settings.evaluate.accelerator)
    model, tokenizer = load_model(folder).to(device).eval(), load_tokenizer(folder)
    if (size := tokenizer.vocab_size) > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {size:,} tokens, its model only {model.config.vocab_size:,}")
    for i in range(settings.options.samples):
        print(continuation(model, tokenizer, prompt, settings.generate, settings.generate.seed + i))


if __name__ == "__main__":
    run(main)
