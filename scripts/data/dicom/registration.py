"""A registration of two DICOM series as DICOM: the transform as an object, the warped MR as a series.

The object, a Deformable Spatial Registration (PS3.3 A.39.2), samples the source frame of reference, the moving series',
into its own, the fixed series': a point of the fixed frame plus the grid's vector is the point of the moving frame
(C.20.3.1.1), so the field goes in as it is. The series, of derived MR images (A.4), lies in the fixed frame. Both join
the study of the fixed series.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.checks import InputError
from scripts.data.dicom.frames import pydicom
from scripts.data.dicom.reader import is_dicom, read_headers
from scripts.data.lps import itk_grid

DEFORMABLE_SPATIAL_REGISTRATION = "1.2.840.10008.5.1.4.1.1.66.3"
CONTENT_BASED = ("125024", "DCM", "Image Content-based Alignment")  # context group 7100
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
RESAMPLED = ("113085", "DCM", "Spatial resampling")  # context group 7203
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
ACQUISITION = {  # what an MR image must have, and what stands in where the moving series lacks it (RM: research mode)
    "ScanningSequence": "RM",
    "SequenceVariant": "NONE",
    "ScanOptions": "",
    "MRAcquisitionType": "",
    "RepetitionTime": "",
    "EchoTime": "",
    "EchoTrainLength": "",
}
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")  # once so, always so


def read_series(path: str | Path) -> list[Any]:
    """The headers of the one DICOM series of a folder or file, a data set per file, without pixels.

    Raises:
        InputError: not DICOM; more than one series, or no single frame of reference.
    """
    if not is_dicom(path):
        raise InputError(
            f"{path}: format dicom needs a DICOM file or a folder with one DICOM series; choose other --formats"
        )
    headers = [header for _, header in read_headers(path)]
    for name in ("SeriesInstanceUID", "FrameOfReferenceUID"):
        found = {str(header.get(name, "")) for header in headers}
        if len(found) > 1 or not all(found):
            count = len(found) if all(found) else "no"
            raise InputError(f"{path}: {count} {name} in its files; a DICOM result needs exactly one")
    return headers


def check_pair(moving: str | Path, fixed: str | Path) -> tuple[list[Any], list[Any]]:
    """The headers of the two series of a pair, see `read_series`.

    Raises:
        InputError: a refusal of `read_series`; they are of different patients.
    """
    series = read_series(moving), read_series(fixed)
    patients = [str(headers[0].get("PatientID", "")) for headers in series]
    if patients[0] != patients[1]:
        raise InputError(
            f"{moving}: PatientID {patients[0]!r}, but {fixed} has {patients[1]!r}; one object is about one patient"
        )
    return series


def save_dicom(path: Path, displacement: np.ndarray, affine: np.ndarray, moving: str | Path, fixed: str | Path) -> None:
    """Write the object, float32; it refers to both series.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm, fixed -> moving.
        affine: voxel -> RAS mm of its grid, shape (4, 4).
        moving, fixed: the two series, folders or files.
    """
    series = check_pair(moving, fixed)
    registration = {
        "SourceFrameOfReferenceUID": series[0][0].FrameOfReferenceUID,
        "ReferencedImageSequence": _instances(series[0]),
        "RegistrationTypeCodeSequence": [_code(CONTENT_BASED)],
        "DeformableRegistrationGridSequence": [_grid(displacement, affine)],
    }
    described = {
        "Modality": "REG",
        "SeriesNumber": 1,
        "SeriesDescription": "MR-TRUS registration, research use only",
        "InstanceNumber": 1,
        "DeviceSerialNumber": "0",
        "ContentLabel": "REGISTRATION",
        "ContentDescription": "Research use only",
        "ContentCreatorName": "",
        "DeformableRegistrationSequence": [_dataset(registration)],
    }
    shared = _shared(series[1][0]) | described | _references(*series)
    _save(path, DEFORMABLE_SPATIAL_REGISTRATION, shared)


def save_warped_series(
    folder: Path, volume: np.ndarray, affine: np.ndarray, moving: str | Path, fixed: str | Path
) -> None:
    """Write the warped moving image as a DICOM series, a file per slice, in a new folder.

    Intensities are rounded to whole numbers, as MR series have them, if they span 8 to 16 bits, else to 65,536 steps.

    Args:
        volume: shape (X, Y, Z); a slice is along x and y.
        affine: voxel -> RAS mm, shape (4, 4).
        moving, fixed: the two series, folders or files.
    """
    (source, *_), (reference, *_) = check_pair(moving, fixed)
    low, high = min(0.0, np.floor(volume.min())), float(volume.max())
    whole = 2**8 <= high - low < 2**16
    slope = 1.0 if whole else float(_decimal((high - low) / (2**16 - 1))) or 1.0
    pixels = ((volume - low) / slope).round().clip(0, 2**16 - 1).astype("<u2")
    origin, spacing, direction = itk_grid(affine)
    related = {name: source[name].value for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    described = {
        "Modality": "MR",
        "ImageType": ["DERIVED", "SECONDARY", "OTHER"],
        "SeriesNumber": 2,
        "SeriesDescription": "MR warped to TRUS, research use only",
        "ImageComments": "Research use only. Not for clinical decisions.",
        "RelatedSeriesSequence": [_dataset(related | {"PurposeOfReferenceCodeSequence": []})],
        "DerivationDescription": "MR, warped to the TRUS by deformable registration",
        "DerivationCodeSequence": [_code(RESAMPLED)],
        "PatientPosition": reference.get("PatientPosition", ""),
        "ImageOrientationPatient": [_decimal(v) for v in direction[:, :2].T.ravel()],
        "PixelSpacing": [_decimal(spacing[1]), _decimal(spacing[0])],  # between rows, between columns
        "SliceThickness": _decimal(spacing[2]),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Columns": volume.shape[0],
        "Rows": volume.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
    }
    if (low, slope) != (0, 1):  # an MR image has no rescaling by the standard, which allows to add it
        described |= {"RescaleIntercept": _decimal(low), "RescaleSlope": _decimal(slope), "RescaleType": "US"}
    acquired = {name: source.get(name) or usual for name, usual in ACQUISITION.items()}
    acquired |= {name: source[name].value for name in LOSSY if name in source}
    shared = _shared(reference) | acquired | described
    folder.mkdir()
    for k in range(volume.shape[2]):
        position = origin + k * spacing[2] * direction[:, 2]
        own = {
            "InstanceNumber": k + 1,
            "ImagePositionPatient": [_decimal(v) for v in position],
            "PixelData": pixels[:, :, k].T.tobytes(),
        }
        _save(folder / f"{k + 1:04d}.dcm", MR_IMAGE, shared | own)


def _shared(reference: Any) -> dict[str, Any]:
    """What every file of a new series in the study and the frame of reference of `reference` has."""
    now = datetime.now()
    stamped = {
        f"{kind}{unit}": now.strftime(form)
        for kind in ("InstanceCreation", "Series", "Content")
        for unit, form in (("Date", "%Y%m%d"), ("Time", "%H%M%S"))
    }
    identity = {name: reference.get(name, "") for name in (*PATIENT, *STUDY)}
    return identity | stamped | {
        "SpecificCharacterSet": reference.get("SpecificCharacterSet", "ISO_IR 192"),
        "SeriesInstanceUID": pydicom().uid.generate_uid(),
        "FrameOfReferenceUID": reference.FrameOfReferenceUID,
        "PositionReferenceIndicator": reference.get("PositionReferenceIndicator", ""),
        "BodyPartExamined": "PROSTATE",
        "Manufacturer": "Research software",
        "ManufacturerModelName": "MR-TRUS registration",
        "SoftwareVersions": f"pydicom {pydicom().__version__}",
    }  # fmt: skip


def _save(path: Path, sop_class: str, elements: Mapping[str, Any]) -> None:
    content = _dataset({**elements, "SOPClassUID": sop_class, "SOPInstanceUID": pydicom().uid.generate_uid()})
    content.file_meta = pydicom().dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = pydicom().uid.ExplicitVRLittleEndian
    content.save_as(path, enforce_file_format=True)


def _code(code: tuple[str, str, str]) -> Any:
    return _dataset(dict(zip(("CodeValue", "CodingSchemeDesignator", "CodeMeaning"), code, strict=True)))


def _dataset(elements: Mapping[str, Any]) -> Any:
    dataset = pydicom().dataset.Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def _grid(displacement: np.ndarray, affine: np.ndarray) -> Any:
    """The deformation grid, whose third axis is the cross product of the others: a left-handed one is turned round."""
    if np.linalg.det(affine[:3, :3]) < 0:
        turned = np.eye(4)
        turned[2, 2:] = -1, displacement.shape[3] - 1
        displacement, affine = displacement[..., ::-1], affine @ turned
    origin, spacing, direction = itk_grid(affine)
    lps = displacement.transpose(3, 2, 1, 0) * [-1, -1, 1]
    return _dataset({
        "ImagePositionPatient": [_decimal(v) for v in origin],
        "ImageOrientationPatient": [_decimal(v) for v in direction[:, :2].T.ravel()],
        "GridDimensions": list(displacement.shape[1:]),
        "GridResolution": [float(v) for v in spacing],
        "VectorGridData": lps.astype("<f4").tobytes(),
    })  # fmt: skip


def _decimal(value: float) -> str:
    """A number as DICOM's decimal string has it, 16 characters at most."""
    return pydicom().valuerep.format_number_as_ds(float(value))


def _instances(headers: list[Any]) -> list[Any]:
    return [
        _dataset({"ReferencedSOPClassUID": h.SOPClassUID, "ReferencedSOPInstanceUID": h.SOPInstanceUID})
        for h in headers
    ]


def _references(moving: list[Any], fixed: list[Any]) -> dict[str, Any]:
    """The Common Instance Reference module: the series of this study, and those of the other."""
    here, elsewhere = [], {}
    for headers in (fixed, moving):
        series = {"SeriesInstanceUID": headers[0].SeriesInstanceUID, "ReferencedInstanceSequence": _instances(headers)}
        study = headers[0].StudyInstanceUID
        (here if study == fixed[0].StudyInstanceUID else elsewhere.setdefault(study, [])).append(_dataset(series))
    other = [_dataset({"StudyInstanceUID": k, "ReferencedSeriesSequence": v}) for k, v in elsewhere.items()]
    found = {"ReferencedSeriesSequence": here, "StudiesContainingOtherReferencedInstancesSequence": other}
    return {name: value for name, value in found.items() if value}
