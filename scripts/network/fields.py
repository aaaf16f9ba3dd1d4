"""Displacement-field mathematics on tensors: sampling, warping, Jacobian, and the way from voxels to world millimetres.

Conventions: a DDF has shape (B, 3, X, Y, Z), order x, y, z, in voxels of its own grid, and pulls:
``warped(p) = moving(p + ddf(p))``. An affine is a 4×4 matrix, voxel -> world mm, RAS. Nothing here knows files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

SLAB = 2**21  # voxels pulled at a time, so that memory does not grow with the grid


def identity_grid(size: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Voxel coordinates of a grid: shape (3, X, Y, Z), order x, y, z."""
    axes = [torch.arange(n, dtype=dtype, device=device) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _grid_sample(image: Tensor, grid: Tensor, mode: str, padding_mode: str) -> Tensor:
    """`torch.nn.functional.grid_sample`, and in one go on all cores: a CPU gives it one thread per batch item.

    A batch smaller than the number of threads is sampled item by item, the points of each cut into equal runs along
    the batch axis over one shared view of the image.
    """
    threads = torch.get_num_threads()
    if image.device.type != "cpu" or len(image) >= threads:
        return F.grid_sample(image, grid, mode, padding_mode, align_corners=False)
    sampled = []
    for volume, points in zip(image.split(1), grid.flatten(1, 3).split(1), strict=True):
        count = points.shape[1]
        runs = F.pad(points, (0, 0, 0, -count % threads)).view(threads, -1, 1, 1, 3)
        values = F.grid_sample(volume.expand(threads, -1, -1, -1, -1), runs, mode, padding_mode, align_corners=False)
        sampled.append(values[..., 0, 0].transpose(0, 1).reshape(1, image.shape[1], -1)[..., :count])
    return torch.cat(sampled).view(image.shape[0], image.shape[1], *grid.shape[1:4])


def _sample(image: Tensor, grid: Tensor, mode: str, padding_mode: str | Sequence[str]) -> Tensor:
    """`sample` at points in grid_sample's coordinates, (B, X', Y', Z', 3): z, y, x in [-1, 1] between outer faces."""
    grid = grid.to(image.dtype)
    if padding_mode in ("zeros", "border"):
        return _grid_sample(image, grid, mode, padding_mode)
    modes = [padding_mode] * image.shape[1] if isinstance(padding_mode, str) else padding_mode
    counts = inside = (grid.abs() <= 1).all(-1).unsqueeze(1)
    if "border" in modes:
        counts = torch.cat([torch.ones_like(inside) if m == "border" else inside for m in modes], dim=1)
    return _grid_sample(image, grid, mode, "border") * counts


def sample(
    image: Tensor, points: Tensor, mode: str = "bilinear", padding_mode: str | Sequence[str] = "border"
) -> Tensor:
    """Values of an image at voxel coordinates.

    Args:
        image: shape (B, C, X, Y, Z).
        points: shape (B, 3, X', Y', Z'), voxel coordinates of `image`, order x, y, z.
        mode: "bilinear" (trilinear in 3-D) or "nearest".
        padding_mode: "border", "zeros" (fades to zero over one voxel beyond the outermost centres), or "outside": zero
            beyond the outer faces of the outermost voxels and border inside them, which is what ITK does; or one of
            "border" and "outside" for each channel.

    Returns:
        Shape (B, C, X', Y', Z').
    """
    # (2p + 1)/n - 1 is grid_sample's coordinate with align_corners=False; a single slice needs no special case
    axes = [(points[:, i] * (2 / n)).add_(1 / n - 1) for i, n in enumerate(image.shape[2:])]
    return _sample(image, torch.stack(axes[::-1], dim=-1), mode, padding_mode)


def at_points(field: Tensor, points: Tensor) -> Tensor:
    """A field (B, 3, X, Y, Z) at points (B, K, 3), voxels, its border beyond it: (B, K, 3)."""
    return sample(field, points.transpose(1, 2)[..., None, None])[..., 0, 0].transpose(1, 2)


def resample(
    image: Tensor,
    to_image: Tensor,
    size: Sequence[int],
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> Tensor:
    """An image on another grid, in one interpolation.

    Args:
        image: shape (1, C, X, Y, Z).
        to_image: voxel of the other grid -> voxel of `image`, shape (4, 4).
        size: voxels of the other grid.
        mode, padding_mode: as in `sample`.

    Returns:
        Shape (1, C, *size).
    """
    to_image = to_image.double().cpu()
    theta = normalised(image.shape[2:]) @ to_image @ torch.linalg.inv(normalised(size))
    theta = theta[:3].flip(0)[:, [2, 1, 0, 3]]  # grid_sample counts x, y, z from the last axis
    grid = F.affine_grid(theta[None].to(image), [1, 1, *size], align_corners=False)
    return _sample(image, grid, mode, padding_mode)


def normalised(size: Sequence[int] | Tensor) -> Tensor:
    """Voxel -> [-1, 1] between the outer faces of the outermost voxels of grids (…, 3): (…, 4, 4), float64, CPU."""
    n = torch.as_tensor(size).double()
    matrix = torch.diag_embed(torch.cat([2 / n, torch.ones_like(n[..., :1])], dim=-1))
    matrix[..., :3, 3] = 1 / n - 1
    return matrix


def warp(image: Tensor, ddf: Tensor, mode: str = "bilinear", padding_mode: str = "zeros") -> Tensor:
    """Image pulled back by a DDF on the same grid: ``warped(p) = image(p + ddf(p))`` (Hu et al. 2018, §2.1).

    Args:
        image: shape (B, C, X, Y, Z).
        ddf: shape (B, 3, X, Y, Z), voxels.
        mode, padding_mode: as in `sample`; zeros outside suit labels, border suits display.

    Raises:
        ValueError: `image` and `ddf` are not on one grid.
    """
    if ddf.shape != (image.shape[0], 3, *image.shape[2:]):
        raise ValueError(f"image {tuple(image.shape)} and ddf {tuple(ddf.shape)} are not on one grid")
    axes = []
    for i, n in enumerate(image.shape[2:]):
        centres = ((2 * torch.arange(n, dtype=ddf.dtype, device=ddf.device) + 1) / n - 1).view(-1, *[1] * (2 - i))
        axes.append(torch.add(centres, ddf[:, i], alpha=2 / n))
    return _sample(image, torch.stack(axes[::-1], dim=-1), mode, padding_mode)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The DDF of two warps, one after the other: ``warp(warp(image, first), second)`` in one interpolation.

    ``composed(p) = second(p) + first(p + second(p))``; beyond the grid `first` has the values of its border.

    Args:
        first, second: shape (B, 3, X, Y, Z), voxels of one grid.

    Returns:
        Shape (B, 3, X, Y, Z), voxels.

    Raises:
        ValueError: the fields are not on one grid.
    """
    return second + warp(first, second, padding_mode="border")


def affine_field(affine: Tensor, size: list[int]) -> Tensor:
    """The DDF of an affine map A of the coordinates q in [-1, 1] between a grid's outer faces: A q − q, in voxels.

    One unit along an axis of n voxels is n/2 of them, so on an anisotropic grid each axis has its own. TorchScript
    compiles it.

    Args:
        affine: shape (B, 3, 4), order x, y, z; the last column is the translation.
        size: voxels along x, y, z.

    Returns:
        Shape (B, 3, *size), voxels.
    """
    change = affine - torch.eye(3, 4, dtype=affine.dtype, device=affine.device)
    field = change[:, :, 3].view(-1, 3, 1, 1, 1)
    for axis in range(3):
        n = size[axis]
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = n
        centres = (2 * torch.arange(n, dtype=affine.dtype, device=affine.device) + 1) / n - 1
        field = field + change[:, :, axis].view(-1, 3, 1, 1, 1) * centres.view(shape)
    half = torch.tensor(size, dtype=affine.dtype, device=affine.device) / 2
    return field * half.view(1, 3, 1, 1, 1)


def jacobian_determinant(displacement: Tensor, affine: Tensor | None = None) -> Tensor:
    """det(∂(p + u)/∂p) at interior voxels by central differences; ≤ 0 where the field folds (Fig. 10).

    Args:
        displacement: shape (B, 3, X, Y, Z); voxels, or mm when `affine` is given.
        affine: voxel -> world of the grid, shape (4, 4).

    Returns:
        Shape (B, X-2, Y-2, Z-2), without unit.
    """
    f = displacement
    gradient = torch.stack(
        [
            (f[:, :, 2:, 1:-1, 1:-1] - f[:, :, :-2, 1:-1, 1:-1]) / 2,
            (f[:, :, 1:-1, 2:, 1:-1] - f[:, :, 1:-1, :-2, 1:-1]) / 2,
            (f[:, :, 1:-1, 1:-1, 2:] - f[:, :, 1:-1, 1:-1, :-2]) / 2,
        ],
        dim=-1,
    ).movedim(1, -2)  # (B, X, Y, Z, component, axis)
    if affine is not None:
        gradient = gradient @ torch.linalg.inv(affine[:3, :3]).to(gradient)
    return torch.linalg.det(gradient + torch.eye(3, dtype=f.dtype, device=f.device))


def transform_points(affine: Tensor, points: Tensor) -> Tensor:
    """A 4×4 affine applied to points of shape (B, 3, X, Y, Z)."""
    affine = affine.to(points)
    return torch.einsum("ij,bj...->bi...", affine[:3, :3], points) + affine[:3, 3].view(1, 3, 1, 1, 1)


def world_grid(size: Sequence[int], affine: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The voxels of a grid in its world: shape (1, 3, *size), float64, mm; `affine` is its voxel -> world, (4, 4)."""
    return transform_points(affine.double(), identity_grid(size, torch.float64, device)[None])


def displaced(displacement: Tensor, affine: Tensor, points: Tensor) -> Tensor:
    """Points moved by a displacement; beyond its grid it has the values of its border, see `covers`.

    Args:
        displacement: shape (1, 3, X, Y, Z), mm in the world.
        affine: voxel -> world of its grid, shape (4, 4).
        points: shape (1, 3, X', Y', Z'), mm in the world.
    """
    return points + sample(displacement, transform_points(torch.linalg.inv(affine), points))


def covers(size: Sequence[int], affine: Tensor, points: Tensor) -> Tensor:
    """Whether world points, (1, 3, X', Y', Z'), lie in a grid, to its voxels' outer faces: shape (1, 1, X', Y', Z')."""
    voxels = transform_points(torch.linalg.inv(affine), points)
    last = torch.tensor([*size], dtype=points.dtype, device=points.device).view(1, 3, 1, 1, 1) - 0.5
    return ((voxels >= -0.5) & (voxels <= last)).all(1, keepdim=True)


def gradient(displacement: Tensor, affine: Tensor, points: Tensor) -> Tensor:
    """∂(x + u(x))/∂x at world points (1, 3, N, 1, 1) by central differences over one voxel: shape (N, 3, 3)."""
    halves = affine[:3, :3].T.reshape(3, 3, 1, 1, 1) / 2  # of each axis of the grid, in mm
    ends = [displaced(displacement, affine, points + side * half) for half in halves for side in (1, -1)]
    along = [(ends[2 * i] - ends[2 * i + 1])[0, :, :, 0, 0].T for i in range(3)]
    return torch.stack(along, dim=-1) @ torch.linalg.inv(affine[:3, :3])


def inverse(
    displacement: Tensor, affine: Tensor, points: Tensor, tolerance: float = 1e-6, steps: int = 60
) -> tuple[Tensor, Tensor, Tensor]:
    """Where x + u(x) meets given points, by Newton's method with step halving.

    A fixed-point iteration x ← y − u(x) diverges where the displacement holds a large rotation or stretch, as it does
    with a initial transform composed in. This begins at the voxel that the displacement takes nearest to the point.

    Args:
        displacement: shape (1, 3, X, Y, Z), float64, mm in the world; border values beyond its grid.
        affine: voxel -> world of its grid, shape (4, 4), float64.
        points: shape (1, 3, N, 1, 1), float64, mm.
        tolerance: of the residual, mm.
        steps: at most.

    Returns:
        x, shape (1, 3, N, 1, 1); the residual ‖x + u(x) − y‖ in mm, shape (N,); and the Jacobian determinant at x,
        shape (N,), ≤ 0 where the field folds and x is one of several.
    """
    every = [max(1, n // 48) for n in displacement.shape[2:]]
    voxels = identity_grid(displacement.shape[2:], torch.float64, "cpu")[:, :: every[0], :: every[1], :: every[2]]
    grid = transform_points(affine, voxels[None])
    tree = cKDTree(displaced(displacement, affine, grid).flatten(2)[0].T.numpy())
    x = grid.flatten(2)[:, :, tree.query(points[0, :, :, 0, 0].T.numpy())[1]][..., None, None].contiguous()

    off, length = displaced(displacement, affine, x) - points, torch.ones_like(points[:, :1])
    for _ in range(steps):
        # a step that was halved that often leads nowhere: the point is outside, or in a fold
        going = ((off.norm(dim=1) > tolerance) & (length[:, 0] > 1e-4)).flatten().nonzero()[:, 0]
        if not len(going):
            break
        at, error, step = x[:, :, going], off[:, :, going], length[:, :, going]
        newton = torch.linalg.pinv(gradient(displacement, affine, at)) @ error[0, :, :, 0, 0].T[..., None]
        tried = at - step * newton[..., 0].T[None, :, :, None, None]
        after = displaced(displacement, affine, tried) - points[:, :, going]
        better = after.norm(dim=1, keepdim=True) < error.norm(dim=1, keepdim=True)
        x[:, :, going], off[:, :, going] = torch.where(better, tried, at), torch.where(better, after, error)
        length[:, :, going] = torch.where(better, (2 * step).clamp_max(1), step / 2)
    return x, off.norm(dim=1).flatten(), torch.linalg.det(gradient(displacement, affine, x))


def world_displacement(
    ddf: Tensor, grid_affine: Tensor, initial: Tensor, affine: Tensor, size: Sequence[int]
) -> Tensor:
    """The whole transform, initial transform composed in, as a displacement in world millimetres on any grid.

    With the initial transform S (fixed world -> moving world) and the grid affine A of the DDF, the transform is
    ``T(x) = S(x + A_linear · ddf(A⁻¹ x))`` and the result is ``T(x) − x``.

    Args:
        ddf: shape (1, 3, X, Y, Z), voxels of the working grid.
        grid_affine: voxel -> world of the working grid, shape (4, 4).
        initial: fixed world -> moving world, shape (4, 4), RAS mm.
        affine, size: the grid to express it on, usually the original fixed image's.

    Returns:
        Shape (1, 3, *size), float64, RAS mm.
    """
    x = world_grid(size, affine, ddf.device)
    grid_affine = grid_affine.double().to(ddf.device)
    u = sample(ddf.double(), transform_points(torch.linalg.inv(grid_affine), x))
    moved = x + torch.einsum("ij,bj...->bi...", grid_affine[:3, :3], u)
    return transform_points(initial.double(), moved) - x


def pull(moving: Tensor, moving_affine: Tensor, displacement: Tensor, affine: Tensor, mode: str = "bilinear") -> Tensor:
    """A moving volume on its own grid, pulled onto the grid of a world displacement in one interpolation.

    Args:
        moving: shape (1, C, X, Y, Z).
        moving_affine: its voxel -> world, shape (4, 4).
        displacement: shape (1, 3, X', Y', Z'), RAS mm, on the grid of `affine`.
        mode: "bilinear" or "nearest".

    Returns:
        Shape (1, C, X', Y', Z'), float64; zero outside the moving volume.
    """
    x = world_grid(displacement.shape[2:], affine, displacement.device)
    points = transform_points(torch.linalg.inv(moving_affine.double()), x + displacement)
    return sample(moving.double(), points, mode, padding_mode="outside")


def slabs(size: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of planes along a grid's first axis, at most `SLAB` voxels or one plane each: the first, and how many."""
    planes = max(1, SLAB // (size[1] * size[2]))
    for first in range(0, size[0], planes):
        yield first, min(planes, size[0] - first)


def pull_by(
    moving: Tensor,
    moving_affine: Tensor,
    displacement: Tensor,
    field_affine: Tensor,
    affine: Tensor,
    size: Sequence[int],
) -> Tensor:
    """`pull` onto any grid by a displacement on a coarser one, in slabs and float32: memory is that of the result.

    Args:
        moving: shape (1, C, X, Y, Z).
        moving_affine, field_affine, affine: voxel -> world of the moving volume, of the displacement's grid and of the
            grid to pull onto, shape (4, 4).
        displacement: shape (1, 3, X', Y', Z'), RAS mm; its border beyond it.
        size: voxels of the grid to pull onto.

    Returns:
        Shape (1, C, *size), float32; zero outside the moving volume.
    """
    to_moving, affine = torch.linalg.inv(moving_affine.double()), affine.double()
    moving, displacement = moving.float(), displacement.float()
    u = torch.einsum("ij,bj...->bi...", to_moving[:3, :3].float(), displacement)  # in voxels of the moving volume
    pulled = torch.empty(1, moving.shape[1], *size)
    for first, count in slabs(size):
        begin = torch.eye(4, dtype=torch.float64)
        begin[0, 3] = first
        shift = resample(u, torch.linalg.inv(field_affine.double()) @ affine @ begin, [count, *size[1:]])
        at = transform_points(to_moving @ affine @ begin, identity_grid([count, *size[1:]], torch.float32, "cpu")[None])
        pulled[:, :, first : first + count] = sample(moving, at.add_(shift), padding_mode="outside")
    return pulled
