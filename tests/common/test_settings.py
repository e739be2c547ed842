"""The habits of LightningCLI: --print_config, --config, --help and typed checks."""

import ast
import contextlib
import inspect
import json
import re

from stages.common import devices, errors
from stages.common.errors import UserError
from stages.common.params import load
from stages.training.trainer import on_this_machine

import pytest
import yaml
from conftest import ROOT, run, run_stage
from hypothesis import example, given, settings
from hypothesis import strategies as st

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory):
    """Only params.yaml: these tests write other ones in its place."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "params.yaml").write_text((template / "params.yaml").read_text())
    return folder


def print_config(folder, *arguments: str) -> str:
    status, out, err = run_stage(folder, "train", *arguments, "--print_config")
    assert status == 0, err
    return out


def test_print_config_is_a_config(folder):
    callback = {
        "class_path": "pytorch_lightning.callbacks.EarlyStopping",
        "init_args": {"monitor": "valid_loss", "patience": 7},
    }
    printed = print_config(folder, "--trainer.callbacks", json.dumps([callback]), "--optimizer.lr", "0.01")
    values = yaml.safe_load(printed)
    assert values["optimizer"]["lr"] == 0.01
    assert values["trainer"]["callbacks"][0]["init_args"]["patience"] == 7
    assert values["trainer"]["min_epochs"] is None  # what params.yaml leaves to Lightning is there too
    for group, of in yaml.safe_load((folder / "params.yaml").read_text()).items():
        assert group == "seed_everything" or of.keys() <= values[group].keys()
    (folder / "printed.yaml").write_text(printed)
    assert print_config(folder, "--config", "printed.yaml") == printed


def test_later_sources_override_earlier_ones(folder):
    (folder / "one.yaml").write_text("trainer: {max_epochs: 5, precision: bf16-mixed}\nseed_everything: 9\n")
    (folder / "two.yaml").write_text("trainer: {max_epochs: 6}\n")

    def values(*arguments: str) -> tuple:
        config = yaml.safe_load(print_config(folder, *arguments))
        return config["trainer"]["max_epochs"], config["trainer"]["precision"], config["seed_everything"]

    assert values() == (2, "32-true", 1)
    assert values("--config", "one.yaml") == (5, "bf16-mixed", 9)
    assert values("--config", "one.yaml", "--config=two.yaml") == (6, "bf16-mixed", 9)
    assert values("--config", "one.yaml", "--trainer.max_epochs", "3") == (3, "bf16-mixed", 9)
    assert values("--trainer.max_epochs=3", "--config", "one.yaml") == (5, "bf16-mixed", 9)


@pytest.mark.parametrize("stage", ["train_tokenizer", "tokenize_blocks", "train", "evaluate", "tools.generate"])
def test_help_describes_every_setting(folder, stage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, text, _ = run_stage(folder, stage, "--help")
    assert status == 0
    descriptions = {}
    for entry in re.split(r"\n  (?=-)", text[text.index("\noptions:") :])[1:]:
        name, _, description = entry.partition(" ")
        description = " ".join(re.split(r"\s{2,}|\n", description)[1:]).strip()
        descriptions[name] = re.sub(r"\(?(required, )?type: .*", "", description, flags=re.S).strip()
    expected = [f"--{group}.{name}" for group, of in PARAMS.items() if isinstance(of, dict) for name in of]
    assert {*expected, "--seed_everything", "--config"} <= descriptions.keys()
    assert [name for name, description in descriptions.items() if len(description) < 10 and name != "-h,"] == []


FILES = [file for folder in ("stages", "tools") for file in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = [file for file in FILES if "__main__" in file.read_text()]  # the others are what two commands share


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_help_of_every_command_is_its_docstring_and_does_nothing(file, tmp_path):
    """In an empty folder: what did anything would fail there, or leave something."""
    module = f"{file.parent.name}.{file.stem}"
    status, text, err = run_stage(tmp_path, module, "--help")
    assert (status, err) == (0, "")
    assert text.startswith(f"usage: python -m {module} ")
    assert inspect.cleandoc(ast.get_docstring(ast.parse(file.read_text()))) in text
    assert "(required)" not in text
    assert not list(tmp_path.iterdir())


def test_help_of_a_commands_own_options(tmp_path):
    """--model of evaluate and generate is no group, and needs no setting of params.yaml."""
    for module, text in (("evaluate", "checkpoint to measure"), ("tools.generate", "GPT-2 folder with its tokenizer")):
        shown = " ".join(run_stage(tmp_path, module, "--help")[1].split())
        assert re.search(rf" --model \[VALUE\] .{{0,60}}{text}", shown)


def test_a_real_process(template):
    done = run("python", "-m", "stages.train", "--model.n_layr", "3", cwd=template, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --model.n_layr: no such setting: did you mean model.n_layer?\n"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "null", "0", "1e-3", "[", "{}", "bpe", "line", "constant"])
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
leaves = [(group, name) for group, of in PARAMS.items() if isinstance(of, dict) for name in of]


def load_or_line(folder, content: bytes) -> str | None:
    """The error line, once it is known to be one; None when the settings are good."""
    (folder / "fuzz").mkdir(exist_ok=True)
    (folder / "fuzz/params.yaml").write_bytes(content)
    with contextlib.chdir(folder / "fuzz"):
        try:
            load("stages.train", "", argv=[])
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith("params.yaml"), str(error)
            return str(error)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*leaves, *((group,) for group in PARAMS)]), values)
@example(("trainer", "accumulate_grad_batches"), None)  # jsonargparse takes null for a whole number
def test_any_value_of_any_setting_is_taken_or_is_one_line(folder, key, value):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    group = params
    for name in key[:-1]:
        group = group[name]
    group[key[-1]] = value
    content = yaml.safe_dump(params, allow_unicode=True).encode("utf-8", "surrogatepass")
    line = load_or_line(folder, content)
    if line is not None and len(key) == 2 and "character" not in line and "YAML" not in line:
        assert re.match(r"params\.yaml(:\d+)?: \w+\.\w+", line), line


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!#|>%@`'\"\\\n\t ,?", max_size=40).map(str.encode))
def test_any_bytes_as_params_yaml_are_one_line(folder, content):
    assert load_or_line(folder, content) is not None


@pytest.mark.parametrize(("hardware", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_auto_is_what_the_processor_multiplies_in_hardware(folder, monkeypatch, hardware, chosen):
    monkeypatch.setattr(devices.torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    monkeypatch.setattr(devices.torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.chdir(folder)
    arguments = ["--trainer.precision", "auto", "--trainer.accelerator", "cpu"]
    assert on_this_machine(load("stages.train", "", argv=arguments)).trainer.precision == chosen


def test_settings_alone_need_no_lightning(folder):
    """Its import takes longer than all else that a stage on little text does."""
    look = "import sys; from stages.common.params import load; load('x', '', argv=[])"
    loaded = run("python", "-c", f"{look}; print(*sys.modules)", cwd=folder, env={"PYTHONPATH": str(ROOT)}).stdout
    assert not {"torch", "pytorch_lightning", "transformers"} & set(loaded.split())


@pytest.mark.parametrize(("capability", "multiplies"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_multiplies_bf16_from_compute_capability_8(monkeypatch, capability, multiplies):
    monkeypatch.setattr(devices.torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.multiplies_bf16(devices.torch.device("cuda")) == multiplies


def test_garbage_is_collected_as_usual_once_all_is_imported():
    code = "import gc; before = gc.get_threshold()\nfrom stages.common.errors import run; during = gc.get_threshold()\n"
    code += "run(lambda: print(during[0] > before[0], gc.get_threshold() == before, gc.get_freeze_count() > 100))"
    assert run("python", "-c", code, cwd=ROOT).stdout == "True True True\n"


def test_ctrl_c_ends_a_stage_with_the_status_of_the_signal(capfd):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        errors.run(interrupted)
    assert stopped.value.code == 130 and capfd.readouterr() == ("", "")
