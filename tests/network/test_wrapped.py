"""Networks around networks keep the size, and do what their names say."""

import pytest
import torch
from monai.networks.nets import LocalNet
from torch import nn

from scripts.network.fields import jacobian_determinant, warp
from scripts.network.wrapped import Folded, ImagesAlone, Integrated, Padded, Standardised


class Known(nn.Module):
    """A network whose field is known."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, image):
        return self.field


@pytest.mark.parametrize("size", [(16, 32, 16), (22, 30, 21)])
def test_localnet_takes_any_size_and_sees_the_pair_in_the_middle_of_zeros(size):
    torch.manual_seed(0)
    network = LocalNet(3, 2, 4, (0, 1, 2, 3, 4), out_kernel_initializer="kaiming_uniform").eval()
    image = torch.rand(1, 2, *size)
    ddf = Padded(network)(image)
    assert ddf.shape == (1, 3, *size)
    whole = torch.zeros(1, 2, 32, 32, 32)
    low = [(-n % 16) // 2 for n in size]
    inside = (..., *(slice(a, a + n) for a, n in zip(low, size, strict=True)))
    if size[0] > 16:
        whole[inside] = image
        assert torch.allclose(ddf, network(whole)[inside], atol=1e-5)
    else:
        assert torch.equal(ddf, network(image))


def test_a_constant_velocity_is_a_translation_and_a_steep_one_does_not_fold():
    constant = torch.tensor([1.5, -0.5, 2.0]).view(1, 3, 1, 1, 1).expand(1, 3, 12, 14, 10)
    assert torch.allclose(Integrated(Known(constant))(torch.rand(1, 2, 12, 14, 10)), constant, atol=1e-4)
    x = torch.arange(40.0).view(40, 1, 1)
    wave = 6 * torch.sin(2 * torch.pi * x / 20).expand(40, 12, 12)
    velocity = torch.stack([wave, 0 * wave, 0 * wave])[None]
    assert jacobian_determinant(velocity).min() < 0  # as a displacement it folds
    assert jacobian_determinant(Integrated(Known(velocity))(torch.rand(1, 2, 40, 12, 12))).min() > 0


def test_the_integrated_field_and_that_of_the_negative_velocity_undo_each_other():
    generator = torch.Generator().manual_seed(0)
    coarse = 1.2 * torch.randn(1, 3, 4, 4, 4, generator=generator)
    velocity = nn.functional.interpolate(coarse, size=(24, 24, 24), mode="trilinear", align_corners=True)
    there, back = (Integrated(Known(v))(torch.rand(1, 2, 24, 24, 24)) for v in (velocity, -velocity))
    left = (back + warp(there, back, padding_mode="border"))[..., 6:-6, 6:-6, 6:-6]
    assert left.norm(dim=1).max() < 0.25 and there.norm(dim=1).max() > 1.5


def test_a_folded_network_sees_every_voxel_and_its_field_is_in_voxels_of_the_pair():
    class Seeing(nn.Module):
        def forward(self, image):
            self.seen = image
            return torch.full((len(image), 3, *image.shape[2:]), 1.5)

    network, image = Seeing(), torch.rand(2, 4, 16, 12, 8)
    field = Folded(network)(image)
    assert field.shape == (2, 3, 16, 12, 8) and torch.allclose(field, torch.tensor(3.0))
    assert network.seen.shape == (2, 32, 8, 6, 4)
    assert torch.equal(network.seen.flatten().sort().values, image.flatten().sort().values)
    ramp = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(1, 1, 16, 16, 16)
    Folded(network)(ramp)
    assert torch.equal(network.seen.mean(1)[0, :, 0, 0], torch.arange(0.5, 16, 2))  # 2³ neighbours together


def test_images_alone_hides_the_glands():
    image = torch.rand(2, 4, 8, 8, 8)
    assert torch.equal(ImagesAlone(nn.Identity())(image), image[:, :2])


def test_a_standardised_network_sees_no_brightness_and_without_images_the_glands_alone():
    image = torch.rand(2, 4, 8, 8, 8)
    other = torch.cat([3 * image[:, :2] + 5, image[:, 2:]], dim=1)
    seen, again = (Standardised(nn.Identity())(pair) for pair in (image, other))
    assert seen.shape == image.shape and torch.allclose(seen, again, atol=1e-4)
    assert seen[:, :2].mean((2, 3, 4)).abs().max() < 1e-5
    assert torch.allclose(seen[:, :2].std((2, 3, 4)), torch.ones(2, 2), atol=1e-4)
    assert torch.equal(seen[:, 2:], 2 * image[:, 2:] - 1)
    assert torch.equal(Standardised(nn.Identity(), images=False)(image), seen[:, 2:])
