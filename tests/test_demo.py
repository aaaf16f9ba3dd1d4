"""The demonstration replaces an earlier demonstration and nothing else."""

import pytest

from scripts.checks import InputError
from scripts.demo import register_phantoms


def test_a_folder_that_merely_holds_a_cohort_is_left_alone(tmp_path):
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="not an earlier demonstration"):
        register_phantoms(tmp_path, None)
    assert (tmp_path / "cohort" / "precious.txt").read_text() == "mine"
