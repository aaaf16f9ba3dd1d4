"""The files of one pair, or of a single image, loaded and passed through the input gate."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from scripts.data import checks, formats
from scripts.data.axes import checked_axes, declared
from scripts.data.datalist import IMAGES, LABELS, OPTIONS, TRUTH
from scripts.data.dicom.reader import modality
from scripts.data.labels import checked_values, load_label
from scripts.data.volumes import load_volume

Size = float | Sequence[float] | None


def load_image(path: str, spacing: Size = None, series: str | int | None = None, side: str | None = None) -> MetaTensor:
    """An image (1, X, Y, Z) that passed the input gate; the arguments are those of `scripts.data.volumes.load_volume`.

    Raises:
        InputError: see `scripts.data.checks`; a file that cannot be read, or that holds several images.
    """
    image = load_volume(path, spacing, series, side)
    if len(image) != 1:
        option = f"--{side}_series" if side else "--series"
        choose = f"; choose one by {option}, counted from 1, and of a colour picture make grey levels"
        raise checks.InputError(f"{path}: expected one image, found {len(image)} channels{choose}")
    checks.check_image(path, image.numpy())
    return image


class LoadSingled(Transform):
    """Load a single image and, where there is one, its label: `image` (1, X, Y, Z), `label` (M, X, Y, Z), see below.

    Adds `file`, and `header_affine` (4, 4), which differs from the image's where its axes are declared.

    Args:
        label_values, spacing, series: as of `LoadPaird`.
        axes: directions of the voxel axes, see `scripts.data.axes`; None for those of the header. An item's own
            `spacing`, `series` and `axes` go before.

    Raises:
        InputError: likewise.
    """

    def __init__(
        self,
        label_values: int | Sequence[int] | None = None,
        spacing: Size = None,
        series: str | int | None = None,
        axes: str | None = None,
    ) -> None:
        self.label_values = checked_values(label_values)
        self.told = {"spacing": spacing, "series": series, "axes": axes}

    def __call__(self, data: Mapping[Hashable, str]) -> dict:
        d = {key: value for key, value in data.items() if key not in self.told}
        told = self.told | {key: value for key, value in data.items() if key in self.told}
        image = load_image(data["image"], told["spacing"], told["series"])
        size, axes = tuple(image.shape[1:]), checked_axes("--axes", told["axes"])
        affine = torch.from_numpy(declared(image.affine.numpy(), size, axes))
        d["image"] = MetaTensor(image.as_tensor(), affine=affine)
        if "label" in data:
            label = load_label(data["label"], data["image"], image, self.label_values, told["spacing"])
            d["label"] = MetaTensor(label.as_tensor(), affine=affine)
        return d | {"file": data["image"], "header_affine": image.affine}


class LoadPaird(Transform):
    """Load the files of one pair and pass them through the input gate.

    NIfTI, MetaImage, NRRD, DICOM or a folder with a DICOM series; labels 3-D, 4-D with the label last, an integer
    index map, or a segmentation of DICOM or 3D Slicer. Adds or replaces the four keys by channel-first `MetaTensor`s,
    float32, each with its own affine (RAS mm). A phantom's `true_ddf` becomes the true displacement (3, X, Y, Z) in RAS
    mm on the fixed grid.

    Args:
        label_values: the structures of an integer index map in the order of the channels, the gland first; None if
            label files hold one binary map per channel.
        moving_spacing, fixed_spacing: voxel size (x, y, z) in mm of images, and their labels, that state none.
        moving_series, fixed_series: which of several volumes of a file or folder, see `scripts.data.dicom.series`.
            A pair's own settings of these names go before all four.

    Raises:
        InputError: any refusal of `scripts.data.checks`; a file that cannot be read.
    """

    def __init__(
        self,
        label_values: int | Sequence[int] | None = None,
        moving_spacing: Size = None,
        fixed_spacing: Size = None,
        moving_series: str | int | None = None,
        fixed_series: str | int | None = None,
    ) -> None:
        self.label_values = checked_values(label_values)
        told = moving_spacing, fixed_spacing, moving_series, fixed_series
        self.told = dict(zip(OPTIONS, told, strict=True))

    def __call__(self, data: Mapping[Hashable, str]) -> dict:
        d = {key: value for key, value in data.items() if key not in self.told}
        told = self.told | {key: value for key, value in data.items() if key in self.told}
        for key in IMAGES:
            side = key.partition("_")[0]
            d[key] = load_image(data[key], told[f"{side}_spacing"], told[f"{side}_series"], side)
        moving, fixed = (data[key] for key in IMAGES)
        checks.check_modalities(moving, modality(moving), fixed, modality(fixed))
        checks.check_two_images(moving, d[IMAGES[0]].numpy(), fixed, d[IMAGES[1]].numpy())
        for key, image in zip(LABELS, IMAGES, strict=True):
            if key in d:
                size = told[f"{key.partition('_')[0]}_spacing"]
                d[key] = load_label(data[key], data[image], d[image], self.label_values, size)
        if all(key in d for key in LABELS):
            checks.check_label_counts(data[LABELS[0]], len(d[LABELS[0]]), data[LABELS[1]], len(d[LABELS[1]]))
            checks.check_drawable(data[LABELS[0]], d[LABELS[0]].numpy(), data[LABELS[1]], d[LABELS[1]].numpy())
        if TRUTH in d:
            d[TRUTH] = self._load_displacement(data[TRUTH], d["fixed_image"])
        return d | {"moving_file": data["moving_image"], "fixed_file": data["fixed_image"]}

    @staticmethod
    def _load_displacement(path: str, fixed: MetaTensor) -> MetaTensor:
        """A displacement as `scripts.data.formats.save_displacement` writes it, LPS, in RAS."""
        (step,) = formats.read_transform(path)
        found, wanted = tuple(step.field.shape[1:]), tuple(fixed.shape[1:])
        if found != wanted:
            raise checks.InputError(f"{path}: {found} is no displacement on the fixed grid {wanted}")
        return MetaTensor(step.field.float(), affine=fixed.affine)
