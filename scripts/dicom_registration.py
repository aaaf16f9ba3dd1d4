"""A registration as a DICOM Deformable Spatial Registration object (PS3.3 A.39.2), for series that are DICOM.

The object samples the source frame of reference, the moving series', into its own, the fixed series': a point of the
fixed frame plus the grid's vector is the point of the moving frame (C.20.3.1.1), so the field goes in as it is. Needs
pydicom, see requirements-dicom.txt.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from scripts.checks import InputError
from scripts.formats import itk_grid

DEFORMABLE_SPATIAL_REGISTRATION = "1.2.840.10008.5.1.4.1.1.66.3"
CONTENT_BASED = ("125024", "DCM", "Image Content-based Alignment")  # context group 7100
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise InputError("pydicom is not installed: pip install -r requirements-dicom.txt") from error
    return pydicom


def read_series(folder: str | Path) -> list[Any]:
    """The headers of the one DICOM series in a folder, a data set per file, without pixels.

    Raises:
        InputError: no pydicom; not a folder of DICOM files; more than one series, or no single frame of reference.
    """
    pydicom = _pydicom()
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: format dicom needs a folder with one DICOM series; choose other --formats")
    headers = []
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file() and not p.name.startswith(".")):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            continue
        if "SeriesInstanceUID" in header:  # a DICOMDIR has none
            headers.append(header)
    if not headers:
        raise InputError(f"{folder}: format dicom needs a folder with one DICOM series; no DICOM image found there")
    for name in ("SeriesInstanceUID", "FrameOfReferenceUID"):
        found = {str(header.get(name, "")) for header in headers}
        if len(found) > 1 or not all(found):
            count = len(found) if all(found) else "no"
            raise InputError(f"{folder}: {count} {name} in its files; format dicom needs exactly one")
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
    """Write the object, float32; it belongs to the study of the fixed series and refers to both.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm, fixed -> moving.
        affine: voxel -> RAS mm of its grid, shape (4, 4).
        moving, fixed: the folders of the two series.
    """
    pydicom = _pydicom()
    series = check_pair(moving, fixed)
    sources, reference = series[0], series[1][0]
    now = datetime.now()
    uid = pydicom.uid.generate_uid()
    stamped = {
        f"{kind}{unit}": now.strftime(form)
        for kind in ("InstanceCreation", "Series", "Content")
        for unit, form in (("Date", "%Y%m%d"), ("Time", "%H%M%S"))
    }
    identity = {name: reference.get(name, "") for name in (*PATIENT, *STUDY)}
    described = {
        "SpecificCharacterSet": reference.get("SpecificCharacterSet", "ISO_IR 192"),
        "SOPClassUID": DEFORMABLE_SPATIAL_REGISTRATION,
        "SOPInstanceUID": uid,
        "Modality": "REG",
        "SeriesInstanceUID": pydicom.uid.generate_uid(),
        "SeriesNumber": 1,
        "SeriesDescription": "MR-TRUS registration, research use only",
        "InstanceNumber": 1,
        "FrameOfReferenceUID": reference.FrameOfReferenceUID,
        "PositionReferenceIndicator": reference.get("PositionReferenceIndicator", ""),
        "Manufacturer": "Research software",
        "ManufacturerModelName": "MR-TRUS registration",
        "DeviceSerialNumber": "0",
        "SoftwareVersions": f"pydicom {pydicom.__version__}",
        "ContentLabel": "REGISTRATION",
        "ContentDescription": "Research use only",
        "ContentCreatorName": "",
        "DeformableRegistrationSequence": [_dataset({
            "SourceFrameOfReferenceUID": sources[0].FrameOfReferenceUID,
            "RegistrationTypeCodeSequence": [
                _dataset(dict(zip(("CodeValue", "CodingSchemeDesignator", "CodeMeaning"), CONTENT_BASED, strict=True)))
            ],
            "DeformableRegistrationGridSequence": [_grid(displacement, affine)],
        })],
    }  # fmt: skip
    content = _dataset(identity | stamped | described | _references(*series))
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content.file_meta.MediaStorageSOPClassUID = DEFORMABLE_SPATIAL_REGISTRATION
    content.file_meta.MediaStorageSOPInstanceUID = uid
    content.save_as(path, enforce_file_format=True)


def _dataset(elements: Mapping[str, Any]) -> Any:
    dataset = _pydicom().dataset.Dataset()
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
    return _pydicom().valuerep.format_number_as_ds(float(value))


def _references(moving: list[Any], fixed: list[Any]) -> dict[str, Any]:
    """The Common Instance Reference module: the series of this study, and those of the other."""
    here, elsewhere = [], {}
    for headers in (fixed, moving):
        instances = [
            _dataset({"ReferencedSOPClassUID": h.SOPClassUID, "ReferencedSOPInstanceUID": h.SOPInstanceUID})
            for h in headers
        ]
        series = _dataset({"SeriesInstanceUID": headers[0].SeriesInstanceUID, "ReferencedInstanceSequence": instances})
        study = headers[0].StudyInstanceUID
        (here if study == fixed[0].StudyInstanceUID else elsewhere.setdefault(study, [])).append(series)
    other = [_dataset({"StudyInstanceUID": k, "ReferencedSeriesSequence": v}) for k, v in elsewhere.items()]
    found = {"ReferencedSeriesSequence": here, "StudiesContainingOtherReferencedInstancesSequence": other}
    return {name: value for name, value in found.items() if value}
