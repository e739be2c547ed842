"""The GitHub workflows: pinned and unprivileged, and their steps do here what they will do there."""

import json
import re
import shutil

import pytest
import yaml
from conftest import ROOT, run, set_params

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(name: str) -> dict[str, str]:
    """Shell commands of a workflow's only job, by step name."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_is_pinned_and_unprivileged(file):
    text = file.read_text()
    workflow = yaml.safe_load(text)
    # YAML 1.1 reads the key `on` as true.
    assert "pull_request" in workflow[True]
    assert set(workflow["permissions"].items()) <= {("contents", "read"), ("pull-requests", "write")}
    for line in re.findall(r"uses: .*", text):
        assert re.fullmatch(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    (job,) = workflow["jobs"].values()
    for step in job["steps"]:
        # A branch's name inside a command could hold commands: GitHub's values come through env.
        assert "${{" not in step.get("run", "")
        if "run" in step:
            run("bash", "-n", "-c", step["run"], cwd=ROOT)


def test_tests_workflow_runs_a_target_of_the_makefile():
    assert steps("tests.yml")["Test"] == "make test"
    assert "pytest" in run("make", "-n", "test", cwd=ROOT).stdout


def test_pull_request_gets_its_figures_settings_and_plots(built, tmp_path):
    origin, checkout = tmp_path / "origin.git", tmp_path / "checkout"
    run("git", "clone", "-q", "--bare", str(built), str(origin), cwd=tmp_path)
    run("git", "clone", "-q", str(origin), str(checkout), cwd=tmp_path)
    shutil.copytree(built / ".dvc" / "cache", checkout / ".dvc" / "cache")  # what actions/cache brings back
    run("git", "config", "user.email", "test@example.com", cwd=checkout)
    run("git", "config", "user.name", "Test", cwd=checkout)
    set_params(checkout, "evaluate.stride=8")
    run("git", "commit", "-qam", "overlap", cwd=checkout)
    run("git", "checkout", "-q", "--detach", cwd=checkout)

    summary = tmp_path / "summary.md"
    environment = {"BASE": "origin/main", "GITHUB_STEP_SUMMARY": str(summary)}
    commands = steps("experiment.yml")
    for name in ("Run what changed", "Write the comment"):
        done = run("bash", "-e", "-c", commands[name], cwd=checkout, env=environment)
        if name == "Run what changed":
            # Only the evaluation had to run: the rest came from the cache.
            assert done.stdout.count("Running stage") == 1 and "Running stage 'evaluate'" in done.stdout

    comment = (checkout / "comment.md").read_text()
    assert summary.read_text() == comment
    changed = json.loads(run("dvc", "metrics", "diff", "--json", "origin/main", cwd=checkout).stdout)
    test = changed["metrics/eval.json"]["test.ppl"]
    row = re.search(r"\| test\.ppl +\| ([\d.]+) +\| ([\d.]+) +\| (-?[\d.]+)", comment)
    assert [float(cell) for cell in row.groups()] == pytest.approx([test["old"], test["new"], test["diff"]], abs=1e-5)
    assert re.search(r"params.yaml +\| evaluate.stride +\| - +\| 8 ", comment)
    images = re.findall(r"!\[.+\]\(\./(.+\.png)\)", comment)
    plots = json.loads(run("dvc", "plots", "diff", "--json", "origin/main", cwd=checkout).stdout)["data"]
    assert len(plots) >= 3 and len(images) == len(set(images)) == sum(len(drawings) for drawings in plots.values())
    for image in images:
        raw = (checkout / image).read_bytes()
        assert raw.startswith(b"\x89PNG") and len(raw) > 10_000
    assert (checkout / "report.html").stat().st_size > 500_000
