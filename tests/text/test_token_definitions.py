"""Tokenizers and token streams against the tokenizers library and plain Python."""

import json
import random
import shutil
from pathlib import Path

from stages import train_tokenizer
from stages.text import streams
from stages.text.tokenizers import JsonTokenizer

import numpy as np
from conftest import run_stage, sample_lines
from tokenizers import Tokenizer, models


def bpe(merges: list[tuple[str, str]], end_of_text: str = "<e>") -> JsonTokenizer:
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "<e>", "<f>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(["<e>", "<f>"])
    return JsonTokenizer(tokenizer, end_of_text, set())


def test_fingerprint_notices_merges_and_end_of_text():
    one, again = bpe([("a", "b"), ("b", "c")]), bpe([("a", "b"), ("b", "c")])
    assert one.fingerprint == again.fingerprint
    merges = bpe([("b", "c"), ("a", "b")])
    assert merges.vocab == one.vocab and merges.encode("abc") != one.encode("abc")
    assert merges.fingerprint != one.fingerprint
    assert bpe([("a", "b"), ("b", "c")], "<f>").fingerprint != one.fingerprint


def test_vocabulary_size_is_the_highest_id_and_one():
    """Ids may have gaps: the model needs a row for each up to the highest."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<e>": 7}, unk_token="a"))
    tokenizer.add_special_tokens(["<e>"])
    assert JsonTokenizer(tokenizer, "<e>", set()).vocab_size == 8


def test_two_bytes_hold_65536_ids():
    assert [streams.token_dtype(size).itemsize for size in (1 << 16, (1 << 16) + 1)] == [2, 4]


def test_long_documents_are_whole(project: Path):
    """300 kB in a line, and Japanese in which a word goes over the places where it may be cut: the ids are those of
    each document encoded whole, whatever is read at a time, and no word counts twice."""
    words = sample_lines(0, 2500).split()
    random.Random(1).shuffle(words)
    texts = [" ".join(words), " ".join(["今日は良い天気です。明日も、" * 700] * 6)]
    assert all(len(text.encode()) > 100_000 for text in texts)
    (project / "data/test.txt").write_text("\n\n".join(texts))
    for stage in ("prepare_corpus", "tokenize_blocks"):
        status, out, err = run_stage(project, stage)
        assert status == 0, err
    tokenizer = Tokenizer.from_file(str(project / "models/tokenizer/tokenizer.json"))
    expected = [end := tokenizer.token_to_id("<|endoftext|>")]
    for text in texts:
        expected += [*tokenizer.encode(text, add_special_tokens=False).ids, end]
    assert np.load(project / "data/blocks/test.npy").tolist() == expected
    counts = json.loads((project / "data/blocks/test.json").read_text())
    size = sum(len(text.encode()) for text in texts)
    assert (counts["words"], counts["bytes"], counts["documents"]) == (len(words) + 6, size, 2)
    assert f"test: {len(expected):,} tokens, 2 documents, {size:,} bytes\n" in out


def test_sample_settings_act(project: Path, monkeypatch):
    """Less text, or other spans of it, make another vocabulary; the same settings the same one."""
    monkeypatch.setattr(train_tokenizer, "SAMPLE_SPAN_BYTES", 500)

    def made(sample_bytes: int, seed: int) -> dict:
        shutil.rmtree(project / "models/tokenizer", ignore_errors=True)
        options = ("--tokenizer.sample_bytes", str(sample_bytes), "--tokenizer.sample_seed", str(seed))
        status, _, err = run_stage(project, "train_tokenizer", *options)
        assert status == 0, err
        return json.loads((project / "models/tokenizer/tokenizer.json").read_text())["model"]["merges"]

    whole = made(10_000_000, 0)
    assert made(10_000_000, 0) == whole
    few = made(1000, 0)
    assert few != whole and made(1000, 0) == few and made(1000, 1) != few
