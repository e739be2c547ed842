"""The first few of the faults that docs/reliability.md counts."""

import shutil

from conftest import digests, set_params
from faults import OUTPUTS, STAGES, faults


def test_killed_on_its_way_through_the_stages(template, built, tmp_path):
    shutil.copytree(template, tmp_path / "fresh")
    set_params(tmp_path / "fresh", "runtime.checkpoint_every_n_steps=10")
    seconds = dict.fromkeys(STAGES, 4.0)
    assert faults(tmp_path / "fresh", tmp_path / "disturbed", digests(built, *OUTPUTS), seconds, points=4, seed=1) == 0
