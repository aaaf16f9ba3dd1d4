"""How the scans of the realistic and the randomised mode show tissue: grey levels, texture, noise, blur."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.phantoms.grids import along_axes, gaussian_rows, ridge, smooth_noise
from scripts.phantoms.probe import Probe

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


def draw_look(rng: np.random.Generator, levels: Mapping[str, float], wild: bool) -> Look:
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


def render_mr(
    noise: torch.Generator, look: Look, depths: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]
) -> Tensor:
    """T2-weighted signal: soft edges, textures, coil sensitivity, noise, blur. Grey levels 0-255."""
    signal = paint(noise, look, depths, shape, spacing)
    signal -= 25 * ridge(depths["gland"] / 1.2)  # the capsule
    signal *= torch.exp(look.bias * smooth_noise(noise, shape, spacing, 80))
    signal *= (310 / signal.amax()).clamp_max(1)  # scanners scale; only the brightest spots saturate
    return finish(look, add_noise(noise, look, signal.clamp_min_(0)))


def render_trus(
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
    level = paint(noise, look, depths, shape, spacing)
    across, ahead, distance = probe.beam(*points)
    # the machine's settings come from the noise's generator, since nothing else depends on them
    near, decay, loss, sides, echoes, tilt = torch.rand(6, generator=noise, device=noise.device).tolist()
    for name, echo in ECHOES.items():
        level += echo * echoes * ridge(depths[name] / 1.5)
    from_surface = (distance - probe.radius).clamp_min(0)
    level += (50 + 120 * near) * torch.exp(-from_surface / (8 + 16 * decay))
    level -= (1.6 * tilt - 0.4) * (points[2] - probe.position[2])  # less contact towards the base
    level -= 1.3 * loss * from_surface * (1 + 0.5 * sides * (across / distance.clamp_min(1)) ** 2)
    for centre, radius, lost in focal:
        covered, behind, _ = probe.shadow(across, ahead, distance, points[2], centre, radius)
        level -= lost * (covered + 0.5).clamp(0, 1) * behind
    level *= torch.exp(look.bias * smooth_noise(noise, shape, spacing, 40))
    image = add_noise(noise, look, level).clamp_(0, 255)
    image *= (probe.margin(across, ahead, distance) / max(spacing)).clamp(0, 1)
    return finish(look, image)


def paint(
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
        image += (everywhere + within * inner) * smooth_noise(noise, shape, spacing, wavelength)
    image += coarse * smooth_noise(noise, shape, spacing, 14)  # loops of bowel; strands of muscle
    return image


def add_noise(noise: torch.Generator, look: Look, image: Tensor) -> Tensor:
    first, second = torch.randn((2, *image.shape), generator=noise, device=noise.device) * look.noise
    if look.noise_kind == "rician":
        return torch.hypot(image + first, second)
    if look.noise_kind == "gaussian":
        return image + first
    rayleigh = (first**2 + second**2) / (2 * look.noise**2 + 1e-6) + 1e-2
    return image + look.noise * (torch.log(rayleigh) + 0.5)  # log-compressed, mean about 0


def finish(look: Look, image: Tensor) -> Tensor:
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
    matrices = [gaussian_rows(n, n, sigma, image.device) for n, sigma in zip(image.shape, look.blur, strict=True)]
    image = along_axes(image, matrices).clamp_(0, 255)
    return (image / 255) ** look.gamma * 255
