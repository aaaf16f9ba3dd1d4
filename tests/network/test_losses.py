"""Each loss equals a literal float64 transcription of its equation, in value and in gradient."""

import numpy as np
import pytest
import torch
from monai.losses import DiffusionLoss
from scipy.ndimage import correlate1d, map_coordinates
from torch.nn import functional as F

from scripts.network.fields import warp
from scripts.network.losses import (
    PAPER_SCALES,
    BendingEnergy,
    FoldingPenalty,
    LabelDrivenLoss,
    MultiscaleCrossEntropyLoss,
    MultiscaleDiceLoss,
    MultiscaleSquaredDiceLoss,
    PrefilteredLoss,
    SignedDistanceLoss,
    WeightedSum,
    gaussian_matrix,
    reached,
    way_back,
)

SIZE = (12, 17, 9)
SPACINGS = [(0.8, 0.8, 0.8), (0.7, 1.1, 2.5)]


def labels(batch=1, size=SIZE, dtype=torch.float64, seed=0):
    """A soft warped label and a binary fixed one, both touching the border of the volume."""
    rng = np.random.default_rng(seed)
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij"))
    warped, fixed = np.empty((2, batch, 1, *size))
    for b in range(batch):
        centre = rng.uniform(-0.5, 0.5, (2, 3, 1, 1, 1))
        distance = np.sqrt(((x - centre) ** 2).sum(1))
        warped[b, 0] = np.clip(4 * (0.9 - distance[0]), 0, 1)
        fixed[b, 0] = distance[1] < 0.8
    return torch.from_numpy(warped).to(dtype), torch.from_numpy(fixed).to(dtype)


def kernel(sigma):
    """The kernel of label-reg for σ in voxels: tail int(3σ), normalised to 1."""
    tail = int(3 * sigma)
    if tail == 0:
        return np.ones(1)
    values = np.exp(-0.5 * (np.arange(-tail, tail + 1) / sigma) ** 2)
    return values / values.sum()


def filter_numpy(label, scale, spacing):
    """f_σ of one volume (X, Y, Z), zeros outside."""
    for axis in range(3):
        label = correlate1d(label, kernel(scale / spacing[axis]), axis=axis, mode="constant", cval=0.0)
    return label


def filter_torch(label, scale, spacing):
    """The same on a tensor (X, Y, Z), differentiable."""
    label = label[None, None]
    for axis in range(3):
        k = torch.from_numpy(kernel(scale / spacing[axis]))
        shape, padding = [1] * 5, [0] * 3
        shape[2 + axis], padding[axis] = len(k), len(k) // 2
        label = F.conv3d(label, k.view(shape), padding=padding)
    return label[0, 0]


def dice_loss(warped, fixed, spacing, scales=PAPER_SCALES, smooth=filter_numpy):
    """1 − Eq. (5), one pair of volumes (X, Y, Z)."""
    total = 0
    for scale in scales:
        a, b = smooth(fixed, scale, spacing), smooth(warped, scale, spacing)
        total = total + 2 * (a * b).sum() / (a.sum() + b.sum())
    return 1 - total / len(scales)


def cross_entropy(warped, fixed, spacing, scales=PAPER_SCALES, smooth=filter_numpy):
    """Eq. (6), the mean over voxels and scales, one pair of volumes (X, Y, Z)."""
    total = 0
    for scale in scales:
        p, q = (smooth(label, scale, spacing).clip(1e-6, 1 - 1e-6) for label in (fixed, warped))
        log = torch.log if smooth is filter_torch else np.log
        total = total - (p * log(q) + (1 - p) * log(1 - q)).mean()
    return total / len(scales)


def squared_dice(warped, fixed, spacing, scales=PAPER_SCALES, smooth=filter_numpy):
    """1 − the mean Dice with squares in its denominator, one pair of volumes (X, Y, Z)."""
    total = 0
    for scale in scales:
        a, b = smooth(fixed, scale, spacing), smooth(warped, scale, spacing)
        total = total + 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())
    return 1 - total / len(scales)


def value_and_gradient(loss, warped, *rest):
    warped = warped.clone().requires_grad_()
    value = loss(warped, *rest)
    return value.detach(), torch.autograd.grad(value, warped)[0]


def transcribed(loss, warped, fixed, spacing, scales=PAPER_SCALES):
    """Value (from NumPy) and gradient of a transcription, the mean over the batch."""
    values, gradients = [], []
    for w, f, s in zip(warped.double()[:, 0], fixed.double()[:, 0], spacing, strict=True):
        values.append(loss(w.numpy(), f.numpy(), s, scales))
        value, gradient = value_and_gradient(lambda x, f=f, s=s: loss(x, f, s, scales, filter_torch), w)
        assert value.item() == pytest.approx(values[-1], rel=1e-12)
        gradients.append(gradient / len(warped))
    return np.mean(values), torch.stack(gradients)[:, None]


def assert_close(found, expected, tolerance):
    (value, gradient), (expected_value, expected_gradient) = found, expected
    assert value.item() == pytest.approx(expected_value, rel=tolerance)
    scale = expected_gradient.abs().max()
    assert scale > 0
    assert (gradient - expected_gradient).abs().max() <= tolerance * scale


PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_multiscale_dice_is_equations_4_and_5_in_value_and_gradient(spacing, dtype, tolerance):
    warped, fixed = labels(dtype=dtype)
    mm = torch.tensor([spacing], dtype=torch.float64)
    found = value_and_gradient(MultiscaleDiceLoss(), warped, fixed, mm)
    assert_close(found, transcribed(dice_loss, warped, fixed, [spacing]), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_multiscale_dice_takes_the_voxel_size_of_each_pair_of_a_batch(dtype, tolerance):
    warped, fixed = labels(batch=3, dtype=dtype)
    spacing = [(0.8, 0.8, 0.8), (0.7, 1.1, 2.5), (1.6, 0.8, 0.8)]
    found = value_and_gradient(MultiscaleDiceLoss(), warped, fixed, torch.tensor(spacing, dtype=torch.float64))
    assert_close(found, transcribed(dice_loss, warped, fixed, spacing), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_multiscale_squared_dice_is_its_transcription_in_value_and_gradient(dtype, tolerance):
    warped, fixed = labels(batch=2, dtype=dtype)
    spacing = [(0.8, 0.8, 0.8), (0.7, 1.1, 2.5)]
    found = value_and_gradient(MultiscaleSquaredDiceLoss(), warped, fixed, torch.tensor(spacing, dtype=torch.float64))
    assert_close(found, transcribed(squared_dice, warped, fixed, spacing), 30 * tolerance)
    mm = torch.tensor(spacing, dtype=torch.float64)
    assert MultiscaleSquaredDiceLoss()(fixed, fixed, mm).item() == pytest.approx(0, abs=1e-5)


def test_a_batch_of_one_voxel_size_is_the_mean_of_its_pairs():
    warped, fixed = labels(batch=3)
    spacing = torch.full((3, 3), 0.8, dtype=torch.float64)
    for loss in (MultiscaleDiceLoss(), MultiscaleCrossEntropyLoss()):
        single = [loss(warped[b : b + 1], fixed[b : b + 1], spacing[:1]) for b in range(3)]
        torch.testing.assert_close(loss(warped, fixed, spacing), torch.stack(single).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", PAPER_SCALES)
def test_each_scale_is_right_alone_and_zero_is_the_plain_soft_dice(scale):
    warped, fixed = labels()
    mm = torch.tensor([SPACINGS[1]], dtype=torch.float64)
    found = value_and_gradient(MultiscaleDiceLoss([scale]), warped, fixed, mm)
    assert_close(found, transcribed(dice_loss, warped, fixed, [SPACINGS[1]], [scale]), 1e-9)
    if scale == 0:
        assert found[0].item() == pytest.approx(1 - (2 * (warped * fixed).sum() / (warped + fixed).sum()).item())


def test_labels_of_any_memory_layout_give_the_same_loss():
    warped, fixed = labels(batch=2)
    mm = torch.tensor(SPACINGS, dtype=torch.float64)
    strided = [x.movedim(2, -1).contiguous().movedim(-1, 2) for x in (warped, fixed)]
    flipped = [x.flip(3).contiguous().flip(3) for x in (warped, fixed)]
    channels_last = [x.expand(-1, 2, -1, -1, -1).contiguous()[:, :1] for x in (warped, fixed)]
    assert not strided[0].is_contiguous() and not channels_last[0].is_contiguous()
    for loss in (MultiscaleDiceLoss(), MultiscaleCrossEntropyLoss()):
        expected = value_and_gradient(loss, warped, fixed, mm)
        for a, b in (strided, flipped, channels_last):
            value, gradient = value_and_gradient(loss, a, b, mm)
            torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("sigma", "expected"), [(0, 1), (1, 0.81), (2, 0.64), (4, 0.38), (8, 0.14)])
def test_an_aligned_cube_of_16_voxels_has_the_known_dice_at_each_scale(sigma, expected):
    cube = torch.zeros(1, 1, 32, 32, 32)
    cube[:, :, 8:24, 8:24, 8:24] = 1
    dice = 1 - MultiscaleDiceLoss([0.8 * sigma])(cube, cube, torch.full((1, 3), 0.8, dtype=torch.float64))
    assert dice.item() == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_the_kernels_are_normalised(sigma):
    inner = gaussian_matrix(32, sigma)[8:-8]
    torch.testing.assert_close(inner.sum(1), torch.ones(16, dtype=torch.float64), rtol=1e-12, atol=0)
    voxel = torch.zeros(1, 1, 17, 17, 17, dtype=torch.float64)
    voxel[..., 8, 8, 8] = 1
    dice = 1 - MultiscaleDiceLoss([sigma])(voxel, voxel, torch.ones(1, 3, dtype=torch.float64))
    # Σ g² of a normalised Gaussian is 1 / (2 √π σ) along each axis; without the division it would be √π σ
    assert dice.item() == pytest.approx((2 * np.sqrt(np.pi) * sigma) ** -3, rel=0.02)


def test_labels_far_apart_still_attract_each_other():
    a, b = torch.zeros(2, 1, 1, 40, 8, 8, dtype=torch.float64)
    a[:, :, 2:6, 2:6, 2:6] = b[:, :, 30:34, 2:6, 2:6] = 1
    spacing = torch.full((1, 3), 0.8, dtype=torch.float64)
    _, gradient = value_and_gradient(MultiscaleDiceLoss(), a, b, spacing)
    towards, away = gradient[0, 0, 7, 3, 3], gradient[0, 0, 0, 3, 3]
    assert towards < away
    _, single = value_and_gradient(MultiscaleDiceLoss([0]), a, b, spacing)
    assert not single[0, 0, :20].any()  # the plain Dice is blind beyond the overlap


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_known_fields_give_the_same_loss_and_gradient(dtype, tolerance):
    warped, fixed = labels(batch=2, dtype=dtype)
    loss, spacing = MultiscaleDiceLoss(), torch.tensor([SPACINGS[1]] * 2, dtype=torch.float64)
    fields = loss.fields(fixed, SPACINGS[1])
    assert fields.shape == (len(PAPER_SCALES), 2, *SIZE)
    found = value_and_gradient(loss, warped, fixed, spacing, fields)
    assert_close(found, transcribed(dice_loss, warped, fixed, [SPACINGS[1]] * 2), tolerance)
    with pytest.raises(ValueError, match="one voxel size"):
        loss(warped, fixed, torch.tensor(SPACINGS), fields)


@pytest.mark.parametrize("loss", [MultiscaleDiceLoss(), MultiscaleCrossEntropyLoss()])
def test_filters_first_used_in_inference_mode_serve_training_later(loss):
    warped, fixed = labels(size=(7, 11, 13))
    with torch.inference_mode():
        value = loss(warped, fixed, torch.full((1, 3), 0.77))
    found, gradient = value_and_gradient(loss, warped, fixed, torch.full((1, 3), 0.77))
    assert found == value and gradient.any()


def test_the_fixed_label_gets_no_gradient():
    warped, fixed = labels()
    fixed.requires_grad_(), warped.requires_grad_()
    for loss in (MultiscaleDiceLoss(), MultiscaleCrossEntropyLoss()):
        value = loss(warped, fixed, torch.ones(1, 3, dtype=torch.float64))
        assert torch.autograd.grad(value, fixed, allow_unused=True)[0] is None


def test_an_empty_warped_label_gives_a_finite_loss_of_one():
    _, fixed = labels()
    value, gradient = value_and_gradient(MultiscaleDiceLoss(), 0 * fixed, fixed, torch.ones(1, 3))
    assert value == 1 and gradient.isfinite().all()


@pytest.mark.parametrize("loss", [MultiscaleDiceLoss(), MultiscaleCrossEntropyLoss()])
def test_labels_or_voxel_sizes_of_wrong_shape_are_refused(loss):
    warped, fixed = labels(batch=2)
    for a, b in ((warped, fixed[:1]), (warped[:, 0], fixed[:, 0]), (warped.expand(-1, 2, -1, -1, -1),) * 2):
        with pytest.raises(ValueError, match="one shape"):
            loss(a, b, torch.ones(2, 3))
    for spacing in (torch.ones(3), torch.ones(1, 3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="spacing"):
            loss(warped, fixed, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_multiscale_cross_entropy_is_equation_6_in_value_and_gradient(spacing):
    warped, fixed = labels()
    mm = torch.tensor([spacing], dtype=torch.float64)
    found = value_and_gradient(MultiscaleCrossEntropyLoss(), warped, fixed, mm)
    expected = transcribed(cross_entropy, warped, fixed, [spacing])
    assert_close(found, expected, 1e-9)
    single = value_and_gradient(MultiscaleCrossEntropyLoss(), warped.float(), fixed.float(), mm)
    assert single[0].item() == pytest.approx(expected[0], rel=1e-3)  # float32 holds 1 − 1e-6 to 6 % of the 1e-6


def test_cross_entropy_of_soft_labels_holds_in_float32_and_with_mixed_voxel_sizes():
    warped, fixed = (0.1 + 0.8 * label for label in labels(batch=2, dtype=torch.float32))
    mm = torch.tensor(SPACINGS, dtype=torch.float64)
    found = value_and_gradient(MultiscaleCrossEntropyLoss(), warped, fixed, mm)
    assert_close(found, transcribed(cross_entropy, warped, fixed, SPACINGS), 1e-5)


def test_cross_entropy_counts_foreground_and_background_alike():
    warped, fixed = (0.1 + 0.8 * label for label in labels())
    loss, mm = MultiscaleCrossEntropyLoss([0]), torch.ones(1, 3, dtype=torch.float64)
    torch.testing.assert_close(loss(warped, fixed, mm), loss(1 - warped, 1 - fixed, mm), rtol=1e-12, atol=0)


def bending_label_reg(ddf):
    """label-reg's bending energy on an array (B, 3, X, Y, Z)."""

    def dx(f):
        return (f[:, :, 2:, 1:-1, 1:-1] - f[:, :, :-2, 1:-1, 1:-1]) / 2

    def dy(f):
        return (f[:, :, 1:-1, 2:, 1:-1] - f[:, :, 1:-1, :-2, 1:-1]) / 2

    def dz(f):
        return (f[:, :, 1:-1, 1:-1, 2:] - f[:, :, 1:-1, 1:-1, :-2]) / 2

    x, y, z = dx(ddf), dy(ddf), dz(ddf)
    pure = dx(x) ** 2 + dy(y) ** 2 + dz(z) ** 2
    return (pure + 2 * dy(x) ** 2 + 2 * dz(x) ** 2 + 2 * dz(y) ** 2).mean()


def bending_compact(ddf):
    """The same with [1, −2, 1] and the four-point mixed stencil, on an array (B, 3, X, Y, Z)."""
    e = np.eye(3, dtype=int)

    def at(x, y, z):
        return ddf[:, :, 1 + x : ddf.shape[2] - 1 + x, 1 + y : ddf.shape[3] - 1 + y, 1 + z : ddf.shape[4] - 1 + z]

    total = 0
    for i in range(3):
        total = total + (at(*e[i]) - 2 * ddf[:, :, 1:-1, 1:-1, 1:-1] + at(*-e[i])) ** 2
        for j in range(i + 1, 3):
            mixed = at(*e[i] + e[j]) - at(*e[i] - e[j]) - at(*-e[i] + e[j]) + at(*-e[i] - e[j])
            total = total + 2 * (mixed / 4) ** 2
    return total.mean()


BENDING = {"label-reg": bending_label_reg, "compact": bending_compact}


def grid(*size):
    return np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in size], indexing="ij"))


@pytest.mark.parametrize("stencil", BENDING)
def test_bending_energy_is_its_transcription_in_value_and_gradient(stencil):
    ddf = 3 * np.random.default_rng(0).normal(size=(2, 3, 5, 7, 6))
    expected, energy = BENDING[stencil](ddf), BendingEnergy(stencil)
    value, gradient = value_and_gradient(energy, torch.from_numpy(ddf))
    assert value.item() == pytest.approx(expected, rel=1e-9)
    numeric = np.zeros(ddf.size)
    for i in range(ddf.size):  # the energy is quadratic, so central differences are exact
        step = np.zeros(ddf.size)
        step[i] = 1
        step = step.reshape(ddf.shape)
        numeric[i] = (BENDING[stencil](ddf + step) - BENDING[stencil](ddf - step)) / 2
    np.testing.assert_allclose(gradient.numpy().ravel(), numeric, rtol=0, atol=1e-9 * np.abs(numeric).max())
    single, gradient = value_and_gradient(energy, torch.from_numpy(ddf).float())
    assert single.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient.numpy().ravel(), numeric, rtol=0, atol=1e-5 * np.abs(numeric).max())


@pytest.mark.parametrize("stencil", BENDING)
def test_bending_energy_of_any_memory_layout_is_the_same_in_value_and_gradient(stencil):
    ddf = torch.randn(2, 7, 6, 9, 3, dtype=torch.float64).permute(0, 4, 3, 1, 2)  # not contiguous, odd sides
    energy = BendingEnergy(stencil)
    for a, b in zip(*(value_and_gradient(energy, x) for x in (ddf, ddf.contiguous())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stencil", BENDING)
def test_an_affine_field_has_no_bending_energy(stencil):
    rng = np.random.default_rng(0)
    ddf = np.einsum("ij,jxyz->ixyz", rng.normal(size=(3, 3)), grid(8, 9, 7)) + rng.normal(size=(3, 1, 1, 1))
    assert BendingEnergy(stencil)(torch.from_numpy(ddf)[None]) < 1e-24


@pytest.mark.parametrize("stencil", BENDING)
def test_a_quadratic_field_has_the_bending_energy_of_calculus(stencil):
    x, y, z = grid(9, 8, 10)
    # second derivatives: xx = 3; xy = 2 and zz = 1; yz = −1; the mean is over the three components
    ddf = np.stack([1.5 * x**2, 2 * x * y + 0.5 * z**2, -y * z])
    expected = (3**2 + (2 * 2**2 + 1**2) + 2 * 1**2) / 3
    assert BendingEnergy(stencil)(torch.from_numpy(ddf)[None]).item() == pytest.approx(expected, rel=1e-12)


def test_only_the_compact_stencil_sees_a_wave_of_two_voxels():
    ddf = torch.from_numpy(np.cos(np.pi * grid(8, 9, 7)[:1])).expand(3, -1, -1, -1)[None]
    assert BendingEnergy("label-reg")(ddf) < 1e-24
    assert BendingEnergy("compact")(ddf).item() == pytest.approx(16)


def test_bending_energy_refuses_an_unknown_stencil_and_a_field_too_small():
    with pytest.raises(ValueError, match="stencil must be"):
        BendingEnergy("central")
    for stencil in BENDING:
        with pytest.raises(ValueError, match="at least 5 voxels"):
            BendingEnergy(stencil)(torch.zeros(1, 3, 9, 4, 9))


def test_the_l2_variant_is_the_mean_squared_central_first_difference():
    ddf = 3 * np.random.default_rng(0).normal(size=(2, 3, 6, 7, 5))
    x = (ddf[:, :, 2:, 1:-1, 1:-1] - ddf[:, :, :-2, 1:-1, 1:-1]) / 2
    y = (ddf[:, :, 1:-1, 2:, 1:-1] - ddf[:, :, 1:-1, :-2, 1:-1]) / 2
    z = (ddf[:, :, 1:-1, 1:-1, 2:] - ddf[:, :, 1:-1, 1:-1, :-2]) / 2
    assert DiffusionLoss()(torch.from_numpy(ddf)).item() == pytest.approx((x**2 + y**2 + z**2).mean(), rel=1e-12)


def folding_field():
    """(1, 3, 12, 6, 7): x + u(x) runs backwards between 6 and 9, nothing moves along y and z."""
    x = torch.from_numpy(grid(12, 6, 7)[0])
    ddf = torch.zeros(1, 3, 12, 6, 7, dtype=torch.float64)
    ddf[:, 0] = -3 * (x - 6).clip(0, 3)
    return ddf


@pytest.mark.parametrize(
    "displacement",
    [
        lambda p: 0 * p,
        lambda p: np.einsum("ij,jxyz->ixyz", [[0.4, 0.3, 0], [0, -0.5, 0.2], [0.1, 0, 0.2]], p),
        lambda p: np.sin(p[::-1] / 2),
        lambda p: np.stack([-2 * p[0], -2 * p[1], 0 * p[2]]),  # half a turn about z, which folds nothing
    ],
    ids=["none", "affine", "smooth", "half a turn"],
)
def test_a_field_that_does_not_fold_is_not_penalised_and_gets_no_gradient(displacement):
    value, gradient = value_and_gradient(FoldingPenalty(), torch.from_numpy(displacement(grid(9, 7, 8)))[None])
    assert value == 0 and not gradient.any()


def test_a_folding_field_has_the_penalty_computed_by_hand():
    # det J = 1 + du/dx is −1/2, −2, −2, −1/2 at x = 6..9 of the inner x = 1..10, and 1 elsewhere
    ddf = folding_field()
    assert FoldingPenalty()(ddf).item() == pytest.approx(5 / 10)
    assert FoldingPenalty()(torch.cat([ddf, 0 * ddf])).item() == pytest.approx(5 / 20)
    mirrored = torch.from_numpy(-2 * grid(5, 6, 7) * np.array([0, 1, 0]).reshape(3, 1, 1, 1))[None]
    assert FoldingPenalty()(mirrored).item() == pytest.approx(1)


def test_the_gradient_of_the_folding_penalty_is_right_and_unfolds():
    ddf = 2 * torch.randn(1, 3, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(FoldingPenalty(), ddf.requires_grad_())
    ddf = folding_field().requires_grad_()
    optimizer = torch.optim.Adam([ddf], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        penalty = FoldingPenalty()(ddf)
        penalty.backward()
        optimizer.step()
    assert penalty == 0


def test_regularisers_are_added_by_their_weights():
    ddf, _ = objective_inputs()
    total = WeightedSum([BendingEnergy(), FoldingPenalty()], [0.5, 3])(ddf)
    torch.testing.assert_close(total, 0.5 * BendingEnergy()(ddf) + 3 * FoldingPenalty()(ddf), rtol=1e-12, atol=0)
    assert FoldingPenalty()(ddf) > 0


def test_regularisers_without_their_weights_and_fields_too_small_to_fold_are_refused():
    with pytest.raises(ValueError, match="as many weights"):
        WeightedSum([BendingEnergy(), FoldingPenalty()], [1])
    with pytest.raises(ValueError, match="at least 3 voxels"):
        FoldingPenalty()(torch.zeros(1, 3, 9, 2, 9))


def objective_inputs(dtype=torch.float64):
    moving, fixed = labels(batch=2, dtype=dtype)
    ddf = torch.randn(2, 3, *SIZE, dtype=dtype, generator=torch.Generator().manual_seed(0))
    spacing = torch.full((2, 3), 0.8, dtype=torch.float64)
    return ddf, {"moving_label": moving, "fixed_label": fixed, "spacing": spacing}


@pytest.mark.parametrize("alpha", [0.5, 0.01, 0])
@pytest.mark.parametrize("similarity", [MultiscaleDiceLoss(), MultiscaleCrossEntropyLoss()])
@pytest.mark.parametrize("regulariser", [BendingEnergy(), DiffusionLoss()])
def test_the_objective_is_the_similarity_plus_alpha_times_the_regulariser(similarity, regulariser, alpha):
    ddf, targets = objective_inputs()
    warped = warp(targets["moving_label"], ddf)
    expected = similarity(warped, targets["fixed_label"], targets["spacing"]) + alpha * regulariser(ddf)
    found = LabelDrivenLoss(similarity, regulariser, alpha)(ddf, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_identical_labels_and_no_displacement_give_no_dice_loss_at_scale_zero():
    _, fixed = labels()
    targets = {"moving_label": fixed, "fixed_label": fixed, "spacing": torch.ones(1, 3)}
    loss = LabelDrivenLoss(MultiscaleDiceLoss([0]), BendingEnergy())
    assert loss(torch.zeros(1, 3, *SIZE, dtype=torch.float64), targets).item() == pytest.approx(0, abs=1e-12)


def test_descending_the_objective_pulls_the_moving_label_onto_the_fixed_one():
    moving, fixed = torch.zeros(2, 1, 1, 24, 16, 16)
    moving[..., 4:11, 5:11, 5:11] = fixed[..., 12:19, 5:11, 5:11] = 1
    targets = {"moving_label": moving, "fixed_label": fixed, "spacing": torch.ones(1, 3, dtype=torch.float64)}
    shift = torch.zeros(1, 3, 1, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.5)
    loss = LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy())
    for _ in range(60):
        optimizer.zero_grad()
        loss(shift.expand(1, 3, 24, 16, 16), targets).backward()
        optimizer.step()
    assert (shift.detach().flatten() - torch.tensor([-8.0, 0, 0])).abs().max() < 0.5


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_precision_ddf_is_warped_and_regularised_in_float32(half):
    ddf, targets = objective_inputs(torch.float32)
    seen = {}

    def similarity(warped, fixed, spacing):
        seen["warped"] = warped
        return warped.mean()

    def regulariser(field):
        seen["ddf"] = field
        return field.mean()

    LabelDrivenLoss(similarity, regulariser)(ddf.to(half), targets)
    assert seen["ddf"].dtype == seen["warped"].dtype == torch.float32
    assert torch.equal(seen["warped"], warp(targets["moving_label"], ddf.to(half).float()))


def prefiltered_numpy(moving, fixed, ddf, spacing, scales=PAPER_SCALES):
    """1 − the mean Dice of the filtered fixed and the warped filtered moving label, one pair of volumes (X, Y, Z)."""
    points, total = np.indices(moving.shape) + ddf, 0
    for scale in scales:
        a, b = filter_numpy(fixed, scale, spacing), filter_numpy(moving, scale, spacing)
        b = map_coordinates(b, points, order=1, mode="grid-constant", cval=0.0)
        total += 2 * (a * b).sum() / (a.sum() + b.sum())
    return 1 - total / len(scales)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_the_prefiltered_loss_filters_both_labels_then_warps_then_takes_dice(dtype, tolerance):
    ddf, targets = objective_inputs(dtype)
    targets["spacing"] = torch.tensor(SPACINGS, dtype=torch.float64)
    arrays = [x.double().numpy() for x in (targets["moving_label"][:, 0], targets["fixed_label"][:, 0], ddf)]
    expected = np.mean([prefiltered_numpy(*pair, s) for *pair, s in zip(*arrays, SPACINGS, strict=True)])
    found = PrefilteredLoss(BendingEnergy(), alpha=0)(ddf, targets)
    assert found.item() == pytest.approx(expected, rel=tolerance)
    after = LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy(), alpha=0)(ddf, targets)
    assert abs(found - after) > 1e-4  # filtering and warping do not commute
    regularised = PrefilteredLoss(BendingEnergy(), alpha=0.5)(ddf, targets)
    assert (regularised - found).item() == pytest.approx(0.5 * BendingEnergy()(ddf).item(), rel=10 * tolerance)


@pytest.mark.parametrize("displaced", [0, 1])
def test_the_prefiltered_loss_is_multiscale_dice_without_filters_or_without_displacement(displaced):
    ddf, targets = objective_inputs()
    targets["spacing"] = torch.tensor(SPACINGS, dtype=torch.float64)
    scales = [0] if displaced else PAPER_SCALES
    before = PrefilteredLoss(BendingEnergy(), 0.3, scales)(displaced * ddf, targets)
    after = LabelDrivenLoss(MultiscaleDiceLoss(scales), BendingEnergy(), 0.3)(displaced * ddf, targets)
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)


def test_the_gradient_of_the_prefiltered_loss_is_right():
    moving, fixed = labels(size=(5, 7, 6))
    targets = {"moving_label": moving, "fixed_label": fixed, "spacing": torch.full((1, 3), 0.8)}
    ddf = torch.randn(1, 3, 5, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = PrefilteredLoss(BendingEnergy(), 0.1, (0, 1, 2))
    assert torch.autograd.gradcheck(lambda u: loss(u, targets), ddf.requires_grad_(), fast_mode=True)


def test_the_prefiltered_loss_draws_labels_far_apart_together():
    moving, fixed = torch.zeros(2, 1, 1, 40, 8, 8, dtype=torch.float64)
    moving[:, :, 2:6, 2:6, 2:6] = fixed[:, :, 26:30, 2:6, 2:6] = 1
    targets = {"moving_label": moving, "fixed_label": fixed, "spacing": torch.full((1, 3), 0.8)}
    shift = torch.zeros(1, 3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    PrefilteredLoss(BendingEnergy())(shift.expand(1, 3, 40, 8, 8), targets).backward()
    assert shift.grad[0, 0, 0, 0, 0] > 0  # the moving label lies at lower x, and the field pulls


def test_the_prefiltered_loss_takes_a_half_precision_ddf_and_refuses_labels_of_wrong_shape():
    ddf, targets = objective_inputs(torch.float32)
    loss = PrefilteredLoss(BendingEnergy())
    assert torch.equal(loss(ddf.bfloat16(), targets), loss(ddf.bfloat16().float(), targets))
    with pytest.raises(ValueError, match="one shape"):
        loss(ddf, targets | {"fixed_label": targets["fixed_label"][:1]})
    with pytest.raises(ValueError, match="spacing"):
        loss(ddf, targets | {"spacing": torch.ones(3)})


def ball(centre, radius, size=(40, 30, 20), mm=(2.0, 2.0, 2.0)):
    """A ball, radius in mm and centre in voxels: its label (1, 1, X, Y, Z) and its exact signed distance (X, Y, Z)."""
    at = [(np.arange(n) - c) * v for n, c, v in zip(size, centre, mm, strict=True)]
    distance = np.sqrt(sum(x**2 for x in np.meshgrid(*at, indexing="ij"))) - radius
    return torch.from_numpy(distance <= 0).double()[None, None], torch.from_numpy(distance)


def test_signed_distances_of_a_ball_are_those_of_geometry():
    label, exact = ball((20, 14, 10), 13.3)
    found = SignedDistanceLoss(BendingEnergy(), reach=15).distances(label, torch.full((1, 3), 2.0))[0, 0]
    assert (found - exact.clamp(-15, 15)).abs().max() < 1.2  # the surface lies somewhere between two voxels
    assert torch.equal(found < 0, label[0, 0] > 0)


def test_the_signed_distance_loss_is_zero_for_equal_labels_and_grows_with_the_shift_of_a_small_one():
    loss, spacing, values = SignedDistanceLoss(BendingEnergy()), torch.full((1, 3), 2.0), []
    fixed, _ = ball((12, 14, 10), 4)
    for shift in range(0, 10, 2):
        targets = {"moving_label": ball((12 + shift, 14, 10), 4)[0], "fixed_label": fixed, "spacing": spacing}
        ddf = torch.zeros(1, 3, 40, 30, 20, dtype=torch.float64, requires_grad=True)
        values.append(loss(ddf, targets))
    assert values[0] < 1e-12 and all(b > a + 0.03 for a, b in zip(values, values[1:], strict=False))
    values[-1].backward()  # 16 mm apart, 8 mm across: overlap would say nothing
    assert ddf.grad[0, 0].sum() < 0  # the moving label lies at higher x, and the field pulls


def test_the_gradient_of_the_signed_distance_loss_is_right():
    moving, fixed = labels(batch=2, size=(5, 7, 6))
    targets = {"moving_label": moving, "fixed_label": fixed, "spacing": torch.tensor(SPACINGS)}
    ddf = torch.randn(2, 3, 5, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = SignedDistanceLoss(BendingEnergy(), 0.1, 3)
    assert torch.autograd.gradcheck(lambda u: loss(u, targets), ddf.requires_grad_(), fast_mode=True)


def test_a_label_that_left_the_grid_is_farther_away_than_any_on_it():
    fixed, ddf, loss = ball((20, 14, 10), 8)[0], torch.zeros(1, 3, 40, 30, 20), SignedDistanceLoss(BendingEnergy())
    targets = {"fixed_label": fixed, "spacing": torch.full((1, 3), 2.0)}
    near, far, gone = (
        loss(ddf, targets | {"moving_label": moving}).item()
        for moving in (ball((23, 14, 10), 8)[0], ball((33, 14, 10), 8)[0], 0 * fixed)
    )
    assert 0 < near < far < gone < 2
    with pytest.raises(ValueError, match="spacing"):
        loss(ddf, targets | {"moving_label": fixed, "spacing": torch.ones(3)})


# ---- labels that a field has pushed off the grid

OBJECTIVES = {
    "multiscale Dice": LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy()),
    "its scales in two_stage.yaml": LabelDrivenLoss(MultiscaleDiceLoss([0, 2, 4, 8]), BendingEnergy()),
    "plain Dice": LabelDrivenLoss(MultiscaleDiceLoss([0]), BendingEnergy()),
    "squared Dice": LabelDrivenLoss(MultiscaleSquaredDiceLoss(), BendingEnergy()),
    "cross-entropy": LabelDrivenLoss(MultiscaleCrossEntropyLoss(), BendingEnergy()),
    "L2": LabelDrivenLoss(MultiscaleDiceLoss(), DiffusionLoss()),
    "no regulariser": LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy(), alpha=0),
    "pre-filtered": PrefilteredLoss(BendingEnergy()),
    "signed distance": SignedDistanceLoss(BendingEnergy()),
}
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
ROOM = (20, 18, 16)
HOME = (-3, -1, -1)  # the translation under which the two balls are one


def two_balls(dtype=torch.float32):
    moving, fixed = (ball(centre, 4, ROOM, (1.0, 1.0, 1.0))[0].to(dtype) for centre in ((8, 9, 8), (11, 10, 9)))
    return {"moving_label": moving, "fixed_label": fixed, "spacing": torch.full((1, 3), 1.7)}


def translated(by, dtype=torch.float32):
    return torch.tensor(by, dtype=dtype).view(1, 3, 1, 1, 1).expand(1, 3, *ROOM)


@EVERY_OBJECTIVE
@pytest.mark.parametrize("by", [(25, -20, 30), (0, 0, -15), (-19, 6, 0)], ids=str)
def test_a_label_pushed_off_the_grid_is_led_back(objective, by):
    targets = two_balls()
    shift = torch.tensor(by, dtype=torch.float32).view(1, 3, 1, 1, 1).requires_grad_()
    optimizer, shares = torch.optim.Adam([shift], lr=1.0), []
    for _ in range(60):
        ddf = shift.expand(1, 3, *ROOM)
        shares.append(reached(warp(targets["moving_label"], ddf.detach()), targets).item())
        if shares[-1] >= 0.5:
            break
        optimizer.zero_grad()
        objective(ddf, targets).backward()
        optimizer.step()
    assert shares[0] == 0 and shares[-1] >= 0.5


@EVERY_OBJECTIVE
def test_a_field_whose_samples_all_miss_the_label_on_the_grid_is_led_to_it(objective):
    targets = two_balls()
    corner = torch.tensor([19.0, 17, 15]).view(3, 1, 1, 1)
    ddf = (corner - torch.from_numpy(grid(*ROOM)).float())[None].requires_grad_()  # every sample in one corner
    assert not warp(targets["moving_label"], ddf).any()
    objective(ddf, targets).backward()
    uphill = ddf.grad.sum((0, 2, 3, 4))
    assert (uphill > 0).all()  # the label lies at lower x, y and z


@EVERY_OBJECTIVE
def test_the_farther_off_a_label_is_the_larger_is_the_loss(objective):
    targets = two_balls()
    values = [objective(translated((x - 3, -1, -1)), targets).item() for x in range(15, 60, 9)]
    assert all(b > a for a, b in zip(values, values[1:], strict=False))


@EVERY_OBJECTIVE
def test_labels_on_the_grid_have_the_bare_objective_bit_for_bit(objective, monkeypatch):
    ddf, targets = objective_inputs(torch.float32)
    assert (reached(warp(targets["moving_label"], ddf), targets) > 0.5).all()
    with_it = value_and_gradient(objective, ddf, targets)
    monkeypatch.setattr("scripts.network.losses.way_back", lambda *_: 0)
    for found, expected in zip(with_it, value_and_gradient(objective, ddf, targets), strict=True):
        assert torch.equal(found, expected)


def test_the_way_back_is_its_formula():
    targets, by = two_balls(torch.float64), (9, 1, -5)
    ddf = translated(by, torch.float64)
    warped = warp(targets["moving_label"], ddf)
    share = (warped.sum() / torch.minimum(targets["moving_label"].sum(), targets["fixed_label"].sum())).item()
    assert 0.05 < share < 0.45
    apart = np.linalg.norm(np.subtract(by, HOME)) / np.linalg.norm(ROOM)
    assert way_back(ddf, warped, targets).item() == pytest.approx((1 - 2 * share) * apart, rel=1e-6)
    assert reached(warped, targets).item() == pytest.approx(share, rel=1e-12)
    both = {key: torch.cat([value, value]) for key, value in targets.items()}
    fields = torch.cat([ddf, 0 * ddf])
    half = way_back(fields, warp(both["moving_label"], fields), both).item()
    assert half == pytest.approx((1 - 2 * share) * apart / 2, rel=1e-6)


def test_the_gradient_of_the_way_back_is_right():
    targets = two_balls(torch.float64)
    noise = torch.randn(1, 3, *ROOM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ddf = (translated((9, 1, -5), torch.float64) + 0.3 * noise).requires_grad_()

    def along(t):  # 17280 partial derivatives at once: those along three random directions
        moved = ddf.detach() + (t.view(3, 1, 1, 1, 1) * ways).sum(0, keepdim=True)
        return way_back(moved, warp(targets["moving_label"], moved), targets)

    ways = torch.randn(3, 3, *ROOM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(along, torch.zeros(3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("empty", ["moving_label", "fixed_label"])
def test_an_empty_label_is_not_looked_for(empty):
    targets = two_balls()
    targets[empty] = 0 * targets[empty]
    ddf = translated((25, -20, 30)).clone().requires_grad_()
    back = way_back(ddf, warp(targets["moving_label"], ddf), targets)
    assert back == 0 and not torch.autograd.grad(back, ddf)[0].any()


def test_a_label_much_larger_than_the_other_one_is_not_lost_where_they_are_aligned():
    moving, fixed = (ball((10, 9, 8), radius, ROOM, (1.0, 1.0, 1.0))[0].float() for radius in (7, 3))
    targets = {"moving_label": moving, "fixed_label": fixed, "spacing": torch.ones(1, 3)}
    at = (torch.from_numpy(grid(*ROOM)) - torch.tensor([10, 9, 8]).view(3, 1, 1, 1)).float()
    ddf = (7 / 3 - 1) * at[None]
    warped = warp(moving, ddf)
    assert warped.sum() / moving.sum() < 0.2
    assert way_back(ddf, warped, targets) == 0
