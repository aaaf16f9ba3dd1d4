"""How many wrong registrations are flagged: phantoms as they are, and pushed out of what the networks learned from.

python benchmarks/confidence.py [--patients 40] [--seed 2031]    # phantoms that neither a training nor the limits have
seen python benchmarks/confidence.py --segmentation_path runs/a/segmentation.pt runs/b/segmentation.pt --cases cases.csv
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
from scipy.ndimage import uniform_filter  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.measure import table  # noqa: E402
from scripts.bundle.workflow import run_config  # noqa: E402
from scripts.data.checks import refusal  # noqa: E402
from scripts.data.datalist import datalist  # noqa: E402
from scripts.data.files import write_csv  # noqa: E402
from scripts.phantoms.phantom import write_cohort  # noqa: E402
from scripts.study.statistics import read_cases  # noqa: E402

WRONG = 8.0  # mm of true error, median over the gland: nearly twice the median of phantoms as they are
Push = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def turned(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Turned by 90 degrees about the third axis, cropped and filled up to the shape it had."""
    other, result = np.rot90(image, axes=(0, 1)), np.full_like(image, image.min())
    common = [min(pair) for pair in zip(image.shape, other.shape, strict=True)]
    here, there = (
        tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(a.shape, common, strict=True))
        for a in (image, other)
    )
    result[here] = other[there]
    return result


def half_black(axis: int) -> Push:
    def push(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        image = image.copy()
        np.moveaxis(image, axis, 0)[image.shape[axis] // 2 :] = image.min()
        return image

    return push


def blank(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    image = image.copy()
    image[tuple(slice(n // 4, 3 * n // 4) for n in image.shape)] = image.mean()
    return image


KINDS: dict[str, Push] = {
    "inverted contrast": lambda image, _: -image,
    "noise of 1.5 standard deviations": lambda image, random: image + random.normal(0, 1.5 * image.std(), image.shape),
    "blurred over 15 voxels": lambda image, _: uniform_filter(image, 15),
    "upside down": lambda image, _: image[:, :, ::-1],
    "back to front": lambda image, _: image[:, ::-1],
    "turned by 90 degrees": turned,
    "one side black": half_black(0),
    "upper half black": half_black(2),
    "middle blank": blank,
    "no prostate, a random texture": lambda image, random: uniform_filter(random.normal(100, 30, image.shape), 5),
}


def outcome(pair: Mapping[str, str], folder: Path, **settings: Any) -> dict[str, Any]:
    """True error in mm and flags of one registration under `settings` of evaluate.json; none where it is refused."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run_config("evaluate.json", datalist=[dict(pair)], output_dir=str(folder), **settings)
    except Exception as error:
        if refusal(error) is None:
            raise
        return {"refused": True}
    (row,) = read_cases(folder / "cases.csv").values()
    return {"refused": False, "error": float(row["true_error_mm"]), "flags": row["flags"]}


def row_of(kind: str, side: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: how many cases of a kind are wrong, and how many of these and of the others are flagged."""
    done = [case for case in found if not case["refused"]]
    wrong = [case for case in done if case["error"] > WRONG]
    other = [case for case in done if case["error"] <= WRONG]
    return {
        "phantoms": kind,
        "image": side,
        "cases": len(found),
        "refused": len(found) - len(done),
        "true error, median mm": float(np.median([case["error"] for case in done])) if done else None,
        "wrong": len(wrong),
        "wrong and flagged": sum(bool(case["flags"]) for case in wrong),
        "not wrong, flagged": f"{sum(bool(case['flags']) for case in other)} of {len(other)}",
    }


def main(patients: int, seed: int, pushed: int, cases: str | None, **settings: Any) -> None:
    sides = {"moving": "MR", "fixed": "TRUS"}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = datalist(str(write_cohort(folder / "cohort", patients, seed, split=(0, 0, 1))), "test")
        progress = tqdm(pairs, desc="as they are", unit="pair")
        found["as they are", ""] = [outcome(pair, folder / "out", **settings) for pair in progress]
        random = np.random.default_rng(seed)
        for (kind, push), side in itertools.product(KINDS.items(), sides):
            group = found.setdefault((kind, sides[side]), [])
            for pair in tqdm(pairs[:pushed], desc=f"{kind}, {sides[side]}", unit="pair"):
                image = nib.load(pair[f"{side}_image"])
                changed = np.ascontiguousarray(push(image.get_fdata(dtype=np.float32), random), dtype=np.float32)
                nib.save(nib.Nifti1Image(changed, image.affine), folder / "pushed.nii.gz")
                pair = dict(pair) | {f"{side}_image": str(folder / "pushed.nii.gz")}
                group.append(outcome(pair, folder / "out", **settings))
    rows = [row_of(kind, side, group) for (kind, side), group in found.items()]
    everything = [case for (_, side), group in found.items() if side for case in group]
    print(table([*rows, row_of("all that were pushed", "", everything)]))
    if cases:
        named = [{"phantoms": kind, "image": side} | case for (kind, side), group in found.items() for case in group]
        write_csv(Path(cases), named)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2031)
    parser.add_argument("--pushed", type=int, default=10, help="patients of each kind and side")
    networks = "the networks of the learned initial transform, instead of the shipped ones"
    parser.add_argument("--segmentation_path", nargs="+", default=argparse.SUPPRESS, help=networks)
    parser.add_argument("--cases", help="a table of every registration, with its error in mm and its flags (CSV)")
    main(**vars(parser.parse_args()))
