"""A report says what the tables of a cross-validation say, shows its cases, and is one page that needs nothing else."""

import csv
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Page as Opened
from conftest import ROOT, TINY, run
from PIL import Image

from scripts.bundle.workflow import run_config
from scripts.data.checks import InputError
from scripts.network.networks import SummedDDFNet
from scripts.phantoms.phantom import write_cohort
from scripts.study import report_cases
from scripts.study.crossval import cross_validate
from scripts.study.report import flag, report, typed
from scripts.study.report_cases import choose, evaluation_of, maps_of
from scripts.study.report_figures import png, slices
from scripts.study.report_tables import number, patient_tre

PICTURES = ("tre", "dsc", "true_error", "slices", "maps")
DATA = "unsplit & small"  # is escaped on the page


def write_weights(path, size, seed):
    """Weights of a network whose field is worth looking at, as a training would leave them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = SummedDDFNet(initial_channels=TINY["initial_channels"]).state_dict()
        for name, value in weights.items():
            if name.startswith("summands"):
                value.copy_(size * torch.randn(value.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)


@pytest.fixture(scope="module")
def crossval(tmp_path_factory) -> Path:
    """A cross-validation of four tiny phantoms in two folds: two variants, one row without training, one incomplete.

    The trainings are left out: weights lie where they would have written them. One fold of baseline is evaluated by
    crossval, the others by the same config in this process, which is faster.
    """
    folder = tmp_path_factory.mktemp("report")
    size = {"fixed_shape": (22, 30, 22), "fixed_spacing": 3.0, "moving_shape": (26, 26, 20)}
    write_cohort(folder / DATA, 4, seed=3, split=(1, 0, 0), moving_spacing=(2.8, 2.8, 3.6), **size)
    (folder / "nothing.yaml").write_text("use_network: false\n")
    output, variants = folder / "cv", ["baseline", "l2", str(folder / "nothing.yaml")]
    runs = {(name, k): output / "runs" / name / f"fold{k}" for name in ("baseline", "l2", "nothing") for k in (0, 1)}
    for (name, k), place in runs.items():
        write_weights(place / "model.pt", 0.05 if name == "l2" else 0.02, k)
    one = {"only": ["baseline:0"], "cores": 1}
    assert cross_validate(str(folder / DATA), str(output), 2, variants, settings=TINY, **one) == 0
    log = (runs["baseline", 0] / "log.txt").read_text()
    assert "/runs/baseline/fold0/" in log and log.count(" --fold=0 ") == 1
    for (name, k), place in runs.items():
        if (name, k) != ("baseline", 0):
            own = log.replace("/runs/baseline/fold0", f"/runs/{name}/fold{k}").replace(" --fold=0 ", f" --fold={k} ")
            (place / "log.txt").write_text(own)
            overlays, settings = evaluation_of(place)
            run_config("evaluate.json", *overlays, **settings | {"use_network": name != "nothing"})
            done = json.dumps({"version": "9.9.9", "commit": "abc1234"})
            (place / "done.json").write_text(
                (runs["baseline", 0] / "done.json").read_text() if name == "baseline" else done
            )
        if name == "nothing":
            (place / "model.pt").unlink()
    (output / "runs" / "delta0" / "fold0").mkdir(parents=True)
    assert cross_validate(str(folder / DATA), str(output), 2, variants, settings=TINY) == 0  # writes the tables
    return output


@pytest.fixture(scope="module")
def page(crossval) -> Path:
    return report(crossval)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a page refers to, its tables as lists of rows of texts, and all of its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.tags, self.tables, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "data", "action", "srcset", "poster"):
                (self.images if tag == "img" else self.links).append(value)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


# ---- the page and its tables


def test_the_tables_say_what_statistics_csv_says(crossval, page):
    found = {(row["variant"], row["metric"]): row for row in rows(crossval / "statistics.csv")}
    tables = rows(page.parent / "table1.csv"), rows(page.parent / "table2.csv")
    assert [row["variant"] for row in tables[0]] == ["baseline", "l2"]
    assert [row["variant"] for row in tables[1]][-2:] == ["nothing", "initial transform alone (baseline)"]
    for row in tables[0] + [tables[1][-2]]:
        for metric in ("tre_mm", "dsc"):
            wanted = found[row["variant"], metric]
            for part in ("median", "q1", "q3"):
                assert float(row[f"{metric}_{part}"]) == float(wanted[part])
            for part in ("difference", "low", "high", "p", "pairs") if row["variant"] != "baseline" else ():
                assert float(row[f"{metric}_{part}"]) == float(wanted[part])
            assert row["empty_warped"] == wanted["empty_warped"]
        flagged = [bool(case["flags"]) for case in rows(crossval / "cases.csv") if case["variant"] == row["variant"]]
        assert float(row["flagged_cases"]) == sum(flagged)
    # one start for all: what the initial transform alone leaves is what no network leaves
    for column in ("tre_mm_median", "dsc_q1", "true_error_mm_median", "patient_tre_mm_q3"):
        assert float(tables[1][-1][column]) == pytest.approx(float(tables[1][-2][column]), abs=1e-4)


def test_the_page_shows_the_tables_the_data_the_folds_and_what_is_left_out(crossval, page):
    shown = Page(page.read_text())
    baseline = rows(page.parent / "table1.csv")[0]
    first = dict(zip(*shown.tables[0][:2], strict=True))
    assert first["TRE, mm"].startswith(number(float(baseline["tre_mm_median"]), 2))
    assert [row[0] for row in shown.tables[0][1:]] == ["baseline", "l2"]
    assert "TRE, mm, difference from baseline" in first and "true error, mm" in first
    assert "delta0: 0 of 2 folds are done" in shown.text and "delta0" not in str(shown.tables)
    assert "Research use only" in shown.text and f"{DATA}: 4 cases of 4 patients" in shown.text
    assert "version 9.9.9 commit abc1234" in shown.text
    assert "python -m scripts crossval \\\n    --dataset_dir 'unsplit & small' \\\n    --folds 2" in shown.text


def test_the_page_needs_no_other_file_no_network_and_no_script(page):
    shown = Page(page.read_text())
    assert len(shown.images) == len(PICTURES) and all(i.startswith("data:image/png;base64,") for i in shown.images)
    cases = sorted(f"cases/{folder.name}/view.html" for folder in (page.parent / "cases").iterdir())
    assert shown.links[0] == "data:," and sorted(shown.links[1:]) == cases
    assert all((page.parent / link).is_file() for link in cases) and not {"script", "iframe", "object"} & set(
        shown.tags
    )
    assert not re.search(r"url\(|@import|https?:", page.read_text())


def test_pictures_and_the_document_are_there_and_captions_say_what_of(page):
    for name in PICTURES:
        with Image.open(page.parent / f"{name}.png") as image:
            image.load()
            assert image.width > 1000
    pdf = (page.parent / "figures.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Type /Page\b", pdf)) == len(PICTURES)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text())
    assert len(captions) == len(PICTURES)
    assert all("4 cases of 4 patients" in c and "2 folds" in c and "commit abc1234" in c for c in captions)
    assert not list(page.parent.glob(".*"))


# ---- the cases that are shown


def test_a_shown_case_is_registered_as_it_was_evaluated_and_only_once(crossval, page, monkeypatch):
    kept = sorted((crossval / "report" / "cases").iterdir())
    assert len(kept) == 3
    labels = {(row["variant"], row["case"]): row for row in rows(crossval / "cases.csv")}
    for folder in kept:
        record, before = (json.loads((place / "qc.json").read_text()) for place in (folder, folder / "before"))
        variant = Path(record["weights"]).parts[-3]
        row = labels[variant, folder.name]
        assert record["gland_dsc"] == pytest.approx(float(row["dsc"]), abs=1e-6)
        assert record["tre_mm"] == pytest.approx(float(row["tre_mm"]), abs=1e-4)
        assert before["gland_dsc"] == pytest.approx(float(row["dsc_before"]), abs=1e-6)
    monkeypatch.setattr(report_cases, "run_config", lambda *_, **__: pytest.fail("registered again"))
    first = page.read_bytes()
    assert report(crossval).read_bytes() == first


def test_other_weights_are_registered_anew(crossval, page, tmp_path, monkeypatch):
    monkeypatch.setattr(report_cases, "choose", lambda cases: {"best": choose(cases)["best"]})  # one is enough
    moved = shutil.copytree(crossval, tmp_path / "moved")
    record = moved / "report" / "cases"
    used = {json.loads((p / "qc.json").read_text())["weights"] for p in record.iterdir()}
    other = "l2" if any("baseline" in w for w in used) else "baseline"
    report(moved, variant=other, dataset_dir=str(crossval.parent / DATA))
    shown = Page((moved / "report" / "report.html").read_text()).text
    assert f"{other}, held-out cases of best" in shown
    again = [json.loads((p / "qc.json").read_text())["weights"] for p in record.iterdir()]
    assert sum(w.startswith(f"{moved}/runs/{other}") for w in again) == 1


def test_best_median_and_worst_of_few_cases_and_of_cases_without_a_value():
    def of(*values):
        return choose({f"c{i}": {"tre_with_gland_mm": value} for i, value in enumerate(values)})

    assert of("3", "1", "2") == {"best": "c1", "median": "c2", "worst": "c0"}
    assert of("3", "nan", "2", "") == {"best": "c2", "median": "c0", "worst": "c3"}
    assert of("3", "1") == {"best": "c1", "worst": "c0"} and of("3") == {"best": "c0"}


def test_maps_are_those_of_the_field_without_its_start():
    affine = torch.tensor([[0, -2.0, 0, 5], [3, 0, 0, -70], [0, 0, 1.5, 9], [0, 0, 0, 1]]).double()
    start = torch.tensor([[1.1, 0.2, 0, 4], [0, 0.9, 0.1, -30], [0.1, 0, 1.2, 8], [0, 0, 0, 1]]).double()
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in (7, 8, 9)), indexing="ij"))
    x = torch.einsum("ij,j...->i...", affine[:3, :3], voxels) + affine[:3, 3].view(3, 1, 1, 1)
    a = torch.tensor([[0.1, 0, 0.2], [0, -0.3, 0], [0, 0.1, 0]]).double()
    u = torch.einsum("ij,j...->i...", a, x)

    def started(points):
        return torch.einsum("ij,j...->i...", start[:3, :3], points) + start[:3, 3].view(3, 1, 1, 1)

    jacobian, length, gradient = maps_of(started(x + u) - x, started(x) - x, affine)
    inside = jacobian[:, 1:-1, 1:-1, 1:-1]
    assert torch.isnan(jacobian).sum() == jacobian.numel() - inside.numel()
    assert torch.allclose(inside, torch.linalg.det(torch.eye(3).double() + a).expand_as(inside))
    assert torch.allclose(length[0], u.norm(dim=0)) and torch.allclose(gradient, a.norm().expand_as(gradient))


def test_the_tre_of_a_patient_is_over_all_landmarks_of_all_cases_and_never_the_gland():
    labels = [("a", 0, "9"), ("a", 1, "3"), ("a", 2, "nan"), ("a", 1, "4"), ("b", 0, "9")]
    found = patient_tre([{"patient": p, "label": str(m), "distance_mm": d} for p, m, d in labels])
    assert found[0] == pytest.approx(np.sqrt(12.5)) and np.isnan(found[1])


def test_figures_and_flags_are_written_to_be_read():
    assert [number(v, 2, "+") for v in (0.004, -0.004, -1.239, 2, np.nan, -np.inf)] == [
        "0.00",
        "0.00",
        "−1.24",
        "+2.00",
        "–",
        "−∞",
    ]
    assert (
        flag("scales", [0, 0.5]) == "--scales '[0, 0.5]'"
        and flag("initial_transform", "centre") == "--initial_transform centre"
    )
    configs = ROOT / "configs"
    mine = [
        configs / "baseline.yaml",
        configs / "real_pairs_cpu.yaml",
        configs / "variant_l2.yaml",
        Path("/x/mine.yaml"),
    ]
    assert typed("l2+mine", mine) == ("real_pairs_cpu", "l2+/x/mine.yaml")
    assert typed("baseline", mine[:2]) == ("real_pairs_cpu", "baseline") and typed("fine_tune", []) == ("", "fine_tune")
    assert shlex.split(flag("patient_pattern", "(p.)_")) == ["--patient_pattern", "(p.)_"]  # text stays as it is


def test_long_headings_of_a_row_lie_on_no_picture_and_are_not_cut_off():
    volume = np.zeros((20, 16, 10))
    volume[5:15, 4:12, 3:7] = 1
    three, points = (volume,) * 3, (np.ones((1, 3)),) * 3
    example = report_cases.Example(three, three, points, volume, volume, volume, np.ones(3))
    long = (
        "CHECK: the two glands that were found differ too much for one patient (initial_stretch_min 0.579, limit 0.7)"
    )
    figure = slices({f"{name}: case\nDSC 0.4\n{long}\n{long}": example for name in ("best", "worst")})
    png(figure)  # places the letters
    headings = [t.get_window_extent() for t in figure.texts if "case" in t.get_text()]
    assert len(headings) == 2
    assert not any(a.overlaps(ax.get_window_extent()) for a in headings for ax in figure.axes)
    assert all(0 < h.x0 and h.x1 < figure.bbox.x1 and h.y1 < figure.bbox.y1 for h in headings)


# ---- refusals


def test_refusals_are_one_line_and_name_what_is_wrong(crossval, tmp_path):
    def refused(message, *arguments):
        with pytest.raises(InputError, match=message) as error:
            report(*arguments)
        assert "\n" not in str(error.value)

    refused("no such folder", tmp_path / "nowhere")
    refused("folds.json: not found", tmp_path)
    shutil.copy(crossval / "folds.json", tmp_path)
    refused("cases.csv: not found", tmp_path)
    refused("--variant nothing: not a trained variant .* there are baseline, l2", crossval, "nothing")
    refused("--variant delta0: not a trained variant", crossval, "delta0")
    refused("data: folder not found; pass --dataset_dir", crossval, None, str(tmp_path / "data"))
    for name in ("cases", "landmarks"):
        shutil.copy(crossval / f"{name}.csv", tmp_path)
    refused("no variant is complete: baseline: 0 of 2 folds", tmp_path)


def test_the_verb_explains_itself():
    shown = run("scripts", "report", "--help")
    assert shown.returncode == 0 and "python -m scripts report cv" in shown.stdout + shown.stderr


# ---- in a browser


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_the_page_fits_its_width_and_asks_for_nothing(browser, page, width):
    opened = Opened(browser, page, width)
    images = opened.js("[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().right])")
    boxes = opened.js("[...document.querySelectorAll('.box')].map(b => [b.scrollWidth, b.clientWidth])")
    assert opened.js("document.documentElement.scrollWidth") <= width and opened.asked_for() == {page.as_uri()}
    assert len(images) == len(PICTURES) and all(natural > 0 and right <= width for natural, right in images)
    assert len(boxes) == 2 and (width > 600 or all(inner > outer for inner, outer in boxes))


def test_the_report_leads_to_a_page_to_look_through_each_case_that_is_shown(browser, page):
    opened = Opened(browser, page)
    case = opened.js("document.querySelector('a[href^=cases]').textContent").split(": ")[1]
    opened.click("a[href^=cases]")
    assert case in opened.ready().text("title") and opened.picture().std() > 10
