"""How the scans of the clinical mode show tissue: sharp T2 slices of a whole pelvis, sharp TRUS of a stepper.

MR is painted at three levels within each slice and averaged, so that edges are sharp in the plane and partial volumes
stand where a surface is oblique to it. Both scans are painted a few slices at a time, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from scripts.phantoms.anatomy import TrueMap
from scripts.phantoms.grids import along_axes, gaussian_rows, ridge, smooth_noise
from scripts.phantoms.pelvis import ClinicalAnatomy
from scripts.phantoms.probe import Probe

# tissue -> grey level of 255, grain: amplitudes of the fine, the middle and the coarse texture
MR = {
    "fat": (185, 8, 10, 10),
    "air": (2, 0, 0, 0),
    "skin": (95, 0, 0, 0),
    "hip": (42, 6, 5, 4),
    "gluteus": (44, 7, 5, 4),
    "septum": (112, 20, 12, 8),
    "rectus": (45, 6, 4, 0),
    "vessel": (14, 0, 5, 0),
    "vein": (70, 5, 30, 0),
    "bone": (22, 0, 0, 0),
    "marrow": (125, 12, 14, 14),
    "head": (165, 8, 8, 8),
    "bowel": (100, 15, 45, 50),
    "sacrum": (80, 10, 12, 5),
    "levator": (45, 5, 4, 0),
    "sphincter": (62, 10, 12, 5),
    "plexus": (120, 34, 40, 10),
    "penis": (105, 12, 15, 0),
    "urethral_sphincter": (60, 4, 4, 0),
    "urethral_wall": (115, 8, 8, 0),
    "bladder_wall": (55, 6, 6, 0),
    "bladder": (235, 0, 0, 5),
    "vesicle": (95, 10, 12, 0),
    "vesicle_lumen": (200, 10, 15, 15),
    "rectum": (62, 8, 8, 0),
    "mucosa": (95, 10, 14, 0),
    "coil": (12, 2, 0, 3),
    "shaft": (70, 0, 5, 0),
    "bore": (10, 0, 0, 0),
    "gas": (5, 0, 2, 0),
    "stool": (75, 35, 40, 15),
    "gel": (215, 3, 4, 5),
    "gland": (150, 12, 18, 20),
    "transition_zone": (92, 12, 16, 14),
    "stroma": (48, 5, 5, 0),
    "nodule": (105, 15, 27, 18),
    "urethra": (105, 5, 10, 0),
    "lesion": (58, 6, 6, 0),
    "cyst": (225, 0, 0, 0),
    "calcification": (20, 0, 0, 0),
}
TRUS = {
    "fat": (112, 4, 14, 7),
    "hip": (78, 5, 10, 8),
    "septum": (100, 5, 10, 0),
    "vessel": (20, 0, 0, 0),
    "vein": (25, 0, 0, 0),
    "bone": (30, 0, 0, 0),
    "bowel": (110, 15, 30, 30),
    "levator": (88, 5, 8, 5),
    "sphincter": (80, 5, 12, 8),
    "plexus": (105, 10, 22, 8),
    "penis": (75, 5, 8, 5),
    "urethral_sphincter": (60, 4, 4, 0),
    "bladder_wall": (105, 4, 8, 0),
    "bladder": (2, 0, 0, 0),
    "vesicle": (75, 5, 8, 0),
    "vesicle_lumen": (40, 5, 8, 5),
    "rectum": (150, 5, 12, 8),
    "mucosa": (75, 5, 8, 5),
    "gland": (104, 6, 10, 5),
    "transition_zone": (80, 7, 12, 6),
    "stroma": (62, 5, 8, 0),
    "nodule": (80, 6, 14, 8),
    "urethra": (58, 4, 6, 0),
    "lesion": (64, 4, 5, 0),
    "cyst": (5, 0, 0, 0),
    "calcification": (245, 0, 0, 0),
    "catheter": (15, 0, 0, 0),
}
ECHOES = {"gland": 45, "transition_zone": 22, "bladder": 50, "bone": 60, "nodule": 14, "catheter": 150, "hip": 12}
GRAINS = (2.2, 6.0, 16.0)  # wavelengths of the textures, mm
LEVELS = 3  # at which a slice of the MR is painted where it is much thicker than a pixel; odd: one is its middle
AT_ONCE = 2_000_000  # voxels painted together


def place_glands(
    rng: np.random.Generator, anatomy: ClinicalAnatomy, edges: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the gland's centre lies in the MR and in the TRUS, off the middle, RAS mm.

    Args:
        edges: lengths of the two volumes, mm. In a large one the gland lies up to 40 mm off the middle.
    """
    half = np.array(anatomy.axes)
    places = []
    for (wanted, middle), edge in zip((((14, 18, 9), (0, 0, 2)), ((3, 5, 6), (0, 4, 0))), edges, strict=True):
        room = np.clip(edge / 2 - half - 4, 2, 40)  # nearly all of the gland stays in the picture
        spread = np.minimum(wanted, 0.08 * edge)
        places.append((rng.normal(middle, spread)).clip(-room, room))
    return places[0], places[1]


def draw_grids(rng: np.random.Generator, pixels: tuple[int, int] = (200, 320)) -> dict[str, list]:
    """Shapes and spacings as clinics have them, as arguments of `scripts.phantoms.phantom.simulate_pair`.

    The MR shows 100 to 400 mm in 15 to 40 slices of 2.5 to 4 mm, the TRUS 80 to 130 mm in slices of 1 to 3 mm.

    Args:
        pixels: least and most along either edge of an MR slice; a TRUS slice has about as many. Fewer than a scanner's
            own are quicker.
    """
    large = rng.random() < 0.25
    field = float(np.exp(rng.uniform(*np.log((220, 400) if large else (100, 220)))))
    number, thick = int(rng.integers(pixels[0], pixels[1] + 1)), rng.uniform(2.5, 4)
    slices = int(np.clip(round(rng.uniform(60, 120) / thick), 15, 40))
    pixel = max(field / number, 0.3)
    number = round(field / pixel)
    edges, apart = rng.uniform((80, 70, 55), (130, 105, 85)), float(np.exp(rng.uniform(0, np.log(3))))
    fine = max(edges.max() / (0.8 * rng.integers(pixels[0], pixels[1] + 1)), 0.2)
    return {
        "moving_shape": [number, number, slices],
        "moving_spacing": [pixel, pixel, thick],
        "fixed_shape": [*np.ceil(edges[:2] / fine).astype(int).tolist(), int(np.ceil(edges[2] / apart))],
        "fixed_spacing": [fine, fine, apart],
    }


def draw_clinical_probe(rng: np.random.Generator, anatomy: ClinicalAnatomy, true_map: TrueMap) -> Probe:
    """A probe behind the gland: its surface a rectal wall away from it, wherever the motion has put it."""
    y = torch.linspace(-2, 0, 200) * anatomy.axes[1]
    inside = anatomy.gland(torch.zeros_like(y), y, torch.zeros_like(y))[0] > 0
    rear = y[inside.nonzero()[0, 0]].item() if inside.any() else -anatomy.axes[1]
    behind = torch.tensor(true_map.moving_centre) + torch.tensor([0, rear, 0])
    x, y, z = (p.item() for p in true_map.inverse(*behind[:, None]))
    radius = rng.uniform(8.5, 13.5)
    return Probe(
        position=(x + rng.normal(0, 2), y - rng.uniform(2.5, 7) - radius, z),
        slopes=(rng.normal(0, 0.03), rng.normal(0, 0.08)),
        radius=radius,
        depth=radius + rng.uniform(55, 100),
        half_angle=float(np.deg2rad(rng.uniform(60, 105))),
        roll=rng.normal(0, np.deg2rad(4)),
    )


def scan_mr(
    rng: np.random.Generator,
    noise: torch.Generator,
    anatomy: ClinicalAnatomy,
    lines: Sequence[Tensor],
    spacing: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The MR, grey levels 0-255, shape (X, Y, Z), and its labels, bool, shape (M, X, Y, Z).

    Args:
        lines: x, y, z of the voxels relative to the gland's centre: shapes (X, 1, 1), (1, Y, 1), (1, 1, Z).
    """
    table = _drawn(rng, MR, 0.13)
    table["gland"] = (rng.uniform(85, 205), *table["gland"][1:])  # the peripheral zone: inflamed to healthy
    table["coil"] = (float(rng.choice([2, 4, 7, 12, 22, 45], p=[0.25, 0.25, 0.2, 0.15, 0.1, 0.05])), 2, 0, 3)
    table["fat"] = (rng.uniform(110, 215), *table["fat"][1:])
    table["bladder"] = (rng.uniform(170, 260), *table["bladder"][1:])
    bias, skin_gain, sigma = rng.uniform(0.05, 0.3), rng.uniform(0, 0.8), rng.uniform(2, 9)
    reach, power, floor = rng.uniform(4, 15), rng.uniform(1.0, 1.7), rng.choice([0.02, 0.05, 0.12, 0.3])
    gain, gamma, blur = rng.uniform(0.9, 1.7), rng.uniform(0.8, 1.25), rng.uniform(0.3, 0.75, 2)
    shape = [line.numel() for line in lines]
    grains = _grains(noise, shape, spacing)
    slices, labels, names = [], [], anatomy.label_names
    core = tuple(_between(line.flatten(), *ends) for line, ends in zip(lines[:2], anatomy.CORE, strict=True))
    levels = LEVELS if spacing[2] > 2 * spacing[0] else 1
    for part in _parts(shape, levels):
        z = lines[2][..., part, None] + (torch.arange(levels, device=noise.device) - levels // 2) * (
            spacing[2] / levels
        )
        z = z.flatten()[None, None]
        grown = [g[..., part].repeat_interleave(levels, 2) for g in grains]
        around = anatomy.around(lines[0], lines[1], z)
        painted = _paint(table, around, grown, spacing[0])
        painted *= 1 + skin_gain * torch.exp(around["air"].clamp_max(0) / 30)
        depths = anatomy.core(lines[0][core[0]], lines[1][:, core[1]], z)
        middle = painted[core]  # a view
        _paint(table, depths, [g[core] for g in grown], spacing[0], middle)
        middle -= 30 * ridge(depths["gland"] / 0.9)  # the capsule
        if "nodule" in depths:
            middle -= 38 * ridge(depths["nodule"] / 0.9)
        if anatomy.filling == "coil":
            away = (-anatomy.coil(lines[0], lines[1], z) - 1).clamp_min(0)
            painted *= floor + 4 / (1 + (away / reach) ** power) ** 1.5
        slices.append(painted.unflatten(2, (-1, levels)).mean(3))
        found = torch.zeros((len(names), *shape[:2], slices[-1].shape[2]), dtype=torch.bool, device=noise.device)
        found[:, core[0], core[1]] = torch.stack([depths[n][..., levels // 2 :: levels] for n in names]) > 0
        labels.append(found)
    signal = torch.cat(slices, 2) * torch.exp(bias * smooth_noise(noise, shape, spacing, 120))
    inner = signal.flatten()[:: max(1, signal.numel() // 100_000)]
    scale = gain * 170 / inner.quantile(0.995 if anatomy.filling == "coil" else 0.98).clamp_min(1)
    first, second = torch.randn((2, *shape), generator=noise, device=noise.device) * sigma
    signal = torch.hypot(signal * scale + first, second)
    matrices = [gaussian_rows(n, n, s, signal.device) for n, s in zip(shape, (*blur, 0.05), strict=True)]
    signal = along_axes(signal, matrices).clamp_(0, 255)
    return (signal / 255) ** gamma * 255, torch.cat(labels, 3)


def scan_trus(
    rng: np.random.Generator,
    noise: torch.Generator,
    anatomy: ClinicalAnatomy,
    lines: Sequence[Tensor],
    mapped: Sequence[Tensor],
    spacing: Sequence[float],
    probe: Probe,
    focal: Sequence[tuple[list[float], float, float]],
) -> tuple[Tensor, Tensor]:
    """The TRUS and its labels, as `scan_mr`.

    Args:
        lines: x, y, z of the voxels in the fixed world.
        mapped: the same points where the true map puts them, relative to the gland's centre, each (X, Y, Z).
        focal: see `scripts.phantoms.probe.hard_and_soft`.
    """
    table = _drawn(rng, TRUS, 0.1)
    contrast = rng.uniform(0.5, 1.1)
    table = {n: (100 + (t[0] - 100) * (contrast if 20 < t[0] < 200 else 1), *t[1:]) for n, t in table.items()}
    wall, grain = rng.uniform(1.5, 4), rng.uniform(6, 15)
    echoes, loss, near, decay = rng.uniform(0.4, 1.2), rng.uniform(0.4, 1.5), rng.uniform(10, 90), rng.uniform(3, 12)
    rings, period, streaks = rng.uniform(0, 45), rng.uniform(1.6, 3.5), rng.uniform(2, 9)
    ring, gamma, blur = rng.uniform(0.55, 0.9), rng.uniform(0.8, 1.5), rng.uniform(0.3, 0.7, 2)
    catheter = Catheter(rng, anatomy) if rng.random() < 0.3 else None
    shape = [line.numel() for line in lines]
    grains = _grains(noise, shape, spacing)
    slices, labels = [], []
    for part in _parts(shape, 1):
        points = lines[0], lines[1], lines[2][..., part]
        own = [m[..., part] for m in mapped]
        depths = anatomy.depths(*own)
        across, ahead, distance = probe.beam(*points)
        angle = torch.atan2(across, ahead)
        # the probe fills the rectum now, whatever was in it at the time of the MR
        for name in ("air", "skin", "coil", "shaft", "bore", "gas", "stool", "gel"):
            depths.pop(name, None)
        depths = _before(depths, "gland", rectum=probe.radius + wall - distance, mucosa=probe.radius + 1 - distance)
        if catheter is not None:
            depths["catheter"] = catheter(*own)
        level = _paint(table, depths, [g[..., part] for g in grains], spacing[0])
        facing = _facing(depths["gland"], across, ahead, distance, spacing)
        level -= 140 * _behind(depths["bone"] - 2, probe, points, distance, angle)
        for name, echo in ECHOES.items():
            if name in depths:
                level += echo * echoes * ridge(depths[name] / 1.2) * (facing if name == "gland" else 0.6)
        from_surface = (distance - probe.radius).clamp_min(0)
        level += near * torch.exp(-from_surface / decay)
        level += rings * torch.cos(2 * np.pi * from_surface / period) * torch.exp(-from_surface / 6)
        level -= loss * from_surface + 2 * loss * (from_surface - 45).clamp_min(0)
        level += streaks * _fan(noise, angle)
        for centre, radius, lost in focal:
            covered, behind, c_ahead = probe.shadow(across, ahead, distance, points[2], centre, radius)
            level -= lost * (covered / 2 + 0.5).clamp(0, 1) * behind * (ahead * c_ahead > 0)
        level += grain * _speckle(noise, distance, angle)
        inside = (probe.margin(across, ahead, distance) / spacing[0] + 0.5).clamp(0, 1)
        level = level.clamp_(0, 255) * inside
        # the cover of the transducer, seen by its own echo in the black of the probe
        level += 90 * ridge((distance - ring * probe.radius) / 0.35) * (ahead > -0.2 * probe.radius)
        slices.append(level)
        labels.append(torch.stack([depths[n] for n in anatomy.label_names]) > 0)
    image = torch.cat(slices, 2)
    matrices = [gaussian_rows(n, n, s, image.device) for n, s in zip(shape, (*blur, 0.05), strict=True)]
    image = along_axes(image, matrices).clamp_(0, 255)
    return (image / 255) ** gamma * 255, torch.cat(labels, 3)


class Catheter:
    """Depth below the wall of a urethral catheter and of its balloon in the bladder, both full of water."""

    def __init__(self, rng: np.random.Generator, anatomy: ClinicalAnatomy) -> None:
        self.axis, self.base = anatomy.urethral_axis, anatomy.axes[2] * 0.9
        self.tube, self.balloon = rng.uniform(2.2, 3.2), rng.uniform(7, 13)

    def __call__(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        off = x**2 + (y - self.axis(z.clamp_max(self.base))) ** 2
        top = self.base + self.balloon + 2
        tube = torch.minimum(self.tube - off.sqrt(), top - z)
        return torch.maximum(tube, self.balloon - (off + (z - top) ** 2).sqrt())


def _drawn(rng: np.random.Generator, table: Mapping[str, Sequence[float]], spread: float) -> dict[str, tuple]:
    """The table of one scan: each level a little another."""
    factors, shifts = np.exp(rng.normal(0, spread, len(table))), rng.normal(0, 3, len(table))
    rough = rng.uniform(0.5, 1.5)
    return {
        name: (max(0.0, level * factor + (shift if level > 15 else 0)), *(rough * g for g in grain))
        for (name, (level, *grain)), factor, shift in zip(table.items(), factors, shifts, strict=True)
    }


def _before(depths: Mapping[str, Tensor], name: str, **new: Tensor) -> dict[str, Tensor]:
    """`depths` with the items of `new` laid just below `name`."""
    ordered = {}
    for key, depth in depths.items():
        if key == name:
            ordered |= new
        if key not in new:
            ordered[key] = depth
    return ordered


def _parts(shape: Sequence[int], levels: int) -> Iterator[slice]:
    """Ranges of slices that are painted together."""
    step = max(1, AT_ONCE // (shape[0] * shape[1] * levels))
    for first in range(0, shape[2], step):
        yield slice(first, min(first + step, shape[2]))


def _between(line: Tensor, low: float, high: float) -> slice:
    """The range of an ascending line, shape (N,), that lies between two values."""
    ends = line.new_tensor((low, high))
    first, last = torch.searchsorted(line.contiguous(), ends).tolist()
    return slice(first, last)


def _grains(noise: torch.Generator, shape: Sequence[int], spacing: Sequence[float]) -> list[Tensor]:
    return [smooth_noise(noise, shape, spacing, max(w, 2 * min(spacing))) for w in GRAINS]


def _paint(
    table: Mapping[str, Sequence[float]],
    depths: Mapping[str, Tensor],
    grains: Sequence[Tensor],
    width: float,
    image: Tensor | None = None,
) -> Tensor:
    """Grey levels of the structures laid over each other, each with its own texture, an edge `width` mm wide.

    They are laid over `image`, in place; over fat if there is none.
    """

    def tissue(name: str, box: tuple[slice, ...]) -> Tensor:
        level, *amplitudes = table[name]
        textures = ((a, g[box]) for a, g in zip(amplitudes, grains, strict=True) if a)
        image = torch.full_like(grains[0][box], level)
        for amplitude, grain in textures:
            image.add_(grain, alpha=amplitude)
        return image

    if image is None:
        image = tissue("fat", (slice(None),) * 3)
    for name, depth in depths.items():
        name = name.removesuffix("_2")
        if name in table:  # the poles look like the tissue around them
            depth = depth.expand_as(image)
            box = _box(depth, -0.5 * width)
            if box:
                image[box].lerp_(tissue(name, box), (depth[box] / width + 0.5).clamp_(0, 1))
    return image


def _box(depth: Tensor, least: float) -> tuple[slice, ...]:
    """The box around where `depth`, shape (X, Y, Z), is above `least`; nothing where it is nowhere."""
    box = [slice(None)] * 3
    flat = depth.amax(2) > least
    for axis in range(2):
        found = flat.any(1 - axis).nonzero()
        if not len(found):
            return ()
        box[axis] = slice(int(found[0]), int(found[-1]) + 1)
    return tuple(box)


def _facing(depth: Tensor, across: Tensor, ahead: Tensor, distance: Tensor, spacing: Sequence[float]) -> Tensor:
    """How squarely the beam meets a surface, 0 to 1: what it meets at a slant sends little back."""
    along_x, along_y = (torch.gradient(depth, spacing=float(s), dim=d)[0] for d, s in enumerate(spacing[:2]))
    cosine = (along_x * across + along_y * ahead) / distance.clamp_min(1)
    return (cosine**2 / (along_x**2 + along_y**2 + 1e-3)).clamp(0, 1)


def _behind(depth: Tensor, probe: Probe, points: Sequence[Tensor], distance: Tensor, angle: Tensor) -> Tensor:
    """1 where the beam has met something with a positive `depth` on its way, else 0; shape (X, Y, Z)."""
    x, y, z = (line.flatten() for line in points)
    far = distance.max()
    radii, angles = torch.linspace(0, 1, 96, device=x.device) * far, torch.linspace(-np.pi, np.pi, 240, device=x.device)
    off = radii[:, None, None] * torch.stack([torch.cos(angles), torch.sin(angles)], -1)  # y and x
    middle = [probe.position[i] + probe.slopes[i] * (z - probe.position[2]) for i in (1, 0)]
    polar = off[None] + torch.stack(middle, -1)[:, None, None]
    low, high = torch.stack([y[0], x[0]]), torch.stack([y[-1], x[-1]])
    sample = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": True}
    grid = 2 * (polar - low) / (high - low) - 1
    met = torch.nn.functional.grid_sample((depth > 0).float().permute(2, 0, 1)[:, None], grid, **sample)
    met = met.cummax(2).values
    back = torch.stack([angle / np.pi, 2 * distance / far - 1], -1).permute(2, 0, 1, 3)
    return torch.nn.functional.grid_sample(met, back, **sample)[:, 0].permute(1, 2, 0)


def _fan(noise: torch.Generator, angle: Tensor) -> Tensor:
    """A smooth random function of the beam's angle: beams that couple better or worse."""
    waves = torch.randn((2, 12), generator=noise, device=noise.device)
    orders = torch.arange(2, 26, 2, device=noise.device)
    return sum(
        (float(s) * torch.sin(int(k) * angle) + float(c) * torch.cos(int(k) * angle)) / 12**0.5
        for k, s, c in zip(orders, *waves, strict=True)
    )


def _speckle(noise: torch.Generator, distance: Tensor, angle: Tensor) -> Tensor:
    """Logarithm of fully developed speckle, mean about 0, that is short along the beam and widens with depth."""
    short, narrow = 0.45, 0.028  # mm and radians between independent points
    shape = distance.shape
    rows, columns = int(distance.max().item() / short) + 2, int(2 * np.pi / narrow)
    field = torch.randn((shape[2], 2, rows, columns), generator=noise, device=noise.device)
    grid = torch.stack([angle / np.pi, distance * (2 / (rows * short)) - 1], -1)
    found = torch.nn.functional.grid_sample(field, grid.permute(2, 0, 1, 3), "bilinear", "border", align_corners=False)
    return torch.log(found.square().sum(1) / 2 + 0.02).permute(1, 2, 0) + 0.6
