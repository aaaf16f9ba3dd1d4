"""The input gate: every refusal and its message. A refusal names the file, what was found and what to do.

What can be mended for certain is mended and said: a warning of the class `Repaired`, which names the file.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SUMS = "SHA256SUMS"  # beside files whose hashes are known, as `sha256sum` writes and reads it
MAX_VOXELS = 512**3  # a larger volume is refused rather than run out of memory half-way
MAX_MM = 1e5  # no scanner's world is larger; single precision tells voxels apart in it
ROUNDING = 1e-4  # cosine between two axes that headers in single precision have, and that ITK takes for zero
INTERRUPTED = "interrupted"  # all that Ctrl-C prints
MAX_SHEAR = 0.02  # the same, about one degree: the most that is mended


class InputError(ValueError):
    """An input that cannot be used; the message is one line that names the file and what is wrong."""


class Repaired(UserWarning):
    """A defect of an input that was mended; the message is one line that names the file and what was done."""


def repaired(path: str | Path, what: str) -> None:
    """Say that something about a file was mended; Python shows each such message once."""
    warnings.warn(f"{path}: {what}", Repaired, stacklevel=2)


def refusal(error: BaseException | None) -> InputError | None:
    """The `InputError` behind an exception, however many layers wrapped it; None if there is none.

    A loader's process that died, a GPU whose memory ran out and a file that the system refuses are refusals too.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, InputError):
            return error
        if died := re.match(r"DataLoader worker \(pid \d+\) (is killed .*?|exited .* code \d+)\. ", text):
            return InputError(f"a process that reads data {died[1]}; if memory ran out, lower --num_workers")
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return InputError(f"{text.splitlines()[0]} --cohort_device cpu or --device cpu need less of the GPU")
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            return InputError(f"{error.filename}: {error.strerror}")
        error = error.__cause__ or error.__context__
    return None


def one_line(refused: InputError) -> str:
    """The message of a refusal without what would break its line, as a file's name may."""
    return " ".join(str(refused).splitlines())


def refuse_in_one_line() -> None:
    """Show an uncaught `InputError` as one line on stderr (exit code 1) without a traceback, a repair likewise.

    Ctrl-C is one line too, and what Ignite logs of an exception, twice, before it raises it, is left out.
    """
    previous, usual = sys.excepthook, warnings.formatwarning

    def hook(kind, value, trace) -> None:
        found = refusal(value)
        if found is not None:
            print(f"error: {one_line(found)}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            print(INTERRUPTED, file=sys.stderr)
        else:
            previous(kind, value, trace)

    def in_one_line(message, category, *where) -> str:
        return f"repaired: {message}\n" if category is Repaired else usual(message, category, *where)

    if getattr(previous, "__module__", None) != __name__:
        sys.excepthook = hook
        warnings.formatwarning = in_one_line
    for handler in logging.getLogger().handlers:
        handler.addFilter(_said_once)


def _said_once(record: logging.LogRecord) -> bool:
    return "run is terminating due to exception" not in record.getMessage()


def check_geometry(path: str | Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuse a grid that is no volume.

    Args:
        shape: voxels along x, y, z.
        affine: voxel -> world mm, shape (4, 4).

    Raises:
        InputError: not three axes, a single slice, too many voxels; an affine that is singular or beyond `MAX_MM`, or
            has a zero or NaN spacing.
    """
    if len(shape) != 3:
        raise InputError(f"{path}: expected a 3-D volume, found {len(shape)} axes {shape}")
    if min(shape) < 2:
        raise InputError(f"{path}: a single slice, size {shape}; give the whole volume")
    check_size(path, shape)
    affine = np.asarray(affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (spacing <= 0).any():
        raise InputError(f"{path}: voxel size {spacing.round(6).tolist()} mm in the header; it must be positive")
    if np.abs(affine).max() > MAX_MM:
        raise InputError(f"{path}: {np.abs(affine).max():g} mm in the affine, beyond {MAX_MM:g}; mend the header")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{path}: the affine in the header is singular; its axes do not span a volume")


def voxel_size(option: str, given: float | Sequence[float] | None) -> np.ndarray | None:
    """A voxel size that the user gives for files that state none, shape (3,), mm; None stays None.

    Args:
        option: its name.
        given: (x, y, z), or one number for all three.

    Raises:
        InputError: it is none.
    """
    if given is None:
        return None
    try:
        size = np.array(given, dtype=float)
    except (TypeError, ValueError):
        size = np.empty(0)
    if size.shape not in ((), (3,)) or not (np.isfinite(size) & (size > 0)).all():
        raise InputError(f"{option} {given}: expected three positive numbers, the voxel size '[x,y,z]' in mm")
    return np.broadcast_to(size, 3)


def check_size(path: str | Path, shape: Sequence[int]) -> None:
    """Refuse a volume that would fill the memory; `shape` is its voxels along x, y, z.

    Raises:
        InputError: more than `MAX_VOXELS`.
    """
    if math.prod(map(int, shape)) > MAX_VOXELS:
        raise InputError(
            f"{path}: size {tuple(shape)} is beyond the cap of {MAX_VOXELS} voxels; crop or resample it first"
        )


def orthonormal(path: str | Path, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """An affine whose axes are perpendicular, as every other tool wants them; the volume's centre stays.

    Axes that are off by up to `MAX_SHEAR` are replaced by the nearest perpendicular ones, with a warning.

    Args:
        shape: voxels along x, y, z.
        affine: voxel -> world mm, shape (4, 4).

    Raises:
        InputError: they are off by more.
    """
    affine = np.asarray(affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    off = np.abs(axes.T @ axes - np.eye(3)).max()
    if off <= ROUNDING:
        return affine
    degrees = np.degrees(np.arcsin(off))
    if off > MAX_SHEAR:
        raise InputError(
            f"{path}: its axes are {degrees:.1f}° from perpendicular; resample it onto a grid without shear"
        )
    left, _, right = np.linalg.svd(axes)
    mended, middle = affine.copy(), (np.array(shape) - 1) / 2
    mended[:3, :3] = (left @ right) * spacing
    mended[:3, 3] += (affine - mended)[:3, :3] @ middle
    moved = distance(shape, affine, mended)
    repaired(path, f"axes {degrees:.2f}° from perpendicular made perpendicular, which moves its corners {moved:.2f} mm")
    return mended


def distance(shape: Sequence[int], one: np.ndarray, other: np.ndarray) -> float:
    """The most that two affines (4, 4) put a voxel of a grid of `shape` apart, mm: at one of its corners."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(shape) - 1
    return np.linalg.norm(corners @ (np.asarray(one, float) - np.asarray(other, float)).T, axis=1).max()


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
        shown = ", ".join(f"{v:.8g}" for v in values[:6]) + (", …" if len(values) > 6 else "")
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
    apart = distance(image_shape, label_affine, image_affine)
    voxel = np.linalg.norm(np.asarray(image_affine, float)[:3, :3], axis=0).min()
    if apart > 0.1 * voxel:
        raise InputError(f"{label_path}: lies up to {apart:.2f} mm away from its image {image_path}; headers differ")


def check_modalities(moving_path: str | Path, moving: str | None, fixed_path: str | Path, fixed: str | None) -> None:
    """Refuse a pair whose headers say that it is not a moving MR and a fixed ultrasound; None says nothing.

    Args:
        moving, fixed: modalities as DICOM names them.

    Raises:
        InputError: exchanged, or two images of the ultrasound.
    """
    if moving == "US":
        what = "they are exchanged" if fixed == "MR" else "the moving image is an MR, the fixed one the TRUS"
        raise InputError(f"{moving_path}: its modality is US, that of {fixed_path} {fixed or 'not stated'}; {what}")


def check_two_images(moving_path: str | Path, moving: np.ndarray, fixed_path: str | Path, fixed: np.ndarray) -> None:
    """Refuse a pair that is one image twice, whatever its files, headers and the order of its axes.

    Args:
        moving, fixed: arrays of any shape.

    Raises:
        InputError: the same voxels.
    """
    if sorted(moving.shape) != sorted(fixed.shape) or moving.min() != fixed.min() or moving.max() != fixed.max():
        return
    if np.array_equal(moving, fixed) or np.array_equal(np.sort(moving, axis=None), np.sort(fixed, axis=None)):
        raise InputError(f"{moving_path}: holds the same image as {fixed_path}; give the MR and the TRUS")


def check_label_counts(moving_path: str | Path, moving: int, fixed_path: str | Path, fixed: int) -> None:
    """Refuse a pair whose files hold different numbers of labels.

    Raises:
        InputError: the counts differ.
    """
    if moving != fixed:
        raise InputError(
            f"{moving_path}: {moving} labels, but {fixed_path} has {fixed}; label m must be the same structure in both"
        )


def check_drawable(moving_path: str | Path, moving: np.ndarray, fixed_path: str | Path, fixed: np.ndarray) -> None:
    """Refuse a pair without a label that both files show; say which channels of (M, X, Y, Z) one of them leaves empty.

    Raises:
        InputError: no label is present in both.
    """
    present = []
    for path, labels in ((moving_path, moving), (fixed_path, fixed)):
        present.append(labels.any(axis=(1, 2, 3)))
        empty = np.flatnonzero(~present[-1])
        if len(empty):
            shown = ", ".join(map(str, empty))
            repaired(path, f"label {shown} of 0 to {len(labels) - 1} is empty, left out of loss and TRE")
    if not np.logical_and(*present).any():
        raise InputError(f"{moving_path}: no label is present both here and in {fixed_path}; nothing can be compared")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hashes(folder: str | Path) -> dict[str, str]:
    """File name -> SHA-256 of what SHA256SUMS in a folder names; nothing without one."""
    sums = Path(folder) / SUMS
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    return {name.strip().lstrip("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}


def check_hash(path: str | Path) -> None:
    """Refuse a file that is not the one SHA256SUMS beside it names; a file it does not name passes.

    Raises:
        InputError: another SHA-256.
    """
    expected = known_hashes(Path(path).parent).get(Path(path).name)
    if expected and expected != (found := sha256(path)):
        raise InputError(
            f"{path}: SHA-256 is {found}, but {SUMS} beside it says {expected}; not opened: damaged or replaced"
        )


def check_case_name(case: str) -> str:
    """Refuse the name of a case that is not the name of one folder; returns it.

    Raises:
        InputError: a path, "..", or a hidden name.
    """
    if not case or Path(case).name != case or "\\" in case or case.startswith("."):
        raise InputError(f"case {case!r}: results go to a folder of that name, so it must be a name, not a path")
    return case
