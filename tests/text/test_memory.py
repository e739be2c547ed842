"""Memory doesn't grow with the text."""

import re
from pathlib import Path

from stages.text.documents import document_spans, open_text, pieces

import pytest
from memory import measure, write


def mapped_mib() -> float:
    """Resident MiB of mapped files in this process."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.parametrize("document", ["blank_line", "line", "file"])
def test_read_pages_are_given_back(tmp_path, document):
    write(tmp_path / "text.txt", "prose", 48)
    before = highest = mapped_mib()
    with open_text(str(tmp_path / "text.txt")) as text:
        for start, end in document_spans(text, document):
            for i, _ in enumerate(pieces(text, start, end, "text.txt")):
                if i % 64 == 0 and start % 64 == 0:
                    highest = max(highest, mapped_mib())
        highest = max(highest, mapped_mib())
    assert highest < before + 12


def test_peak_memory_is_flat(tmp_path):
    settings = [f"--data.{split}_file={split}.txt" for split in ("train", "valid", "test")]
    peaks = {}
    for split in ("valid", "test"):
        write(tmp_path / f"{split}.txt", "prose", 0.01)
    for mib in (6, 24):
        write(tmp_path / "train.txt", "prose", mib)
        if mib == 6:
            measure(tmp_path, "train_tokenizer", *settings, "--tokenizer.algorithm=byte")
        peaks[mib], _ = measure(tmp_path, "tokenize_blocks", *settings)
    # Two runs on the same text differ by up to 50 MiB; the ids of 18 MiB as Python's integers would take 600.
    assert peaks[24] < peaks[6] + 100
