"""The files of one pair, loaded and passed through the input gate."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from scripts.data import checks, formats
from scripts.data.datalist import IMAGES, LABELS, OPTIONS, TRUTH
from scripts.data.dicom import is_segmentation
from scripts.data.volumes import load_segmentation, load_volume

Size = float | Sequence[float] | None


class LoadPaird(Transform):
    """Load the files of one pair and pass them through the input gate.

    NIfTI, MetaImage, NRRD, DICOM or a folder with a DICOM series; labels 3-D, 4-D with the label last, an integer
    index map, or a DICOM segmentation. Adds or replaces the four keys by channel-first `MetaTensor`s, float32, each
    with its own affine (RAS mm). A phantom's `true_ddf` becomes the true displacement (3, X, Y, Z) in RAS mm on the
    fixed grid.

    Args:
        label_values: the structures of an integer index map in the order of the channels, the gland first; None if
            label files hold one binary map per channel.
        moving_spacing, fixed_spacing: voxel size (x, y, z) in mm of images, and their labels, that state none.
        moving_series, fixed_series: which of several volumes of a file or folder, see `scripts.data.dicom_series`.
            A pair's own settings of these names go before all four.

    Raises:
        InputError: any refusal of `scripts.data.checks`; a file that cannot be read.
    """

    def __init__(
        self,
        label_values: Sequence[int] | None = None,
        moving_spacing: Size = None,
        fixed_spacing: Size = None,
        moving_series: str | int | None = None,
        fixed_series: str | int | None = None,
    ) -> None:
        self.label_values = label_values
        told = moving_spacing, fixed_spacing, moving_series, fixed_series
        self.told = dict(zip(OPTIONS, told, strict=True))

    def __call__(self, data: Mapping[Hashable, str]) -> dict:
        d = {key: value for key, value in data.items() if key not in self.told}
        told = self.told | {key: value for key, value in data.items() if key in self.told}
        for key in IMAGES:
            side = key.partition("_")[0]
            d[key] = load_volume(data[key], told[f"{side}_spacing"], told[f"{side}_series"], side)
            if len(d[key]) != 1:
                raise checks.InputError(f"{data[key]}: expected one image, found {len(d[key])} channels")
            checks.check_image(data[key], d[key].numpy())
        for key, image in zip(LABELS, IMAGES, strict=True):
            if key in d:
                size = told[f"{key.partition('_')[0]}_spacing"]
                d[key] = self._load_label(data[key], data[image], d[image], size)
        if all(key in d for key in LABELS):
            checks.check_label_counts(data[LABELS[0]], len(d[LABELS[0]]), data[LABELS[1]], len(d[LABELS[1]]))
            checks.check_drawable(data[LABELS[0]], d[LABELS[0]].numpy(), data[LABELS[1]], d[LABELS[1]].numpy())
        if TRUTH in d:
            d[TRUTH] = self._load_displacement(data[TRUTH], d["fixed_image"])
        return d | {"moving_file": data["moving_image"], "fixed_file": data["fixed_image"]}

    def _load_label(self, path: str, image_path: str, image: MetaTensor, size: Size = None) -> MetaTensor:
        if is_segmentation(path):
            label = load_segmentation(path, image, self.label_values)
            checks.check_labels(path, label.numpy())
            return label
        label = load_volume(path, size)
        checks.check_label_geometry(
            path, tuple(label.shape[1:]), label.affine, image_path, tuple(image.shape[1:]), image.affine
        )
        if self.label_values is not None:
            unknown = sorted(set(np.unique(label.numpy())) - {0, *self.label_values})
            if len(label) != 1 or unknown:
                found = f"value {unknown[0]:g}" if unknown else f"{len(label)} channels"
                raise checks.InputError(f"{path}: {found} in an index map of values {list(self.label_values)}")
            label = MetaTensor(
                torch.cat([label.as_tensor() == v for v in self.label_values]).float(), affine=label.affine
            )
        checks.check_labels(path, label.numpy())
        return label

    @staticmethod
    def _load_displacement(path: str, fixed: MetaTensor) -> MetaTensor:
        """A displacement as `scripts.data.formats.save_displacement` writes it, LPS, in RAS."""
        (step,) = formats.read_transform(path)
        found, wanted = tuple(step.field.shape[1:]), tuple(fixed.shape[1:])
        if found != wanted:
            raise checks.InputError(f"{path}: {found} is no displacement on the fixed grid {wanted}")
        return MetaTensor(step.field.float(), affine=fixed.affine)
