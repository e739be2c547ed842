"""Makes models/tokenizer/: a tokenizer trained on the corpus' train split, or taken as it is."""

import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

from stages.common.commands import progress_bar
from stages.common.errors import UserError, note, one_line, run
from stages.common.files import check_states, new_folder, states_in
from stages.common.memory import check_memory
from stages.common.params import load
from stages.common.paths import TOKENIZER
from stages.common.settings import Tokenizer as TokenizerSettings
from stages.text.corpus import Documents
from stages.text.encoding import document_parts
from stages.text.tokenizers import JsonTokenizer, existing

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_TEXT = "<|endoftext|>"
SAMPLE_SPAN_BYTES = 1 << 20
# Trainers keep every different word, in some 100 bytes for each of its own.
DISTINCT_BYTES = 1 << 23
ENTRY_BYTES = 100  # of a tokenizer's vocabulary while it is trained
RUN_LENGTH = 128
# After a word where there is one; in an endless one anywhere.
CUT = re.compile(r"\S(?=\s)|\S{1024}|\s{1024}")
LONG_RUN = re.compile(rf"(?<!\S)\S{{{RUN_LENGTH + 1},}}")
# Words are taken as they are and counted already.
SENTENCEPIECE = {
    "input_format": "tsv",
    "model_type": "unigram",
    "hard_vocab_limit": False,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "split_by_whitespace": False,
    "max_sentence_length": 1 << 14,
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    "num_threads": 1,  # sums over threads would depend on how many there are
    "minloglevel": 2,
}


def main() -> None:
    settings = load("stages.train_tokenizer", __doc__)
    key, name = "tokenizer.tokenizer_model", settings.tokenizer.tokenizer_model
    with new_folder(TOKENIZER) as folder:
        before = states_in(name)
        if name is not None:
            texts = (str(document[:SAMPLE_SPAN_BYTES], "utf-8", "ignore") for document in Documents("train").batch(0))
            tokenizer, roles = existing(key, name, texts)
        else:
            tokenizer = JsonTokenizer(train(Documents("train"), settings.tokenizer), END_OF_TEXT, set())
            roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        tokenizer.save(folder, roles)
        check_states(key, name, before)
    print(f"{TOKENIZER}: {len(tokenizer.vocab):,} entries")


def train(text: Documents, settings: TokenizerSettings) -> Tokenizer:
    """A byte-level tokenizer: the pre-tokenizer maps the 256 bytes to 256 characters that are all in
    the vocabulary, so every text can be encoded and decoding gives its exact bytes, or with
    normalization those of the normalized text
    (https://github.com/openai/gpt-2, bytes_to_unicode in src/encoder.py)."""
    check_memory(settings.vocab_size * ENTRY_BYTES, f"tokenizer.vocab_size: {settings.vocab_size:,} entries: lower it")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    normalizer = normalizers.NFKC() if settings.normalization else None
    control = [AddedToken(t, normalized=False) for t in (END_OF_TEXT, *settings.special_tokens)]
    if settings.algorithm == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, byte_level
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocab_size, special_tokens=control, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(sample(text, settings), trainer)
    elif settings.algorithm == "unigram":
        texts = chain.from_iterable(sample(text, settings))
        texts = map(normalizer.normalize_str, texts) if normalizer else texts
        tokenizer = Tokenizer(unigram_model(texts, byte_level, alphabet, settings.vocab_size - len(control)))
        tokenizer.add_special_tokens(control)
    else:
        # Token id = byte value, end-of-text = 256, then special_tokens.
        characters = {character: value for value, character in bytes_to_unicode().items()}
        tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
        tokenizer.add_special_tokens(control)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if settings.algorithm != "byte" and tokenizer.get_vocab_size() < settings.vocab_size:
        note(
            f"the text has only {tokenizer.get_vocab_size():,} entries to offer, "
            f"fewer than tokenizer.vocab_size {settings.vocab_size:,}"
        )
    return tokenizer


def sample(text: Documents, settings: TokenizerSettings) -> Iterator[list[str]]:
    """The text in spans of random order, up to sample_bytes of it or DISTINCT_BYTES of different words."""
    words, distinct, size = set(), 0, int(text.starts[-1])
    spans = range(0, size, SAMPLE_SPAN_BYTES)
    count = min(len(spans), -(-settings.sample_bytes // SAMPLE_SPAN_BYTES))
    size = min(size, count * SAMPLE_SPAN_BYTES)
    with progress_bar(size, "reading") as bar:
        for start in random.Random(settings.sample_seed).sample(spans, count):
            span = memoryview(whole_characters(text.joined(start, start + SAMPLE_SPAN_BYTES + 3)))
            bar.update(min(len(span), SAMPLE_SPAN_BYTES))
            for part, _ in document_parts(span, text.name, CUT):
                new = set(part.encode().split()) - words
                words |= new
                distinct += sum(map(len, new))
                yield cut_long_runs(part)
            if distinct > DISTINCT_BYTES:
                return


def whole_characters(raw: bytes) -> bytes:
    """SAMPLE_SPAN_BYTES of UTF-8: the character that begins before them left out, the last one whole."""
    start, end = 0, min(len(raw), SAMPLE_SPAN_BYTES)
    while start < min(3, end) and raw[start] & 0xC0 == 0x80:
        start += 1
    while end < len(raw) and raw[end] & 0xC0 == 0x80:
        end += 1
    return raw[start:end]


def cut_long_runs(text: str) -> list[str]:
    """The text cut inside runs of visible characters so long that merging them would take hours."""
    cuts = [at for run in LONG_RUN.finditer(text) for at in range(run.start() + RUN_LENGTH, run.end(), RUN_LENGTH)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def unigram_model(
    texts: Iterator[str], byte_level: pre_tokenizers.ByteLevel, alphabet: list[str], size: int
) -> models.Unigram:
    """A Unigram model of at most `size` pieces, trained by sentencepiece on the byte-level words.

    tokenizers' own Unigram trainer gives other pieces at every run; sentencepiece with one
    thread, on words in sorted order, gives the same ones.
    """
    words = Counter()
    for text in texts:
        words.update(word for word, _ in byte_level.pre_tokenize_str(text))
    # Bytes that the text doesn't have are pieces too, so that every text can be encoded.
    unseen = sorted(set(alphabet).difference(*words))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "words.tsv")
        with source.open("w", encoding="utf-8", newline="") as file:
            for word, count in sorted(words.items()):
                file.write(f"{word}\t{count}\n")
        prefix = str(Path(folder, "unigram"))
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(source), model_prefix=prefix, vocab_size=size + 1 - len(unseen), **SENTENCEPIECE
            )
        except RuntimeError as error:
            raise UserError(f"tokenizer.algorithm: unigram: sentencepiece: {one_line(error)}") from None
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    vocabulary = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(1, processor.get_piece_size())]
    least = min(score for _, score in vocabulary)
    return models.Unigram(vocabulary + [(character, least) for character in unseen], unk_id=None)


if __name__ == "__main__":
    run(main)
