"""Folders and files that other programs take: transformers' pipelines, llama.cpp."""

import json
import math
import re
from pathlib import Path

from tools import export

import numpy as np
import pytest
import torch
from conftest import run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def settings_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_pipeline_works_as_typed(built, monkeypatch):
    monkeypatch.chdir(built)
    assert settings_of(built / "models/gpt2", "tokenizer_config.json")["model_max_length"] == 16
    # What both transformers 4 and 5 know; 5 alone would write TokenizersBackend.
    assert settings_of(built / "models/gpt2", "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    generate = pipeline("text-generation", "models/gpt2")
    texts = {generate("In the beginning")[0]["generated_text"] for _ in range(5)}
    assert len(texts) > 1 and all(text.startswith("In the beginning") for text in texts)
    lengths = [len(generate.tokenizer.encode(text)) for text in texts]
    assert max(lengths) > len(generate.tokenizer.encode("In the beginning"))


def test_checkpoint_becomes_a_folder(project):
    assert run_stage(project, "train", "--trainer.max_steps", "3")[0] == 0
    (checkpoint,) = project.glob("models/checkpoints/*/final.ckpt")
    sampling = ["--generate.temperature", "0.5", "--generate.top_k", "7"]
    status, out, err = run_stage(project, "tools.export", str(checkpoint), "--output", "out/exported", *sampling)
    assert status == 0 and out == "made out/exported\n", err
    made = AutoModelForCausalLM.from_pretrained(project / "out/exported")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(weight, weights[f"model.{name}"]) for name, weight in made.state_dict().items())
    assert (made.generation_config.temperature, made.generation_config.top_k) == (0.5, 7)
    assert made.generation_config.do_sample and made.generation_config.max_length == 16
    tokenizer = AutoTokenizer.from_pretrained(project / "out/exported")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(project / "models/tokenizer").get_vocab()
    assert tokenizer.model_max_length == 16
    # It is what evaluate measures.
    one, other = (run_stage(project, "evaluate", "--model", str(path)) for path in (checkpoint, "out/exported"))
    assert one == other and one[0] == 0
    # temperature 0 is no sampling; a folder that is there stays.
    greedy = ["tools.export", "models/gpt2", "--output", "greedy", "--generate.temperature", "0"]
    assert run_stage(project, *greedy)[0] == 0
    assert settings_of(project / "greedy", "generation_config.json")["do_sample"] is False
    status, _, err = run_stage(project, *greedy)
    assert (status, err) == (1, "error: --output: greedy exists: name a new folder\n")


def test_gguf(project):
    command = ["tools.export", "models/gpt2", "--output", "exported", "--format", "gguf"]
    status, out, err = run_stage(project, *command)
    assert status == 0, err
    same, texts, ppl, its_ppl = re.match(
        r"token ids: (\S+) of (\S+) texts the same   test ppl: checkpoint (\S+), file (\S+)\n", out
    ).groups()
    assert same == texts and ppl == its_ppl
    assert float(ppl) == pytest.approx(settings_of(project / "metrics", "eval.json")["test"]["ppl"], rel=1e-5)
    assert [file.name for file in (project / "exported").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("wrong", ["weights", "merges"])
def test_gguf_that_is_not_the_checkpoint(project, monkeypatch, wrong):
    if wrong == "weights":
        monkeypatch.setattr(export, "TURNED", tuple(name for name in export.TURNED if name != "attn.c_proj.weight"))
    else:
        import gguf

        add = gguf.GGUFWriter.add_token_merges
        monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, merges: add(self, merges[::-1]))
    status, _, err = run_stage(project, "tools.export", "models/gpt2", "--output", "exported", "--format", "gguf")
    assert status == 1 and not (project / "exported").exists()
    assert err == "error: --format gguf: the file isn't the checkpoint: nothing is kept of it\n"


@pytest.mark.parametrize("algorithm", ["unigram", "byte"])
def test_gguf_of_another_kind_of_tokenizer_is_refused(project, algorithm):
    assert run_stage(project, "train_tokenizer", "--tokenizer.algorithm", algorithm)[0] == 0
    for file in (project / "models/tokenizer").iterdir():
        file.rename(project / "models/gpt2" / file.name)
    status, _, err = run_stage(project, "tools.export", "models/gpt2", "--output", "exported", "--format", "gguf")
    assert status == 1 and not (project / "exported").exists()
    assert err.startswith("error: --format gguf: the tokenizer is no byte-level BPE with GPT-2's pattern")


def test_llama_cpp_itself(built, tmp_path):
    """Runs where llama-cpp-python is installed: it is no requirement, because pip must build it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    command = ["tools.export", "models/gpt2", "--output", str(tmp_path / "exported"), "--format", "gguf"]
    assert run_stage(built, *command)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(built / "models/gpt2")
    tokens = np.load(built / "data/blocks/test.npy")[:401].astype(np.int64)
    llama = llama_cpp.Llama(str(tmp_path / "exported/model.gguf"), n_ctx=16, logits_all=True, verbose=False)
    text = (built / "data/test.txt").read_text()
    own = AutoTokenizer.from_pretrained(built / "models/gpt2").encode(text, add_special_tokens=False)
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == own
    losses = [0.0, 0.0]
    for start in range(0, 400, 16):
        block = torch.from_numpy(tokens[start : start + 17])
        llama.reset()
        llama.eval(block[:-1].tolist())
        with torch.no_grad():
            logits = torch.from_numpy(np.array(llama.scores[:16])), model(block[None, :-1]).logits[0]
        for i in range(2):
            losses[i] += torch.nn.functional.cross_entropy(logits[i], block[1:], reduction="sum").item() / 400
    assert math.isclose(*losses, rel_tol=1e-3)
