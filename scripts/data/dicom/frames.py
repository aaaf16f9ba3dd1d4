"""One image of a DICOM data set, a file or a frame of one: where it lies, how large it is, what it belongs to.

Everything is from the tags, the functional groups of an enhanced file before those of its data set; what they do not
say is None, never a default. Millimetres are in LPS, as DICOM counts them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError

CENTIMETRE, FLAT = 3, 1  # of PhysicalUnitsXDirection; of RegionSpatialFormat: 2-D, not a trace
ALIKE = 0.01  # share by which two statements of one size may differ
EIGEN = (0x1129, 0x1016)  # voxel size of the TRUS volumes of TCIA's Prostate-MRI-US-Biopsy, one number
IN_PATIENT = (
    ("ImagePositionPatient", "PlanePositionSequence"),
    ("ImageOrientationPatient", "PlaneOrientationSequence"),
)
IN_VOLUME = (  # of an enhanced ultrasound volume
    ("ImagePositionVolume", "PlanePositionVolumeSequence"),
    ("ImageOrientationVolume", "PlaneOrientationVolumeSequence"),
)
VOLUME_TAGS = {  # what all images of one volume share -> the functional group of an enhanced file
    "EchoTime": "MREchoSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "EchoNumbers": None,
    "DiffusionBValue": "MRDiffusionSequence",
    "TemporalPositionIdentifier": None,
    "TemporalPositionIndex": "FrameContentSequence",
    "StackID": "FrameContentSequence",
    "DataType": "ImageDataTypeSequence",
}
REPEAT_TAGS = {  # what may tell apart images at one place, though slices of one volume may differ in it
    "AcquisitionNumber": None,
    "FrameAcquisitionNumber": "FrameContentSequence",
    "TriggerTime": None,
    "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence",
    "TemporalPositionTimeOffset": "TemporalPositionSequence",
    "InversionTime": None,
    "FlipAngle": "MRTimingAndRelatedParametersSequence",
    "RepetitionTime": "MRTimingAndRelatedParametersSequence",
    "SequenceName": None,
    "ComplexImageComponent": "MRImageFrameTypeSequence",
    "FrameType": "MRImageFrameTypeSequence",
    "ImageType": None,
    "DiffusionDirectionality": "MRDiffusionSequence",
    "DiffusionGradientOrientation": "DiffusionGradientDirectionSequence",
    "FrameAcquisitionDateTime": "FrameContentSequence",
    "AcquisitionTime": None,
    "ContentTime": None,
}


def pydicom() -> Any:
    """The module, which a volume of another format does without; what its headers say is judged here, not there."""
    import pydicom as module

    module.config.settings.reading_validation_mode = module.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    return module


class Frame(NamedTuple):
    """One image.

    Attributes:
        path: its file.
        header: the file's data set, without voxels.
        index: which frame of the file, from 0.
        position: of the first pixel's centre, LPS mm, shape (3,); None if not stated.
        axes: unit vectors along a row and along a column, LPS, shape (2, 3); None if not stated.
        own: whether these are coordinates of an ultrasound volume of its own, not of the patient.
    """

    path: Path
    header: Any
    index: int
    position: np.ndarray | None
    axes: np.ndarray | None
    own: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Columns and rows."""
        return int(self.header.Columns), int(self.header.Rows)

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the image, LPS."""
        return np.cross(*self.axes)

    def find(self, keyword: str, group: str | None = None) -> Any:
        """An element of the frame's functional group, of the shared one, else of the data set; None if empty."""
        return find(self.header, self.index, keyword, group)

    def text(self, keyword: str, group: str | None = None) -> str:
        """The same as text, numbers in their shortest form: 100.0 and 100 are one echo time; "none" if empty."""
        return as_text(self.find(keyword, group))


def frames_of(path: Path, header: Any) -> list[Frame]:
    """The frames of one file, in its order.

    Raises:
        InputError: a count of frames that the file contradicts; positions or directions that are none.
    """
    count = frame_count(header)
    groups = header.get("PerFrameFunctionalGroupsSequence")
    if count < 1 or (groups and len(groups) != count):
        raise InputError(f"{path}: NumberOfFrames is {count}, but {len(groups or ())} frames are described")
    if "MOSAIC" in as_text(header.get("ImageType")):
        raise InputError(f"{path}: a mosaic of slices in one picture; convert it to a volume first")
    several = count > 1 and not groups  # then a position of the whole file is that of its first frame
    frames = []
    for index in range(count):
        position, axes = (find(header, index, *where) for where in IN_PATIENT)
        own = position is None and axes is None
        if own:
            position, axes = (find(header, index, *where) for where in IN_VOLUME)
        if several and index:
            position = None
        frames.append(Frame(path, header, index, _vector(path, "image position", position, 3), _axes(path, axes), own))
    return frames


def frame_count(header: Any) -> int:
    """How many frames a file has; one that does not say so has one."""
    return int(header.get("NumberOfFrames") or 1)


def find(header: Any, index: int, keyword: str, group: str | None = None) -> Any:
    """An element of a frame's functional group, of the shared one, else of the data set; None if empty."""
    places = [header]
    for name, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        groups = header.get(name) if group else None
        if groups and len(groups) > item:
            places += [one for one in (groups[item].get(group) or [])][:1]
    for place in reversed(places):
        value = place.get(keyword)
        if value is not None and str(value) not in ("", "[]"):
            return value
    return None


def as_text(value: Any) -> str:
    """A value of an element as text, see `Frame.text`."""
    if value is None:
        return "none"
    if isinstance(value, int | float):
        return f"{value:.10g}"
    if not isinstance(value, str) and isinstance(value, Sequence):
        return "\\".join(as_text(one) for one in value)
    return str(value).strip() or "none"


def _vector(path: Path, name: str, value: Any, count: int) -> np.ndarray | None:
    """Numbers of an element, shape (count,); None stays None."""
    if value is None:
        return None
    try:
        numbers = np.array([float(one) for one in value])
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise InputError(f"{path}: {name} {as_text(value)} in the header; expected {count} numbers")
    return numbers


def _axes(path: Path, value: Any) -> np.ndarray | None:
    """The two unit vectors of an orientation."""
    numbers = _vector(path, "image orientation", value, 6)
    if numbers is None:
        return None
    axes = numbers.reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 0.01:
        raise InputError(f"{path}: image orientation {as_text(value)} in the header; expected two unit vectors")
    return axes / lengths[:, None]


def pixel_size(frame: Frame, path: str | Path | None = None) -> np.ndarray | None:
    """Distance between columns and between rows, mm, shape (2,); None if nothing states it.

    Args:
        path: where it is named, a size that is stated by the way is said to be so.

    Raises:
        InputError: it is not positive, or two statements disagree.
    """
    found = {
        "PixelSpacing": _positive(frame, "PixelSpacing", frame.find("PixelSpacing", "PixelMeasuresSequence")),
        "SequenceOfUltrasoundRegions": _regions(frame),
        "its private element (1129,1016)": _eigen(frame),
    }
    sizes = {name: size for name, size in found.items() if size is not None}
    (name, size), *others = sizes.items() or [(None, None)]
    for other, differing in others:
        if np.abs(differing / size - 1).max() > ALIKE:
            raise InputError(
                f"{frame.path}: pixels of {by(size)} mm by {name}, of {by(differing)} mm by {other}; correct the wrong"
            )
    if size is not None:
        return size
    for name in ("ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        size = _positive(frame, name, frame.find(name))
        if size is not None:
            if path is not None:
                checks.repaired(path, f"no PixelSpacing, so its {name} of {by(size)} mm is used")
            return size
    return None


def frame_distance(frame: Frame, path: str | Path) -> float | None:
    """Distance in mm between the frames of a file that does not say where each lies; None if nothing states it.

    Args:
        path: what is named where a distance is stated by the way.

    Raises:
        InputError: two statements disagree.
    """
    stated = frame.find("SpacingBetweenSlices", "PixelMeasuresSequence")
    if stated is not None:
        return abs(float(stated)) or None
    thickness, eigen = frame.find("SliceThickness", "PixelMeasuresSequence"), _eigen(frame)
    if eigen is not None:
        if thickness and abs(float(thickness) / eigen[0] - 1) > ALIKE:
            raise InputError(
                f"{frame.path}: frames {eigen[0]:g} mm apart by its private element (1129,1016), {thickness:g} mm by"
                " SliceThickness; correct the wrong"
            )
        return float(eigen[0])
    if frame.header.get("Modality") != "US" or not thickness:  # slices of MR overlap or leave gaps
        return None
    checks.repaired(path, f"no SpacingBetweenSlices, so frames lie its SliceThickness of {thickness:g} mm apart")
    return float(thickness)


def by(size: Sequence[float]) -> str:
    """A size as it is read: 1.6 × 1.6."""
    return " × ".join(f"{one:.6g}" for one in size)


def of_eigen(frame: Frame) -> bool:
    """Whether a frame is of a TRUS volume as TCIA's Prostate-MRI-US-Biopsy has them, which state no position."""
    return frame.header.get("Modality") == "US" and any(tag.group == EIGEN[0] for tag in frame.header.keys())


def _positive(frame: Frame, name: str, stated: Any) -> np.ndarray | None:
    """Between rows and between columns, as DICOM states it, turned round; None stays None."""
    size = _vector(frame.path, name, stated, 2)
    if size is not None and (size <= 0).any():
        raise InputError(f"{frame.path}: voxel size {by(size)} mm in {name}; it must be positive")
    return None if size is None else size[::-1]


def _regions(frame: Frame) -> np.ndarray | None:
    """Pixel size of the flat regions of an ultrasound image that are in cm, mm; None without one."""
    sizes = []
    for region in frame.header.get("SequenceOfUltrasoundRegions") or []:
        units = {region.get(f"PhysicalUnits{axis}Direction") for axis in "XY"}
        if units == {CENTIMETRE} and region.get("RegionSpatialFormat", FLAT) == FLAT:
            size = 10 * np.abs([float(region.get(f"PhysicalDelta{axis}") or np.nan) for axis in "XY"])
            if np.isfinite(size).all() and (size > 0).all():
                sizes.append(size)
    for size in sizes[1:]:
        if np.abs(size / sizes[0] - 1).max() > ALIKE:
            raise InputError(
                f"{frame.path}: {len(sizes)} ultrasound regions with pixels of {by(sizes[0])} and {by(size)} mm;"
                " keep the one that is meant"
            )
    return sizes[0] if sizes else None


def _eigen(frame: Frame) -> np.ndarray | None:
    """The private voxel size of TCIA's Prostate-MRI-US-Biopsy, mm, shape (2,); None without one."""
    element = frame.header.get(EIGEN) if of_eigen(frame) else None
    if element is None:
        return None
    try:
        value = element.value
        if isinstance(value, bytes):  # of unknown representation: text, or one number
            as_number = {4: "<f4", 8: "<f8"}.get(len(value))
            text = value.strip(b"\0 ")
            is_text = text.replace(b".", b"").isdigit()
            value = text.decode() if is_text or as_number is None else np.frombuffer(value, as_number)[0]
        size = float(value)
    except (TypeError, ValueError):
        size = 0.0
    if not 0.01 < size < 10:
        raise InputError(f"{frame.path}: {element.value!r} in the private element (1129,1016); expected a voxel size")
    return np.array([size, size])
