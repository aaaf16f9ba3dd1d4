"""Segments of a DICOM segmentation on the grid of another series, as a segmentation of that series, by highdicom.

Their labels, codes, algorithms and tracking are those of the segmentation they come from.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.checks import InputError
from scripts.data.dicom.frames import pydicom
from scripts.data.dicom.reader import is_dicom, is_segmentation, read_headers
from scripts.data.dicom.registration import PATIENT, STUDY, check_pair
from scripts.data.lps import FLIP

SERIES = 3  # after the registration object and the warped series
DESCRIPTION = "Warped by registration. Research use only"


def highdicom() -> Any:
    """highdicom, which is imported late.

    Raises:
        InputError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise InputError(
            "writing a DICOM segmentation needs highdicom: pip install -r requirements-dicom.txt"
        ) from error
    return highdicom


def check_reference(source: str | Path, reference: str | Path | None) -> tuple[list[Any], list[Any]]:
    """The headers of a segmentation and of the series that another of its segments is to refer to.

    Raises:
        InputError: the series is not DICOM, has not one frame of reference, or is of another patient.
    """
    highdicom()
    if reference is None or not is_dicom(reference):
        raise InputError(
            f"{reference or source}: a DICOM segmentation refers to a DICOM series; name the fixed one by --reference,"
            " or choose an --output that ends in .nii.gz"
        )
    if is_segmentation(reference):
        raise InputError(f"{reference}: a segmentation is no image; give the series that it is of as --reference")
    return check_pair(source, reference)


def segments(path: str | Path) -> list[Any]:
    """What a segmentation says of each of its segments, in its order, as data sets; not of a label map's background."""
    ((_, header),) = read_headers(path)
    return [item for item in header.SegmentSequence if int(item.SegmentNumber)]


def save_segmentation(
    path: Path, channels: np.ndarray, affine: np.ndarray, source: str | Path, reference: str | Path
) -> None:
    """Write segments as a binary segmentation that joins the study of `reference` and lies in its frame of reference.

    Args:
        channels: shape (X, Y, Z, M), 0 or 1, a segment each in the order of `segments`.
        affine: voxel -> RAS mm, shape (4, 4).
        source: the segmentation that they come from.
        reference: the DICOM series, a folder or file.

    Raises:
        InputError: see `check_reference`; a segment without the codes that it must have.
    """
    hd = highdicom()
    (_, images), described = check_reference(source, reference), []
    for number, item in enumerate(segments(source), start=1):
        item = copy.deepcopy(item)
        item.SegmentNumber = number  # from 1 on, as the standard has it
        try:
            described.append(hd.seg.SegmentDescription.from_dataset(item))
        except (AttributeError, ValueError) as error:
            raise InputError(f"{source}: segment {number} is not described as it must be: {error}") from error
    for image in images:
        for name in (*PATIENT, *STUDY):  # may be empty, but has to be there
            if name not in image:
                setattr(image, name, "")
    lps = np.eye(4)
    lps[:3] = FLIP.numpy()[:, None] * affine[:3]
    volume = hd.Volume(
        np.ascontiguousarray(channels.transpose(2, 1, 0, 3).astype(np.uint8)),
        lps[:, [2, 1, 0, 3]],
        coordinate_system="PATIENT",
        frame_of_reference_uid=images[0].FrameOfReferenceUID,
        channels={"SegmentNumber": list(range(1, channels.shape[3] + 1))},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string .* is unlikely to represent")  # names are as they were
        made = hd.seg.Segmentation(
            source_images=images,
            pixel_array=volume,
            segmentation_type="BINARY",
            segment_descriptions=described,
            series_instance_uid=pydicom().uid.generate_uid(),
            series_number=SERIES,
            series_description="Segments warped to TRUS, research use only",
            sop_instance_uid=pydicom().uid.generate_uid(),
            instance_number=1,
            manufacturer="Research software",
            manufacturer_model_name="MR-TRUS registration",
            software_versions=f"highdicom {hd.__version__}",
            device_serial_number="0",
            content_description=DESCRIPTION,
            content_label="SEGMENTATION",
        )
    # those of an enhanced image, which highdicom takes over, may lack what a segmentation must have
    made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = volume.get_pixel_measures()
    made.save_as(path)
