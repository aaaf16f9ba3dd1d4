"""The cohort of the paper's shape has the paper's numbers, and cross-validation takes it as it is."""

from collections import Counter

import nibabel as nib
import pytest

from scripts.data.checks import InputError
from scripts.data.datalist import datalist
from scripts.data.pairs import LoadPaird
from scripts.phantoms.paper_cohort import LABELS, PAIRS_OF, write_paper_cohort
from scripts.study.plan import deal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "cohort"
    return folder, write_paper_cohort(folder, seed=1)


def test_it_has_the_paper_s_patients_pairs_and_labels(cohort):
    folder, found = cohort
    assert found == LABELS and sum(found.values()) == 834
    pairs = datalist(str(folder), "train", patient_pattern=r"(patient\d+)_")
    assert len(pairs) == 108
    assert Counter(Counter(p["patient"] for p in pairs).values()) == PAIRS_OF
    written = [nib.load(p["fixed_label"]).shape for p in pairs]
    assert sum(shape[3] if len(shape) == 4 else 1 for shape in written) == 834
    dealt = deal(str(folder), 12, 0, r"(patient\d+)_")
    assert sorted(map(len, dealt)) == [6] * 8 + [7] * 4


def test_the_gland_comes_first_and_the_zones_fill_it_without_overlap(cohort):
    folder, _ = cohort
    whole = 0
    for pair in datalist(str(folder), "train")[:12]:
        loaded = LoadPaird()(pair)
        for side in ("moving", "fixed"):
            gland, *others = loaded[f"{side}_label"].numpy().astype(bool)
            assert all(gland.sum() >= other.sum() for other in others)
            halves = [a for a in others if a.sum() > 0.05 * gland.sum()]
            whole += any((a ^ b == gland).all() for a in halves for b in halves if a is not b)
    assert whole >= 12  # both zones are labelled in nearly every pair


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="is not empty"):
        write_paper_cohort(tmp_path)
