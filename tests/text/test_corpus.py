"""prepare_corpus: documents from every form of text, held out, without duplicates, and how much of them leaks."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import re
import shutil
from pathlib import Path

from stages.common.errors import UserError
from stages.text import leakage, sources, splits
from stages.text.corpus import Batch, Documents
from stages.text.splits import written_splits

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import ROOT, corpus_of, data_settings, run, run_stage, sample_lines, set_params
from hypothesis import given, settings
from hypothesis import strategies as st

DOCUMENTS = [d for d in sample_lines(200, 400).split("\n\n") if d.strip()]
DOCUMENTS = [d.rstrip("\n") for d in DOCUMENTS]
DOCUMENTS[3] += ' "quoted", with a comma;\ttab \\ and\r\nline ends of Windows: 日本 é\U0001f469\u200d\U0001f680'
OTHERS = [sample_lines(start, 24) for start in (3000, 4000)]


def jsonl(key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: d}, ensure_ascii=i % 2) + "\n" for i, d in enumerate(DOCUMENTS)).encode()


def in_folder(folder: Path) -> Path:
    for i, document in enumerate(DOCUMENTS):
        file = folder / f"{i // 10:03}" / f"{i:04}.txt"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(document.encode())
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


def csv_file(path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "n"])
        rows.writerows([d, i] for i, d in enumerate(DOCUMENTS))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def parquet(path: Path, **columns) -> Path:
    pd.DataFrame(columns or {"n": range(len(DOCUMENTS)), "text": DOCUMENTS}).to_parquet(path, row_group_size=7)
    return path


PLAIN = "\n\n".join(DOCUMENTS).encode()
FORMS = {
    "txt": lambda f: written(f / "t.txt", PLAIN),
    "txt without an ending": lambda f: written(f / "text", PLAIN + b"\n"),
    "txt.zst": lambda f: written(f / "t.txt.zst", pa.compress(PLAIN, "zstd", asbytes=True)),
    "txt.bz2": lambda f: written(f / "t.txt.bz2", bz2.compress(PLAIN)),
    "txt.xz": lambda f: written(f / "t.txt.xz", lzma.compress(PLAIN)),
    "separator": lambda f: written(f / "t.txt", "\n<|endoftext|>\n".join(DOCUMENTS).encode()),
    "folder": lambda f: in_folder(f / "folder"),
    "jsonl": lambda f: written(f / "t.jsonl", jsonl()),
    "jsonl.gz": lambda f: written(f / "t.jsonl.gz", gzip.compress(jsonl()[:5000]) + gzip.compress(jsonl()[5000:])),
    "csv": lambda f: csv_file(f / "t.csv"),
    "parquet": lambda f: parquet(f / "t.parquet"),
    "parquet.gz": lambda f: written(f / "t.parquet.gz", gzip.compress(parquet(f / "x").read_bytes())),
}


@pytest.fixture(scope="module")
def project(template, tmp_path_factory) -> Path:
    """Settings, two other texts, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copy(template / "params.yaml", folder)
    (folder / "t.txt").write_bytes(PLAIN)
    for split, text in zip(("valid", "test"), OTHERS):
        (folder / f"{split}.txt").write_text(text)
        set_params(folder, f"data.{split}_file={split}.txt")
    set_params(folder, "data.train_file=t.txt", "tokenizer.algorithm=byte")
    for stage in ("prepare_corpus", "train_tokenizer", "tokenize_blocks"):
        status, _, err = run_stage(folder, stage)
        assert status == 0, err
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_blocks(project, tmp_path, form):
    expected = {file.name: file.read_bytes() for file in (project / "data/blocks").iterdir()}
    path = FORMS[form](tmp_path)
    arguments = ["--data.train_file", str(path)]
    if form in ("separator", "folder"):
        arguments += ["--data.document", {"folder": "file"}.get(form, form)]
        # The other texts are in another form then.
        for split, text in zip(("valid", "test"), OTHERS):
            (tmp_path / f"{split}.jsonl").write_text(
                "".join(json.dumps({"text": d}) + "\n" for d in text.removesuffix("\n").split("\n\n"))
            )
            arguments += [f"--data.{split}_file", str(tmp_path / f"{split}.jsonl")]
    for stage in ("prepare_corpus", "tokenize_blocks"):
        status, _, err = run_stage(project, stage, *arguments)
        assert status == 0, err
    assert {file.name: file.read_bytes() for file in (project / "data/blocks").iterdir()} == expected
    table = pd.read_feather(project / "data/corpus/train.arrow")
    assert table.text.tolist() == DOCUMENTS


def prepared(folder: Path, names=("train", "valid", "test"), **changes) -> dict[str, list[bytes]]:
    target = folder / "made"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    with written_splits(data_settings(**changes), target, names):
        pass
    assert sorted(file.name for file in target.iterdir()) == sorted(f"{name}.arrow" for name in names)
    return {name: [bytes(d) for d in Documents(name, target).documents()] for name in names}


def one_path(path) -> dict[str, str]:
    return {f"{split}_file": str(path) for split in ("train", "valid", "test")}


lines = st.lists(
    st.sampled_from(["\n", "\r\n", "\n\n", " ", "\t", "\r", "\f", "a", "b c", "日本", "\x1c", "<|e|>", "<|"])
)


@settings(max_examples=100, deadline=None)
@given(
    lines.map("".join).map(str.encode), st.sampled_from(["blank_line", "line", "file", "separator"]), st.integers(1, 9)
)
def test_documents_do_not_depend_on_where_chunks_end(tmp_path_factory, text, document, size):
    file = tmp_path_factory.mktemp("chunks") / "t.txt"
    file.write_bytes(text)
    if not text:
        return
    group = data_settings(document=document, separator="<|e|>")
    found = sources.find_files(str(file), document)

    def read() -> list[bytes]:
        return [bytes(d) for d in sources.read_documents(found[0], group, lambda size: None)]

    whole = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", size)
        assert read() == whole
    assert all(d.strip() for d in whole)
    if document == "separator":
        parts = [part.strip("\r\n") for part in text.decode().split("<|e|>")]
        assert whole == [part.encode() for part in parts if part.encode().strip()]


def test_documents_are_held_out_by_their_text(tmp_path):
    draw, words = random.Random(0), sample_lines(0, 50).split()
    documents = [" ".join(draw.choices(words, k=20)) for _ in range(4000)]
    (tmp_path / "t.txt").write_text("\n".join(documents + documents[:500]))
    made = prepared(tmp_path, document="line", **one_path(tmp_path / "t.txt"))
    sets = {name: set(texts) for name, texts in made.items()}
    assert sum(map(len, made.values())) == 4500 and sum(map(len, sets.values())) == len(set.union(*sets.values()))
    for name in ("valid", "test"):  # 5 %, within five standard deviations
        assert abs(len(sets[name]) - 200) < 70
    # More text, and in another order: none moves. Another fraction of one leaves the other as it was.
    draw.shuffle(documents)
    (tmp_path / "t.txt").write_text("\n".join(["new first", *documents, *(f"new {i}" for i in range(900))]))
    more = prepared(tmp_path, document="line", **one_path(tmp_path / "t.txt"))
    assert all(sets[name] <= set(more[name]) for name in sets)
    half = prepared(tmp_path, document="line", valid_fraction=0.5, **one_path(tmp_path / "t.txt"))
    assert half["test"] == more["test"] and set(more["valid"]) < set(half["valid"])
    other = prepared(tmp_path, document="line", split_seed=1, **one_path(tmp_path / "t.txt"))
    assert not sets["test"] <= set(other["test"])


def test_joined_is_the_text_with_a_blank_line_after_each_document(tmp_path):
    """Any stretch of it, which is what a tokenizer is trained on."""
    (tmp_path / "text.txt").write_text("In the beginning\n\nGod\n\ncreated the heaven\nand the earth.\n")
    documents = corpus_of(tmp_path / "text.txt", "blank_line")["train"]
    whole = b"In the beginning\n\nGod\n\ncreated the heaven\nand the earth.\n\n"
    assert documents.starts[-1] == len(whole)
    for start in range(len(whole)):
        assert documents.joined(start, start + 9) == whole[start : start + 9]


def test_one_document_is_held_out_of_in_pieces(tmp_path, capsys):
    book, shares = sample_lines(0, 6000), {"valid_fraction": 0.2, "test_fraction": 0.2}
    (tmp_path / "book.txt").write_text(book)
    made = prepared(tmp_path, document="file", **one_path(tmp_path / "book.txt"), **shares)
    assert "note: " in capsys.readouterr().err
    pieces = [piece for texts in made.values() for piece in texts]
    assert all(len(texts) > 1 for texts in made.values())
    assert all(piece.decode() in book for piece in pieces)
    assert sum(map(len, pieces)) + 2 * (len(pieces) - 1) == len(book.encode())
    (tmp_path / "book.txt").write_text("A new first chapter.\n\n" + book + "\n\nMore.")
    more = prepared(tmp_path, document="file", **one_path(tmp_path / "book.txt"), **shares)
    moved = [len(set(made[name]) - set(more[name])) for name in made]
    assert sum(moved) <= 2  # the first and the last piece


def test_deduplicate(tmp_path):
    texts = {"train": ["a b", "c d", "a b", "held out", "e f"], "valid": ["held out", "v", "v"], "test": ["c d"]}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    paths = {f"{name}_file": str(tmp_path / f"{name}.txt") for name in texts}
    assert {k: [d.decode() for d in v] for k, v in prepared(tmp_path, document="line", **paths).items()} == texts
    made = prepared(tmp_path, document="line", deduplicate="exact", **paths)
    assert made == {"train": [b"a b", b"e f"], "valid": [b"held out", b"v"], "test": [b"c d"]}


def test_near_duplicates_of_held_out_documents_leave_train(tmp_path):
    chapters = [" ".join(d.split()) for d in sample_lines(0, 480).split("\n\n")][:30]
    near = [re.sub(r"\bGod\b", "Lord", d, count=1) + " Amen." for d in chapters[20:25]]
    (tmp_path / "train.txt").write_text("\n".join([*chapters[:20], *near, chapters[0] + " And more."]))
    (tmp_path / "valid.txt").write_text("\n".join(chapters[20:]))
    shutil.copy(tmp_path / "valid.txt", tmp_path / "test.txt")
    paths = {f"{name}_file": str(tmp_path / f"{name}.txt") for name in ("train", "valid", "test")}
    made = prepared(tmp_path, document="line", deduplicate="near", **paths)
    assert [d.decode() for d in made["train"]] == chapters[:20]
    assert [d.decode() for d in made["valid"]] == chapters[20:]


def grams(text: str, unit: str) -> set:
    if unit == "words":
        words = text.split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}
    raw = text.encode()
    return {raw[i : i + 50] for i in range(len(raw) - 49)}


@pytest.mark.parametrize("unit", ["words", "bytes"])
def test_leakage_is_counted(project, tmp_path, unit):
    chapters = [d.rstrip("\n") for d in sample_lines(0, 1200).split("\n\n")]
    if unit == "bytes":
        chapters = [re.sub(r"[\s,.:;]", "", d) for d in chapters]
    train, test = chapters[:70], [*chapters[70:], chapters[5], chapters[6][:600] + chapters[90][:400]]
    for name, documents in (("train", train), ("test", test), ("valid", test)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(documents))
    files = [f"--data.{name}_file={tmp_path / f'{name}.txt'}" for name in ("train", "test", "valid")]
    status, _, err = run_stage(project, "prepare_corpus", *files)
    assert status == 0 and "note: test leaks into train: 3.1% of its documents" in err
    figures = json.loads((project / "metrics/corpus.json").read_text())
    known = set().union(*(grams(d, unit) for d in train))
    counts = []
    for d in test:
        words = d.split() if unit == "words" else d.encode()  # ASCII: every byte begins a character
        n = 13 if unit == "words" else 50
        each = [tuple(words[i : i + n]) if unit == "words" else words[i : i + n] for i in range(len(words) - n + 1)]
        counts.append((len(each), sum(gram in known for gram in each)))
    total, found = np.array(counts).T
    leakage = figures["leakage"]["test"]
    assert figures["ngram"] == {"words": "13 words", "bytes": "50 bytes"}[unit]
    assert leakage["ngrams"] == pytest.approx(found.sum() / total.sum(), rel=1e-9)
    assert leakage["documents"] == pytest.approx(sum(d in train for d in test) / len(test))
    assert leakage["worst"][f"document {len(test) - 1}"] == 1.0
    assert leakage["worst"][f"document {len(test)}"] == pytest.approx(found[-1] / total[-1])
    row = figures["sets"]["train"]
    assert row["documents"] == len(train) and row["bytes"] == sum(len(d.encode()) for d in train)
    assert row["words"] == sum(len(d.split()) for d in train) and row["longest"] == max(map(len, train))
    assert sum(row["train"] for row in figures["lengths"]) == pytest.approx(1)


def test_documents_that_fill_a_part_stay_apart():
    offsets = np.array([0, 400_000, leakage.PART_BYTES])
    (part,) = leakage.parts(Batch(offsets, memoryview(b"a " * (leakage.PART_BYTES // 2))))
    assert part.offsets.tolist() == offsets.tolist() and len(part.text) == leakage.PART_BYTES


@pytest.mark.parametrize("ending", ["", "日本\u3000é "])
def test_words_of_a_document_larger_than_a_part(monkeypatch, ending):
    text = (sample_lines(0, 60) + ending) * 9
    monkeypatch.setattr(leakage, "PART_BYTES", 1001)
    batch = Batch(np.array([0, len(text.encode())]), memoryview(text.encode()))
    assert sum(part.count_words() for part in leakage.parts(batch)) == len(text.split())


def test_words_end_at_every_white_space_of_unicode():
    """Each white-space character, and those whose bytes are next to one's, between words, at both ends and alone."""
    spaces = [i for i in range(0x110000) if chr(i).isspace()]
    others = [i + step for i in spaces for step in (-64, -1, 1, 64, 0x1000) if i + step >= 0 and i + step not in spaces]
    for character in map(chr, spaces + others):
        documents = [f"{character}a{character}{character}日本{character}", character, f"é{character}b", "c"]
        raw = [document.encode() for document in documents]
        batch = Batch(np.cumsum([0, *map(len, raw)]), memoryview(b"".join(raw)))
        (part,) = leakage.parts(batch)
        starts, ends = part.words
        found = [bytes(part.text[start:end]).decode() for start, end in zip(starts, ends)]
        assert found == [word for document in documents for word in document.split()], hex(ord(character))
        assert part.count_words() == len(found)


def test_source_code_is_a_corpus(project):
    """The project's own stages/ in all three, a document a file."""
    arguments = [f"--data.{split}_file={ROOT / 'stages'}" for split in ("train", "valid", "test")]
    arguments += ["--data.document=file", "--data.valid_fraction=0.2", "--data.test_fraction=0.2"]
    status, _, err = run_stage(project, "prepare_corpus", *arguments)
    assert status == 0, err
    made = {
        s: [bytes(d) for d in Documents(s, project / "data/corpus").documents()] for s in ("train", "valid", "test")
    }
    files = {f.read_bytes() for f in (ROOT / "stages").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert set().union(*made.values()) == {content for content in files if content.strip()}


def test_a_data_set_of_the_hub(template, tmp_path, monkeypatch):
    """A part of a cached one through DVC, all of it, and none."""
    project = tmp_path / "project"
    shutil.copytree(template, project)
    pipeline = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(pipeline.replace("      - ${data.train_file}\n", ""))
    stories = tmp_path / "hub/datasets--someone--stories"
    snapshot = stories / "snapshots/0123456789abcdef0123456789abcdef01234567"
    (snapshot / "data").mkdir(parents=True)
    (stories / "refs").mkdir()
    (stories / "refs/main").write_text(snapshot.name)
    (snapshot / "README.md").write_text("A card.")
    for i, part in enumerate(("more-0", "train-0", "train-1")):
        parquet(snapshot / f"data/{part}.parquet", text=DOCUMENTS[3 * i : 3 * i + 3])

    def train_documents() -> list[str]:
        return pd.read_feather(project / "data/corpus/train.arrow").text.tolist()

    set_params(project, "data.train_file=someone/stories/data/train-*")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run("dvc", "repro", "prepare_corpus", cwd=project, env=offline)
    assert train_documents() == DOCUMENTS[3:9]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run_stage(project, "prepare_corpus", "--data.train_file=someone/stories")[0] == 0
    assert train_documents() == DOCUMENTS[:9]
    # What is here must be watched.
    monkeypatch.setenv("DVC_STAGE", "prepare_corpus")
    _, _, err = run_stage(project, "prepare_corpus", "--data.train_file=data/valid.txt")
    assert err.startswith("error: params.yaml: data.train_file: DVC doesn't watch data/valid.txt")


def test_further_test_sets(project, tmp_path):
    project = shutil.copytree(project, tmp_path / "project")
    arguments = ["--data.test_files={news: valid.txt, more_1: test.txt}"]
    for stage in ("prepare_corpus", "tokenize_blocks"):
        status, _, err = run_stage(project, stage, *arguments)
        assert status == 0, err
    blocks = project / "data/blocks"
    assert (blocks / "news.npy").read_bytes() == (blocks / "valid.npy").read_bytes()
    assert (blocks / "more_1.npy").read_bytes() == (blocks / "test.npy").read_bytes()


def test_the_place_of_a_wrong_byte_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 8)
    file = written(tmp_path / "t.txt", "é".encode() * 50 + b"\xff" + b"a" * 50)
    with pytest.raises(UserError, match=r"t\.txt: not UTF-8 at byte offset 100: convert"):
        prepared(tmp_path, ["train"], train_file=str(file))


def overwrite_quietly(file: Path) -> None:
    """As many other bytes, and the date of before."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"X")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_size == before.st_size


def test_a_text_that_changes_while_it_is_read_is_one_line(tmp_path, monkeypatch):
    append, shorten = (lambda file: file.open("a").write("more")), (lambda file: os.truncate(file, 9))
    for change in (append, shorten, Path.unlink, overwrite_quietly):
        file = tmp_path / "t.txt"
        file.write_text("\n".join(DOCUMENTS))
        write = splits.write_hashed

        def changing(target, documents, signed, file=file, change=change, write=write):
            first = next(documents)
            change(file)
            return write(target, iter([first, *documents]), signed)

        monkeypatch.setattr(splits, "write_hashed", changing)
        with pytest.raises(UserError, match=r"t\.txt: changed while it was read"):
            prepared(tmp_path, ["train"], train_file=str(file))
        monkeypatch.undo()


def test_a_marker_in_another_mode_gets_one_note(project):
    (project / "marked.txt").write_text("one<|endoftext|>\n\ntwo<|endoftext|>three\n")
    _, _, err = run_stage(project, "prepare_corpus", "--data.train_file=marked.txt")
    assert err.count("note: marked.txt holds <|endoftext|>: does data.document: separator fit marked.txt?") == 1


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


PARQUET = pd.DataFrame({"text": DOCUMENTS}).to_parquet()
DAMAGED = PARQUET[:99] + bytes(len(PARQUET) // 2) + PARQUET[99 + len(PARQUET) // 2 :]
BAD = {
    "unknown ending": ({"t.docx": b"PK"}, "t.docx", r"t\.docx: no reader for \.docx: name a file or folder of \.txt"),
    "unknown ending, compressed": ({"t.doc.gz": b"x"}, "t.doc.gz", r"no reader for \.doc"),
    "broken gz": ({"t.txt.gz": cut(gzip.compress(PLAIN))}, "t.txt.gz", r"t\.txt\.gz: broken gzip: .*Truncated"),
    "no gz": ({"t.txt.gz": PLAIN}, "t.txt.gz", r"t\.txt\.gz: broken gzip: .*header"),
    "broken bz2": ({"t.txt.bz2": cut(bz2.compress(PLAIN))}, "t.txt.bz2", r"t\.txt\.bz2: broken bz2"),
    "broken xz": ({"t.txt.xz": cut(lzma.compress(PLAIN))}, "t.txt.xz", r"t\.txt\.xz: broken xz"),
    "broken zst": (
        {"t.jsonl.zst": cut(pa.compress(jsonl(), "zstd", asbytes=True))},
        "t.jsonl.zst",
        r"t\.jsonl\.zst: broken zstd",
    ),
    "no parquet": ({"t.parquet": PLAIN}, "t.parquet", r"t\.parquet: broken parquet"),
    "cut parquet": ({"t.parquet": cut(PARQUET)}, "t.parquet", r"t\.parquet: broken parquet"),
    "damaged parquet": ({"t.parquet": DAMAGED}, "t.parquet", r"t\.parquet: broken parquet"),
    "broken json": ({"t.jsonl": jsonl() + b'{"text": "a'}, "t.jsonl", r"t\.jsonl: line \d+: broken JSON: Unterminated"),
    "json list": ({"t.jsonl": b'{"text": "a"}\n[1]\n'}, "t.jsonl", r"t\.jsonl: line 2: no object"),
    "missing field": (
        {"t.jsonl": jsonl("content")},
        "t.jsonl",
        r"line 1: no field 'text', there are: id, content: set",
    ),
    "missing field, csv": ({"t.csv": b"a,b\n1,2\n"}, "t.csv", r"t\.csv: line 1: no field 'text', there are: a, b"),
    "no text": ({"t.jsonl": b'{"text": "a"}\n\n{"text": 3}'}, "t.jsonl", r"line 3: field 'text' is 3, no text"),
    "null": ({"t.jsonl": b'{"text": null}'}, "t.jsonl", r"line 1: field 'text' is null, no text"),
    "half a character": (
        {"t.jsonl": rb'{"text": "\ud800"}'},
        "t.jsonl",
        r"line 1: field 'text' holds half a character",
    ),
    "unequal rows": ({"t.csv": b"text,b\nx,1\ny\n"}, "t.csv", r"t\.csv: line 3: 1 fields, not 2"),
    "open quote": ({"t.csv": b'text\n"abc\n'}, "t.csv", r"t\.csv: line 2: broken CSV"),
    "Latin-1 rows": ({"t.csv": b"text\na\n\xe9\n"}, "t.csv", r"t\.csv: line 3: not UTF-8"),
    "Latin-1 lines": ({"t.jsonl": b'{"text": "\xe9"}\n'}, "t.jsonl", r"t\.jsonl: line 1: broken JSON: .*utf-8"),
    "Latin-1 inside gz": ({"t.txt.gz": gzip.compress(b"abc \xe9")}, "t.txt.gz", r"not UTF-8 at byte offset 4"),
    "cut inside a character": ({"c.txt": "é".encode()[:1]}, "c.txt", r"c\.txt: not UTF-8 at byte offset 0"),
    "empty folder": ({"f/.hidden": b"x"}, "f", r"f: no file in it that can be read"),
    "mixed folder": (
        {"f/a.txt": b"x", "f/b.csv": b"text\nx\n"},
        "f",
        r"f: mixed formats: f/a\.txt is txt, f/b\.csv csv",
    ),
    "text and others": ({"f/a.txt": b"x", "f/b.png": b"x"}, "f", r"f: mixed formats: f/a\.txt is txt, f/b\.png \.png"),
    "only others": ({"f/b.png": b"x"}, "f", r"f/b\.png: no reader for \.png"),
    "blank rows": ({"t.jsonl": b'{"text": " "}\n'}, "t.jsonl", r"t\.jsonl: only white space"),
    "a data set's id": ({}, "someone/else", r"someone/else: no such file or folder, nor a Hugging Face data set"),
    "no data set's id": ({"f/.hidden": b"x"}, "f/stories", r"f/stories: no such file or folder: set the data group"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(project, name):
    files, path, line = BAD[name]
    for file, content in files.items():
        (project / file).parent.mkdir(exist_ok=True)
        (project / file).write_bytes(content)
    before = {f: f.read_bytes() for f in (project / "data/corpus").iterdir()}
    status, _, err = run_stage(project, "prepare_corpus", "--data.train_file", path)
    for file in files:
        (project / file).unlink()
    assert status == 1 and len(err.splitlines()) == 1 and re.search(f"^error: .*{line}", err), err
    assert {f: f.read_bytes() for f in (project / "data/corpus").iterdir()} == before


def test_parquet_without_text(project):
    for columns, line in (
        ({"text": [1, 2]}, "field 'text' is int64, no text"),
        ({"text": ["a", None]}, "row 2: .* null"),
    ):
        parquet(project / "bad.parquet", **columns)
        status, _, err = run_stage(project, "prepare_corpus", "--data.train_file=bad.parquet")
        assert status == 1 and re.search(rf"^error: bad\.parquet: .*{line}", err), err


@pytest.mark.parametrize("key", ["valid_fraction", "test_fraction"])
def test_nothing_held_out_is_one_line(project, key):
    files = [f"--data.{split}_file=t.txt" for split in ("train", "valid", "test")]
    status, _, err = run_stage(project, "prepare_corpus", *files, f"--data.{key}=0")
    split = key.split("_")[0]
    assert status == 1 and err.startswith(
        f"error: t.txt: no document of {len(DOCUMENTS)} is left for {split}: raise"
    ), err


def test_valid_and_test_share_a_path_by_halves(tmp_path, capsys):
    chapters = [" ".join(d.split()) for d in sample_lines(0, 1200).split("\n\n")]
    (tmp_path / "train.txt").write_text(chapters[0])
    (tmp_path / "other.txt").write_text("\n".join([*chapters, chapters[3]]))
    paths = one_path(tmp_path / "other.txt") | {"train_file": str(tmp_path / "train.txt")}
    made = prepared(tmp_path, document="line", **paths)
    halves = [[d.decode() for d in made[name]] for name in ("valid", "test")]
    assert sorted([*halves[0], *halves[1]]) == sorted([*chapters, chapters[3]])
    assert not set(halves[0]) & set(halves[1]) and min(map(len, halves)) > len(chapters) / 4
    assert made["train"] == [chapters[0].encode()]


def test_what_of_a_folder_is_text(tmp_path):
    """Neither a byte order mark nor white space of any script, nor the file that DVC puts beside one."""
    folder = tmp_path / "text"
    folder.mkdir()
    texts = {f"text {i}" for i in range(60)}
    (folder / "a.txt").write_bytes("\n\u3000\n".join(["\ufeff", *texts]).encode())
    (folder / "a.txt.dvc").write_text("outs: []")
    (folder / "b.txt").symlink_to(folder / "a.txt")
    made = prepared(tmp_path, document="line", deduplicate="exact", **one_path(folder))
    assert {text.decode() for documents in made.values() for text in documents} == texts
