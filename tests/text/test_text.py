"""Text of any kind goes through the tokenizer and comes back byte for byte, or is one clear error."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from stages.common.errors import UserError
from stages.text.streams import write_blocks

import numpy as np
import pytest
from conftest import ROOT, corpus_of, run_stage, sample_lines, set_params, stages_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

ALGORITHMS = ("bpe", "unigram", "byte")
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
    "ニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。しかもあとで聞くと"
    "それは書生という人間中で一番獰悪な種族であったそうだ。"
)
CODE = (ROOT / "stages/common/settings.py").read_text()
TEXTS = {
    "english": sample_lines(100, 120).encode(),
    "japanese without spaces": (JAPANESE * 12).encode(),
    "source code": CODE.encode(),
    "crlf": sample_lines(100, 120).replace("\n", "\r\n").encode(),
    "no newline at the end": sample_lines(100, 120).rstrip("\n").encode(),
    "byte order mark": b"\xef\xbb\xbf" + sample_lines(100, 120).encode(),
}


def documents_of(text: bytes, document: str) -> list[bytes]:
    """What documents are, as simply as can be said: lines, and runs of lines that are not blank."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    if document == "file":
        return [text]
    groups = [[]]
    for line in re.findall(rb"[^\n]*\n|[^\n]+", text):
        if document == "line" or not line.strip():
            groups.append([])
        if line.strip():
            groups[-1].append(line)
    documents = [b"".join(group) for group in groups if group]
    return [d[:-2] if d.endswith(b"\r\n") else d.removesuffix(b"\n") for d in documents]


def blank(text: bytes) -> bool:
    return not text.strip()


@pytest.fixture(scope="module")
def tokenizers(template, tmp_path_factory):
    """A project with a folder of tokenizers, one of each algorithm, trained by the real stage."""
    project = tmp_path_factory.mktemp("tokenizers") / "project"
    shutil.copytree(template, project)
    assert run_stage(project, "prepare_corpus")[0] == 0
    for algorithm in ALGORITHMS:
        status, _, err = run_stage(project, "train_tokenizer", "--tokenizer.algorithm", algorithm)
        assert status == 0, err
        (project / "models/tokenizer").rename(project / algorithm)
    return project


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", TEXTS)
def test_own_text(template, tmp_path, kind, algorithm):
    shutil.copy(template / "params.yaml", tmp_path)
    for split in ("train", "valid", "test"):
        (tmp_path / split).write_bytes(TEXTS[kind])
    arguments = [f"--data.{split}_file={split}" for split in ("train", "valid", "test")]
    arguments += ["--tokenizer.algorithm", algorithm, "--tokenizer.vocab_size", "400"]
    for stage in ("prepare_corpus", "train_tokenizer", "tokenize_blocks"):
        status, _, err = run_stage(tmp_path, stage, *arguments)
        assert status == 0, err

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models/tokenizer")
    if algorithm == "byte":
        assert len(tokenizer) == 257 and tokenizer.eos_token_id == 256
        assert tokenizer.encode("aé", add_special_tokens=False) == list("aé".encode())
    elif algorithm == "bpe":
        assert len(tokenizer) == 400
    else:
        assert 257 < len(tokenizer) <= 400
    text = TEXTS[kind].decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text

    stream = np.load(tmp_path / "data/blocks/train.npy")
    assert stream.dtype == np.uint16 and stream.max() < len(tokenizer)
    expected = documents_of(TEXTS[kind], "blank_line")
    assert decoded_documents(stream, tokenizer) == expected
    counts = json.loads((tmp_path / "data/blocks/train.json").read_text())
    assert counts["documents"] == len(expected)
    assert counts["bytes"] == sum(len(document) for document in expected)
    assert counts["words"] == sum(len(document.decode().split()) for document in expected)
    assert counts["tokens"] == len(stream)


def decoded_documents(stream: np.ndarray, tokenizer) -> list[bytes]:
    ends = np.flatnonzero(stream == tokenizer.eos_token_id)
    assert ends[0] == 0 and ends[-1] == len(stream) - 1
    return [tokenizer.decode(stream[a + 1 : b]).encode() for a, b in zip(ends, ends[1:])]


def test_own_text_through_dvc(template, warm, tmp_path):
    """Three kinds of text in one project: the figures count the very bytes."""
    project = tmp_path / "project"
    shutil.copytree(template, project)
    files = {"train": "japanese without spaces", "valid": "crlf", "test": "no newline at the end"}
    for split, kind in files.items():
        (project / f"{kind}.txt").write_bytes(TEXTS[kind])
        set_params(project, f"data.{split}_file={kind}.txt")
    set_params(project, "tokenizer.algorithm=unigram", "trainer.max_epochs=1", "generate.prompts=['吾輩は']")
    warm("dvc", "repro", "evaluate", cwd=project)
    figures = json.loads((project / "metrics/eval.json").read_text())
    details = json.loads((project / "metrics/details.json").read_text())
    for split in ("valid", "test"):
        documents = documents_of(TEXTS[files[split]], "blank_line")
        assert details[split]["bytes"] == sum(len(document) for document in documents)
        assert 0 < figures[split]["bits_per_byte"] < 20
    assert "吾輩は" in (project / "metrics/samples.md").read_text(encoding="utf-8")
    # A changed byte of a text runs again what depends on it: not the tokenizer, which reads another.
    (project / "crlf.txt").write_bytes(TEXTS["crlf"][:-9])
    assert stages_run(warm("dvc", "repro", "tokenize_blocks", cwd=project)) == ["prepare_corpus", "tokenize_blocks"]


anything = st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "replace"))


@settings(max_examples=100, deadline=None)
@given(anything)
@example("<|endoftext|> Ġ ▁ \u2581\ufeff\0\r\n é e\u0301 \U0001f469\u200d\U0001f680")
def test_any_text_comes_back_from_the_tokenizer_folder(tokenizers, text):
    for algorithm in ALGORITHMS:
        tokenizer = loaded(tokenizers / algorithm)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def loaded(folder, cache={}):  # noqa: B006
    if folder not in cache:
        cache[folder] = AutoTokenizer.from_pretrained(folder)
    return cache[folder]


# Line ends and spaces are where documents begin and end, so that there are many of them.
lines = st.lists(
    st.sampled_from(["\n", "\r\n", "\n\n", " ", "\t", "\r", "\f", "a", "b c", "日本", "<|endoftext|>", "\x1c"])
)
texts = lines.map("".join).map(str.encode) | st.text().map(str.encode) | st.binary(max_size=50)


@settings(max_examples=250, deadline=None)
@given(texts, st.sampled_from(["blank_line", "line", "file"]), st.sampled_from(ALGORITHMS))
@example(b"a\n ", "blank_line", "byte")
@example(b"a\r\n\r\nb\r\n", "blank_line", "byte")
@example(b"\n \n\ta\n", "blank_line", "bpe")
@example(b"caf\xc3", "file", "bpe")
@example(b"ok\n\n\xff", "line", "unigram")
def test_any_bytes_become_documents_or_one_error(tokenizers, text, document, algorithm):
    (tokenizers / "any.txt").write_bytes(text)
    with contextlib.chdir(tokenizers):
        try:
            write_blocks(corpus_of(Path("any.txt"), document), algorithm, "any")
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith("any.txt: ")
            try:
                text.decode()
            except UnicodeDecodeError as wrong:
                if not blank(text[: wrong.start]) or document == "file":
                    assert f"not UTF-8 at byte offset {wrong.start:,}:" in str(error)
                return
            assert blank(text)
            return
    assert not blank(text)
    text.decode()
    assert decoded_documents(np.load(tokenizers / "any/train.npy"), loaded(tokenizers / algorithm)) == documents_of(
        text, document
    )


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=300).map(str.encode) | st.binary(max_size=300), st.sampled_from(ALGORITHMS))
def test_any_bytes_train_a_tokenizer_or_are_one_error(tokenizers, text, algorithm):
    (tokenizers / "any.txt").write_bytes(text)
    arguments = ["--data.train_file", "any.txt", "--tokenizer.algorithm", algorithm, "--tokenizer.vocab_size", "270"]
    status, _, err = run_stage(tokenizers, "prepare_corpus", *arguments)
    if not status:
        status, _, err = run_stage(tokenizers, "train_tokenizer", *arguments)
    if status:
        error = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert status == 1 and len(error) == 1 and error[0].startswith("error: any.txt: "), err
        return
    tokenizer = AutoTokenizer.from_pretrained(tokenizers / "models/tokenizer")
    assert len(tokenizer) <= 270
    decoded = text.decode("utf-8", "replace")
    assert tokenizer.decode(tokenizer.encode(decoded)) == decoded


def test_tokenizer_of_a_folder(tokenizers, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(tokenizers, project)
    status, _, err = run_stage(project, "train_tokenizer", "--tokenizer.tokenizer_model", "unigram")
    assert status == 0, err
    assert run_stage(project, "tokenize_blocks")[0] == 0
    stream = np.load(project / "data/blocks/test.npy")
    expected = documents_of((project / "data/test.txt").read_bytes(), "blank_line")
    assert decoded_documents(stream, AutoTokenizer.from_pretrained(project / "unigram")) == expected


def train_tokenizer(project, name: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "stages.train_tokenizer", "--tokenizer.tokenizer_model", name]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stderr


def test_id_in_the_cache_needs_no_network(tokenizers, tmp_path):
    snapshot = tmp_path / "hub/models--someone--tokenizer/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tokenizers / "bpe", snapshot)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    status, err = train_tokenizer(tokenizers, "someone/tokenizer", **offline)
    assert status == 0, err
    made, cached = (AutoTokenizer.from_pretrained(path) for path in (tokenizers / "models/tokenizer", snapshot))
    assert made.get_vocab() == cached.get_vocab()


def test_id_without_a_network_is_one_line(tokenizers, tmp_path):
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    status, err = train_tokenizer(tokenizers, "someone/else", **offline)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("error: tokenizer.tokenizer_model: 'someone/else' is neither a folder nor a Hugging Face id")


def test_more_than_65536_entries_take_32_bits(project):
    tokenizer = AutoTokenizer.from_pretrained(project / "models/tokenizer")
    tokenizer.add_tokens([f"entry{i}." for i in range(66_000)])
    tokenizer.save_pretrained(project / "models/tokenizer")
    text = "In the beginning entry0. was, and entry65999. came to pass.\n"
    with (project / "data/train.txt").open("a") as file:
        file.write(text)
    assert run_stage(project, "prepare_corpus")[0] == 0
    assert run_stage(project, "tokenize_blocks")[0] == 0
    tokens = np.load(project / "data/blocks/train.npy")
    assert tokens.dtype == np.uint32
    assert tokens.max() == len(tokenizer) - 1 > 65_536
    assert tokenizer.decode(tokens[-200:].tolist()).endswith(text.removesuffix("\n") + "<|endoftext|>")
    status, out, errors = run_stage(project, "train", "--trainer.max_epochs", "null", "--trainer.max_steps", "3")
    assert status == 0, errors
