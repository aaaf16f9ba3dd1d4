"""Pairwise intensity registration by elastix, what the network is compared with (Hu et al. 2018, Table 2).

The paper used NiftyReg. Where elastix differs: the bending energy is a mean over random samples, and the similarity is
not scaled by one minus its weight; the optimiser is adaptive stochastic gradient descent on 2048 samples a step, not
conjugate gradients on all voxels; NMI has 32 B-spline (Parzen) histogram bins. Needs itk-elastix, see
requirements-crossval.txt.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn

from scripts.data.checks import InputError
from scripts.data.formats import matrix_of
from scripts.data.lps import itk_grid
from scripts.data.root import CONFIGS

RIGID = CONFIGS / "elastix" / "rigid.txt"


def _itk() -> Any:
    try:
        import itk

        itk.ElastixRegistrationMethod  # noqa: B018  itk alone, without elastix, lacks it
    except (ImportError, AttributeError) as error:
        raise InputError("elastix is not installed: pip install -r requirements-crossval.txt") from error
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    return itk


def _image(itk: Any, volume: Tensor, affine: Tensor) -> Any:
    """An ITK image, LPS, of a volume (X, Y, Z) and its voxel -> world matrix, RAS mm."""
    image = itk.image_from_array(np.ascontiguousarray(volume.cpu().numpy().astype(np.float32).transpose(2, 1, 0)))
    origin, spacing, direction = itk_grid(affine.double().cpu().numpy())
    image.SetOrigin(origin.tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction)
    return image


def _register(itk: Any, fixed: Any, moving: Any, path: str | Path) -> Any:
    """The transform elastix finds, as its parameter object; `path` is an elastix parameter map."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such elastix parameter map")
    parameters = itk.ParameterObject.New()
    parameters.ReadParameterFile(str(path))
    return itk.elastix_registration_method(  # with more than one thread elastix has crashed the process, beside torch
        fixed, moving, parameter_object=parameters, number_of_threads=1, log_to_console=False
    )[1]


def rigid_transform(moving: MetaTensor, fixed: MetaTensor, centred: Tensor) -> Tensor:
    """The rigid registration of two images by elastix: fixed world -> moving world, shape (4, 4), RAS mm, float64.

    Args:
        moving, fixed: images (1, X, Y, Z).
        centred: where it begins, a translation of fixed to moving world, shape (4, 4).

    Raises:
        InputError: elastix is not installed, or it gives up on the pair.
    """
    itk = _itk()
    onto_fixed = torch.linalg.inv(centred) @ moving.affine.double()  # the moving image moved to where it begins
    images = _image(itk, fixed[0], fixed.affine.double()), _image(itk, moving[0], onto_fixed)
    try:
        found = _register(itk, *images, RIGID).GetParameterMap(0)
    except RuntimeError as error:
        raise InputError(f"no rigid initial transform: elastix gave up on this pair, {reason(error)}") from error
    angles_and_shift = np.array([float(v) for v in found["TransformParameters"]])
    centre = np.array([float(v) for v in found["CenterOfRotationPoint"]])
    euler = itk.Euler3DTransform[itk.D].New(Center=centre.tolist())
    euler.SetComputeZYX("ComputeZYX" in found and found["ComputeZYX"][0] == "true")
    euler.SetParameters(itk.OptimizerParameters[itk.D](angles_and_shift.tolist()))
    return centred @ matrix_of(euler)


class ElastixInferer(Inferer):
    """Instead of a network: elastix registers the two images of each pair on the working grid, and no label is seen.

    Lengths of the parameter map are in voxels of that grid. Where elastix gives up on a pair, as it does when too few
    samples lie inside the moving image, the pair keeps its initial transform and that is printed.

    Args:
        parameters: an elastix parameter map, see configs/elastix.

    Raises:
        InputError: elastix is not installed, or there is no such file.
    """

    def __init__(self, parameters: str) -> None:
        self.parameters = parameters
        self.used = "float32"  # as `scripts.registration.precision.PrecisionInferer`

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([self._pair(*pair[:2]) for pair in inputs.float()]).to(inputs.device)

    def _pair(self, moving: Tensor, fixed: Tensor) -> Tensor:
        itk = _itk()
        voxels = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))  # ITK's own world, so that its units are voxels
        moving, fixed = (_image(itk, volume, voxels) for volume in (moving, fixed))
        try:
            transform = _register(itk, fixed, moving, self.parameters)
        except RuntimeError as error:
            print(f"elastix gave up, the pair keeps its initial transform: {reason(error)}", flush=True)
            return torch.zeros(3, *itk.size(fixed))
        with tempfile.TemporaryDirectory() as folder:  # it writes the field to a file, too
            field = itk.transformix_deformation_field(moving, transform, output_directory=folder)
            field = itk.array_from_image(field)
        return torch.from_numpy(field.transpose(3, 2, 1, 0).copy())


def reason(error: Exception) -> str:
    """The last line of what elastix says."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]
