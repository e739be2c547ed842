"""Continuations of a prompt, held against transformers' own logits and generate."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer

GREEDY = ("--generate.temperature", "0")


@pytest.fixture(scope="module")
def reference(built):
    return AutoModelForCausalLM.from_pretrained(built / "models/gpt2").eval(), AutoTokenizer.from_pretrained(
        built / "models/gpt2"
    )


def generate(project, prompt: str, *arguments: str) -> str:
    status, out, err = run_stage(project, "tools.generate", "--prompt", prompt, *arguments)
    assert status == 0, err
    return out.removesuffix("\n")


@pytest.mark.parametrize("prompt", ["And", "the Lord", ""])
def test_greedy_is_what_transformers_generates(built, reference, prompt):
    model, tokenizer = reference
    ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    expected = model.generate(
        torch.tensor([ids]), max_length=model.config.n_positions, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )[0, 1:]
    count = str(len(expected) + 1 - len(ids))
    assert generate(built, prompt, *GREEDY, "--generate.max_new_tokens", count) == tokenizer.decode(
        expected, skip_special_tokens=False
    ).removesuffix(tokenizer.eos_token)


def test_same_seed_same_text(built):
    one = generate(built, "And", "--generate.seed", "1", "--generate.max_new_tokens", "30")
    assert generate(built, "And", "--generate.seed", "1", "--generate.max_new_tokens", "30") == one
    two = generate(built, "And", "--generate.seed", "2", "--generate.max_new_tokens", "30")
    assert two != one
    both = generate(built, "And", "--generate.seed", "1", "--generate.max_new_tokens", "30", "--samples", "2")
    assert both == f"{one}\n{two}"


def first_tokens(built, reference, count: int, *arguments: str) -> list[int]:
    """The first token after a prompt, drawn with as many seeds."""
    from stages.common.params import load
    from stages.model.gpt2 import load_model
    from stages.model.sampling import continuation
    from stages.text.tokenizers import load_tokenizer

    os.chdir(built)
    settings = load("tools.generate", "", argv=["--generate.max_new_tokens", "1", *arguments]).generate
    model, tokenizer = load_model(built / "models/gpt2").eval(), load_tokenizer(built / "models/gpt2")
    drawn = []
    for seed in range(count):
        text = continuation(model, tokenizer, "And", settings, seed)
        drawn.append(text.removeprefix("And"))
    return drawn


def probabilities(reference, temperature: float) -> torch.Tensor:
    model, tokenizer = reference
    ids = [tokenizer.eos_token_id, *tokenizer.encode("And", add_special_tokens=False)]
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([ids])).logits[0, -1] / temperature, -1)


def test_temperature_top_k_and_top_p(built, reference, monkeypatch):
    monkeypatch.chdir(built)
    tokenizer = reference[1]

    def text_of(token: int) -> str:
        return "" if token == tokenizer.eos_token_id else tokenizer.decode([token])

    # Drawn frequencies follow softmax(logits / temperature) of transformers.
    drawn = first_tokens(built, reference, 1500, "--generate.temperature", "0.7", "--generate.top_k", "0")
    expected = probabilities(reference, 0.7)
    likeliest = int(expected.argmax())
    share, p = drawn.count(text_of(likeliest)) / len(drawn), expected[likeliest].item()
    assert abs(share - p) < 4 * (p * (1 - p) / len(drawn)) ** 0.5
    # top_k and top_p leave only the likeliest tokens, at a temperature that gives each of them a chance.
    flat = probabilities(reference, 5.0)
    order = flat.argsort(descending=True)
    two = (flat[order[0]] + flat[order[1]] / 2).item()
    for arguments, allowed in ((("3", "1.0"), order[:3]), (("0", str(two)), order[:2])):
        options = ("--generate.temperature", "5", "--generate.top_k", arguments[0], "--generate.top_p", arguments[1])
        drawn = set(first_tokens(built, reference, 150, *options))
        assert drawn == {text_of(token) for token in allowed.tolist()}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "$(touch shell-was-run); `touch shell-was-run` > x | & 'a' \"b\" \\",
        "two\nlines\r\n\n\n",
        "a <|endoftext|> inside",
        "<|endoftext|>",
        "日本語 \U0001f469\u200d\U0001f680 \0",
        "longer than the block " * 40,
        "null",
        "[1, 2]",
        "{a: b}",
        "3",
        "~",
        "@file",
    ],
)
def test_any_prompt_comes_first_as_it_is(built, prompt):
    text = generate(built, prompt)
    assert text.startswith(prompt)
    assert not list(built.rglob("*-was-run"))


def test_long_prompt_is_seen_from_its_end(built, reference):
    """The model sees the last block_size tokens: what stands before them changes nothing."""
    end = "the LORD spake unto Moses, saying, Speak unto the children of Israel"
    short, long = (generate(built, start + end, *GREEDY) for start in ("And ", "Quite another beginning of it. "))
    assert short.removeprefix("And ") == long.removeprefix("Quite another beginning of it. ")


def test_samples_page_shows_what_generate_prints(built):
    page = (built / "metrics/samples.md").read_text(encoding="utf-8")
    prompts = ["In the beginning", "And it came to pass", "Blessed are"]
    assert [json.loads(line.removeprefix("Prompt: ")) for line in page.splitlines() if "Prompt: " in line] == prompts
    for prompt in prompts:
        quoted = "\n".join(f"    {line}" for line in generate(built, prompt).split("\n"))
        assert f"\n\n{quoted}\n" in page


def test_a_real_process(built):
    command = [sys.executable, "-m", "tools.generate", "--prompt", "$(touch shell-was-run)", *GREEDY]
    done = subprocess.run(command, cwd=built, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == generate(built, "$(touch shell-was-run)", *GREEDY) + "\n"
