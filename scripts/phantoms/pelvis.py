"""A whole pelvis as clinics see it: filled rectum or endorectal coil, hips, pubis, muscles, fat, skin, the air outside.

Shapes and sizes were set by hand beside public clinical T2 images. As in `scripts.phantoms.anatomy`, points are RAS mm
relative to the gland's centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scripts.phantoms.anatomy import Anatomy, ball, ellipsoid

FILLINGS = {"coil": 0.3, "gas": 0.2, "stool": 0.12, "gel": 0.06, "collapsed": 0.32}  # of the rectum, share of men


class ClinicalAnatomy(Anatomy):
    """A prostate with a tapering apex in a whole pelvis.

    Attributes:
        filling: of the rectum, one of `FILLINGS`.
    """

    VOLUMES = (48, 0.5, 15, 170)
    NODULES = 16
    CORE = ((-80.0, 80.0), (-100.0, 80.0))  # x and y of what lies between the pelvic walls, mm

    def _draw_neighbours(self, rng: np.random.Generator) -> None:
        super()._draw_neighbours(rng)
        self._draw_gland(rng)
        self._draw_rectum(rng)
        self._draw_wall(rng)
        self._draw_bones(rng)

    def _draw_gland(self, rng: np.random.Generator) -> None:
        a, b, c = self.axes
        self.axes = a, b, c = (a, b, c * 0.9)  # the apex below makes up for the length
        large = float(np.clip((a * b * c / 9500 - 0.6) * 0.5, 0, 0.3))  # hyperplasia leaves a rim of peripheral zone
        self.inner = float(np.clip(rng.uniform(0.5, 0.78) + large, 0.45, 0.97))
        self.inner_centre = (rng.normal(0, 0.04), rng.uniform(0.1, 0.26), rng.uniform(0.1, 0.32))
        self.apex = (rng.uniform(1.0, 1.4), rng.uniform(0.1, 0.8))  # how much longer, and slimmer, than an egg's
        self.tilt = rng.uniform(0, 0.3)  # of the gland's axis, forward towards the apex
        self.ends = np.array([rng.uniform(0.75, 1.05), rng.uniform(0.95, 1.05)])
        self.lobe = None
        if rng.random() < 0.2:  # a lobe that grows into the bladder
            self.lobe = (rng.normal(0, 4), rng.uniform(0, 0.3) * b, c * rng.uniform(0.8, 1.05), rng.uniform(7, 13))
            self.ends[0] = 1.6

    def _draw_rectum(self, rng: np.random.Generator) -> None:
        _, _, c = self.axes
        self.filling = str(rng.choice(list(FILLINGS), p=list(FILLINGS.values())))
        full = {"coil": (14, 21.5), "gas": (10, 22.5), "stool": (10, 21), "gel": (9, 19), "collapsed": (7, 10.5)}
        wide = {"coil": (0.97, 1.1), "gas": (0.9, 1.3), "stool": (0.9, 1.3), "gel": (0.9, 1.5), "collapsed": (1, 1.6)}
        contact = {"coil": (-8, -2), "collapsed": (-3, 3)}.get(self.filling, (-5, 1))
        self.contact = rng.uniform(*contact)
        self.wall = rng.uniform(1, 2) if self.filling == "coil" else rng.uniform(2, 4)
        self.rectum = (rng.normal(0, 2.5), rng.uniform(*full[self.filling]), rng.uniform(150, 400))
        self.aspect = rng.uniform(*wide[self.filling])
        low = -c * rng.uniform(0.5, 1.3)
        length = rng.uniform(60, 95) if self.filling == "coil" else rng.uniform(45, 130)
        self.full = (low, low + length, rng.uniform(6.5, 9.5))  # from, to, radius beyond, mm
        self.anorectal = rng.uniform(0.2, 0.7)  # how the anal canal turns back, mm a mm
        self.shaft = rng.uniform(3.5, 5)  # of the coil, mm
        self.level = (rng.uniform(-0.6, 0.6), rng.random() < 0.25)  # of a fluid under gas, in radii

    def _draw_wall(self, rng: np.random.Generator) -> None:
        a, b, c = self.axes
        self.pelvis = (float(np.clip(a + rng.uniform(5, 14), 30, 52)), rng.uniform(0.3, 0.6), rng.uniform(0.05, 0.3))
        self.levator = (rng.uniform(11, 16), rng.uniform(1.2, 2.4), rng.uniform(8, 20))
        half, front, back = rng.uniform(165, 205), rng.uniform(75, 120), rng.uniform(90, 125)
        self.body = (rng.normal(0, 4), half, front, back)  # middle, half-width, skin in front and behind, mm
        self.skin_fat = (rng.uniform(10, 40), rng.uniform(12, 38))  # in front and at the sides; behind
        self.bend_waves = rng.uniform((1.2, 13, 16, 0), (3.6, 30, 40, 6.28), (3, 4)).tolist()
        half_axes = (rng.uniform(24, 46), rng.uniform(16, 36), rng.uniform(12, 42))
        self.bladder = half_axes
        self.bladder_centre = (rng.normal(0, 4), rng.uniform(4, 20), c * rng.uniform(0.6, 0.95) + half_axes[2])
        self.bladder_wall = rng.uniform(2.5, 6)
        self.vesicle = (rng.uniform(14, 22), rng.uniform(5, 8.5), rng.uniform(6, 11), rng.uniform(0, 0.5))
        self.convolution = rng.uniform(1.1, 1.8)  # of the seminal vesicles, mm a radian
        self.plexus = (rng.uniform(1.5, 6), rng.uniform(3, 12))
        self.glutei = (rng.uniform(42, 54), rng.uniform(0.15, 0.35), rng.uniform(8, 22), rng.uniform(1.4, 2.2))
        self.muscles = (int(rng.integers(4, 8)), rng.uniform(0, 6.28), rng.uniform(0.4, 1.4))

    def _draw_bones(self, rng: np.random.Generator) -> None:
        _, b, c = self.axes
        hip = np.array([rng.uniform(83, 94), rng.uniform(0, 14), rng.uniform(6, 34)])
        self.hip, self.hip_radius = hip, rng.uniform(22, 26)
        y, z = b + rng.uniform(12, 22), c * rng.uniform(-0.5, 0.3)  # of the symphysis
        self.symphysis = (y, z, rng.uniform(1.5, 3))
        upper, lower = np.array([11, y + 4, z + 10]), np.array([11, y - 2, z - 11])
        tuber = np.array([rng.uniform(50, 60), rng.uniform(-42, -30), -c - rng.uniform(18, 30)])
        shaft = hip + (40, -16, -22)
        self.bones = [  # from, to, radius at either end, of one side
            (upper, hip + (-22, 18, 8), 11, 12),
            (upper, upper + (18, -7, -4), 11, 9),
            (lower, lower + (17, -9, -4), 11, 9),
            (lower + (14, -8, -4), tuber + (-4, 6, 0), 8, 8),
            (tuber, hip + (-18, -22, 0), 15, 12),
            (tuber + (8, 8, 8), hip + (-10, -14, -8), 13, 12),
            (hip + (-10, -4, 30), hip + (8, -8, 130), 17, 15),
            (hip, shaft, 15, 14),
            (shaft, hip + (32, -2, -160), 17, 13),
        ]

    def _egg(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        longer, slimmer = self.apex
        below = (-z / (self.axes[2] * longer)).clamp(0, 1.5)
        slim = 1 + slimmer * below**2
        upright = torch.where(z < 0, z / longer, z)
        gland, zone = super()._egg(x * slim, (y + self.tilt * z) * slim, upright)
        if self.lobe is not None:
            lobe = ball(x, y, z, self.lobe[:3], self.lobe[3])
            gland, zone = torch.logaddexp(gland, lobe), torch.maximum(zone, lobe - 1.5)
        return gland, zone

    def _profile(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Radius, front and axis (y) of the rectum at each level, mm."""
        _, b, c = self.axes
        _, radius, curvature = self.rectum
        low, high, beyond = self.full
        round_ = beyond + (radius - beyond) * torch.sigmoid((z - low) / 3) * torch.sigmoid((high - z) / 4)
        # it follows the gland's back, then the sacrum above and the anal canal below
        level = z.clamp(-c * self.apex[0], c)
        front = -(b + self.contact) - self.tilt * level + 0.45 * b * (-level / c).clamp_min(0) ** 2
        front = front - (z - c).clamp_min(0) ** 2 / curvature * 2 + self.anorectal * (z + c * self.apex[0]).clamp_max(0)
        return round_, front, front - round_

    def _rectum(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        round_, _, axis = self._profile(z)
        return round_ - (((x - self.rectum[0]) / self.aspect) ** 2 + (y - axis) ** 2).sqrt()

    def _held(self, lumen: Tensor, z: Tensor) -> Tensor:
        """Depth below the surface of what fills the rectum, mm: below it the canal is shut."""
        low, high, _ = self.full
        return torch.minimum(torch.minimum(lumen, z - low + 4), high + 8 - z)

    def coil(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Depth below the surface of an endorectal coil, mm, negative outside."""
        return self._held(self._rectum(x, y, z) - self.wall, z)

    def _outside_rectum(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return -self._rectum(x, y, z) - 0.5

    def urethral_axis(self, z: Tensor) -> Tensor:
        return self.bend * (1 - (z / (self.axes[2] * self.apex[0])).clamp(-1, 1) ** 2) - self.tilt * z

    def _bent(self, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        """The points moved by a few mm, so that nothing outside the gland is straight or the same on both sides."""
        ways = ((x, (y, z)), (y, (z, x)), (z, (x, y)))
        return [
            p + size * torch.sin(u / first + v / second + phase)
            for (p, (u, v)), (size, first, second, phase) in zip(ways, self.bend_waves, strict=True)
        ]

    def depths(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        return self.around(x, y, z) | self.core(x, y, z)

    def _wall(self, side: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance beyond the pelvic side wall, mm."""
        width, slope, flare = self.pelvis
        y = y.clamp(-45, 70)
        return side - (width - slope * y - 0.005 * (y + 8) ** 2 + flare * z.clamp(-40, 40)).clamp_min(6)

    def around(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """What lies outside the pelvic wall, with the pubis; parts beyond the widest of the points are left out."""
        lines = x, y, z
        middle, half, front, back = self.body
        deep = (front + back) / 2
        oval = (((x - middle).abs() / half) ** 2.5 + ((y - (front - back) / 2).abs() / deep) ** 2.5) ** 0.4
        body = (1 - oval) * deep
        cleft = 0.06 * (45 - back - y) + 0.25 * (16 - back - y).clamp_min(0) - 0.05 * z.clamp_min(0)
        body = torch.minimum(body, (x - middle).abs() - cleft + 3 * (y + back - 45).clamp_min(0))
        before, behind = self.skin_fat
        fascia = body - before - (behind - before) * torch.sigmoid(-(y + 30) / 12)
        number, phase, thin = self.muscles
        hx, hy, hz = self.hip
        out = x.abs() - hx, y - hy
        away = (out[0] ** 2 + out[1] ** 2).sqrt()
        turn = number / 2 * torch.atan2(out[1], out[0]) + phase + 0.5 * torch.sin(away / 14 + phase)
        septa = torch.minimum(thin - torch.sin(turn + z / 60).abs() * (2 / number * away), away - 30)
        strands = self._strands(x, y, z)
        x, y, z = self._bent(x, y, z)
        side = x.abs()
        wall = self._wall(side, y, z)
        start, rise, apart, _ = self.glutei
        sy, sz, gap = self.symphysis
        # before the pubis the muscles of the thighs meet
        met = torch.minimum(torch.minimum(side - 1, y - sy + 12 - 0.2 * side), sz + 22 - 0.4 * (y - sy) - z)
        hip = torch.minimum(torch.maximum(wall, met), torch.minimum(y + 40, sy + 9 + 0.5 * side - y))
        hip = torch.minimum(hip, fascia)
        gluteus = torch.minimum(torch.minimum(fascia, side - apart), rise * (side - 30).clamp_min(0) - start - y)
        reach = side.max().item()
        bone = torch.full_like(side, -100)
        for first, second, *radii in self.bones:
            if min(first[0] - radii[0], second[0] - radii[1]) < reach:
                box = _box(lines, first, second, max(radii) + 8)
                torch.maximum(bone[box], _rod((side[box], y[box], z[box]), first, second, radii), out=bone[box])
        bone = torch.minimum(bone, side - gap)
        hips = {}
        if hx - self.hip_radius - 14 < reach:
            head = ball(side, y, z, self.hip, self.hip_radius)
            socket = torch.minimum(torch.minimum(head + 13, -3 - head), hx + 4 + 0.3 * (z - hz) - side)
            bone = torch.maximum(bone, torch.maximum(head, socket))
            hips["vessel"] = _ring((side, y), (hx - 16, hy + 46 + 0.1 * (front - 90)), 5)
            hips["vein"] = _ring((side, y), (hx - 30, hy + 43 + 0.1 * (front - 90)), 6)
        hips |= {"bone": bone, "marrow": bone - 2.2}
        if "vein" in hips:
            hips["head"] = head - 2.2
        around = {
            "air": -body,
            "skin": torch.minimum(body, 2.2 - body),
            "hip": hip,
            "gluteus": gluteus,
            "septum": torch.maximum(
                torch.minimum(hip, septa),
                torch.minimum(torch.maximum(gluteus, torch.minimum(hip - 2, wall - 16)) - 1, strands),
            ),
            "rectus": torch.minimum(
                torch.minimum(torch.minimum(fascia, 10 - fascia), y - 20),
                torch.minimum(38 - side + 0.2 * z, z - sz - 4),
            ),
        }
        return around | hips

    def _strands(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Depth below the surface of the fat between the strands of muscle, wherever there is muscle."""
        phase, strand = self.glutei[2:]
        way = (
            0.4 * x.abs()
            + 3 * torch.sin(x / 9 + z / 5)
            + 0.9 * y
            + 2 * torch.sin(y / 6)
            + 4 * torch.sin(x / 21 - y / 16)
        )
        more = 0.2 * torch.sin(x / 13 + z / 11 + phase) * torch.sin(y / 9 - z / 19)  # here, and none there
        return (torch.sin(way / strand) - 0.95 - more) * strand

    def core(self, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """What lies between the pelvic walls: all of it within `CORE`."""
        gland, zone = self.gland(x, y, z)
        return self._midline(gland, z, *self._bent(x, y, z)) | self._within(gland, zone, x, y, z)

    def _midline(self, gland: Tensor, level: Tensor, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """What lies between the pelvic walls, but for the rectum and the gland; `level` is z before it was bent."""
        _, b, c = self.axes
        side = x.abs()
        wall = self._wall(side, y, z)
        apex = -c * self.apex[0] * self.ends[1]
        round_, _, axis = self._profile(level)
        back = axis - round_ - 5
        low, thickness, below = self.levator
        rise = ((z - apex + below) / (below - apex + 0.3 * c)).clamp(0, 1.2) ** 1.4
        width = torch.maximum(low + (self.pelvis[0] - 3 - low) * rise, self.aspect * round_ + 4)
        within = width * ((y - back) / 22).clamp(0, 1).sqrt() - side
        sy, sz, _ = self.symphysis
        closed = torch.minimum(sy - 6 - y, 0.4 * c - z)
        levator = torch.minimum(torch.minimum(thickness - within.abs(), closed), -wall)
        canal = 6.5 - (x**2 + (y - self.urethral_axis(z.clamp_min(apex))) ** 2).sqrt()
        urethra = torch.minimum(canal, apex + 3 - z)
        bx, by, bz = self.bladder_centre
        bladder = ellipsoid((x - bx, y - by, z - bz), self.bladder)
        vx, vy, vz, tilt = self.vesicle
        vesicle = ellipsoid((side - 0.8 * vx, y + 0.75 * b, z - 0.9 * c - tilt * (side - 0.8 * vx)), (vx, vy, vz))
        grape = self.convolution
        swirl = 2.2 * torch.sin(x / 5.3 + z / 4) + 1.5 * torch.sin(y / 4.1 - x / 7)
        lumen = torch.sin(x / grape + swirl) * torch.sin(y / grape + z / 3 - swirl) + 0.3
        ahead = self.ahead(x, y, 0.9)
        plexus = gland + self.plexus[0] + self.plexus[1] * ahead
        tail = axis - round_ - 16
        return {
            "bowel": torch.minimum(torch.minimum(z - self.bowel, -wall - 2), 60 - y),
            "sacrum": torch.minimum(8 + 0.1 * z.clamp(-20, 80) - (side**2 + (y - tail) ** 2).sqrt(), z + 0.6 * c),
            "levator": levator,
            "sphincter": torch.minimum(
                width * ((y - back) / 22).clamp(0, 1).sqrt() * ((sy - 10 - y) / 24).clamp(0, 1).sqrt() - side,
                apex - 1 - z,
            ),
            "plexus": torch.minimum(plexus, torch.minimum(-wall - 1, z - apex + 6)),
            "penis": torch.maximum(
                torch.maximum(
                    ellipsoid((x, y - sy + 24, z - apex + 24), (12, 11, 13)),
                    _rod((side, y, z), (12, sy - 16, apex - 16), (44, -20, apex - 34), (5, 6)),
                ),
                _rod((x, y, z), (0, sy - 8, sz - 30), (0, sy + 60, sz - 14), (10, 12)),
            ),
            "urethral_sphincter": urethra,
            "urethral_wall": urethra - 2.2,
            "bladder_wall": bladder + self.bladder_wall,
            "bladder": bladder,
            "vesicle": vesicle,
            "vesicle_lumen": torch.minimum(vesicle - 0.5, lumen * grape),
        }

    def _within(self, gland: Tensor, zone: Tensor, x: Tensor, y: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Rectum, what fills it, and the gland."""
        rectum = self._rectum(x, y, z)
        round_, _, axis = self._profile(z)
        low, high, beyond = self.full
        lumen = rectum - self.wall
        depths = {"rectum": rectum}
        if self.filling == "collapsed":
            depths["mucosa"] = rectum - 0.45 * round_
        else:
            depths["mucosa"] = lumen + 1
            depths[self.filling] = held = self._held(lumen, z)
            share, fluid = self.level
            if self.filling == "gas" and fluid:
                depths["gel"] = torch.minimum(held, axis + share * round_ - y)
            if self.filling == "coil":
                tube = self.shaft - ((x - self.rectum[0]) ** 2 + (y - axis) ** 2).sqrt()
                depths["shaft"] = torch.minimum(tube, torch.minimum(high - z, rectum))
                depths["bore"] = depths["shaft"] - 1.6
        ahead = self.ahead(x, y, 0.7)
        return depths | self._parts(gland, zone, ahead, x, y, z)


def _box(lines: Sequence[Tensor], first: Sequence[float], second: Sequence[float], far: float) -> tuple[slice, ...]:
    """What of y and z, where they are the lines of a grid, lies within `far` of the box between two points."""
    box = [slice(None)] * 3
    for axis in (1, 2):
        line = lines[axis]
        if line.numel() == line.shape[axis - 3]:
            near = (line > min(first[axis], second[axis]) - far) & (line < max(first[axis], second[axis]) + far)
            found = near.flatten().nonzero().flatten()
            box[axis] = slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
    return tuple(box)


def _rod(points: Sequence[Tensor], first: Sequence[float], second: Sequence[float], radii: Sequence[float]) -> Tensor:
    """Approximate depth below a rod between two points, mm; its radius goes from one of `radii` to the other."""
    way = np.subtract(second, first).tolist()
    off = [p - float(q) for p, q in zip(points, first, strict=True)]
    length = sum(w * w for w in way)
    share = (sum(o * (w / length) for o, w in zip(off, way, strict=True))).clamp(0, 1)
    near = sum((o - share * w) ** 2 for o, w in zip(off, way, strict=True)).sqrt()
    return radii[0] + share * (radii[1] - radii[0]) - near


def _ring(points: Sequence[Tensor], centre: Sequence[float], radius: float) -> Tensor:
    """Depth below a cylinder along z, mm."""
    return radius - sum((p - float(c)) ** 2 for p, c in zip(points, centre, strict=True)).sqrt()
