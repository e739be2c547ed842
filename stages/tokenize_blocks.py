"""Makes data/blocks/: the token stream of each split of the corpus, ready to be mapped.

metrics/tokens.json says how much text a token is, and what share of the text the tokenizer changes.
"""

from stages.common.errors import run
from stages.common.files import write_json
from stages.common.params import load
from stages.common.paths import BLOCKS, METRICS, TOKENIZER
from stages.text.corpus import Documents, split_names
from stages.text.streams import token_figures, write_blocks


def main() -> None:
    settings = load("stages.tokenize_blocks", __doc__)
    splits = {name: Documents(name) for name in split_names()}
    counts = write_blocks(splits, TOKENIZER, BLOCKS, settings.tokenizer.lossy, settings.runtime)
    write_json(METRICS / "tokens.json", {split: token_figures(count) for split, count in counts.items()})
    for split, count in counts.items():
        print(f"{split}: {count['tokens']:,} tokens, {count['documents']:,} documents, {count['bytes']:,} bytes")


if __name__ == "__main__":
    run(main)
