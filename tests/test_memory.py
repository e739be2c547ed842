"""Memory doesn't grow with the text."""

import pytest
from memory import measure, write


@pytest.mark.parametrize("document", ["blank_line", "line", "file"])
def test_peak_memory_is_flat(tmp_path, document):
    settings = [f"--data.{split}_file={split}.txt" for split in ("train", "valid", "test")]
    peaks = {}
    for split in ("valid", "test"):
        write(tmp_path / f"{split}.txt", "prose", 0.01)
    for mib in (6, 24):
        write(tmp_path / "train.txt", "prose", mib)
        if mib == 6:
            measure(tmp_path, "train_tokenizer", *settings, "--tokenizer.algorithm=byte")
        peaks[mib], _ = measure(tmp_path, "tokenize_blocks", *settings, f"--data.document={document}")
    assert peaks[24] < peaks[6] + 12
