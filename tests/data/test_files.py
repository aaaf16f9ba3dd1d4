"""Several processes that write into one folder leave one result, never a mixture, and nothing of an older one stays."""

import math
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.data.checks import InputError
from scripts.data.files import write_csv, written_together

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from scripts.data.files import alone_in
from scripts.data.files import written_together
folder, own = Path(sys.argv[2]), sys.argv[3]
for turn in range(60):
    with written_together(folder) as partial:
        for name in "abcdef":
            (partial / name).write_text(f"{own} {turn}")
    with alone_in(folder):
        found = {(folder / name).read_text() for name in "abcdef"}
    assert len(found) == 1, found
"""


def test_two_processes_that_write_into_one_folder_leave_one_result(tmp_path):
    commands = [[sys.executable, "-c", WRITER, str(ROOT), str(tmp_path / "out"), own] for own in ("one", "two")]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == list("abcdef")


def test_a_csv_table_keeps_its_rows(tmp_path):
    write_csv(tmp_path / "new" / "cases.csv", [{"case": "a", "dsc": 0.5}, {"case": "b", "dsc": math.nan}])
    assert (tmp_path / "new" / "cases.csv").read_text().split() == ["case,dsc", "a,0.5", "b,nan"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["cases.csv"]


def test_files_of_an_earlier_result_go(tmp_path):
    for names in ("ab", "bc"):
        with written_together(tmp_path, stale={"a", "d"}) as partial:
            for name in names:
                (partial / name).touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]


def test_a_folder_of_slices_is_replaced_and_one_of_other_files_is_refused(tmp_path):
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "old.dcm").touch()
    with written_together(tmp_path) as partial:
        (partial / "series").mkdir()
        (partial / "series" / "new.dcm").touch()
    assert [p.name for p in (tmp_path / "series").iterdir()] == ["new.dcm"]
    (tmp_path / "series" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds other files"), written_together(tmp_path, stale={"series"}) as partial:
        (partial / "a").touch()
    assert sorted(p.name for p in (tmp_path / "series").iterdir()) == ["mine.txt", "new.dcm"]
    assert not (tmp_path / "a").exists()
