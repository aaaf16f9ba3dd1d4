"""The files of one pair, or of a single image, loaded and passed through the input gate."""

from __future__ import annotations

import json
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

    Adds `file`, and `header` (4, 4), the affine that its header says.

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
        image = load_image(data["image"], told["spacing"], told["series"], "image")
        axes = checked_axes("--image_axes", told["axes"])
        d["image"] = _as_declared(image, axes)
        if "label" in data:
            label = load_label(data["label"], data["image"], image, self.label_values, told["spacing"])
            d["label"] = _as_declared(label, axes)
        return d | {"file": data["image"], "header": image.affine}


def _as_declared(volume: MetaTensor, axes: str | None) -> MetaTensor:
    """A volume (C, X, Y, Z) whose voxel axes run as declared, see `scripts.data.axes.declared`."""
    affine = declared(volume.affine.numpy(), volume.shape[1:], axes)
    return MetaTensor(volume.as_tensor(), affine=torch.from_numpy(affine))


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
        moving_axes, fixed_axes: directions of the voxel axes where a header does not tell the truth, see
            `scripts.data.axes`: the image and its label lie as declared, and `moving_header`, `fixed_header` (4, 4)
            are the affines that their headers say. A pair's own settings of these names go before all six.

    Adds `moving_file` and `fixed_file`, and as JSON `read_as`: the label files, and the settings that are not None.

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
        moving_axes: str | None = None,
        fixed_axes: str | None = None,
    ) -> None:
        self.label_values = checked_values(label_values)
        told = moving_spacing, fixed_spacing, moving_series, fixed_series, moving_axes, fixed_axes
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
        for side in ("moving", "fixed"):
            axes = checked_axes(f"--{side}_axes", told[f"{side}_axes"])
            if axes is not None and TRUTH in d:
                raise checks.InputError(
                    f"{data[TRUTH]}: is in the world of the headers; leave out --{side}_axes {axes}"
                )
            if axes is not None:
                d[f"{side}_header"] = d[f"{side}_image"].affine
                for key in (k for k in (f"{side}_image", f"{side}_label") if k in d):
                    d[key] = _as_declared(d[key], axes)
        used = {key: data[key] for key in LABELS if key in data} | {"label_values": self.label_values} | told
        read_as = json.dumps({key: value for key, value in used.items() if value is not None})
        return d | {"moving_file": data["moving_image"], "fixed_file": data["fixed_image"], "read_as": read_as}

    @staticmethod
    def _load_displacement(path: str, fixed: MetaTensor) -> MetaTensor:
        """A displacement as `scripts.data.formats.save_displacement` writes it, LPS, in RAS."""
        (step,) = formats.read_transform(path)
        found, wanted = tuple(step.field.shape[1:]), tuple(fixed.shape[1:])
        if found != wanted:
            raise checks.InputError(f"{path}: {found} is no displacement on the fixed grid {wanted}")
        return MetaTensor(step.field.float(), affine=fixed.affine)
