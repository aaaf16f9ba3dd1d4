"""The voxels of DICOM frames: decoded by pydicom, compressed ones by GDCM, colour made grey, rescaled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.colour import grey
from scripts.data.dicom.frames import Frame, frame_count, pydicom


def decode(path: str | Path, frames: Sequence[Frame]) -> list[np.ndarray]:
    """The images of frames, grey levels after their rescale, float32, shape (rows, columns) each.

    Args:
        path: what a message names.

    Raises:
        InputError: a file that is cut short, or whose compression cannot be undone here.
    """
    images, coloured = [], False
    for frame, image in zip(frames, stored(frames), strict=True):
        if image.ndim == 3:
            image, is_colour = grey(image)
            coloured |= is_colour
        images.append(_rescaled(frame, image))
    if coloured:
        checks.repaired(path, "colours made grey by their luminance")
    if frames[0].header.get("PhotometricInterpretation") == "MONOCHROME1":
        checks.repaired(path, "MONOCHROME1, shown with low values bright; the values are left as they are stored")
    return images


def equal(frames: Sequence[Frame]) -> bool:
    """Whether frames hold the same stored values."""
    first, *others = frames
    if any(other.shape != first.shape for other in others):
        return False
    images = stored(frames)
    return all(np.array_equal(images[0], image) for image in images[1:])


def stored(frames: Sequence[Frame]) -> list[np.ndarray]:
    """The stored values of frames, shape (rows, columns) each, colours (red, green, blue) last."""
    wanted = defaultdict(list)
    for frame in frames:
        wanted[frame.path].append(frame)
    found = {}
    for file, some in wanted.items():
        one = some[0].index if len(some) == 1 else None
        images = _read(file, some[0].header, one)
        found |= {(file, f.index): images[0 if one is not None else f.index] for f in some}
    return [found[frame.path, frame.index] for frame in frames]


def _read(file: Path, header: Any, index: int | None) -> np.ndarray:
    """Stored values of a file, shape (frames, rows, columns), colours last; of one frame unless `index` is None."""
    dicom = pydicom()
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID")
    try:
        if syntax is None:  # files of before 2001 do not say how they are encoded
            source = dicom.dcmread(file, force=True)
            source.ensure_file_meta()
            implicit = source.original_encoding[0]
            uid = dicom.uid.ImplicitVRLittleEndian if implicit else dicom.uid.ExplicitVRLittleEndian
            source.file_meta.TransferSyntaxUID = uid
        else:
            source = file
        single = index is not None or frame_count(header) == 1
        images = dicom.pixels.pixel_array(source, index=index)
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            images = dicom.pixels.apply_color_lut(images, header)
    except Exception as error:  # pydicom raises many kinds
        reason = first_line(error)
        if syntax is not None and syntax.is_compressed and "missing dependencies" in str(error):
            reason = f"compressed by {syntax.name}, which needs python-gdcm: pip install -r requirements.txt"
        raise InputError(f"{file}: its voxels cannot be read: {reason}") from error
    return images[None] if single else images


def _rescaled(frame: Frame, image: np.ndarray) -> np.ndarray:
    """An image after its modality transform: a table of the file, or slope and intercept of the frame."""
    if frame.header.get("ModalityLUTSequence"):
        return pydicom().pixels.apply_modality_lut(image, frame.header).astype(np.float32)
    slope, intercept = (frame.find(n, "PixelValueTransformationSequence") for n in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        return image.astype(np.float32)
    return (image * float(1 if slope is None else slope) + float(intercept or 0)).astype(np.float32)


def first_line(error: Exception) -> str:
    """The first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else repr(error)
