"""What a core does of the tasks of prepare_corpus and tokenize_blocks, and of what one process does after them.

    RAYON_NUM_THREADS=1 python -m benchmarks.text TEXT_FILE

Needs data/corpus and models/tokenizer (`dvc repro train_tokenizer`). A core's MB/s are those of processor time.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.tokenizing import measured
from stages.common.paths import TOKENIZER
from stages.common.settings import Data
from stages.text import splits, streams
from stages.text.corpus import Documents
from stages.text.leakage import Grams, Seen
from stages.text.measures import measure
from stages.text.sources import find_files

import numpy as np
import yaml

NAME = ".0"  # of the first path's documents, as write_share writes them


def main() -> None:
    (path,) = sys.argv[1:]
    data = yaml.safe_load(Path("params.yaml").read_text())["data"] | {"train_file": path, "document": "blank_line"}
    size, files = Path(path).stat().st_size, {path: find_files(path, "blank_line")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for how in ("none", "near"):
            settings = Data(**data | {"deduplicate": how})
            what = "reading" if how == "none" else "reading and signing"
            measured(what, size, lambda settings=settings: splits.write_share(folder, 0, 1, settings, files))
        documents = Documents(NAME, folder)
        count = sum(1 for _ in documents.documents())
        print(f"{count:,} documents of {size / count:,.0f} bytes")
        held_out = [Documents("valid")]
        grams = Grams.of(measure(held_out[0]).sums[2].item(), held_out[0].size)
        seen = Seen(grams, grams.of_documents(held_out))
        measured("measuring and leakage", size, lambda: measure(documents, None, seen))
        source, kept = splits.Source([documents], np.empty(0)), np.arange(count) % 7 > 0
        parts = {"train": np.ones(count, bool)}
        measured("one process: comparing signatures", size, lambda: splits.drop_similar({"train": source}, parts))
        measured("one process: copying documents", size, lambda: splits.select(source, kept, folder / "kept.arrow"))
        work = {"train": documents.path.rename(folder / "train.arrow")}
        tokens, target = folder / "tokens", folder / "joined/train.npy"
        for each in (tokens, target.parent):
            each.mkdir()
        measured("tokenizing", size, lambda: streams.write_part(tokens, 0, 1, work, str(TOKENIZER), "allow"))
        train = Documents("train", folder)
        measured("one process: putting tokens together", size, lambda: streams.join(target, [tokens], train))


if __name__ == "__main__":
    main()
