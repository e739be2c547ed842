"""Makes data/blocks/: the token streams of train_file, valid_file and test_file, ready to be mapped."""

from stages.common.errors import run
from stages.common.paths import BLOCKS, TOKENIZER
from stages.common.settings import load, make_parser
from stages.text.streams import write_blocks


def main() -> None:
    settings = load(make_parser("stages.tokenize_blocks", __doc__))
    files = {"train": settings.data.train_file, "valid": settings.data.valid_file, "test": settings.data.test_file}
    counts = write_blocks(files, settings.data.document, TOKENIZER, BLOCKS, settings.tokenizer.lossy)
    for split, count in counts.items():
        print(f"{split}: {count['tokens']:,} tokens, {count['documents']:,} documents, {count['bytes']:,} bytes")


if __name__ == "__main__":
    run(main)
