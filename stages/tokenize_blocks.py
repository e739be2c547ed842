"""Makes data/blocks/: the token streams of train_file, valid_file and test_file, ready to be mapped.

metrics/tokens.json says how much text a token is, and what share of the text the tokenizer changes.
"""

import json

from stages.common.errors import run
from stages.common.files import write_text
from stages.common.paths import BLOCKS, METRICS, TOKENIZER
from stages.common.settings import load
from stages.text.streams import token_figures, write_blocks


def main() -> None:
    settings = load("stages.tokenize_blocks", __doc__)
    files = {"train": settings.data.train_file, "valid": settings.data.valid_file, "test": settings.data.test_file}
    counts = write_blocks(files, settings.data.document, TOKENIZER, BLOCKS, settings.tokenizer.lossy)
    figures = {split: token_figures(count) for split, count in counts.items()}
    write_text(METRICS / "tokens.json", json.dumps(figures, indent=2) + "\n")
    for split, count in counts.items():
        print(f"{split}: {count['tokens']:,} tokens, {count['documents']:,} documents, {count['bytes']:,} bytes")


if __name__ == "__main__":
    run(main)
