"""A registration can be looked through: the page opens from disk, asks for nothing, and shows what the files hold."""

import json
import re
import shutil
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from browser import Page, started
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from scripts.bundle.workflow import run_config
from scripts.data.axes import declared
from scripts.data.checks import InputError, refusal
from scripts.data.volumes import save_volume
from scripts.network import fields
from scripts.registration import view as module
from scripts.registration.index import write_index
from scripts.registration.segmentation import on_grid
from scripts.registration.view import LARGEST, view
from scripts.registration.view_data import grid_of, rounded

HOSTILE = "<img src=x onerror=document.title='run'>&\"'$x`${1}`"
CHEAP = {"initial_transform": "header", "spacing": 4.0, "refine_steps": 0, "use_network": False, "weights": None}
CHEAP |= {"glands": False, "limits#folded_percent": [None, -1.0], "view": True}


@pytest.fixture(scope="module")
def batch(cohort, tmp_path_factory):
    """A batch of two pairs with labels, shown: `plain`, which keeps glands too, and one of a name that is markup."""
    folder = tmp_path_factory.mktemp("view")
    for kind in ("moving_images", "fixed_images", "moving_labels", "fixed_labels"):
        (folder / "data" / kind).mkdir(parents=True)
        for case in ("plain", HOSTILE):
            shutil.copy(next((cohort / "test" / kind).iterdir()), folder / "data" / kind / f"{case}.nii.gz")
    run_config("inference.json", dataset_dir=str(folder / "data"), output_dir=str(folder / "out"), **CHEAP)
    for side in ("moving", "fixed"):
        label = nib.load(folder / "data" / f"{side}_labels" / "plain.nii.gz")
        gland = np.asarray(label.dataobj)[..., 0]
        save_volume(folder / "out" / "plain" / f"{side}_gland.nii.gz", gland, label.affine, np.uint8)
    return folder


@pytest.fixture(scope="module")
def case(batch):
    """The folder of the plain case, with two targets that were marked in the MR: one in its gland, one far away."""
    label = nib.load(batch / "data" / "moving_labels" / "plain.nii.gz")
    inside = label.affine @ [*np.argwhere(np.asarray(label.dataobj)[..., 0] > 0.5).mean(0), 1]
    places = {"<b>lesion</b>": inside[:3], "elsewhere": inside[:3] + 500}
    points = [
        {"id": str(k), "label": name, "position": place.tolist()} for k, (name, place) in enumerate(places.items())
    ]
    markup = {"type": "Fiducial", "coordinateSystem": "RAS", "coordinateUnits": "mm", "controlPoints": points}
    (batch / "targets.mrk.json").write_text(json.dumps({"markups": [markup]}))
    view(batch / "out" / "plain", points=str(batch / "targets.mrk.json"), points_from="moving")
    return batch / "out" / "plain"


@pytest.fixture(scope="module")
def page(browser, case):
    return Page(browser, case / "view.html").ready()


def centre_of(path, channel):
    label = nib.load(path)
    return (label.affine @ [*np.argwhere(np.asarray(label.dataobj)[..., channel] > 0.5).mean(0), 1])[:3]


def test_the_page_opens_from_disk_asks_for_nothing_and_complains_of_nothing(browser, case):
    page = Page(browser, case / "view.html").ready()
    assert page.asked_for() == {(case / "view.html").as_uri()}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.picture().std() > 20
    text = page.js("document.body.innerText")
    assert "Research use only" in text and "No flag is no proof" in text


def test_scrolling_flipping_and_mixing_change_what_is_seen(page):
    seen = []

    def differs():
        now = page.picture()
        assert all(np.abs(now - before).mean() > 0.5 for before in seen[-1:])
        seen.append(now)

    differs()
    box = page.browser.find_element("id", "planes").rect
    place = {"x": box["x"] + box["width"] / 6, "y": box["y"] + box["height"] / 2}
    before = page.text("where")
    page.browser.execute_script("scrollTo(0, 0)")
    wheel = {"type": "mouseWheel", "deltaX": 0, "deltaY": 240} | place
    page.browser.execute_cdp_cmd("Input.dispatchMouseEvent", wheel)
    page.until(f"document.getElementById('where').textContent !== {json.dumps(before)}")
    differs()
    for selector in (
        "[data-mode=trus]",
        "[data-mode=mr]",
        "[data-before='1']",
        "[data-mode=board]",
        "[data-mode=both]",
    ):
        page.click(selector)
        differs()
    page.browser.execute_script("const s = document.getElementById('share'); s.value = 95; s.oninput()")
    differs()
    page.browser.execute_script("const s = document.getElementById('mr_high'); s.value = 90; s.oninput()")
    differs()
    page.click("[data-before='0']")
    page.browser.execute_script("const s = document.getElementById('field'); s.value = 'grid'; s.onchange()")
    differs()
    page.click("[data-zoom='1.25']")
    differs()
    page.click("[data-zoom='0']")


def test_blinking_goes_on_by_itself_until_it_is_stopped(page):
    page.click("#blink")
    for name in ("TRUS", "MR registered", "TRUS"):
        page.until(f"document.getElementById('shown').textContent === '{name}'")
    page.click("#blink")
    still = page.text("shown")
    time.sleep(1.5)
    assert page.text("shown") == still


def test_a_target_takes_the_cross_hair_to_within_a_voxel_of_it(page, batch, case):
    names = page.js("[...document.querySelectorAll('[data-target]')].map(b => b.textContent)")
    truth = centre_of(batch / "data" / "fixed_labels" / "plain.nii.gz", 1)
    number = next(k for k, name in enumerate(names) if "landmark 1," in name)
    page.click(f"[data-target='{number}']")
    assert np.abs(page.place() - truth).max() < 3.0  # mm, a voxel
    marked = next(k for k, name in enumerate(names) if "<b>lesion</b>" in name)
    page.click(f"[data-target='{marked}']")
    inside = centre_of(batch / "data" / "moving_labels" / "plain.nii.gz", 0)
    assert np.abs(page.place() - inside).max() < 3.0  # the initial transform "header" moves nothing
    assert not any("elsewhere" in name for name in names)
    assert "elsewhere is not shown: outside the field" in page.js("document.body.innerText")


def test_the_keyboard_does_what_the_mouse_does_and_left_on_the_screen_is_the_patient_s_right(page):
    from selenium.webdriver.common.keys import Keys

    page.js("document.getElementById('planes').focus()")
    for key, step in ((Keys.ARROW_LEFT, (3, 0, 0)), (Keys.ARROW_UP, (0, 3, 0)), (Keys.PAGE_UP, (0, 0, 3))):
        before = page.place()
        page.press(key)
        page.press(key)
        assert page.place() - before == pytest.approx(2 * np.array(step), abs=1.6)  # from between voxels onto them
    for key, mode in (
        ("t", "trus"),
        ("m", "mr"),
        ("c", "board"),
        ("b", "both"),
        (Keys.SPACE, "mr"),
        (Keys.SPACE, "trus"),
    ):
        page.press(key)
        assert page.js(f"document.querySelector('[data-mode={mode}]').getAttribute('aria-pressed')") == "true"
    page.press("r")
    assert page.js("document.querySelector(\"[data-before='1']\").getAttribute('aria-pressed')") == "true"
    page.press("r")
    before = page.text("where")
    page.press("n")
    assert page.text("where") != before


def test_a_click_on_a_plane_goes_there(page):
    box = page.browser.find_element("id", "planes").rect
    page.browser.execute_script("scrollTo(0, 0)")
    places = []
    for share in (0.1, 0.2):  # of the row of planes: in the axial one
        where = {
            "x": box["x"] + share * box["width"],
            "y": box["y"] + box["height"] / 3,
            "button": "left",
            "clickCount": 1,
        }
        for kind in ("mousePressed", "mouseReleased"):
            page.browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind} | where)
        places.append(page.place())
    assert places[0][0] - places[1][0] > 5 and abs(places[0][1] - places[1][1]) < 1


@pytest.mark.parametrize("name", ["plain", HOSTILE])
def test_at_390_pixels_nothing_is_wider_than_the_screen(browser, batch, case, name):
    page = Page(browser, batch / "out" / name / "view.html", 390).ready()
    assert page.js("document.documentElement.scrollWidth") <= 390
    edges = page.js("[...document.querySelectorAll('button, input, select, img, canvas')].map(e =>"
                    " e.getBoundingClientRect().right)")  # fmt: skip
    assert max(edges) <= 390
    assert page.picture().std() > 20


def test_names_are_text_and_never_markup(browser, batch, case):
    for path in (batch / "out" / HOSTILE / "view.html", batch / "out" / "index.html"):
        page = Page(browser, path)
        if path.name == "view.html":
            page.ready()
            assert page.js("document.querySelector('h1').textContent") == f"MR to TRUS registration of {HOSTILE}"
        else:
            assert HOSTILE in page.js("[...document.querySelectorAll('th a')].map(a => a.textContent)")
        assert page.js("document.title") != "run"
        page.until("[...document.images].every(i => i.naturalWidth > 100)")  # they are loaded when they are seen
        assert page.js("document.querySelectorAll('b b, [onerror]').length") == 0
    assert page.asked_for() <= {p.as_uri() for p in (path, *path.parent.glob("*/overview.png"))}


def test_without_webgl_the_page_says_so_and_shows_the_picture(case):
    browser = started("disable-gpu", "disable-3d-apis")
    try:
        page = Page(browser, case / "view.html")
        page.until("document.getElementById('why').textContent")
        shown = page.js("document.body.innerText")
        assert "The planes cannot be shown: this browser has no WebGL 2" in shown
        assert page.js("document.getElementById('stage').hidden && document.images[0].naturalWidth") == 1500
    finally:
        browser.quit()


def test_the_page_is_one_file_with_the_viewer_s_licence_and_lets_nothing_else_in(case):
    text = (case / "view.html").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    assert "Redistribution and use in source and binary forms" in text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert np.prod(data["size"]) < 3e6 and len(data["masks"]) > 3
    assert text.count("</script") == 3


def test_a_page_of_a_large_image_is_coarser_and_says_so(case, tmp_path, monkeypatch):
    copy = shutil.copytree(case, tmp_path / "out")
    monkeypatch.setattr(module, "VOXELS", 3000)
    text = view(copy).read_text(encoding="utf-8")
    assert "The images are coarser here than in the files" in text


def test_refusals_are_one_line_and_say_what_to_do(batch, case, tmp_path, monkeypatch, cohort):
    def refused(message, *given, **named):
        with pytest.raises(InputError, match=message) as error:
            view(*given, **named)
        assert "\n" not in str(error.value)

    bare = shutil.copytree(case, tmp_path / "bare")
    record = json.loads((bare / "qc.json").read_text())
    (bare / "qc.json").write_text(json.dumps(record | {"read_as": {}}))  # labels would not fit either
    others = {side: next((cohort / "train" / f"{side}_images").iterdir()) for side in ("moving", "fixed")}
    refused("qc.json: not found; give the --output_dir", tmp_path)
    for side, other in others.items():
        refused(f"not the {side} image that was registered", bare, **{side: str(other)})
    refused("nowhere.nii.gz: not found; say where it is now by --moving", case, moving="nowhere.nii.gz")
    refused("--points_from fixed or moving", case, points=str(batch / "targets.mrk.json"))
    refused("has no meaning without --points", case, points_from="fixed")
    (bare / "qc.json").write_text(json.dumps({k: v for k, v in record.items() if k != "fingerprints"}))
    refused("register again", bare)
    monkeypatch.setattr(module, "PACKAGE", "no_such_viewer")
    refused("not installed: pip install -r requirements-view.txt", case)


# ---- the table of a batch


def test_the_index_has_flagged_cases_first_sorts_and_leads_to_each_page(browser, batch, case):
    folder = batch / "table"
    shutil.copytree(batch / "out", folder)
    third = shutil.copytree(folder / "plain", folder / "a")
    for place, flags, moved in ((folder / "plain", [], 9.0), (third, [], 30.0)):
        record = json.loads((place / "qc.json").read_text()) | {"flags": flags, "translation_mm": moved}
        (place / "qc.json").write_text(json.dumps(record))
    page = Page(browser, write_index(folder, ["lost"]))
    order = "[...document.querySelectorAll('tbody th')].map(t => t.textContent)"
    assert page.js(order) == ["lost", HOSTILE, "a", "plain"]
    moved = next(k for k, t in enumerate(page.js("[...document.querySelectorAll('thead th')].map(t => t.textContent)"))
                 if t.startswith("moved"))  # fmt: skip
    page.browser.find_elements("css selector", "thead th")[moved].find_element("css selector", "button").click()
    assert page.js(order)[-1] == "lost" and page.js(order).index("plain") < page.js(order).index("a")
    assert page.js("document.querySelectorAll('thead th')[" + str(moved) + "].getAttribute('aria-sort')") == "ascending"
    assert "3 registered, 1 of them with flags; 1 not registered" in page.js("document.body.innerText")
    page.click("tbody td a[href^='a/']")
    assert page.ready().js("document.querySelector('h1').textContent").endswith("of plain")
    narrow = Page(browser, folder / "index.html", 390)
    assert narrow.js("document.documentElement.scrollWidth") <= 390


def test_a_batch_names_the_cases_that_were_refused(batch, tmp_path):
    data = shutil.copytree(batch / "data", tmp_path / "data")
    bad = data / "fixed_images" / f"{HOSTILE}.nii.gz"
    bad.write_bytes(b"no image")
    settings = CHEAP | {"view": False}
    with pytest.raises(RuntimeError) as error:
        run_config("inference.json", dataset_dir=str(data), output_dir=str(tmp_path / "out"), **settings)
    assert "1 of 2 pairs refused" in str(refusal(error.value))
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "1 registered, 1 of them with flags; 1 not registered" in text and "<img src=x" not in text


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR"])
@pytest.mark.parametrize("voxels", [10**6, 2000])
def test_what_is_shown_lies_where_it_lies_in_the_file_however_that_is_stored(axes, voxels):
    turn = Rotation.from_euler("xyz", (9, -12, 15), degrees=True).as_matrix()
    header = declared(np.diag([1.1, 0.7, 2.0, 1.0]), (20, 30, 12), axes)
    header[:3] = turn @ header[:3]
    world = fields.world_grid((20, 30, 12), torch.from_numpy(header))[0]
    slope = torch.tensor([0.3, -1.0, 0.6], dtype=torch.float64)
    image = MetaTensor(torch.einsum("i,ixyz->xyz", slope, world)[None].float(), affine=torch.from_numpy(header))
    affine, size = grid_of(image, voxels)
    assert np.prod(size) <= voxels and nib.aff2axcodes(affine.numpy()) == ("R", "A", "S")
    inside = (slice(None), *(slice(2, -2),) * 3)
    expected = torch.einsum("i,ixyz->xyz", slope, fields.world_grid(size, affine)[0])[None]
    np.testing.assert_allclose(on_grid(image, affine, size)[0][inside], expected[inside], atol=0.01)


def test_an_outline_between_thick_slices_is_between_theirs():
    x, y, z = np.meshgrid(np.arange(40), np.arange(40), np.arange(8), indexing="ij")
    cone = (np.hypot(x - 20, y - 20) < 15 - 1.5 * z) & (z > 0) & (z < 7)  # mm: voxels of 1, slices of 3
    mask = MetaTensor(torch.from_numpy(cone[None].astype(np.float32)), affine=torch.diag(torch.tensor([1.0, 1, 3, 1])))
    values = rounded(mask).numpy()[0]
    assert ((values > 0.5) == cone).all()
    between = (values[..., 3] + values[..., 4]) / 2 > 0.5  # halfway between slices of radius 10.5 and 9
    assert np.sqrt(between.sum() / np.pi) == pytest.approx(9.75, abs=0.25)
