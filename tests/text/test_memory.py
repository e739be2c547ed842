"""Memory doesn't grow with the text."""

import re
from pathlib import Path

from stages.text.encoding import document_parts
from stages.text.tokenizers import SAFE_CUT

import pytest
from conftest import corpus_of
from memory import measure, write


def mapped_mib() -> float:
    """Resident MiB of mapped files in this process."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.parametrize("document", ["blank_line", "line", "file"])
def test_read_pages_are_given_back(tmp_path, document):
    write(tmp_path / "text.txt", "prose", 48)
    splits, before = corpus_of(tmp_path / "text.txt", document), mapped_mib()
    highest = before
    for i, text in enumerate(splits["train"].documents()):
        for j, _ in enumerate(document_parts(text, "", SAFE_CUT)):
            if j == 64 or i % 4096 == 0:
                splits["train"].release()
                highest = max(highest, mapped_mib())
    assert highest < before + 12


def test_peak_memory_is_flat(tmp_path):
    settings = [f"--data.{split}_file={split}.txt" for split in ("train", "valid", "test")]
    peaks, prepared = {}, {}
    for split in ("valid", "test"):
        write(tmp_path / f"{split}.txt", "prose", 0.01)
    for mib in (6, 24):
        write(tmp_path / "train.txt", "prose", mib)
        prepared[mib], _ = measure(tmp_path, "prepare_corpus", *settings)
        if mib == 6:
            measure(tmp_path, "train_tokenizer", *settings, "--tokenizer.algorithm=byte")
        peaks[mib], _ = measure(tmp_path, "tokenize_blocks", *settings)
    assert prepared[24] < prepared[6] + 60
    # Two runs on the same text differ by up to 50 MiB; the ids of 18 MiB as Python's integers would take 600.
    assert peaks[24] < peaks[6] + 100
