"""What all batches of cubes have in common: random numbers, grey levels, and that nothing waits for the device."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.registration.transforms import PlanFixedGridd
from scripts.training.cohort import CohortLoader, SimulatedPairs
from scripts.training.cubes import blurred, rotation, seen
from scripts.training.gland_cubes import GlandLoader
from scripts.training.pair_cubes import PairCubeLoader


def test_each_image_of_a_batch_is_blurred_by_its_own_gaussian():
    images, sigma = torch.rand(2, 2, 12, 12, 12), torch.tensor([[0.0, 0.7], [1.4, 0.0]])
    found = blurred(images, sigma)
    assert torch.equal(found[0, 0], images[0, 0]) and torch.equal(found[1, 1], images[1, 1])
    for b, c in ((0, 1), (1, 0)):
        image, s = images[b, c].double().numpy(), sigma[b, c].item()
        inside = ndimage.gaussian_filter(np.ones_like(image), s, mode="constant", truncate=9)
        wanted = ndimage.gaussian_filter(image, s, mode="constant", truncate=9) / inside
        np.testing.assert_allclose(found[b, c], wanted, atol=1e-5)


def test_grey_levels_are_brighter_along_each_axis_as_its_slope_says():
    look = {"gamma": torch.full((1, 1, 1, 1, 1), 2.0), "slope": torch.tensor([[[0.1, -0.2, 0.3]]])}
    look |= {"blur": torch.zeros(1, 1), "noise": torch.zeros(1, 1, 5, 5, 5)}
    image = seen(torch.full((1, 1, 5, 5, 5), 0.5), look)[0, 0]
    assert image[2, 2, 2] == pytest.approx(0.25)
    for axis, slope in enumerate((0.1, -0.2, 0.3)):
        ends = image.movedim(axis, 0)[:, 2, 2]
        assert (ends[-1] / ends[0]).log().item() == pytest.approx(2 * slope, rel=1e-4)


def test_rotation_vectors_turn_as_scipy_turns():
    turns = torch.randn(6, 3, dtype=torch.float64) * torch.tensor([0, 1e-9, 1e-3, 0.1, 1, 3])[:, None]
    np.testing.assert_allclose(rotation(turns), Rotation.from_rotvec(turns.numpy()).as_matrix(), atol=1e-9)


class Reads(TorchDispatchMode):
    """Counts what makes Python wait for a device: a number read, or a result whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in self.NAMES)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"augmentation": 0}, {"warp": 2.0}])
@pytest.mark.parametrize("kind", [CohortLoader, GlandLoader, PairCubeLoader])
def test_a_batch_is_made_without_waiting_for_the_device(kind, settings):
    if "warp" in settings and kind is not PairCubeLoader:
        pytest.skip("it always warps, or never")
    simulated = SimulatedPairs("realistic", 2, transform=PlanFixedGridd(3.0) if kind is CohortLoader else None)
    batches = iter(kind([], 3, 4, "cpu", simulated=simulated, share=1.0, pool=1, renewal=100, **settings))
    next(batches)
    with Reads() as reads:
        batch = next(batches)
    assert reads.count == 0
    assert all(v.isfinite().all() for k, v in batch.items() if torch.is_tensor(v) and "points" not in k)


def test_phantoms_that_other_processes_make_ahead_are_those_that_this_one_would_make():
    def loader(workers):
        simulated = SimulatedPairs("randomised", 5)
        return GlandLoader([], 2, 6, "cpu", simulated=simulated, share=1.0, pool=2, renewal=2, num_workers=workers)

    alone, ahead = loader(0), loader(2)
    state = None
    for k, (one, two) in enumerate(zip(alone, ahead, strict=True)):
        assert one["case"] == two["case"]
        torch.testing.assert_close(one["image"], two["image"], rtol=0, atol=1e-3)
        state = ahead.state_dict() if k == 4 else state
    resumed = loader(2)
    resumed.load_state_dict(state)
    assert next(iter(resumed))["case"] == one["case"] and [p["case"] for p in resumed.pool.phantoms] == [
        p["case"] for p in ahead.pool.phantoms
    ]
