"""Dictionary transforms of a pair: load and check, bring onto the fixed grid, warp back.

The keys are the datalist's: `moving_image`, `fixed_image`, `moving_label`, `fixed_label`. Images are (C, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Transform
from torch import Tensor

from scripts.data import checks, formats
from scripts.data.datalist import IMAGES, KEYS, LABELS
from scripts.network import fields
from scripts.registration.initial_transform import align_glands, align_moments, read_initial_transform
from scripts.registration.orientation import upright_axes, way_of
from scripts.registration.segmentation import CLOSE, NOMINAL, close_up, coarsened, cube_affine, frame, moments

GLANDS = ("moving_gland", "fixed_gland")
GRID = 32  # voxels along each axis of a working grid that is measured by the gland


class PlanFixedGridd(MapTransform):
    """Plan the working grid: the fixed image's field of view in its own axes, reordered to RAS, isotropic.

    Resamples nothing. Adds `grid_affine` (4, 4), voxel -> world RAS mm, and its `grid_size`; `initial_transform`
    (4, 4), fixed world -> moving world; `initial_stretch` (3,), by how much it stretches, but for a learned one by how
    much the glands found differ, of which it takes a part; `spacing` (3,) in mm. One that is no matrix is
    `initial_displacement` (3, X, Y, Z), RAS mm on the fixed image's grid: the moving volumes are pulled onto that grid
    by it, and `initial_transform` is the identity.

    Args:
        spacing: voxel size of the working grid in mm; None or "none" keeps the fixed file's. "gland" measures by the
            fixed gland that was found: the cube of its second pass, upright as the gland networks believe it, whose
            `spacing` is in the millimetres of a gland of nominal length, so that neither a small prostate nor a wrong
            voxel size in the headers changes anything; it needs the glands that
            `scripts.registration.segmentation.SegmentGlandsd` adds.
        initial_transform: "learned", see `align_glands`, between the glands that `segmentation.SegmentGlandsd`
            added; "centroids", the labelled glands' centroids coincide, an oracle that only evaluates; or see
            `read_initial_transform`.
        kind: of the learned initial transform.
    """

    def __init__(
        self, spacing: float | None | str = 0.8, initial_transform: str = "centre", kind: str = "maximum_a_posteriori"
    ) -> None:
        super().__init__(KEYS, allow_missing_keys=True)
        self.by_gland = spacing == "gland"
        self.spacing = None if spacing in (None, "none", "gland") else float(spacing)
        self.initial_transform, self.kind = initial_transform, kind

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        if self.by_gland and "fixed_gland" not in data:
            raise checks.InputError(
                'spacing "gland" needs the glands that the weights of a learned initial transform find'
            )
        transform, between = torch.eye(4, dtype=torch.float64), None
        if self.initial_transform == "learned":
            transform = align_glands(data["fixed_gland"], data["moving_gland"], self.kind)
            between = align_moments(moments(data["fixed_gland"]), moments(data["moving_gland"]), "affine")
        elif self.initial_transform == "centroids":
            transform = self._between_labels(data)
        else:
            steps = read_initial_transform(self.initial_transform, data["moving_image"], data["fixed_image"])
            if self.initial_transform not in ("centre", "rigid"):  # these look at the images, others at their headers
                steps = [torch.linalg.inv(as_declared(data, "fixed")), *steps, as_declared(data, "moving")]
            if any(isinstance(step, formats.Displacement) for step in steps):
                data = self._pulled(data, steps)
            else:
                for step in steps:
                    transform = step @ transform
        grid_affine, size, spacing = (self._around_gland if self.by_gland else self._field_of_view)(data)
        plan = {"grid_affine": grid_affine, "grid_size": size, "initial_transform": transform, "spacing": spacing}
        plan["initial_stretch"] = torch.linalg.svdvals((transform if between is None else between)[:3, :3])
        return dict(data) | self._without_aliasing(data, plan) | plan

    def _pulled(self, data: Mapping[Hashable, MetaTensor], steps: Sequence[formats.Step]) -> dict:
        """A pair whose moving volumes went through an initial transform that is no matrix, and its displacement."""
        affine, size = data["fixed_image"].affine.double(), data["fixed_image"].shape[1:]
        x = fields.world_grid(size, affine)
        to, known = formats.forward(steps, x)
        if not known.all():
            percent = 100 * known.double().mean().item()
            raise checks.InputError(
                f"{self.initial_transform}: covers {percent:.0f} % of the fixed image; it must cover all"
            )
        pulled = {
            key: MetaTensor(
                fields.pull(data[key].as_tensor()[None], data[key].affine, to - x, affine)[0].float(), affine=affine
            )
            for key in ("moving_image", "moving_label", "moving_gland")
            if key in data
        }
        return dict(data) | pulled | {"initial_displacement": (to - x)[0]}

    def _without_aliasing(self, data: Mapping[Hashable, MetaTensor], plan: Mapping[str, Tensor]) -> dict:
        """The volumes of a pair, coarsened where the working grid is measured by the gland; labels stay binary."""
        if not self.by_gland:
            return {}
        coarse = {}
        for key in self.key_iterator(data):
            coarse[key] = coarsened(data[key], grid_to_world(plan, key))
            if key in LABELS:
                coarse[key] = (coarse[key] >= 0.5).float()
        return coarse

    @staticmethod
    def _between_labels(data: Mapping[Hashable, MetaTensor]) -> Tensor:
        for key in LABELS:
            if key not in data or not data[key][:1].any():
                raise checks.InputError(
                    f'{data.get("case")}: initial transform "centroids" needs label 0, the gland, in {key}'
                )
        return align_moments(*(moments(data[key][:1]) for key in LABELS[::-1]), "translation")

    @staticmethod
    def _around_gland(data: Mapping[Hashable, MetaTensor]) -> tuple[Tensor, list[int], Tensor]:
        centre, length = close_up(data["fixed_gland"])
        nominal = torch.full((3,), CLOSE * NOMINAL / GRID, dtype=torch.float64)
        axes = frame(data["fixed_image"])[1]
        if "fixed_confidence" in data:  # a network that deforms sees the pair as the gland networks do
            way = way_of(data["fixed_image"].affine.cpu().numpy(), data["fixed_confidence"]["axes"])
            axes = upright_axes(axes, way)
        return cube_affine(centre, axes, length, GRID), [GRID] * 3, nominal

    def _field_of_view(self, data: Mapping[Hashable, MetaTensor]) -> tuple[Tensor, list[int], Tensor]:
        fixed = Orientation(axcodes="RAS", labels=None)(data["fixed_image"])
        affine = fixed.affine.double()
        old = affine[:3, :3].norm(dim=0)
        new = torch.full((3,), self.spacing, dtype=torch.float64) if self.spacing else old
        old_size = torch.tensor(fixed.shape[1:], dtype=torch.float64)
        size = (old_size * old / new - 1e-3).ceil()
        grid_affine = affine.clone()
        grid_affine[:3, :3] *= new / old
        grid_affine[:3, 3] += affine[:3, :3] @ ((old_size - 1) / 2) - grid_affine[:3, :3] @ ((size - 1) / 2)
        return grid_affine, size.int().tolist(), new


def as_declared(data: Mapping[Hashable, MetaTensor], side: str) -> Tensor:
    """World of a header -> world in which its image lies, (4, 4), float64: the identity but for declared axes."""
    if f"{side}_header" not in data:
        return torch.eye(4, dtype=torch.float64)
    image = data[f"original_{side}_image"] if f"original_{side}_image" in data else data[f"{side}_image"]
    return image.affine.double().cpu() @ torch.linalg.inv(torch.as_tensor(data[f"{side}_header"]).double().cpu())


def as_headers_say(item: Mapping[Hashable, MetaTensor]) -> dict:
    """A registration whose `displacement`, `field_affine` and `original_…` images are in the worlds of the headers, for
    its files.

    The same voxels of the fixed image show the same voxels of the moving one; only where axes were declared that differ
    from a header's are the worlds not those in which the pair was registered.
    """
    if not {"moving_header", "fixed_header"} & set(item):
        return dict(item)
    fixed, moving = (torch.linalg.inv(as_declared(item, side)) for side in ("fixed", "moving"))
    x = fields.world_grid(item["displacement"].shape[1:], item["field_affine"])
    y = x + item["displacement"][None].double()
    u = fields.transform_points(moving, y) - fields.transform_points(fixed, x)
    result = dict(item) | {"displacement": u[0].to(item["displacement"]), "field_affine": fixed @ item["field_affine"]}
    for side in ("moving", "fixed"):
        for key in (k for k in (f"original_{side}_image", f"original_{side}_label") if k in item):
            header = item.get(f"{side}_header", item[key].affine)
            result[key] = MetaTensor(item[key].as_tensor(), affine=torch.as_tensor(header).cpu())
    return result


def grid_to_world(plan: Mapping[Hashable, Tensor], key: str) -> Tensor:
    """Voxel of the planned working grid -> world of the volume called `key`, shape (4, 4), float64."""
    return plan["initial_transform"] @ plan["grid_affine"] if key.startswith("moving") else plan["grid_affine"]


def from_grid(data: Mapping[Hashable, MetaTensor], key: str) -> Tensor:
    """Voxel of the planned working grid -> voxel of the volume `data[key]`, shape (4, 4), float64."""
    return torch.linalg.inv(data[key].affine.double()) @ grid_to_world(data, key)


class OntoFixedGridd(PlanFixedGridd):
    """Bring a pair onto the working grid of `PlanFixedGridd`; same arguments.

    Each volume is interpolated once: the moving image is pulled through the initial transform straight onto the grid.
    Adds `image`, the network's input (2, X, Y, Z): channel 0 moving, 1 fixed; glands that were found are channels 2 and
    3. Replaces the labels by soft maps (M, X, Y, Z) on the same grid.
    """

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        d = super().__call__(data)
        size = d.pop("grid_size")
        d |= {f"original_{key}": data[key] for key in GLANDS if key in d}
        for key in [k for k in (*KEYS, *GLANDS) if k in d]:
            padding = "border" if key in IMAGES else "outside"
            volume = d[key].as_tensor()[None].double()
            d[key] = fields.resample(volume, from_grid(d, key), size, padding_mode=padding)[0].float()
        d["image"] = torch.cat([d.pop(key) for key in (*IMAGES, *GLANDS) if key in d])
        return d


class KeepOriginalsd(MapTransform):
    """Keep each volume as loaded under `original_…`, for the final warp and the metrics on the original grid."""

    def __init__(self) -> None:
        super().__init__(KEYS, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        return dict(data) | {f"original_{key}": data[key] for key in self.key_iterator(data)}


def transform_on(data: Mapping[Hashable, Tensor], ddf: Tensor, affine: Tensor, size: Sequence[int]) -> Tensor:
    """A DDF of the working grid as one transform between the original images, on any grid of the fixed world.

    Args:
        data: `grid_affine`, `initial_transform`, `initial_displacement` if there is one, `original_fixed_image`.
        ddf: shape (3, X, Y, Z), voxels of the working grid; zero gives the initial transform alone.
        affine: voxel -> world of the other grid, shape (4, 4).
        size: its voxels.

    Returns:
        The displacement, shape (1, 3, *size), float64, RAS mm, initial transform composed in.
    """
    ddf = torch.as_tensor(ddf)[None].cpu()
    u = fields.world_displacement(ddf, data["grid_affine"].cpu(), data["initial_transform"].cpu(), affine, size)
    if "initial_displacement" in data:
        x, fixed = fields.world_grid(size, affine), data["original_fixed_image"].affine.double()
        u = fields.displaced(data["initial_displacement"][None].cpu(), fixed, x + u) - x
    return u


def to_original_grid(data: Mapping[Hashable, Tensor], ddf: Tensor) -> dict[str, Tensor]:
    """A DDF of the working grid as one transform between the original images, and the moving volumes warped by it.

    Args:
        data: as for `transform_on`, and the `original_…` volumes.
        ddf: see `transform_on`.

    Returns:
        `displacement` (3, X, Y, Z), RAS mm on the original fixed grid, which is `field_affine`, initial transform
        composed in; `moving_image` and, where there are moving labels, `moving_label` (soft maps), on that grid, each
        interpolated once.
    """
    affine, size = data["original_fixed_image"].affine.double(), data["original_fixed_image"].shape[1:]
    u = transform_on(data, ddf, affine, size)
    result = {"displacement": u[0], "field_affine": affine}
    for key in ("moving_image", "moving_label"):
        if f"original_{key}" in data:
            volume = data[f"original_{key}"]
            result[key] = fields.pull(volume.as_tensor()[None], volume.affine, u, affine)[0].float()
    return result


def compact(data: Mapping[Hashable, Tensor], ddf: Tensor) -> dict[str, Tensor]:
    """As `to_original_grid`, with the displacement on the working grid, as far as the fixed image reaches and a margin.

    The transform is linear between the voxels of the working grid, and beyond that grid between the voxels it would
    have: so nothing is lost, and a field needs no voxels of the size that the image has.
    """
    affine, size = data["original_fixed_image"].affine.double(), data["original_fixed_image"].shape[1:]
    grid_affine = data["grid_affine"].double().cpu()
    faces = torch.cartesian_prod(*(torch.tensor([-0.5, n - 0.5], dtype=torch.float64) for n in size))
    corners = fields.transform_points(torch.linalg.inv(grid_affine) @ affine, faces.T[None, ..., None, None])[
        0, ..., 0, 0
    ]
    low, high = corners.amin(1).floor() - 1, corners.amax(1).ceil() + 1
    field_affine = grid_affine.clone()
    field_affine[:3, 3] += grid_affine[:3, :3] @ low
    u = transform_on(data, ddf, field_affine, (high - low + 1).int().tolist()).float()
    result = {"displacement": u[0], "field_affine": field_affine}
    for key in ("moving_image", "moving_label"):
        if f"original_{key}" in data:
            volume = data[f"original_{key}"]
            told = (u, field_affine, affine, size)
            result[key] = fields.pull_by(volume.as_tensor()[None], volume.affine, *told)[0]
    return result


class ToOriginalGridd(Transform):
    """Add `displacement`, `field_affine`, `warped_moving_image` and `warped_moving_label` from `pred`.

    Args:
        on_fixed_grid: False leaves the displacement on a grid of its own, see `compact`, True on the fixed image's, see
            `to_original_grid`; after an initial transform that is no matrix it is always there.
    """

    def __init__(self, on_fixed_grid: bool = True) -> None:
        self.on_fixed_grid = on_fixed_grid

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict:
        whole = self.on_fixed_grid or "initial_displacement" in data
        result = (to_original_grid if whole else compact)(data, data["pred"])
        return dict(data) | {f"warped_{k}" if k.startswith("moving") else k: v for k, v in result.items()}
