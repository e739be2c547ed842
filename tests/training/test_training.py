"""Training from outside: a callback records what a run starts from and sees, and a plain loop repeats it."""

import json
import math
import re
import shutil
from types import SimpleNamespace

from stages.model import gpt2

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, run, run_stage, set_params, train_inputs
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

# Few blocks, so that a run is over in a second.
SHORT = ["--model.block_size", "16", "--optimizer.batch_size", "24", "--trainer.max_epochs", "1"]


@pytest.fixture
def files(built, tmp_path):
    """What the train stage reads, and nothing that it made."""
    return train_inputs(built, tmp_path / "project")


def train(project, *arguments: str, **probe):
    """Runs the stage with a Probe; returns what it saw and what it printed."""
    callback = [{"class_path": "probe.Probe", "init_args": {"folder": str(project / "seen"), **probe}}]
    status, _, err = run_stage(project, "train", *SHORT, "--trainer.callbacks", json.dumps(callback), *arguments)
    assert status == 0, err
    seen = torch.load(project / "seen/seen.pt") | json.loads((project / "seen/seen.json").read_text())
    return SimpleNamespace(**seen)


def expected_rate(step: int, steps: int, schedule: str, warmup: int, peak: float, least: float) -> float:
    """Learning rate of step 1, 2, ..., from the definitions in params.yaml."""
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    if schedule == "linear":
        return peak - (1 - least) * peak * done
    if schedule == "wsd":  # of 18 steps the last 20 %, 4, are the cooldown
        return peak * (least + (1 - least) * (1 - math.sqrt(max(0, step - 15) / 4)))
    if schedule == "cosine":
        return least * peak + (1 - least) * peak * (1 + math.cos(math.pi * done)) / 2
    return peak


def independent_training(seen, rates: list[float], accumulate: int, clip: float | None, decay: float) -> dict:
    """transformers' own model and loss, and AdamW (Loshchilov and Hutter, 2019) written out."""
    vocabulary, width = seen.first["transformer.wte.weight"].shape
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_layer=2, n_head=2, n_embd=width,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.load_state_dict(seen.first)
    first, second = {}, {}
    for t, rate in enumerate(rates, 1):
        for batch in seen.batches[(t - 1) * accumulate : t * accumulate]:
            scores = model(batch[:, :-1]).logits
            loss = F.cross_entropy(scores.reshape(-1, vocabulary), batch[:, 1:].reshape(-1)) / accumulate
            loss.backward()
        if clip is not None:
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1.0, clip / (norm + 1e-6))
        with torch.no_grad():
            for name, p in model.named_parameters():
                first[name] = 0.9 * first.get(name, 0) + 0.1 * p.grad
                second[name] = 0.95 * second.get(name, 0) + 0.05 * p.grad.square()
                if not re.search(r"bias|ln_", name):
                    p *= 1 - rate * decay
                p -= rate * (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
                p.grad = None
    return model.state_dict()


@pytest.mark.parametrize(
    "schedule, accumulate, clip, decay",
    [
        ("cosine", 1, 0.05, 0.1),
        ("linear", 1, None, 0.5),
        ("constant", 3, 0.02, 0.0),
        ("cosine", 2, None, 0.1),
        ("wsd", 1, None, 0.1),
    ],
)
def test_training_is_what_a_plain_loop_computes(files, schedule, accumulate, clip, decay):
    seen = train(
        files,
        *("--optimizer.schedule", schedule, "--optimizer.num_warmup_steps", "4", "--optimizer.min_lr_ratio", "0.2"),
        *("--optimizer.weight_decay", str(decay), "--trainer.gradient_clip_val", "null" if clip is None else str(clip)),
        *("--trainer.accumulate_grad_batches", str(accumulate), "--trainer.limit_train_batches", "18"),
    )
    steps = 18 // accumulate
    rates = [expected_rate(step, steps, schedule, 4, 4e-3, 0.2) for step in range(1, steps + 1)]
    assert seen.rates[::accumulate] == pytest.approx(rates)
    last = independent_training(seen, rates, accumulate, clip, decay)
    moved = max((seen.last[name] - seen.first[name]).abs().max().item() for name in last)
    assert moved > 0.005
    for name, weight in seen.last.items():
        assert (weight - last[name]).abs().max() < 0.01 * moved, name


def test_only_matrices_decay(files):
    seen = train(files, "--trainer.max_steps", "3", "--optimizer.weight_decay", "0.3")
    decays = {name: decay for decay, names in seen.groups for name in names}
    assert {name for name, weight in seen.first.items() if name != "lm_head.weight"} == decays.keys()
    assert {name for name, decay in decays.items() if decay == 0.3} == {
        n for n, w in seen.first.items() if w.ndim > 1 and n in decays
    }
    assert {decay for name, decay in decays.items() if re.search(r"bias|ln_", name)} == {0.0}


def test_schedule_of_a_given_length(files):
    seen = train(
        files, "--optimizer.schedule", "linear", "--optimizer.num_training_steps", "10", "--trainer.max_steps", "14"
    )
    expected = [expected_rate(min(step, 11), 10, "linear", 2, 4e-3, 0.1) for step in range(1, 15)]
    assert seen.rates == pytest.approx(expected)


def test_accumulation_equals_a_larger_batch(files):
    steps = ("--trainer.max_steps", "10", "--trainer.max_epochs", "3")
    large = train(files, *steps)
    parts = train(files, *steps, "--optimizer.batch_size", "8", "--trainer.accumulate_grad_batches", "3")
    assert torch.equal(torch.cat(large.batches), torch.cat(parts.batches))
    for name, weight in large.last.items():
        assert torch.allclose(weight, parts.last[name], atol=2e-5), name


def test_shuffled_by_seed_and_epoch(files):
    """And the borders of the blocks lie elsewhere in each epoch, whoever fetches them."""
    three = ("--trainer.max_epochs", "3")
    one, again = train(files, *three), train(files, *three, "--runtime.num_workers", "1")
    other = train(files, *three, "--seed_everything", "2")
    assert torch.equal(torch.stack(one.batches), torch.stack(again.batches))
    third = len(one.batches) // 3
    epochs = [one.batches[i * third : (i + 1) * third] for i in range(3)]
    orders = [torch.cat(batches) for batches in (*epochs, other.batches[:third])]
    tokens = np.load(files / "data/blocks/train.npy").astype(np.int64)
    firsts = []
    for order in orders:
        rows = {tuple(row) for row in order.tolist()}
        assert len(rows) > 0.95 * len(order)
        starts = [[*range(first, len(tokens) - 17, 16), len(tokens) - 17] for first in range(16)]
        blocks = [{tuple(tokens[i : i + 17].tolist()) for i in each} for each in starts]
        firsts += [[first for first in range(16) if rows <= blocks[first]]]
    assert firsts == [[0], [9], [3], [0]]  # 16 times 0, 0.618 and 1.236 - 1
    assert all(not torch.equal(orders[0], each) for each in orders[1:])
    assert not torch.equal(one.first["transformer.wte.weight"], other.first["transformer.wte.weight"])


def mean_loss(folder, stream: np.ndarray) -> float:
    """Nats a token, one block at a time, the short last one too."""
    model = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    total = 0.0
    for i in range(0, len(stream) - 1, 16):
        ids = torch.from_numpy(stream[i : i + 17].astype(np.int64))[None]
        with torch.no_grad():
            total += F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item()
    return total / (len(stream) - 1)


def test_the_best_validation_loss_is_what_is_kept(files):
    """A learning rate that is too high at its end makes the last weights worse than earlier ones."""
    arguments = ("--optimizer.schedule", "constant", "--optimizer.lr", "0.1", "--trainer.val_check_interval", "2")
    seen = train(files, *arguments)
    history = pd.read_csv(files / "metrics/valid.csv")
    assert len(history) > 5 and history.valid_loss.argmin() < len(history) - 1
    measured = mean_loss(files / "models/gpt2", np.load(files / "data/blocks/valid.npy"))
    assert measured == pytest.approx(history.valid_loss.min(), rel=1e-5)
    kept = safetensors.torch.load_file(files / "models/gpt2/model.safetensors")
    assert not torch.equal(kept["transformer.wte.weight"], seen.last["transformer.wte.weight"])
    best = history.step[history.valid_loss.argmin()]
    assert f"weights of step {best:,}, at the lowest validation loss" in (files / "models/gpt2/README.md").read_text()


def test_fine_tuning_starts_from_the_folder(files, built):
    shutil.copytree(built / "models/gpt2", files / "pretrained")
    seen = train(files, "--model.from_pretrained", "pretrained", "--trainer.max_steps", "3", "--model.dropout", "0.1")
    first = safetensors.torch.load_file(built / "models/gpt2/model.safetensors")
    for name, weight in first.items():
        assert torch.equal(seen.first[name], weight)
        assert not torch.equal(seen.last[name], weight), name
    # Its shape is the folder's, whatever the model group says; block_size may be smaller.
    train(files, "--model.from_pretrained", "pretrained", "--model.n_layer", "7", "--model.block_size", "8")
    assert GPT2Config.from_pretrained(files / "models/gpt2").n_layer == 2


def test_a_warm_up_that_is_longer_than_the_training_is_a_tenth_of_it(files):
    seen = train(
        files, "--trainer.max_steps", "20", "--optimizer.num_warmup_steps", "50", "--optimizer.batch_size", "4"
    )
    assert seen.rates[:2] == [pytest.approx(seen.rates[2] / 2), pytest.approx(seen.rates[2])]
    assert len(seen.rates) == 20 and seen.rates[-1] < seen.rates[2]
    _, _, err = run_stage(files, "train", "--trainer.max_steps", "4", "--optimizer.num_warmup_steps", "50")
    assert "note: optimizer.num_warmup_steps: 50 leaves nothing of 4 training steps: it takes 0\n" in err


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(files):
    callback = [{"class_path": "probe.Probe", "init_args": {"folder": "seen", "poison": 7}}]
    arguments = ("--trainer.callbacks", json.dumps(callback), "--runtime.checkpoint_every_n_steps", "1")
    status, _, err = run_stage(files, "train", *SHORT, *arguments)
    assert status == 1
    assert re.search(r"^error: loss is not a finite number at step \d: lower optimizer\.lr", err, re.M), err
    newest = max(files.glob("models/checkpoints/*/step-*.ckpt"))
    weights = torch.load(newest, weights_only=True)["state_dict"]
    assert int(newest.stem.removeprefix("step-")) in (6, 7)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert not (files / "models/gpt2").exists()


@pytest.mark.parametrize("act", ["gelu_new", "relu"])
def test_lean_forward_pass_is_transformers(act):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=311, n_positions=32, n_layer=3, n_head=4, n_embd=48, activation_function=act)
    model = GPT2LMHeadModel(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    for length in (1, 7, 32):
        ids = torch.randint(311, (3, length))
        logits = F.linear(gpt2.hidden_states(model, ids), model.lm_head.weight)
        assert torch.allclose(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_next_logits_with_a_cache_are_those_without():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=311, n_positions=32, n_layer=3, n_head=4, n_embd=48)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(311, (2, 32))
    cache = DynamicCache()
    with torch.inference_mode():
        expected = model(ids).logits
        for length in range(5, 33):
            fresh = ids[:, cache.get_seq_length() : length]
            assert fresh.shape[1] == (1 if length > 5 else 5)
            measured = gpt2.next_logits(model, fresh, cache)
            assert torch.allclose(measured, expected[:, length - 1], rtol=1e-4, atol=1e-4)


def scalars(project) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (project / "logs").rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_callbacks_of_params_yaml_through_dvc(built, warm, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(built, project, ignore=shutil.ignore_patterns("logs"))
    shutil.copy(ROOT / "tests/probe.py", project / "my_callbacks.py")
    lightning = "pytorch_lightning.callbacks"
    callbacks = [
        {
            "class_path": f"{lightning}.EarlyStopping",
            "init_args": {"monitor": "valid_loss", "min_delta": 9, "patience": 1},
        },
        {"class_path": f"{lightning}.LearningRateMonitor", "init_args": {"logging_interval": "step"}},
        {"class_path": f"{lightning}.DeviceStatsMonitor", "init_args": {"cpu_stats": True}},
        {"class_path": f"{lightning}.ModelCheckpoint", "init_args": {"dirpath": "mine", "monitor": "valid_loss"}},
        {"class_path": "my_callbacks.Probe", "init_args": {"folder": "seen"}},
    ]
    before = pd.read_csv(project / "metrics/valid.csv")
    set_params(project, f"trainer.callbacks={json.dumps(callbacks)}", "runtime.log_every_n_steps=5")
    warm("dvc", "repro", "train", cwd=project)

    after = pd.read_csv(project / "metrics/valid.csv")
    assert len(after) == 2 < len(before)  # no validation is better by 9 nats, so the second one ends it
    seen = json.loads((project / "seen/seen.json").read_text())
    logged = scalars(project)
    rates = next(values for tag, values in logged.items() if tag.startswith("lr-"))
    for event in rates:
        assert event.value == pytest.approx(seen["rates"][event.step])
    assert [event.step for event in rates][:2] == [4, 9]
    assert any(tag.startswith("DeviceStatsMonitor.on_train_batch_start/cpu") for tag in logged)
    assert [event.value for event in logged["valid_loss"]] == pytest.approx(list(after.valid_loss), rel=1e-6)
    assert {"loss", "valid_ppl"} <= logged.keys()
    # Lightning's own checkpoint can be measured too, and logs are not tracked.
    (checkpoint,) = (project / "mine").glob("*.ckpt")
    figures = json.loads(warm("stages.evaluate", "--model", str(checkpoint), cwd=project).stdout)
    assert figures["valid"]["loss"] == pytest.approx(after.valid_loss.min(), rel=1e-5)
    assert "logs/" not in run("git", "status", "--porcelain", cwd=project).stdout
