"""Simulated prostate MR-TRUS pairs whose true displacement is known.

World coordinates are RAS millimetres (x right, y anterior, z superior). The anatomy is a set of implicit functions in
the world of the moving image (MR); the fixed image (TRUS) evaluates the same functions at T(x). Labels are thus exact
in both scans, never resampled:

    moving_label(y) = anatomy(y),    fixed_label(x) = anatomy(T(x)),    T(x) = x + true_displacement(x)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy import ndarray
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation
from scipy.special import expit
from tqdm import tqdm

# Grey levels 0-255 of each tissue. Their order of brightness differs between MR and TRUS, as it does in patients.
MR_LEVELS = {"fat": 150, "muscle": 45, "bladder": 225, "rectum": 85, "lumen": 8, "gland": 165, "transition_zone": 95}
MR_LEVELS |= {"urethra": 150, "lesion": 50, "cyst": 240, "calcification": 25}
TRUS_LEVELS = {"fat": 150, "muscle": 80, "bladder": 15, "rectum": 165, "lumen": 5, "gland": 112, "transition_zone": 90}
TRUS_LEVELS |= {"urethra": 50, "lesion": 75, "cyst": 10, "calcification": 245}

FOCAL = ("lesion", "cyst", "calcification")  # seen by their own contrast
POLES = ("apex", "base")  # seen only by the shape around them


class PhantomPair(NamedTuple):
    """One simulated patient.

    Attributes:
        moving_image, fixed_image: MR and TRUS, float32 in [0, 255], shape (X, Y, Z) of each scan.
        moving_label, fixed_label: uint8 in {0, 1}, shape (X, Y, Z, M); channel m is `label_names[m]`, 0 the gland.
        moving_affine, fixed_affine: voxel -> RAS mm, shape (4, 4). The two worlds share no origin.
        true_displacement: float32, RAS mm on the fixed grid, shape (X, Y, Z, 3), pull-back:
            moving point = fixed point + displacement.
        label_names: M names.
    """

    moving_image: ndarray
    fixed_image: ndarray
    moving_label: ndarray
    fixed_label: ndarray
    moving_affine: ndarray
    fixed_affine: ndarray
    true_displacement: ndarray
    label_names: tuple[str, ...]


class Anatomy:
    """A prostate and its neighbours as implicit functions of points relative to the gland's centre, RAS mm."""

    def __init__(self, rng: np.random.Generator):
        axes = np.array([24, 17, 21]) + np.array([3, 2.5, 3]) * rng.normal(size=3).clip(-2, 2)
        volume = 4 / 3 * np.pi * axes.prod()
        self.axes = axes * (np.clip(volume, 25e3, 60e3) / volume) ** (1 / 3)
        self.shape = rng.normal(0, 0.04, 6)
        self.inner = rng.uniform(0.55, 0.75)
        self.bend = rng.uniform(2, 6)
        self.rectum_radius = rng.uniform(9, 13)
        self.bladder_axes = np.array([rng.uniform(22, 32), rng.uniform(16, 24), rng.uniform(8, 18)])

        names = np.array(FOCAL + POLES)[rng.permutation(5)[: rng.integers(2, 5)]]
        self.landmarks = dict(zip(names.tolist(), rng.uniform(3, 6, len(names)), strict=True))
        centres = np.zeros((len(names), 3))
        while pdist(centres).min() < 0.45:  # gland units: apart, so that none hides another
            centres = 0.65 * np.cbrt(rng.uniform(size=(len(names), 1))) * _directions(rng.normal(size=centres.shape))
            centres[names == "apex"], centres[names == "base"] = (0, 0, -0.8), (0, 0, 0.8)
        self.centres = dict(zip(names.tolist(), centres * self.axes, strict=True))

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("gland", "transition_zone", "urethra", *self.landmarks)

    def depths(self, points: ndarray) -> dict[str, ndarray]:
        """Approximate depth below the surface of each structure in mm, positive inside; later ones cover earlier ones.

        Args:
            points: relative to the gland's centre, RAS mm, shape (..., 3).
        Returns:
            name -> shape (...).
        """
        x, y, z = np.moveaxis(points, -1, 0)
        a, b, c = self.axes
        rectum = self.rectum_radius - np.hypot(x, y + b + self.rectum_radius + 1 - z**2 / 120)
        depths = {
            "muscle": np.abs(x) - a - 9 + (y + 4) ** 2 / 120 - 0.15 * z,  # the pelvis narrows downwards
            "bladder": _ellipsoid((points - (0, 8, c + 0.6 * self.bladder_axes[2])) / self.bladder_axes) * 15,
            "rectum": rectum,
            "lumen": rectum - 3,
        }
        p = points / self.axes
        p[..., :2] /= 1 + 0.18 * np.tanh(p[..., 2:])  # narrow at the apex, broad at the base
        i, j, k = np.moveaxis(_directions(p), -1, 0)
        bulge = np.stack([i * j, i * k, j * k, i**2 - j**2, i**3, k**3], axis=-1) @ self.shape
        # The rectum leaves a groove in the posterior midline.
        groove = 0.12 * np.exp(-((i / 0.35) ** 2)) * np.clip(-j, 0, None) ** 3
        gland = _ellipsoid(p / (1 + bulge - groove)[..., None]) * self.axes.mean()
        inside = {
            "gland": gland,
            "transition_zone": _ellipsoid((p - (0, 0.2, 0.1)) / self.inner) * self.inner * self.axes.mean(),
            "urethra": 3 - np.hypot(x, y - self.bend * (1 - (z / c) ** 2)),
        }
        inside |= {name: r - np.linalg.norm(points - self.centres[name], axis=-1) for name, r in self.landmarks.items()}
        return depths | {name: np.minimum(depth, gland) for name, depth in inside.items()}


class TrueMap:
    """T(x) = c_moving + R (x - c_fixed) + Σ_k a_k exp(-|x - c_fixed - p_k|² / 2 s_k²), fixed -> moving world, RAS mm.

    The first term of the sum is the probe, which presses on the gland from behind. The others are random.
    exp(-r² / 2s²) is nowhere steeper than e^{-1/2} / s, so with Σ_k |a_k| e^{-1/2} / s_k < 1, and R a rotation, T is
    invertible and its Jacobian determinant positive on the whole space: the a_k are scaled down where this needs it.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        moving_centre: ndarray,
        fixed_centre: ndarray,
        gland_depth: float = 17.0,
        rotation: float = 4.0,
        deformation: float = 3.0,
    ):
        """Draw a map.

        Args:
            moving_centre, fixed_centre: of the gland in each world, RAS mm, shape (3,).
            gland_depth: from the gland's centre to its posterior surface, mm.
            rotation: standard deviation about each axis, degrees.
            deformation: standard deviation of each component of the random a_k, mm.
        """
        self.moving_centre, self.fixed_centre = moving_centre, fixed_centre
        self.rotation = Rotation.from_rotvec(rng.normal(0, rotation, 3), degrees=True).as_matrix()
        self.centres = np.vstack([[0, -gland_depth - 2, 0], rng.normal(0, 12, (4, 3))])
        self.widths = np.append(18, rng.uniform(10, 15, 4))
        self.amplitudes = np.vstack([[0, -rng.uniform(2, 6), 0], rng.normal(0, deformation, (4, 3))])
        steepest = np.sum(np.linalg.norm(self.amplitudes, axis=1) / self.widths) * np.exp(-0.5)
        self.amplitudes *= min(1, 0.85 / steepest)

    def __call__(self, points: ndarray) -> ndarray:
        """Moving world points of fixed world points, RAS mm, shape (..., 3)."""
        points = points - self.fixed_centre
        mapped = self.moving_centre + points @ self.rotation.T
        for amplitude, centre, width in zip(self.amplitudes, self.centres, self.widths, strict=True):
            squared = np.sum((points - centre) ** 2, axis=-1, keepdims=True)
            mapped += amplitude * np.exp(-squared / (2 * width**2))
        return mapped


def simulate_pair(
    rng: np.random.Generator,
    fixed_shape: Sequence[int] = (40, 56, 40),
    fixed_spacing: float | Sequence[float] = 1.6,
    moving_shape: Sequence[int] = (48, 48, 40),
    moving_spacing: float | Sequence[float] = (1.5, 1.5, 1.8),
) -> PhantomPair:
    """One patient: an MR, a TRUS, their labels and the true displacement between them.

    Args:
        rng: the only source of randomness.
        fixed_shape, moving_shape: voxels (x, y, z) of the TRUS and the MR.
        fixed_spacing, moving_spacing: voxel size in mm.
    Raises:
        ValueError: a grid is too small or too coarse for the anatomy, so that a label is empty.
    """
    scans = rng.normal(0, 30, (2, 3)).round(1)  # the centre of each volume, in its own world
    moving_affine = _centred_affine(moving_shape, moving_spacing, scans[0])
    fixed_affine = _centred_affine(fixed_shape, fixed_spacing, scans[1])
    moving_centre, fixed_centre = scans + rng.normal(0, 3.2, (2, 3)).clip(-6, 6)  # of the gland
    anatomy = Anatomy(rng)
    true_map = TrueMap(rng, moving_centre, fixed_centre, gland_depth=anatomy.axes[1])

    moving_points, fixed_points = _points(moving_shape, moving_affine), _points(fixed_shape, fixed_affine)
    mapped_points = true_map(fixed_points)
    moving_depths = anatomy.depths(moving_points - moving_centre)
    fixed_depths = anatomy.depths(mapped_points - moving_centre)
    # The probe lies in the rectum; only its place steers the beam, so rotation and deformation need not be followed.
    probe = fixed_centre - (0, anatomy.axes[1] + anatomy.rectum_radius, 0)

    def labels(depths: dict[str, ndarray], which: str) -> ndarray:
        label = np.stack([depths[name] > 0 for name in anatomy.label_names], axis=-1).astype(np.uint8)
        for name, voxels in zip(anatomy.label_names, label.sum((0, 1, 2), dtype=int), strict=True):
            if voxels == 0:
                raise ValueError(f"the {name} has no voxel in the {which} label: its grid is too small or too coarse")
        return label

    return PhantomPair(
        moving_image=_render_mr(rng, moving_depths, moving_points - moving_centre),
        fixed_image=_render_trus(rng, fixed_depths, mapped_points - moving_centre, fixed_points - probe),
        moving_label=labels(moving_depths, "moving"),
        fixed_label=labels(fixed_depths, "fixed"),
        moving_affine=moving_affine,
        fixed_affine=fixed_affine,
        true_displacement=(mapped_points - fixed_points).astype(np.float32),
        label_names=anatomy.label_names,
    )


def write_cohort(
    output_dir: str | Path,
    patients: int = 20,
    seed: int = 0,
    split: Sequence[float] = (0.7, 0.1, 0.2),
    **pair_options,
) -> Path:
    """Write simulated patients as `<output_dir>/{train,val,test}/{fixed,moving}_{images,labels}/case000000.nii.gz`.

    Beside them `true_ddf/case000000.nii.gz` holds the true displacement as ITK, 3D Slicer and ANTs read it: 5-D,
    intent 1007, LPS mm. Images and labels are uint8, the label channels last. The number of a
    case counts through all splits. Case k is drawn from (seed, k) alone, however many cases are made.

    Args:
        output_dir: new or empty.
        patients: how many, one pair each.
        split: shares of train, val and test. A share above 0 gets at least one patient; train takes the rest.
        pair_options: passed to `simulate_pair`.
    Returns:
        `output_dir`.
    Raises:
        ValueError: the folder is not empty, the shares do not sum to 1, or the patients do not suffice for them.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty: choose a new folder")
    if len(split) != 3 or min(split) < 0 or not np.isclose(sum(split), 1):
        raise ValueError(f"split {split} must be three shares that sum to 1")
    val, test = (max(1, round(share * patients)) if share else 0 for share in split[1:])
    train = patients - val - test
    if train < (split[0] > 0):
        raise ValueError(f"{patients} patients are too few for the split {split}")

    for case, part in enumerate(tqdm(["train"] * train + ["val"] * val + ["test"] * test, desc="phantom")):
        pair = simulate_pair(np.random.default_rng([seed, case]), **pair_options)
        lps = pair.true_displacement[:, :, :, None] * np.float32([-1, -1, 1])
        for folder, array, affine in (
            ("moving_images", pair.moving_image.round().astype(np.uint8), pair.moving_affine),
            ("fixed_images", pair.fixed_image.round().astype(np.uint8), pair.fixed_affine),
            ("moving_labels", pair.moving_label, pair.moving_affine),
            ("fixed_labels", pair.fixed_label, pair.fixed_affine),
            ("true_ddf", lps, pair.fixed_affine),
        ):
            image = nib.Nifti1Image(array, affine)
            image.set_sform(affine, code=1)
            image.set_qform(affine, code=1)
            image.header.set_xyzt_units("mm")
            if folder == "true_ddf":
                image.header.set_intent("vector")
            path = output_dir / part / folder / f"case{case:06d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(image, path)
    return output_dir


def _render_mr(rng: np.random.Generator, depths: dict[str, ndarray], points: ndarray) -> ndarray:
    """T2-weighted signal: mixed transition zone, dark capsule, bias field, mild blur, Rician noise."""
    signal = _paint(rng, depths, MR_LEVELS) + 8 * _waves(rng, wavelength=14)(points)
    signal += 22 * expit(depths["transition_zone"]) * _waves(rng, wavelength=11)(points)
    signal -= 45 * np.exp(-(depths["gland"] ** 2))
    signal *= 1 + 0.12 * _waves(rng, wavelength=150)(points)
    signal = gaussian_filter(signal, 0.5)
    noise = rng.normal(0, 5, (2, *signal.shape))
    return np.hypot(signal + noise[0], noise[1]).clip(0, 255).astype(np.float32)


def _render_trus(rng: np.random.Generator, depths: dict[str, ndarray], points: ndarray, from_probe: ndarray) -> ndarray:
    """Log-compressed echo (60 dB): bright interfaces, Rayleigh speckle, attenuation, a fan that opens at the probe.

    Args:
        points: relative to the gland's centre in the moving world, mm, shape (X, Y, Z, 3); textures follow it.
        from_probe: relative to the probe's axis in the fixed world, mm, shape (X, Y, Z, 3).
    """
    level = _paint(rng, depths, TRUS_LEVELS) + 14 * _waves(rng, wavelength=16)(points)
    for name, echo in {"gland": 55, "transition_zone": 30, "bladder": 60}.items():
        level += echo * np.exp(-((depths[name] / 1.5) ** 2))
    beam, across = np.hypot(from_probe[..., 0], from_probe[..., 1]), np.abs(np.arctan2(*from_probe.T[:2])).T

    amplitude = 10 ** (
        (level / 255 - 1) * 60 / 20
    )  # undo the compression: speckle and attenuation multiply the amplitude
    real, imaginary = (gaussian_filter(rng.normal(size=level.shape), 0.5) for _ in range(2))
    speckle = np.hypot(real, imaginary)
    envelope = amplitude * speckle / speckle.mean() * 10 ** (-0.35 * (beam - 25) / 20)
    image = 255 * (1 + 20 * np.log10(gaussian_filter(envelope, 0.5) + 1e-6) / 60)
    fan = expit((beam - 10) / 0.8) * expit((np.deg2rad(68) - across) * 25) * expit((62 - beam) / 0.8)
    return (image.clip(0, 255) * fan).astype(np.float32)


def _paint(rng: np.random.Generator, depths: dict[str, ndarray], levels: dict[str, float]) -> ndarray:
    """Grey levels of the structures laid over each other with soft edges; each patient's tissues vary a little."""
    image = np.full(depths["gland"].shape, float(levels["fat"]))
    for name, depth in depths.items():
        if name in levels:  # the poles look like the tissue around them
            image += expit(depth / 0.4) * (levels[name] * rng.uniform(0.85, 1.15) - image)
    return image


def _waves(rng: np.random.Generator, wavelength: float, count: int = 12) -> Callable[[ndarray], ndarray]:
    """A smooth random function of points (..., 3) in mm, mean 0, variance 1: plane waves in random directions."""
    vectors = _directions(rng.normal(size=(count, 3))) * 2 * np.pi / (wavelength * rng.uniform(0.7, 1.5, (count, 1)))
    phases = rng.uniform(0, 2 * np.pi, count)
    return lambda points: np.cos(points @ vectors.T + phases).sum(-1) * np.sqrt(2 / count)


def _directions(vectors: ndarray) -> ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _ellipsoid(p: ndarray) -> ndarray:
    """1 at the centre, 0 on the unit sphere, negative outside."""
    return 1 - np.linalg.norm(p, axis=-1)


def _centred_affine(shape: Sequence[int], spacing: float | Sequence[float], centre: ndarray) -> ndarray:
    """Voxel -> RAS mm with the middle of the volume at `centre`."""
    affine = np.diag([*np.broadcast_to(np.asarray(spacing, float), 3), 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (np.asarray(shape) - 1) / 2
    return affine


def _points(shape: Sequence[int], affine: ndarray) -> ndarray:
    """World points of all voxel centres, RAS mm, shape (X, Y, Z, 3)."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
