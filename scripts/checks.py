"""The input gate: every refusal and its message. A refusal names the file, what was found and what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

MAX_VOXELS = 512**3  # a larger volume is refused rather than run out of memory half-way


class InputError(ValueError):
    """An input that cannot be used; the message is one line that names the file and what is wrong."""


def refusal(error: BaseException | None) -> InputError | None:
    """The `InputError` behind an exception, however many layers or processes wrapped it; None if there is none.

    A loader's process that died and a GPU whose memory ran out are refusals too.
    """
    while error is not None:
        text = str(error)
        if "in DataLoader worker" in text and (there := re.search(r"^\S*InputError: (.+)$", text, re.MULTILINE)):
            return InputError(there[1])
        if isinstance(error, InputError):
            return error
        if died := re.match(r"DataLoader worker \(pid \d+\) (is killed .*?|exited .* code \d+)\. ", text):
            return InputError(f"a process that reads data {died[1]}; if memory ran out, lower --num_workers")
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return InputError(f"{text.splitlines()[0]} --cohort_device cpu or --device cpu need less of the GPU")
        error = error.__cause__ or error.__context__
    return None


def refuse_in_one_line() -> None:
    """Make an uncaught `InputError` end the process with one line on stderr and exit code 1, not with a traceback."""
    previous = sys.excepthook

    def hook(kind, value, trace) -> None:
        found = refusal(value)
        if found is None:
            previous(kind, value, trace)
        else:
            print(f"error: {found}", file=sys.stderr)

    if getattr(previous, "__module__", None) != __name__:
        sys.excepthook = hook


def check_geometry(path: str | Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuse a grid that is no volume.

    Args:
        shape: voxels along x, y, z.
        affine: voxel -> world mm, shape (4, 4).

    Raises:
        InputError: not three axes, a single slice, too many voxels, a zero, negative or NaN spacing, a singular affine.
    """
    if len(shape) != 3:
        raise InputError(f"{path}: expected a 3-D volume, found {len(shape)} axes {shape}")
    if min(shape) < 2:
        raise InputError(f"{path}: a single slice, size {shape}; give the whole volume")
    if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
        raise InputError(f"{path}: size {shape} is beyond the cap of {MAX_VOXELS} voxels; crop or resample it first")
    affine = np.asarray(affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (spacing <= 0).any():
        raise InputError(f"{path}: voxel size {spacing.round(6).tolist()} mm in the header; it must be positive")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{path}: the affine in the header is singular; its axes do not span a volume")


def check_image(path: str | Path, image: np.ndarray) -> None:
    """Refuse an image without usable intensities; `image` is an array of any shape.

    Raises:
        InputError: NaN or infinity, or one constant value.
    """
    check_finite(path, image)
    if image.min() == image.max():
        raise InputError(f"{path}: every voxel is {image.flat[0]:g}; a constant image cannot be registered")


def check_finite(path: str | Path, image: np.ndarray) -> None:
    """Refuse NaN or infinity in an array of any shape, which every interpolation spreads.

    Raises:
        InputError: there is one.
    """
    bad = int((~np.isfinite(image)).sum())
    if bad:
        raise InputError(f"{path}: {bad} voxels are NaN or infinite; clean the image first")


def check_labels(path: str | Path, labels: np.ndarray) -> None:
    """Refuse a label file whose channels are not binary maps; `labels` has shape (M, X, Y, Z).

    Raises:
        InputError: values other than 0 and 1, or no foreground at all.
    """
    values = np.unique(labels)
    if not np.isin(values, (0, 1)).all():
        shown = ", ".join(f"{v:g}" for v in values[:6]) + (", …" if len(values) > 6 else "")
        raise InputError(
            f"{path}: label values {shown}; expected 0 and 1. For an integer index map declare its values,"
            " for example --label_values '[1,2,3]'"
        )
    if not labels.any():
        raise InputError(f"{path}: the label set is empty, no voxel is labelled")


def check_label_geometry(
    label_path: str | Path,
    label_shape: tuple[int, ...],
    label_affine: np.ndarray,
    image_path: str | Path,
    image_shape: tuple[int, ...],
    image_affine: np.ndarray,
) -> None:
    """Refuse a label that is not on its image's grid.

    Raises:
        InputError: another size, or corners that lie more than a tenth of a voxel apart.
    """
    if label_shape != image_shape:
        raise InputError(f"{label_path}: size {label_shape} differs from its image {image_path}: {image_shape}")
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(image_shape) - 1
    shift = corners @ (np.asarray(label_affine, float) - np.asarray(image_affine, float)).T
    apart = np.linalg.norm(shift, axis=1).max()
    voxel = np.linalg.norm(np.asarray(image_affine, float)[:3, :3], axis=0).min()
    if apart > 0.1 * voxel:
        raise InputError(f"{label_path}: lies up to {apart:.2f} mm away from its image {image_path}; headers differ")


def check_label_counts(moving_path: str | Path, moving: int, fixed_path: str | Path, fixed: int) -> None:
    """Refuse a pair whose files hold different numbers of labels.

    Raises:
        InputError: the counts differ.
    """
    if moving != fixed:
        raise InputError(
            f"{moving_path}: {moving} labels, but {fixed_path} has {fixed}; label m must be the same structure in both"
        )


def check_weights(path: str, network) -> str:
    """Refuse weights that are missing, are not plain tensors, or do not fit `network`; returns `path`.

    Raises:
        InputError: see above.
    """
    import torch  # only here: the rest of the gate needs numpy alone

    if not Path(path).is_file():
        raise InputError(
            f"{path}: no weights there; train first (configs/train.json writes them), or pass --ckpt_path FILE"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {k: tuple(v.shape) for k, v in found.items()}
    except Exception as error:  # whatever a damaged or hostile file raises is one refusal
        raise InputError(f"{path}: not a readable weights file of plain tensors") from error
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    if shapes != wanted:
        name = next(k for k in [*wanted, *shapes] if shapes.get(k) != wanted.get(k))
        raise InputError(
            f"{path}: does not fit the network: {name} is {shapes.get(name, 'absent')} in the file,"
            f" {wanted.get(name, 'absent')} in the network; pass the settings it was trained with"
        )
    return path
