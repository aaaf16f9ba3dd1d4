"""Simulated prostate MR-TRUS pairs whose true displacement is known.

World coordinates are RAS millimetres (x right, y anterior, z superior). The anatomy is a set of implicit functions in
the world of the moving image (MR); the fixed image (TRUS) evaluates the same functions at T(x). Labels are thus exact
in both scans, never resampled:

    moving_label(y) = anatomy(y),    fixed_label(x) = anatomy(T(x)),    T(x) = x + true_displacement(x)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.data.checks import InputError
from scripts.phantoms.anatomy import Anatomy, TrueMap
from scripts.phantoms.clinical import draw_clinical_probe, draw_grids, place_glands, scan_mr, scan_trus
from scripts.phantoms.looks import MR_LEVELS, TRUS_LEVELS, draw_look, render_mr, render_trus
from scripts.phantoms.pelvis import ClinicalAnatomy
from scripts.phantoms.probe import Probe, draw_probe, hard_and_soft

MODES = ("realistic", "randomised", "clinical")
ANATOMIES = {"clinical": ClinicalAnatomy}  # the other modes: `Anatomy`


class PhantomPair(NamedTuple):
    """Two scans of one simulated patient; tensors on one device, affines in NumPy.

    Attributes:
        moving_image, fixed_image: MR and TRUS, float32 in [0, 255], shape (X, Y, Z) of each scan.
        moving_label, fixed_label: uint8 in {0, 1}, shape (X, Y, Z, M); channel m is `label_names[m]`, 0 the gland.
        moving_affine, fixed_affine: voxel -> RAS mm, float64, shape (4, 4). The two worlds share no origin.
        true_displacement: float32, RAS mm on the fixed grid, shape (X, Y, Z, 3), pull-back:
            moving point = fixed point + displacement.
        label_names: M names.
        anatomy: what was scanned.
        true_map: the motion; `true_displacement` on all of space.
        probe: where the TRUS was taken from.
    """

    moving_image: Tensor
    fixed_image: Tensor
    moving_label: Tensor
    fixed_label: Tensor
    moving_affine: np.ndarray
    fixed_affine: np.ndarray
    true_displacement: Tensor
    label_names: tuple[str, ...]
    anatomy: Anatomy
    true_map: TrueMap
    probe: Probe


def simulate_pair(
    rng: np.random.Generator,
    fixed_shape: Sequence[int] = (56, 40, 40),
    fixed_spacing: float | Sequence[float] = 1.6,
    moving_shape: Sequence[int] = (48, 48, 40),
    moving_spacing: float | Sequence[float] = (1.5, 1.5, 1.8),
    mode: str = "realistic",
    anatomy: Anatomy | None = None,
    device: str | torch.device = "cpu",
) -> PhantomPair:
    """One MR and one TRUS of a patient, their labels and the true displacement between them.

    Landmarks that have no voxel in either image are left out.

    Args:
        rng: the only source of randomness. What is drawn of anatomy, motion and look does not depend on the device;
            the noise of the voxels does.
        fixed_shape, moving_shape: voxels (x, y, z) of the TRUS and the MR.
        fixed_spacing, moving_spacing: voxel size in mm.
        mode: "realistic"; "randomised": any contrast, texture, noise and field of view, and larger motion; "clinical":
            a whole pelvis in sharp slices, often with an endorectal coil or a full rectum, and sharp TRUS (grids such
            as clinics have: `scripts.phantoms.clinical.draw_grids`).
        anatomy: of an earlier pair of the patient; drawn if None. The clinical mode has its own kind.
        device: where the images are made and left.
    Raises:
        ValueError: a grid is too small or too coarse, so that the gland is empty; an unknown mode; or an anatomy of
            another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")
    wild, clinical = mode == "randomised", mode == "clinical"
    if anatomy is None:
        anatomy = ANATOMIES.get(mode, Anatomy)(rng)
    if clinical and not isinstance(anatomy, ClinicalAnatomy):
        raise ValueError("mode 'clinical' needs a scripts.phantoms.pelvis.ClinicalAnatomy")
    scans = rng.normal(0, 30, (2, 3)).round(1)  # the centre of each volume, in its own world
    moving_affine = _centred_affine(moving_shape, moving_spacing, scans[0])
    fixed_affine = _centred_affine(fixed_shape, fixed_spacing, scans[1])
    spacings = [affine.diagonal()[:3].tolist() for affine in (moving_affine, fixed_affine)]
    if clinical:
        place = place_glands(rng, anatomy, np.multiply((moving_shape, fixed_shape), spacings))
        motion = {"press": (-2.0, 3.0)} if anatomy.filling == "coil" else {}  # a coil presses as the probe does
    else:
        # where the gland lies in the volume: the spread of the public sample of real pairs
        place = rng.normal(((0, -1.5, -1), (0, -2, 0)), np.multiply((1.5 if wild else 1), ((2.2, 6, 5), (3, 3, 5))))
        place = place.clip(-16, 16)
        motion = {"rotation": 7.0, "deformation": 4.5, "swelling": 0.08, "press": (0.0, 10.0)} if wild else {}
    moving_centre, fixed_centre = scans + place
    true_map = TrueMap(rng, moving_centre, fixed_centre, anatomy.axes[1], **motion)

    def relative(points: Sequence[Tensor]) -> list[Tensor]:
        return [p - centre for p, centre in zip(points, moving_centre.tolist(), strict=True)]

    moving_points, fixed_points = _axes(moving_shape, moving_affine, device), _axes(fixed_shape, fixed_affine, device)
    mapped = true_map(*fixed_points)
    displacement = torch.stack([m - p for m, p in zip(mapped, fixed_points, strict=True)])
    if clinical:
        probe = draw_clinical_probe(rng, anatomy, true_map)
        noise = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        moving_image, moving_labels = scan_mr(rng, noise, anatomy, relative(moving_points), spacings[0])
        fixed_image, fixed_labels = scan_trus(
            rng, noise, anatomy, fixed_points, relative(mapped), spacings[1], probe, hard_and_soft(anatomy, true_map)
        )
    else:
        probe = draw_probe(rng, anatomy, true_map, wild)
        looks = [draw_look(rng, levels, wild) for levels in (MR_LEVELS, TRUS_LEVELS)]
        noise = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        moving_depths, fixed_depths = anatomy.depths(*relative(moving_points)), anatomy.depths(*relative(mapped))
        moving_labels, fixed_labels = (
            torch.stack([depths[n] for n in anatomy.label_names]) > 0 for depths in (moving_depths, fixed_depths)
        )
        focal = hard_and_soft(anatomy, true_map)
        moving_image = render_mr(noise, looks[0], moving_depths, moving_shape, spacings[0])
        fixed_image = render_trus(noise, looks[1], fixed_depths, fixed_points, spacings[1], probe, focal)

    labels = moving_labels, fixed_labels
    seen = torch.stack([label.flatten(1).any(1) for label in labels]).tolist()
    for side, present in zip(("moving", "fixed"), seen, strict=True):
        if not present[0]:
            raise ValueError(
                f"the gland has no voxel in the {side} label: its grid is too small, too coarse or beside it"
            )
    both = [m for m, present in enumerate(zip(*seen, strict=True)) if all(present)]
    moving_label, fixed_label = (label[both].to(torch.uint8).permute(1, 2, 3, 0) for label in labels)

    return PhantomPair(
        moving_image,
        fixed_image,
        moving_label,
        fixed_label,
        moving_affine,
        fixed_affine,
        displacement.permute(1, 2, 3, 0),
        tuple(anatomy.label_names[m] for m in both),
        anatomy,
        true_map,
        probe,
    )


def write_cohort(
    output_dir: str | Path,
    patients: int = 20,
    seed: int = 0,
    split: Sequence[float] = (0.7, 0.1, 0.2),
    pairs_per_patient: int = 1,
    **pair_options,
) -> Path:
    """Write simulated patients as `<output_dir>/{train,val,test}/{fixed,moving}_{images,labels}/case000000.nii.gz`.

    Beside them `true_ddf/case000000.nii.gz` holds the true displacement as ITK, 3D Slicer and ANTs read it: 5-D,
    intent 1007, LPS mm. Images and labels are uint8, the label channels last. The number of a
    case counts through all splits. Case k is drawn from (seed, k) alone, however many cases are made.

    Args:
        output_dir: new or empty.
        patients: how many.
        split: shares of train, val and test. A share above 0 gets at least one patient; train takes the rest.
        pairs_per_patient: the most pairs of a patient. Above 1 a patient has 1 to that many pairs of the same anatomy,
            each with its own motion and noise, and the files are called patient000000_1.nii.gz.
        pair_options: passed to `simulate_pair`. The clinical mode draws the grids that are not given.
    Returns:
        `output_dir`.
    Raises:
        ValueError: the folder is not empty, the shares do not sum to 1, or the patients do not suffice for them.
    """
    output_dir = new_folder(output_dir)
    if len(split) != 3 or min(split) < 0 or not np.isclose(sum(split), 1):
        raise ValueError(f"split {split} must be three shares that sum to 1")
    val, test = (max(1, round(share * patients)) if share else 0 for share in split[1:])
    train = patients - val - test
    if train < (split[0] > 0):
        raise ValueError(f"{patients} patients are too few for the split {split}")
    if pairs_per_patient < 1:
        raise ValueError(f"pairs_per_patient {pairs_per_patient} must be at least 1")

    clinical = pair_options.get("mode") == "clinical"

    def grids(rng: np.random.Generator) -> dict:
        return (draw_grids(rng) if clinical else {}) | pair_options

    for patient, part in enumerate(tqdm(["train"] * train + ["val"] * val + ["test"] * test, desc="phantom")):
        rng = np.random.default_rng([seed, patient])
        if pairs_per_patient == 1:
            write_pair(output_dir / part, f"case{patient:06d}", simulate_pair(rng, **grids(rng)))
            continue
        anatomy = ANATOMIES.get(pair_options.get("mode"), Anatomy)(rng)
        for k in range(1, 1 + int(rng.integers(1, pairs_per_patient + 1))):
            own = np.random.default_rng([seed, patient, k])
            pair = simulate_pair(own, anatomy=anatomy, **grids(own))
            write_pair(output_dir / part, f"patient{patient:06d}_{k}", pair)
    return output_dir


def new_folder(path: str | Path) -> Path:
    """The path of a folder that is empty or does not exist.

    Raises:
        InputError: it holds something.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{path} is not empty: choose a new folder")
    return path


def write_pair(folder: Path, name: str, pair: PhantomPair) -> None:
    """Write a pair as `write_cohort` does, into the five sub-folders of `folder`."""
    lps = pair.true_displacement[:, :, :, None].cpu() * torch.tensor([-1.0, -1.0, 1.0])
    for part, volume, affine in (
        ("moving_images", pair.moving_image.round().to(torch.uint8), pair.moving_affine),
        ("fixed_images", pair.fixed_image.round().to(torch.uint8), pair.fixed_affine),
        ("moving_labels", pair.moving_label, pair.moving_affine),
        ("fixed_labels", pair.fixed_label, pair.fixed_affine),
        ("true_ddf", lps, pair.fixed_affine),
    ):
        image = nib.Nifti1Image(volume.cpu().numpy(), affine)
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        image.header.set_xyzt_units("mm")
        if part == "true_ddf":
            image.header.set_intent("vector")
        path = folder / part / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)


# ---- grids


def _centred_affine(shape: Sequence[int], spacing: float | Sequence[float], centre: np.ndarray) -> np.ndarray:
    """Voxel -> RAS mm with the middle of the volume at `centre`."""
    affine = np.diag([*np.broadcast_to(np.asarray(spacing, float), 3), 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (np.asarray(shape) - 1) / 2
    return affine


def _axes(shape: Sequence[int], affine: np.ndarray, device: torch.device | str) -> list[Tensor]:
    """World coordinates of the voxel centres, RAS mm: shapes (X, 1, 1), (1, Y, 1) and (1, 1, Z)."""
    points = []
    for axis, n in enumerate(shape):
        line = affine[axis, axis] * torch.arange(n, dtype=torch.float64) + affine[axis, 3]
        points.append(line.float().to(device).view([n if i == axis else 1 for i in range(3)]))
    return points
