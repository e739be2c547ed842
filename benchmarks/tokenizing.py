"""tokenize_blocks on the sample repeated to 256 MB, and `encode_batch` of the tokenizers library on its first 16 MB.

    RAYON_NUM_THREADS=1 python -m benchmarks.tokenizing

Needs data/sample and models/tokenizer (`dvc repro train_tokenizer`). A core's MB/s are those of processor time.
"""

import tempfile
import time
from itertools import chain, repeat
from pathlib import Path

from stages.common.paths import TOKENIZER
from stages.text.corpus import Documents, write_documents
from stages.text.streams import write_blocks

from tokenizers import Tokenizer

MB = 1_000_000


def measured(name: str, size: int, work) -> float:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    print(f"{name}: {size / MB / clock:.1f} MB/s, {size / MB / cpu:.1f} MB/s a core", flush=True)
    return size / cpu


def main() -> None:
    sample = Path("data/sample/train.txt").read_bytes() + b"\n"
    with tempfile.TemporaryDirectory() as folder:
        documents = [document.encode() for document in sample.decode().removesuffix("\n").split("\n\n")]
        write_documents(Path(folder, "train.arrow"), chain(*repeat(documents, 256 * MB // len(sample))))
        splits = {"train": Documents("train", folder)}
        stage = measured(
            "tokenize_blocks",
            splits["train"].size,
            lambda: write_blocks(splits, TOKENIZER, Path(folder, "blocks")),
        )
        documents = (sample * (16 * MB // len(sample))).decode().split("\n\n")
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    size = sum(len(document.encode()) for document in documents)
    batch = measured("encode_batch", size, lambda: tokenizer.encode_batch(documents, add_special_tokens=False))
    print(f"tokenize_blocks / encode_batch, a core: {stage / batch:.1f}")


if __name__ == "__main__":
    main()
