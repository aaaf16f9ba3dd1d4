"""A pelvis as implicit functions, and the smooth invertible motion between its two scans.

Both take points as three broadcastable tensors x, y, z (RAS mm: x right, y anterior, z superior), so that on a regular
grid, given as (X, 1, 1), (1, Y, 1) and (1, 1, Z), what depends on one or two axes is computed on one or two axes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

FOCAL = ("lesion", "cyst", "calcification")  # seen by their own contrast
POLES = ("apex", "base")  # seen only by the shape around them
WIDER = (0.92, 1.03, 1.0)  # MR over TRUS: the probe flattens the gland, and it gives way to the sides


class Anatomy:
    """A prostate and its neighbours, relative to the gland's centre.

    Attributes:
        axes: half-axes of the gland, mm.
        label_names: gland, transition_zone, urethra, then the landmarks this patient has.
        centres: landmark -> (x, y, z) in mm; radii: landmark -> mm.

    Class attributes, for other men than those of the first cohort:
        VOLUMES: median in mL, standard deviation of the logarithm, least and largest.
        NODULES: one more than the most nodules of a gland.

    Args:
        rng: the only source of randomness.
        keep: chances that a pole, the first and the second landmark of a kind are landmarks of this patient.
    """

    VOLUMES = (56, 0.42, 16, 110)  # as in men sent to biopsy
    NODULES = 6

    def __init__(self, rng: np.random.Generator, keep: tuple[float, float, float] = (0.8, 0.6, 0.25)) -> None:
        median, spread, least, largest = self.VOLUMES
        volume = float(np.clip(rng.lognormal(np.log(median), spread), least, largest))  # mL
        ratio = np.array([23, 18, 23]) * np.exp(rng.normal(0, 0.08, 3))
        self.axes = tuple((ratio * (volume / (4e-3 / 3 * np.pi * ratio.prod())) ** (1 / 3)).tolist())
        self.taper = rng.uniform(0.1, 0.4)
        self.shape = rng.normal(0, 0.045, 8).clip(-0.1, 0.1).tolist()
        self.groove = rng.uniform(0, 0.16)
        # benign hyperplasia grows the transition zone: large glands are mostly that
        self.inner = float(np.clip(0.48 + 0.0035 * volume + rng.normal(0, 0.07), 0.42, 0.85))
        self.inner_centre = (rng.normal(0, 0.04), rng.uniform(0.08, 0.2), rng.uniform(0, 0.15))
        self._draw_neighbours(rng)
        self.nodules = self.centres = self.radii = {}
        self._fit_volume(volume)
        self._draw_landmarks(rng, keep)

    def _draw_neighbours(self, rng: np.random.Generator) -> None:
        a, b, c = self.axes
        self.bend = rng.uniform(2, 0.4 * b)  # of the urethra, mm
        self.urethra = rng.uniform(2.6, 3.6)  # radius, mm
        self.rectum = (rng.normal(0, 2.5), rng.uniform(8, 17), rng.uniform(150, 400))  # offset, radius, curvature, mm
        self.ends = rng.uniform(0.8, 1.1, 2)  # where base and apex are cut flat, in half-axes
        self.stroma = (rng.uniform(0, 7), rng.uniform(0, 6))  # before the gland and in its front, thickness in mm
        self.contact = rng.uniform(-5, 1.5)  # from the egg that the gland would be alone to the rectum, mm
        self.folds = (rng.uniform(0, 0.25), rng.uniform(5, 12), rng.uniform(0, 6), rng.uniform(0.8, 1.4))
        self.wall = rng.uniform(1.5, 3.5)
        self.bladder = (rng.uniform(18, 36), rng.uniform(12, 26), rng.uniform(6, 24))  # half-axes: empty to full
        self.bladder_centre = (rng.normal(0, 3), rng.uniform(6, 30), c + self.bladder[2] * rng.uniform(0.75, 1.1))
        self.pelvis = (a + rng.uniform(2, 11), rng.uniform(0.25, 0.7), rng.uniform(0.2, 0.9))  # half-width, slopes
        self.obturator = rng.uniform(10, 18)  # thickness, mm
        self.pubis = (rng.uniform(18, 26), b + rng.uniform(14, 24), -c * rng.uniform(0.3, 1.0))
        self.levator = (
            rng.uniform(9, 14),
            rng.uniform(1.5, 3.5),
            rng.uniform(6, 18),
        )  # low width, thickness, depth below apex
        self.perineum = (b + rng.uniform(6, 18), c + rng.uniform(2, 10), rng.uniform(-0.6, 0.1) * b)
        self.vesicle = (rng.uniform(11, 18), rng.uniform(4, 6.5), rng.uniform(4, 8), rng.uniform(0, 0.5))
        self.plexus = (rng.uniform(0.5, 4.5), rng.uniform(0, 14))  # thickness about the gland, more before it, mm
        self.rectus = (b + rng.uniform(32, 60), rng.uniform(6, 12))  # from, thickness, mm
        self.bowel = c + rng.uniform(12, 40)

    def _cloud(self, rng: np.random.Generator | None = None, count: int = 12000) -> tuple[Tensor, Tensor]:
        """Points of the gland's bounding box (3, N), on a lattice without `rng`, and the gland's depth there (N,)."""
        if rng is None:
            points = torch.stack(torch.meshgrid(*[torch.linspace(-1.4, 1.4, 30)] * 3, indexing="ij")).flatten(1)
        else:
            points = torch.from_numpy(rng.uniform(-1.4, 1.4, (3, count)).astype(np.float32))
        points = points * torch.tensor(self.axes)[:, None]
        return points, self.gland(*points)[0]

    def _fit_volume(self, volume: float) -> None:
        _, depth = self._cloud()
        found = (depth > 0).double().mean().item() * np.prod([2.8 * 30 / 29 * half for half in self.axes]) / 1000
        self.axes = tuple(half * (volume / found) ** (1 / 3) for half in self.axes)

    def _draw_landmarks(self, rng: np.random.Generator, chances: tuple[float, float, float]) -> None:
        points, depth = self._cloud(rng)
        zone = self.gland(*points)[1]
        inside = depth > 0
        level = points[2][inside]
        centres = {}
        for name, low in (("apex", True), ("base", False)):
            end = level.quantile(0.02 if low else 0.98)
            pole = points[:, inside & ((points[2] <= end) if low else (points[2] >= end))].mean(1)
            centres[name] = pole.tolist()
        taken = list(centres.values())

        def place(where: Tensor, apart: float) -> list[float] | None:
            """A point of the mask `where` that keeps its distance from the others, if there is one."""
            for index in rng.permutation(where.nonzero()[:, 0].numpy())[:50]:
                point = points[:, int(index)].tolist()
                if all(np.linalg.norm(np.subtract(point, other)) > apart for other in taken):
                    taken.append(point)
                    return point
            return None

        size = float(np.mean(self.axes))
        for name in (*FOCAL, *(f"{name}_2" for name in FOCAL)):
            zonal = (zone < 0) if rng.random() < {"lesion": 0.7, "cyst": 0.2}.get(name[:6], 0.4) else (zone > 0)
            point = place(zonal & (depth > 2.5), 0.5 * size)
            if point is not None:
                centres[name] = point
        names = list(centres)
        keep = [n for n in names if rng.random() < chances[0 if n in POLES else 2 if n.endswith("_2") else 1]]
        if len(keep) < 2:
            keep = names[:2]
        order = rng.permutation(len(keep))
        self.centres = {keep[i]: tuple(centres[keep[i]]) for i in order}
        self.radii = {n: rng.uniform(3, 6) if n[:4] != "calc" else rng.uniform(2.4, 4) for n in self.centres}
        # nodules of hyperplasia have contrast in both scans, and no label
        nodules = [place(zone > 1, 0.25 * size) for _ in range(rng.integers(0, self.NODULES))]
        self.nodules = {tuple(point): rng.uniform(3, 0.4 * size) for point in nodules if point is not None}

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("gland", "transition_zone", "urethra", *self.centres)

    def gland(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Approximate depth below the surface of the gland and of the transition zone in mm, positive inside."""
        gland, zone = self._egg(x, y, z)
        gland = -torch.logaddexp(-gland, -self._outside_rectum(x, y, z))  # the rectum hollows it from behind
        base, apex = (self.axes[2] * self.ends).tolist()
        gland = -torch.logaddexp(-gland, torch.logaddexp(z - base, -apex - z))
        return gland, torch.minimum(zone, gland)

    def _egg(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The gland as it would be alone, and its transition zone."""
        a, b, c = self.axes
        size = (a + b + c) / 3
        k = z / c
        narrow = 1 / (1 + self.taper * torch.tanh(1.5 * k))  # at the apex
        i, j = x / a * narrow, y / b * narrow
        ic, jc, kc = self.inner_centre
        zone = (self.inner - ((i - ic) ** 2 + (j - jc) ** 2 + ((k - kc) / 1.1) ** 2).sqrt()) * size
        radius = (i**2 + j**2 + k**2).sqrt().clamp_min(1e-4)
        i, j, k = i / radius, j / radius, k / radius
        s = self.shape
        surface = i * (s[0] * j + s[1] * k + s[2] * i * i) + j * (s[3] * k + s[4] * j * j)
        surface += k * (s[5] * k * k + s[6] * i * i) + s[7] * (i - j) * (i + j) + 1
        # the rectum leaves a groove in the posterior midline
        surface -= self.groove * j.clamp_max(0) ** 2 / (1 + (i / 0.4) ** 2) ** 2
        gland = (1 - radius / surface) * size
        return gland, zone

    def _outside_rectum(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance from the rectum, mm, negative inside."""
        offset, round_, _ = self.rectum
        return ((x - offset) ** 2 + (y - self._rectal_axis(z)) ** 2).sqrt() - round_ - 0.5

    def _rectal_axis(self, z: Tensor) -> Tensor:
        """y of the rectum's axis, mm."""
        _, radius, curvature = self.rectum
        _, b, c = self.axes
        return -(b + radius + self.contact) - z.clamp_min(0) ** 2 / curvature + 0.1 * (z + c).clamp_max(0)

    def depths(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Approximate depth below the surface of each structure in mm, positive inside; later ones cover earlier ones.

        Args:
            x, y, z: relative to the gland's centre, RAS mm, broadcastable.
        Returns:
            name -> a tensor that broadcasts to the shape of the points; in full for what has a label.
        """
        a, b, c = self.axes
        side = x.abs()
        gland, zone = self.gland(x, y, z)
        width, slope, flare = self.pelvis
        muscle = side - (width - slope * y.clamp(-35, 25) + flare * z)
        px, py, pz = self.pubis
        pubis = ellipsoid((side - px, y - py - 0.2 * (side - px), z - pz), (15, 9, 13))
        offset, radius, _ = self.rectum
        back = self._rectal_axis(z)
        narrow = 0.6 + 0.4 * torch.sigmoid((z + c) / 6)
        depth, wave, phase, aspect = self.folds
        narrow = narrow * (1 + depth * torch.sin(z / wave + phase))
        across = (x - offset - 3 * depth * radius * torch.cos(z / (1.3 * wave) + phase)) / aspect
        rectum = radius * narrow - (across**2 + (y - back) ** 2).sqrt()
        sacrum = -y - (b + 2 * radius + 14) - 0.25 * z
        # the levator: a horseshoe about the rectum, open to the front, a funnel from the pelvic wall to the apex
        low, thickness, below = self.levator
        rise = ((z + c + below) / (c + below)).clamp(0, 1.3)
        reach = ((y + b + 2 * radius + 6) / (b + 2 * radius)).clamp(0, 1).sqrt()
        within = (low + (width - low) * rise) * reach - side
        levator = torch.minimum(thickness - within.abs(), 0.5 * c - z)
        sphincter = torch.minimum(within, -c - 2 - z)
        front, down, under = self.perineum  # what lies before an oblique plane below the pubic symphysis
        steep = (front - under) / down
        perineum = (y + 0.3 * side - front - steep * z) / (1 + steep**2) ** 0.5
        bx, by, bz = self.bladder_centre
        vx, vy, vz, tilt = self.vesicle
        u = side - 0.85 * vx
        front, thick = self.rectus
        ahead = self.ahead(x, y, 0.8)
        depths = {
            "bowel": z - self.bowel,
            "rectus": torch.minimum(torch.minimum(y - front, front + thick - y), z + 0.5 * c),
            "muscle": muscle,
            "levator": levator,
            "sphincter": sphincter,
            "perineum": perineum,
            "bone": torch.maximum(torch.maximum(muscle - self.obturator, pubis), sacrum),
            "plexus": gland + self.plexus[0] + self.plexus[1] * ahead,
            "bladder": ellipsoid((x - bx, y - by, z - bz), self.bladder),
            "vesicle": ellipsoid((u, y + 0.8 * b, z - 0.85 * c - tilt * u), (vx, vy, vz)),
            "rectum": rectum,
            "lumen": rectum - self.wall,
        }
        return depths | self._parts(gland, zone, ahead, x, y, z)

    def urethral_axis(self, z: Tensor) -> Tensor:
        """y of the urethra's axis, mm."""
        return self.bend * (1 - (z / self.axes[2]) ** 2)

    def ahead(self, x: Tensor, y: Tensor, width: float) -> Tensor:
        """How much a point lies before the gland, 0 to 1; `width` in half-axes of the gland."""
        a, b, _ = self.axes
        return torch.sigmoid((y - 0.3 * b) / 2) * torch.exp(-((x / (width * a)) ** 2))

    def _parts(self, gland: Tensor, zone: Tensor, ahead: Tensor, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """The gland and what is in it or, as the stroma, before it; `ahead` says how much a point lies before it."""
        before, inside = self.stroma
        skin = gland + before * ahead  # of the stroma
        depths = {"gland": gland, "transition_zone": zone}
        depths["stroma"] = torch.minimum(skin, (before + inside) * ahead - skin)
        if self.nodules:
            balls = [ball(x, y, z, centre, radius) for centre, radius in self.nodules.items()]
            depths["nodule"] = torch.minimum(torch.stack(balls).amax(0), zone)
        curve = self.urethral_axis(z)
        depths["urethra"] = torch.minimum(self.urethra - (x**2 + (y - curve) ** 2).sqrt(), gland)
        for name, centre in self.centres.items():
            depths[name] = torch.minimum(ball(x, y, z, centre, self.radii[name]), gland)
        return depths


class TrueMap:
    """T(x) = c_moving + A (x - c_fixed) + Σ_k a_k exp(-½ Σ_i (x - c_fixed - p_k)_i² / s_ki²), fixed -> moving, RAS mm.

    A is a rotation times a symmetric scaling (the gland swells between the scans). The first term of the sum is the
    probe, which presses on the gland from behind and is long in z; the others are random. No Gaussian is steeper than
    e^{-1/2} / min_i s_ki, so with Σ_k |a_k| e^{-1/2} / min_i s_ki below the smallest singular value of A, T is
    invertible and its Jacobian determinant positive on the whole space: the a_k are scaled down where this needs it.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        moving_centre: Sequence[float],
        fixed_centre: Sequence[float],
        gland_depth: float = 17.0,
        rotation: float = 4.0,
        deformation: float = 3.0,
        swelling: float = 0.04,
        press: tuple[float, float] = (2.0, 7.0),
    ) -> None:
        """Draw a map.

        Args:
            moving_centre, fixed_centre: of the gland in each world, RAS mm.
            gland_depth: from the gland's centre to its posterior surface, mm.
            rotation: standard deviation about each axis, degrees.
            deformation: standard deviation of each component of the random a_k, mm.
            swelling: standard deviation of the logarithm of the scaling, in common and again along each axis.
            press: range of the probe's push, mm.
        """
        self.moving_centre = [float(v) for v in moving_centre]
        self.fixed_centre = [float(v) for v in fixed_centre]
        scales = np.exp((swelling * (rng.normal() + 0.5 * rng.normal(size=3))).clip(-0.5, 0.5)) * WIDER
        self.linear = Rotation.from_rotvec(rng.normal(0, rotation, 3), degrees=True).as_matrix() * scales
        self.centres = np.vstack([[rng.normal(0, 3), -gland_depth - 2, rng.normal(0, 5)], rng.normal(0, 13, (5, 3))])
        self.widths = np.vstack([rng.uniform((12, 12, 20), (22, 20, 40)), np.repeat(rng.uniform(9, 17, (5, 1)), 3, 1)])
        self.amplitudes = np.vstack([[0, -rng.uniform(*press), 0], rng.normal(0, deformation, (5, 3))])
        steepest = np.sum(np.linalg.norm(self.amplitudes, axis=1) / self.widths.min(1)) * np.exp(-0.5)
        self.contraction = min(steepest / scales.min(), 0.85)  # of the iteration that inverts T
        self.amplitudes *= min(1, 0.85 * scales.min() / steepest)

    def __call__(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moving world points of fixed world points, RAS mm; broadcastable tensors to three of the full shape."""
        points = [p - centre for p, centre in zip((x, y, z), self.fixed_centre, strict=True)]
        mapped = [self.moving_centre[i] + sum(float(self.linear[i, j]) * points[j] for j in range(3)) for i in range(3)]
        for amplitude, centre, width in zip(self.amplitudes, self.centres, self.widths, strict=True):
            factors = [torch.exp(-0.5 * ((points[i] - centre[i]) / width[i]) ** 2) for i in range(3)]
            bump = factors[0] * factors[1] * factors[2]
            for i in range(3):
                if amplitude[i]:
                    mapped[i] = mapped[i].add_(bump, alpha=float(amplitude[i]))
        return tuple(mapped)

    def inverse(self, x: Tensor, y: Tensor, z: Tensor, tolerance: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed world points of moving world points of one shape, RAS mm, to `tolerance` mm."""
        target = torch.stack([x, y, z]).double().flatten(1)
        back = torch.from_numpy(np.linalg.inv(self.linear))
        centre = torch.tensor([self.fixed_centre, self.moving_centre]).double()[..., None]
        points = back @ (target - centre[1]) + centre[0]
        for _ in range(200):
            step = back @ (target - torch.stack(self(*points)))
            points = points + step
            if step.norm(dim=0).max() < tolerance * (1 - self.contraction):
                break
        return tuple(points.view(3, *x.shape).to(x.dtype))


def ball(x: Tensor, y: Tensor, z: Tensor, centre: Sequence[float], radius: float) -> Tensor:
    return radius - ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()


def ellipsoid(points: Sequence[Tensor], axes: Sequence[float]) -> Tensor:
    """Approximate depth in mm below an ellipsoid at the origin."""
    norm = sum((p / axis) ** 2 for p, axis in zip(points, axes, strict=True)).sqrt()
    return (1 - norm) * min(axes)
