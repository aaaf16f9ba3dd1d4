"""Simulated prostate MR-TRUS pairs whose true displacement is known.

World coordinates are RAS millimetres (x right, y anterior, z superior). The anatomy is a set of implicit functions in
the world of the moving image (MR); the fixed image (TRUS) evaluates the same functions at T(x). Labels are thus exact
in both scans, never resampled:

    moving_label(y) = anatomy(y),    fixed_label(x) = anatomy(T(x)),    T(x) = x + true_displacement(x)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.data.checks import InputError
from scripts.phantoms.anatomy import Anatomy, TrueMap

MODES = ("realistic", "randomised")
# Grey levels 0-255 of each tissue. Their order of brightness differs between MR and TRUS, as it does in patients.
MR_LEVELS = {"fat": 165, "bowel": 110, "rectus": 60, "muscle": 45, "bone": 70, "levator": 45, "sphincter": 75}
MR_LEVELS |= {"perineum": 75, "plexus": 112, "stroma": 80, "bladder": 190, "vesicle": 130, "rectum": 75}
MR_LEVELS |= {"lumen": 15, "gland": 122, "nodule": 112}
MR_LEVELS |= {"transition_zone": 85, "urethra": 110, "lesion": 55, "cyst": 215, "calcification": 25}
TRUS_LEVELS = {"fat": 110, "bowel": 90, "rectus": 70, "muscle": 60, "bone": 40, "levator": 70, "sphincter": 90}
TRUS_LEVELS |= {"perineum": 85, "plexus": 140, "stroma": 95, "bladder": 15, "vesicle": 60, "rectum": 130}
TRUS_LEVELS |= {"gland": 110, "nodule": 95}
TRUS_LEVELS |= {"transition_zone": 88, "urethra": 60, "lesion": 70, "cyst": 12, "calcification": 250}
ECHOES = {"gland": 25, "transition_zone": 14, "bladder": 35}  # of the boundary, in TRUS


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


class Probe(NamedTuple):
    """A cylinder in the rectum and the sector it sees, in the fixed world; lengths in mm, angles in radians.

    Attributes:
        position: x, y and z of a point of its axis.
        slopes: of x and y along z.
        radius: of the probe; nothing is seen within.
        depth: distance from the axis where the picture ends.
        half_angle: of the sector; None: the picture fills the volume.
        roll: of the sector about the axis.
    """

    position: tuple[float, float, float]
    slopes: tuple[float, float]
    radius: float
    depth: float
    half_angle: float | None
    roll: float

    def beam(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offset from the axis along x and along y, and distance from it, of fixed world points, mm."""
        z = z - self.position[2]
        across, ahead = x - self.position[0] - self.slopes[0] * z, y - self.position[1] - self.slopes[1] * z
        return across, ahead, (across**2 + ahead**2).sqrt()

    def margin(self, across: Tensor, ahead: Tensor, distance: Tensor) -> Tensor:
        """Distance inside the border of the sector, mm, negative outside."""
        if self.half_angle is None:
            return torch.full_like(distance, torch.inf)
        left, right = self.half_angle - self.roll, self.half_angle + self.roll
        sides = ahead * np.sin(left) + across * np.cos(left), ahead * np.sin(right) - across * np.cos(right)
        # beyond a half-angle of 90 degrees the sector is not convex: either side suffices
        wings = torch.minimum(*sides) if self.half_angle < np.pi / 2 else torch.maximum(*sides)
        return torch.minimum(torch.minimum(distance - self.radius, self.depth - distance), wings)


class Look(NamedTuple):
    """How one scan shows the tissues; lengths in mm, grey levels of 255.

    Attributes:
        levels: tissue -> grey level; a tissue that is missing here looks as what surrounds it.
        textures: (wavelength, amplitude everywhere, amplitude more in the transition zone), several.
        bias: relative amplitude of a smooth multiplicative field.
        noise, noise_kind: standard deviation; "rician", "gaussian", "speckle".
        blur: standard deviation of the point spread along each axis, voxels.
        gamma: of the final grey levels; inverted: whether bright becomes dark.
        dark_ends: share of the slices at each end of z that is black.
        border: share of the volume, at each of the 6 faces, that is black.
    """

    levels: dict[str, float]
    textures: list[tuple[float, float, float]]
    bias: float
    noise: float
    noise_kind: str
    blur: tuple[float, float, float]
    gamma: float
    inverted: bool
    dark_ends: tuple[float, float]
    border: tuple[float, ...]


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
        mode: "realistic", or "randomised": any contrast, texture, noise and field of view, and larger motion.
        anatomy: of an earlier pair of the patient; drawn if None.
        device: where the images are made and left.
    Raises:
        ValueError: a grid is too small or too coarse, so that the gland is empty; or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")
    wild = mode == "randomised"
    if anatomy is None:
        anatomy = Anatomy(rng)
    scans = rng.normal(0, 30, (2, 3)).round(1)  # the centre of each volume, in its own world
    moving_affine = _centred_affine(moving_shape, moving_spacing, scans[0])
    fixed_affine = _centred_affine(fixed_shape, fixed_spacing, scans[1])
    # where the gland lies in the volume: the spread of the public sample of real pairs
    place = rng.normal(((0, -1.5, -1), (0, -2, 0)), np.multiply((1.5 if wild else 1), ((2.2, 6, 5), (3, 3, 5))))
    moving_centre, fixed_centre = scans + place.clip(-16, 16)
    stronger = {"rotation": 7.0, "deformation": 4.5, "swelling": 0.08, "press": (0.0, 10.0)} if wild else {}
    true_map = TrueMap(rng, moving_centre, fixed_centre, anatomy.axes[1], **stronger)
    probe = _draw_probe(rng, anatomy, true_map, wild)
    looks = [_draw_look(rng, levels, wild) for levels in (MR_LEVELS, TRUS_LEVELS)]
    noise = torch.Generator(device).manual_seed(int(rng.integers(2**62)))

    def relative(points: Sequence[Tensor]) -> list[Tensor]:
        return [p - centre for p, centre in zip(points, moving_centre.tolist(), strict=True)]

    moving_points, fixed_points = _axes(moving_shape, moving_affine, device), _axes(fixed_shape, fixed_affine, device)
    mapped = true_map(*fixed_points)
    moving_depths = anatomy.depths(*relative(moving_points))
    fixed_depths = anatomy.depths(*relative(mapped))
    displacement = torch.stack([m - p for m, p in zip(mapped, fixed_points, strict=True)])

    labels = [torch.stack([depths[n] for n in anatomy.label_names]) > 0 for depths in (moving_depths, fixed_depths)]
    seen = torch.stack([label.flatten(1).any(1) for label in labels]).tolist()
    for side, present in zip(("moving", "fixed"), seen, strict=True):
        if not present[0]:
            raise ValueError(
                f"the gland has no voxel in the {side} label: its grid is too small, too coarse or beside it"
            )
    both = [m for m, present in enumerate(zip(*seen, strict=True)) if all(present)]
    moving_label, fixed_label = (label[both].to(torch.uint8).permute(1, 2, 3, 0) for label in labels)

    spacings = [affine.diagonal()[:3].tolist() for affine in (moving_affine, fixed_affine)]
    return PhantomPair(
        _render_mr(noise, looks[0], moving_depths, moving_shape, spacings[0]),
        _render_trus(
            noise, looks[1], fixed_depths, fixed_points, spacings[1], probe, _hard_and_soft(anatomy, true_map)
        ),
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
        pair_options: passed to `simulate_pair`.
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

    for patient, part in enumerate(tqdm(["train"] * train + ["val"] * val + ["test"] * test, desc="phantom")):
        rng = np.random.default_rng([seed, patient])
        if pairs_per_patient == 1:
            write_pair(output_dir / part, f"case{patient:06d}", simulate_pair(rng, **pair_options))
            continue
        anatomy = Anatomy(rng)
        for k in range(1, 1 + int(rng.integers(1, pairs_per_patient + 1))):
            pair = simulate_pair(np.random.default_rng([seed, patient, k]), anatomy=anatomy, **pair_options)
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


# ---- what is drawn


def _draw_probe(rng: np.random.Generator, anatomy: Anatomy, true_map: TrueMap, wild: bool) -> Probe:
    """A probe behind the gland: its surface a rectal wall away from it, wherever the motion has put it."""
    surface = anatomy.axes[1] + min(0.0, anatomy.contact + 0.5)  # in the midline
    behind = torch.tensor(true_map.moving_centre) - torch.tensor([0, surface, 0])
    x, y, z = (p.item() for p in true_map.inverse(*behind[:, None]))
    radius = anatomy.rectum[1] * rng.uniform(0.8, 1.05)  # it fills the rectum
    gap = rng.uniform(-1, 8) if wild else rng.uniform(1, 5)
    half_angle = np.deg2rad(rng.uniform(35, 110) if wild else rng.uniform(48, 80))
    return Probe(
        position=(x + rng.normal(0, 2), y - gap - radius, z),
        slopes=(rng.normal(0, 0.03), rng.normal(0, 0.1)),
        radius=radius,
        depth=radius + (rng.uniform(45, 110) if wild else rng.uniform(55, 90)),
        half_angle=None if wild and rng.random() < 0.15 else half_angle,
        roll=rng.normal(0, np.deg2rad(8 if wild else 3)),
    )


def _draw_look(rng: np.random.Generator, levels: Mapping[str, float], wild: bool) -> Look:
    """The look of one scan whose tissues usually have `levels`."""
    mr = levels is MR_LEVELS
    names = list(levels)
    drawn = np.array(list(levels.values())) * np.exp(rng.normal(0, 0.12, len(names))) + rng.normal(0, 5, len(names))
    if mr:
        drawn[names.index("lumen")] = rng.choice([5, 10, 20, 60, 100])  # gas, stool, collapsed
        drawn[names.index("rectum")] = rng.uniform(45, 110)  # the wall may look like the gland
    if not mr:  # soft tissues differ little in TRUS
        drawn = 100 + (drawn - 100) * rng.uniform(0.25, 1)
    if wild:
        share = rng.uniform(0.3, 1)
        drawn = share * rng.uniform(0, 255, len(names)) + (1 - share) * drawn
    kept = {n: float(v) for n, v in zip(names, drawn, strict=True) if not wild or n == "fat" or rng.random() > 0.15}
    heavy = rng.random() < 0.5  # as the public sample, smoothed for anonymity; else as scanners give it
    blur = rng.uniform(0, 2.5) if wild else rng.uniform(1, 2.4) if heavy else rng.uniform(0.3, 0.8)
    strength = rng.uniform(0, 2.5) if wild else rng.uniform(0.6, 1.3)
    dark = rng.random() < (0.4 if wild else 0.75 if mr else 0)
    bordered = wild and rng.random() < 0.3
    return Look(
        levels=kept,
        textures=[(rng.uniform(4, 9), 7 * strength, 6 * strength), (rng.uniform(10, 30), 9 * strength, 9 * strength)],
        bias=rng.uniform(0, 0.6) if wild else rng.uniform(0.1, 0.4) if mr else rng.uniform(0.05, 0.15),
        noise=rng.uniform(0, 30) if wild else rng.uniform(3, 9) if mr else rng.uniform(8, 22),
        noise_kind=str(rng.choice(["rician", "gaussian", "speckle"])) if wild else "rician" if mr else "speckle",
        blur=tuple(np.clip(blur * rng.uniform(0.8, 1.25, 3), 0, 3).tolist()),
        gamma=float(np.exp(rng.uniform(-0.7, 0.7))) if wild else rng.uniform(0.9, 1.4) if mr else rng.uniform(0.7, 1.5),
        inverted=bool(wild and mr and rng.random() < 0.25),
        dark_ends=tuple(rng.uniform(0, 0.12, 2).tolist()) if dark else (0.0, 0.0),
        border=tuple(rng.uniform(0, 0.12, 6).tolist()) if bordered else (0.0,) * 6,
    )


# ---- what is seen


def _render_mr(
    noise: torch.Generator, look: Look, depths: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]
) -> Tensor:
    """T2-weighted signal: soft edges, textures, coil sensitivity, noise, blur. Grey levels 0-255."""
    signal = _paint(noise, look, depths, shape, spacing)
    signal -= 25 * _ridge(depths["gland"] / 1.2)  # the capsule
    signal *= torch.exp(look.bias * _smooth_noise(noise, shape, spacing, 80))
    signal *= (310 / signal.amax()).clamp_max(1)  # scanners scale; only the brightest spots saturate
    return _finish(look, _add_noise(noise, look, signal.clamp_min_(0)))


def _render_trus(
    noise: torch.Generator,
    look: Look,
    depths: Mapping[str, Tensor],
    points: Sequence[Tensor],
    spacing: Sequence[float],
    probe: Probe,
    focal: Sequence[tuple[list[float], float, float]],
) -> Tensor:
    """Log-compressed echo: bright interfaces, speckle, near field, attenuation, shadows, a sector. Grey levels 0-255.

    Args:
        points: x, y, z of the fixed world, mm.
        focal: (centre in the fixed world, radius, grey levels lost behind it) of what changes the beam.
    """
    shape = depths["gland"].shape
    level = _paint(noise, look, depths, shape, spacing)
    across, ahead, distance = probe.beam(*points)
    # the machine's settings come from the noise's generator, since nothing else depends on them
    near, decay, loss, sides, echoes, tilt = torch.rand(6, generator=noise, device=noise.device).tolist()
    for name, echo in ECHOES.items():
        level += echo * echoes * _ridge(depths[name] / 1.5)
    from_surface = (distance - probe.radius).clamp_min(0)
    level += (50 + 120 * near) * torch.exp(-from_surface / (8 + 16 * decay))
    level -= (1.6 * tilt - 0.4) * (points[2] - probe.position[2])  # less contact towards the base
    level -= 1.3 * loss * from_surface * (1 + 0.5 * sides * (across / distance.clamp_min(1)) ** 2)
    for centre, radius, lost in focal:
        c_across, c_ahead, c_distance = (v.item() for v in probe.beam(*torch.tensor(centre)[:, None]))
        beside = (across * c_ahead - ahead * c_across) / distance.clamp_min(1)  # from the beam to the centre
        covered = radius - (beside**2 + (points[2] - centre[2]) ** 2).sqrt()
        level -= lost * (covered + 0.5).clamp(0, 1) * ((distance - c_distance - 0.6 * radius) / 2).clamp(0, 1)
    level *= torch.exp(look.bias * _smooth_noise(noise, shape, spacing, 40))
    image = _add_noise(noise, look, level).clamp_(0, 255)
    image *= (probe.margin(across, ahead, distance) / max(spacing)).clamp(0, 1)
    return _finish(look, image)


def _hard_and_soft(anatomy: Anatomy, true_map: TrueMap) -> list[tuple[list[float], float, float]]:
    """(centre in the fixed world, radius, grey levels lost behind) of calcifications, and of cysts, which lose less."""
    found = []
    for name, centre in anatomy.centres.items():
        kind = name.removesuffix("_2")
        if kind in ("calcification", "cyst"):
            moving = torch.tensor(true_map.moving_centre) + torch.tensor(centre)
            fixed = [p.item() for p in true_map.inverse(*moving[:, None])]
            found.append((fixed, anatomy.radii[name], 90.0 if kind == "calcification" else -20.0))
    return found


def _paint(
    noise: torch.Generator, look: Look, depths: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]
) -> Tensor:
    """Grey levels of the structures laid over each other, an edge a voxel wide, and their textures."""
    image = torch.full(tuple(shape), look.levels["fat"], device=noise.device)
    width = float(np.mean(spacing))
    for name, depth in depths.items():
        level = look.levels.get(name.removesuffix("_2"))
        if level is not None:  # the poles look like the tissue around them
            share = (depth / width + 0.5).clamp_(0, 1)
            image += share * (level - image)
    inner = (depths["transition_zone"] / width + 0.5).clamp_(0, 1)
    coarse = 60 * (depths["bowel"] / 6).clamp(0, 1) * ("bowel" in look.levels)
    coarse = coarse + 18 * (depths["perineum"] / 6).clamp(0, 1) * ("perineum" in look.levels)
    for wavelength, everywhere, within in look.textures:
        image += (everywhere + within * inner) * _smooth_noise(noise, shape, spacing, wavelength)
    image += coarse * _smooth_noise(noise, shape, spacing, 14)  # loops of bowel; strands of muscle
    return image


def _add_noise(noise: torch.Generator, look: Look, image: Tensor) -> Tensor:
    first, second = torch.randn((2, *image.shape), generator=noise, device=noise.device) * look.noise
    if look.noise_kind == "rician":
        return torch.hypot(image + first, second)
    if look.noise_kind == "gaussian":
        return image + first
    rayleigh = (first**2 + second**2) / (2 * look.noise**2 + 1e-6) + 1e-2
    return image + look.noise * (torch.log(rayleigh) + 0.5)  # log-compressed, mean about 0


def _finish(look: Look, image: Tensor) -> Tensor:
    """Black ends and borders, blur, inversion, gamma; grey levels 0-255."""
    low, high = (round(share * image.shape[2]) for share in look.dark_ends)
    if look.inverted:
        image = 255 - image
    image[..., :low] = 0
    image[..., image.shape[2] - high :] = 0
    for axis in range(3):
        n = image.shape[axis]
        image.narrow(axis, 0, round(look.border[2 * axis] * n)).zero_()
        last = round(look.border[2 * axis + 1] * n)
        image.narrow(axis, n - last, last).zero_()
    matrices = [_gaussian_rows(n, n, sigma, image.device) for n, sigma in zip(image.shape, look.blur, strict=True)]
    image = _along_axes(image, matrices).clamp_(0, 255)
    return (image / 255) ** look.gamma * 255


# ---- arithmetic on grids


def _ridge(distance: Tensor) -> Tensor:
    """1 at a distance of 0, falling off on both sides within about 1."""
    return 1 / (1 + distance**2) ** 2


def _smooth_noise(noise: torch.Generator, shape: Sequence[int], spacing: Sequence[float], wavelength: float) -> Tensor:
    """A smooth random function of the voxels, mean 0, variance about 1: blurred noise of a coarse lattice."""
    step = wavelength / 2
    sizes = [int(n * s / step) + 4 for n, s in zip(shape, spacing, strict=True)]
    matrices = []
    for n, s, size in zip(shape, spacing, sizes, strict=True):
        rows = _gaussian_rows(n, size, 0.8, noise.device, s / step)
        matrices.append(rows / rows.norm(dim=1, keepdim=True))
    return _along_axes(torch.randn(sizes, generator=noise, device=noise.device), matrices)


def _gaussian_rows(n: int, size: int, sigma: float, device: torch.device | str, step: float = 1.0) -> Tensor:
    """Gaussian weights (n, size) of `size` samples for n points a `step` apart, both centred; rows sum to 1."""
    offset = step * (torch.arange(n) - (n - 1) / 2)[:, None] - (torch.arange(size) - (size - 1) / 2)
    weights = torch.exp(-0.5 * (offset / max(sigma, 0.05)) ** 2) * (offset.abs() <= max(4 * sigma, 0.5))
    return (weights / weights.sum(1, keepdim=True)).to(device)


def _along_axes(volume: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A matrix along each axis of (X, Y, Z): separable blur or interpolation, at a matrix product's speed."""
    x, y, z = matrices
    volume = volume @ z.T
    volume = y @ volume
    return (x @ volume.flatten(1)).view(-1, *volume.shape[1:])


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
