"""The demonstration shows what it says, and replaces an earlier demonstration and nothing else."""

import pytest

from scripts.data.checks import InputError
from scripts.study import demo


def test_phantoms_are_registered_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PHANTOMS", 1)  # six take longer
    demo.register_phantoms(tmp_path / "demo", None)
    table = (tmp_path / "demo" / "table.txt").read_text("utf-8")
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 3 and table.splitlines()[-1].startswith("median")
    assert (tmp_path / "demo" / "overview.png").stat().st_size > 10_000


def test_a_folder_that_merely_holds_a_cohort_is_left_alone(tmp_path):
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="not an earlier demonstration"):
        demo.register_phantoms(tmp_path, None)
    assert (tmp_path / "cohort" / "precious.txt").read_text() == "mine"
