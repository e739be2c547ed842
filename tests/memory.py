"""Peak memory and speed of prepare_corpus, train_tokenizer and tokenize_blocks on large text, made on the spot.

    python tests/memory.py --mib 1024

Prints one line for each text and stage, and ends with status 1 when a stage needed more than 1.5 GiB.
"""

import argparse
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ROOT, sample_lines

LIMIT_MIB = 1536
KANA_AND_KANJI = [chr(i) for i in (*range(0x3041, 0x3094), *range(0x4E00, 0x5200))]


def prose(draw: random.Random) -> Iterator[str]:
    """Chapters of the King James Bible in random order; every verse brings a word that was never there."""
    verses = sample_lines(0, 31_102).split("\n")
    while True:
        start = draw.randrange(len(verses) - 30)
        yield "\n".join(f"{verse} {new_word(draw)}" for verse in verses[start : start + 30]) + "\n\n"


def new_word(draw: random.Random) -> str:
    """A word of eight letters in one of four alphabets."""
    first = draw.choice([0x61, 0x3B1, 0x430, 0x5D0])
    return "".join(chr(first + draw.randrange(24)) for _ in range(8))


def distinct(draw: random.Random) -> Iterator[str]:
    """No word twice."""
    letters = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
    while True:
        word = draw.randbytes(60_000).hex().translate(letters)
        yield "\n\n".join(
            " ".join(word[i : i + 12] for i in range(start, start + 1200, 12)) for start in range(0, len(word), 1200)
        )
        yield "\n\n"


def japanese(draw: random.Random) -> Iterator[str]:
    """Sentences without spaces."""
    while True:
        yield "".join("".join(draw.choices(KANA_AND_KANJI, k=draw.randint(10, 60))) + "。\n" for _ in range(100)) + "\n"


def endless_word(draw: random.Random) -> Iterator[str]:
    for text in distinct(draw):
        yield "".join(text.split())


def endless_line(draw: random.Random) -> Iterator[str]:
    for text in prose(draw):
        yield text.replace("\n", " ")


TEXTS = {f.__name__: f for f in (prose, distinct, japanese, endless_word, endless_line)}


def write(path: Path, text: str, mib: float) -> None:
    """A file of about so many MiB; the same bytes every time."""
    size = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for part in TEXTS[text](random.Random(0)):
            file.write(part)
            size += len(part.encode())
            if size >= mib * 2**20:
                return


def write_table(text: Path, target: Path) -> None:
    """The paragraphs of a text as the rows of a .jsonl, .csv or .parquet file.

    A row at a time: what a stage is said to have needed is at least what this process has when it starts it.
    """
    with text.open(encoding="utf-8", newline="") as lines, target.open("wb") as file:
        groups = ("".join(group).rstrip("\n") for blank, group in groupby(lines, "\n".__eq__) if not blank)
        if target.suffix == ".parquet":
            with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as table:
                while rows := list(islice(groups, 10_000)):
                    table.write_table(pa.table({"text": rows}))
            return
        file = io.TextIOWrapper(file, encoding="utf-8", newline="")
        if target.suffix == ".csv":
            csv.writer(file).writerows([row] for row in chain(["text"], groups))
        else:
            file.writelines(json.dumps({"text": row}) + "\n" for row in groups)
        file.close()


def measure(folder: Path, stage: str, *settings: str) -> tuple[float, float]:
    """Runs a stage in a folder; returns its peak resident memory in MiB, and its seconds."""
    shutil.copy(ROOT / "params.yaml", folder)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}", *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{stage} {settings}: status {status}"
    return used.ru_maxrss / 1024, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/memory.py", description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=float, default=1024, help="size of train_file")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--algorithms", nargs="+", choices=["bpe", "unigram", "byte"], default=["bpe"])
    parser.add_argument("--documents", nargs="*", choices=["blank_line", "line", "file"], default=["blank_line"])
    parser.add_argument(
        "--tables", nargs="*", choices=["jsonl", "csv", "parquet"], default=[], help="forms to read too"
    )
    arguments = parser.parse_args()
    highest = 0.0
    print("| text | MiB | stage | peak MiB | seconds |\n| --- | --- | --- | --- | --- |", flush=True)
    for text in arguments.texts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for split, mib in (("train", arguments.mib), ("valid", 0.1), ("test", 0.1)):
                write(folder / f"{split}.txt", text, mib)
            files = [f"--data.{split}_file={split}.txt" for split in ("train", "valid", "test")]
            runs = []
            for ending in arguments.tables:
                write_table(folder / "train.txt", folder / f"train.{ending}")
                runs.append(("prepare_corpus", [f"--data.train_file=train.{ending}"]))
            for document in arguments.documents:
                runs.append(("prepare_corpus", [f"--data.document={document}"]))
                for algorithm in arguments.algorithms:
                    runs += [("train_tokenizer", [f"--tokenizer.algorithm={algorithm}"]), ("tokenize_blocks", [])]
            for stage, settings in runs:
                peak, seconds = measure(folder, stage, *files, *settings)
                highest = max(highest, peak)
                what = " ".join([stage, *(setting.split("=")[1] for setting in settings)])
                print(f"| {text} | {arguments.mib:,.0f} | {what} | {peak:,.0f} | {seconds:,.0f} |", flush=True)
    return int(highest > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
