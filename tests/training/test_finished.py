"""Checkpoints of finished trainings: kept until DVC has recorded the model, and no longer."""

import shutil

from conftest import run, run_stage


def finished(project) -> list:
    return list(project.glob("models/checkpoints/*/final.ckpt"))


def test_they_stay_until_dvc_has_recorded_the_model_and_do_not_pile_up(project):
    shutil.rmtree(project / "models/checkpoints", ignore_errors=True)
    for steps in ("2", "3"):
        assert run_stage(project, "train", "--trainer.max_steps", steps)[0] == 0
        assert len(finished(project)) == 1  # an evaluation that was skipped leaves none behind
    assert run_stage(project, "evaluate")[0] == 0
    assert len(finished(project)) == 1  # by hand: dvc.lock has another run's metrics/run.json
    run("dvc", "commit", "--force", "train", cwd=project)
    assert run_stage(project, "evaluate")[0] == 0
    assert finished(project) == []
