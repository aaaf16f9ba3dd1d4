"""A folder with one DICOM series reads as the same volume as a NIfTI file."""

import numpy as np
import SimpleITK as sitk

from scripts.volumes import load_volume


def write_series(folder, image):
    """One oblique CT-like series, a file per slice."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    shared = {
        "0008|0060": "MR",
        "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
        "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
        "0020|0052": "1.2.826.0.1.3680043.2.1125.3",
        "0020|0037": "\\".join(f"{direction[i]:.10f}" for i in (0, 3, 6, 1, 4, 7)),
    }
    for k in range(image.GetDepth()):
        piece = image[:, :, k]
        for tag, value in shared.items():
            piece.SetMetaData(tag, value)
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        piece.SetMetaData("0020|0032", "\\".join(f"{p:.8f}" for p in position))
        piece.SetMetaData("0020|0013", str(k + 1))
        piece.SetMetaData("0008|0018", f"1.2.826.0.1.3680043.2.1125.4.{k + 1}")
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(piece)


def test_a_dicom_folder_gives_the_nifti_files_volume_and_affine(tmp_path):
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.integers(0, 1000, (6, 9, 11)).astype(np.int16))  # z, y, x
    image.SetSpacing((0.8, 0.9, 2.5))
    image.SetOrigin((-31.0, 12.5, 40.0))
    turn = sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3)
    image.SetDirection(turn.GetMatrix())
    write_series(tmp_path / "series", image)
    sitk.WriteImage(image, str(tmp_path / "volume.nii.gz"))
    dicom, nifti = (load_volume(str(tmp_path / name)) for name in ("series", "volume.nii.gz"))

    def at(volume, world):
        index = np.linalg.inv(volume.affine.numpy()) @ [*world, 1]
        assert np.allclose(index, index.round(), atol=0.02)
        return volume[0].numpy()[tuple(index[:3].round().astype(int))]

    assert sorted(dicom.shape) == sorted(nifti.shape)
    for voxel in rng.integers(0, (11, 9, 6), (20, 3)):
        world = (nifti.affine.numpy() @ [*voxel, 1])[:3]
        assert at(dicom, world) == at(nifti, world)
