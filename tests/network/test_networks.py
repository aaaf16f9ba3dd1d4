"""The network is the one of Fig. 4: a literal transcription on its own weights gives the same displacement field."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from scripts.network.networks import CompositeNet, ConvBN, GlobalNet, MeanField, SummedDDFNet, additive_upsampling

ALL = (0, 1, 2, 3, 4)
LOWER = (1, 2, 3, 4)
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64, whose sums each processor orders as it likes
CLOSE = {"rtol": 1e-4, "atol": 5e-4}  # float32; the fields reach tens of voxels


def trained(seed=0, **options):
    """A small network in eval mode whose every weight, head and running statistic is random."""
    torch.manual_seed(seed)
    net = SummedDDFNet(initial_channels=2, **options).eval()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.startswith("summands"):
                value.normal_(0, 0.3)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var") or "norm.weight" in name:
                value.uniform_(0.5, 2)
            elif name.endswith("bias"):
                value.normal_(0, 0.2)
    return net


@pytest.mark.parametrize("levels", [2, 3])
def test_a_network_of_fewer_levels_takes_sizes_of_fewer_halvings_and_sums_their_summands(levels):
    net = trained(levels=levels, first_kernel=3, summands=range(levels + 1), in_channels=3)
    assert net.down[0].conv.conv.weight.shape[2:] == (3, 3, 3)
    image = torch.randn(1, 3, 12, 10, 9, generator=torch.Generator().manual_seed(0))
    padded, low = net.padded(image)
    assert [n % 2**levels for n in padded.shape[2:]] == [0, 0, 0] and len(net.features(padded)) == levels + 1
    field, summands = net(image), net.displacement_summands(image)
    assert field.shape == (1, 3, 12, 10, 9) and len(summands) == levels + 1
    assert torch.equal(field, sum(summands[1:], summands[0]))
    with pytest.raises(ValueError, match=f"out of 0..{levels}"):
        SummedDDFNet(2, levels=levels, summands=(levels + 1,))


def image_pair(*size, batch=1):
    return torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(1))


def figure_4(w, x, summands=ALL, additive=True, skip_after_unit=False, skip_in_shortcut_only=False):
    """Fig. 4 written out on the weights `w`: the fields δ_k, coarsest first, for sides that are multiples of 16."""

    def bn(x, name):
        mean, var = (w[f"{name}.running_{s}"].view(1, -1, 1, 1, 1) for s in ("mean", "var"))
        scale, shift = (w[f"{name}.{s}"].view(1, -1, 1, 1, 1) for s in ("weight", "bias"))
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    def conv(x, name):
        kernel = w[f"{name}.conv.weight"]
        return bn(F.conv3d(x, kernel, padding=kernel.shape[-1] // 2), f"{name}.norm")

    def unit(x, shortcut, name):
        return torch.relu(conv(torch.relu(conv(x, f"{name}.conv1")), f"{name}.conv2") + shortcut)

    def resize(x, size):
        return F.interpolate(x, size=size, mode="trilinear", align_corners=False)

    size, skips = x.shape[2:], []
    for k in range(4):
        h0 = torch.relu(conv(x, f"down.{k}.conv"))
        h1 = unit(h0, h0, f"down.{k}.residual")
        skips.append(h1 if skip_after_unit else h0)
        x = F.max_pool3d(h1, kernel_size=2, stride=2)
    x = torch.relu(conv(x, "deep"))
    levels = {4: x}
    for i, k in enumerate(range(3, min(summands) - 1, -1)):
        up = F.conv_transpose3d(x, w[f"up.{i}.deconv.conv.weight"], stride=2, padding=1, output_padding=1)
        h = torch.relu(bn(up, f"up.{i}.deconv.norm"))
        if additive:
            resized, n = resize(x, skips[k].shape[2:]), x.shape[1] // 2
            h = h + resized[:, :n] + resized[:, n:]
        summed = h + skips[k]
        x = levels[k] = unit(h if skip_in_shortcut_only else summed, summed, f"up.{i}.residual")
    order = sorted(summands, reverse=True)
    return [
        resize(F.conv3d(levels[k], w[f"summands.{i}.conv.weight"], w[f"summands.{i}.conv.bias"], padding=1), size)
        for i, k in enumerate(order)
    ]


def layer_counts(n0, summands=ALL):
    """Parameters of each layer, by name, from its formula; batch normalisation has a scale and a shift per channel."""
    n = [n0 * 2**k for k in range(5)]
    counts = {}
    for k in range(4):
        before, kernel = (n[k - 1], 3) if k else (2, 7)
        counts |= {f"down.{k}.conv.conv": before * n[k] * kernel**3, f"down.{k}.conv.norm": 2 * n[k]}
        for c in (1, 2):
            counts[f"down.{k}.residual.conv{c}.conv"] = n[k] * n[k] * 27
            counts[f"down.{k}.residual.conv{c}.norm"] = 2 * n[k]
    counts |= {"deep.conv": n[3] * n[4] * 27, "deep.norm": 2 * n[4]}
    for i, k in enumerate(range(3, min(summands) - 1, -1)):
        counts |= {f"up.{i}.deconv.conv": n[k + 1] * n[k] * 27, f"up.{i}.deconv.norm": 2 * n[k]}
        for c in (1, 2):
            counts[f"up.{i}.residual.conv{c}.conv"] = n[k] * n[k] * 27
            counts[f"up.{i}.residual.conv{c}.norm"] = 2 * n[k]
    return counts | {f"summands.{i}.conv": n[k] * 3 * 27 + 3 for i, k in enumerate(sorted(summands, reverse=True))}


@pytest.fixture(scope="module")
def paper_network():
    torch.manual_seed(0)
    return SummedDDFNet()


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 18_909_743),
        ({"summands": (0,)}, 18_831_971),
        ({"summands": LOWER}, 18_796_364),
        ({"additive": False}, 18_909_743),
        ({"skip_in_shortcut_only": True}, 18_909_743),
    ],
)
def test_the_parameter_count_is_that_of_the_paper_in_total_and_layer_by_layer(options, total):
    with torch.device("meta"):
        net = SummedDDFNet(**options)
    found = {}
    for name, p in net.named_parameters():
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0) + p.numel()
    assert found == layer_counts(32, options.get("summands", ALL))
    assert sum(found.values()) == total


def test_a_new_network_predicts_no_displacement():
    net = SummedDDFNet(initial_channels=2)
    for mode in (True, False):
        assert not net.train(mode)(image_pair(17, 20, 31, batch=2)).any()


def test_all_weights_but_the_heads_are_xavier_and_the_heads_are_zero(paper_network):
    for name, p in paper_network.named_parameters():
        if name.startswith("summands"):
            assert not p.any(), name
        elif p.ndim == 5:
            bound = (6 / ((p.shape[0] + p.shape[1]) * p[0, 0].numel())) ** 0.5
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name
            assert p.mean().abs() < 0.02 * bound, name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_every_convolution_but_the_heads_is_without_bias_and_batch_norm_has_the_eps_of_label_reg(paper_network):
    norms = [m for m in paper_network.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert len(norms) == 4 * 3 + 1 + 4 * 3
    assert {m.eps for m in norms} == {1e-3}
    assert all(m.affine and m.track_running_stats for m in norms)
    convolutions = (torch.nn.Conv3d, torch.nn.ConvTranspose3d)
    biased = [name for name, m in paper_network.named_modules() if isinstance(m, convolutions) and m.bias is not None]
    assert biased == [f"summands.{i}.conv" for i in range(5)]


@pytest.mark.parametrize("summands", [ALL, (0,), LOWER, (2,), (4,), (3, 0)])
def test_the_ddf_is_the_sum_of_its_separately_computed_summands_and_not_their_mean(summands):
    net, x = trained(summands=summands), image_pair(32, 16, 48)
    fields = figure_4(net.state_dict(), x, summands)
    with torch.no_grad():
        for field, expected in zip(net.displacement_summands(x), fields, strict=True):
            torch.testing.assert_close(field, expected, **CLOSE)
        ddf = net(x)
    total = sum(fields)
    assert total.abs().max() > 0.5
    torch.testing.assert_close(ddf, total, **CLOSE)
    if len(summands) > 1:
        assert (ddf - total / len(summands)).abs().max() > 0.1


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("skip_in_shortcut_only", [True, False])
def test_the_network_is_figure_4_in_every_variant(additive, skip_in_shortcut_only):
    options = {"additive": additive, "skip_in_shortcut_only": skip_in_shortcut_only}
    net, x = trained(**options), image_pair(32, 32, 16, batch=2)
    with torch.no_grad():
        ddf = net(x)
    torch.testing.assert_close(ddf, sum(figure_4(net.state_dict(), x, **options)), **CLOSE)
    for name, value in options.items():
        other = sum(figure_4(net.state_dict(), x, **options | {name: not value}))
        assert (ddf - other).abs().max() > 0.05, name


def test_the_skip_is_taken_before_the_residual_unit():
    net, x = trained(), image_pair(32, 32, 16)
    with torch.no_grad():
        ddf = net(x)
    before, after = (sum(figure_4(net.state_dict(), x, skip_after_unit=late)) for late in (False, True))
    torch.testing.assert_close(ddf, before, **CLOSE)
    assert (ddf - after).abs().max() > 0.05


def test_additive_upsampling_resizes_then_adds_the_two_contiguous_halves():
    x = torch.randn(2, 6, 3, 5, 4, dtype=torch.float64)
    resized = F.interpolate(x, size=(6, 10, 8), mode="trilinear", align_corners=False)
    torch.testing.assert_close(additive_upsampling(x), resized[:, :3] + resized[:, 3:], rtol=1e-12, atol=1e-12)


def test_additive_upsampling_of_ones_is_two_and_interleaved_halves_differ():
    assert (additive_upsampling(torch.ones(1, 4, 2, 2, 2)) == 2).all()
    x = torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1, 1, 1).expand(1, 4, 2, 2, 2)
    assert additive_upsampling(x)[0, :, 0, 0, 0].tolist() == [101, 1010]


@pytest.mark.parametrize("size", [(21, 31, 17), (16, 33, 47)])
def test_odd_sizes_come_back_at_their_size_and_equal_padding_by_hand(size):
    net, x = trained().double(), image_pair(*size).double()
    padded = [-(-n // 16) * 16 for n in size]
    low = [(p - n) // 2 for p, n in zip(padded, size, strict=True)]
    inside = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
    by_hand = torch.zeros(1, 2, *padded, dtype=torch.float64)
    by_hand[(slice(None), slice(None), *inside)] = x
    with torch.no_grad():
        ddf, expected = net(x), net(by_hand)[(slice(None), slice(None), *inside)]
    assert ddf.shape == (1, 3, *size)
    torch.testing.assert_close(ddf, expected, **EXACT)


def test_each_pair_of_a_batch_is_registered_alone():
    net, x = trained(), image_pair(16, 16, 32, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"summands": LOWER}, {"additive": False, "skip_in_shortcut_only": True}])
def test_torchscript_gives_the_same_field(options, tmp_path):
    net, x = trained(**options).double(), image_pair(21, 31, 17).double()
    torch.jit.script(net).save(str(tmp_path / "net.ts"))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "net.ts"))(x), net(x), **EXACT)


@pytest.mark.parametrize("summands", [(), (0, 0), (5,), (-1, 0), (0, 1, 2, 3, 4, 5)])
def test_summands_that_are_no_distinct_levels_are_refused(summands):
    with pytest.raises(ValueError, match="distinct levels"):
        SummedDDFNet(initial_channels=2, summands=summands)


def pulled(volume, ddf):
    """Channels of a volume (C, X, Y, Z) at p + ddf(p), border values beyond, interpolated by SciPy."""
    points = np.indices(ddf.shape[1:]) + ddf.double().numpy()
    channels = [map_coordinates(c, points, order=1, mode="nearest") for c in volume.double().numpy()]
    return torch.from_numpy(np.stack(channels)).float()


def one_after_the_other(fields):
    """The displacement of several warps (3, X, Y, Z), the first of which moves the image first."""
    total = fields[0]
    for field in fields[1:]:
        total = field + pulled(total, field)
    return total


def test_composed_summands_are_warps_one_after_the_other_coarse_first():
    net, x = trained(composed=True), image_pair(21, 31, 17, batch=2)
    with torch.no_grad():
        for summand in net.summands:
            summand.conv.weight.mul_(0.1)
        fields, ddf = net.displacement_summands(x), net(x)
    for b in range(2):
        single = [field[b] for field in fields]
        torch.testing.assert_close(ddf[b], one_after_the_other(single), rtol=1e-4, atol=1e-3)
        for other in (sum(single), one_after_the_other(single[::-1])):
            assert (ddf[b] - other).abs().max() > 0.1


@pytest.mark.parametrize("level", [0, 2, 4])
def test_one_summand_composed_is_the_summand(level):
    x = image_pair(17, 20, 31)
    with torch.no_grad():
        fields = [trained(summands=(level,), composed=composed)(x) for composed in (True, False)]
    assert torch.equal(*fields)


def test_constant_summands_composed_are_their_sum():
    net, x = trained(composed=True), image_pair(17, 20, 31)
    with torch.no_grad():
        for summand in net.summands:
            summand.conv.weight.zero_()
        ddf, total = net(x), sum(summand.conv.bias for summand in net.summands)
    torch.testing.assert_close(ddf, total.view(1, 3, 1, 1, 1).expand_as(ddf), rtol=1e-5, atol=1e-5)


def test_composition_has_the_weights_of_the_sum_and_its_gradient_reaches_them_all():
    net = trained(composed=True)
    net.load_state_dict(trained().state_dict())
    net(image_pair(32, 16, 16)).square().mean().backward()
    assert all(p.grad.any() for p in net.parameters())


def global_net(seed=0, **options):
    """A small Global-Net in eval mode with random features, whose affine map depends on them."""
    torch.manual_seed(seed)
    net = GlobalNet(initial_channels=2, **options).eval()
    with torch.no_grad():
        net.connected.weight.normal_(0, 0.002)
        net.connected.bias.add_(0.05 * torch.randn(12))
    return net


def voxel_field(affine, size):
    """The DDF (3, X, Y, Z) in voxels of a map (3, 4) of [-1, 1]³, by way of its 4×4 matrix on voxel coordinates."""
    to_unit = np.diag([*(2 / np.array(size)), 1])
    to_unit[:3, 3] = 1 / np.array(size) - 1
    matrix = np.linalg.inv(to_unit) @ np.r_[affine, [[0, 0, 0, 1]]] @ to_unit
    voxels = np.indices(size)
    moved = np.einsum("ij,jxyz->ixyz", matrix[:3, :3], voxels) + matrix[:3, 3].reshape(3, 1, 1, 1)
    return torch.from_numpy(moved - voxels).float()


@pytest.mark.parametrize("size", [(17, 20, 31), (16, 16, 16), (5, 40, 33)])
def test_a_new_global_net_predicts_exactly_no_displacement_at_any_size(size):
    net = GlobalNet(initial_channels=2)
    for mode in (True, False):
        ddf = net.train(mode)(image_pair(*size, batch=2))
        assert ddf.shape == (2, 3, *size) and not ddf.any()


def test_the_bias_of_global_net_is_its_affine_map_in_the_unit_cube():
    net, size = GlobalNet(initial_channels=2), (9, 21, 34)
    affine = np.eye(3, 4) + np.random.default_rng(0).normal(size=(3, 4), scale=0.2)
    with torch.no_grad():
        net.connected.bias.copy_(torch.from_numpy(affine).flatten())
        ddf = net(image_pair(*size, batch=2))
    expected = voxel_field(affine, size)
    assert expected.abs().amax((1, 2, 3)).min() > 0.5
    torch.testing.assert_close(ddf, expected.expand(2, -1, -1, -1, -1), rtol=1e-5, atol=1e-5)


def test_global_net_connects_every_deepest_feature_where_the_grid_is_the_papers():
    net, x = global_net(deep_size=(2, 1, 3)), image_pair(32, 16, 48, batch=2)
    with torch.no_grad():
        deep, _ = net.encode(x)
        assert deep.shape == (2, 32, 2, 1, 3)
        affine = (deep.flatten(1) @ net.connected.weight.T + net.connected.bias).view(2, 3, 4)
        ddf = net(x)
    for b in range(2):
        torch.testing.assert_close(ddf[b], voxel_field(affine[b].double().numpy(), (32, 16, 48)), **CLOSE)
    assert (ddf[0] - ddf[1]).abs().max() > 0.01


def test_global_net_registers_each_pair_of_a_batch_alone_at_odd_sizes():
    net, x = global_net(), image_pair(21, 31, 17, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), **CLOSE)


def test_global_net_has_the_encoder_of_the_summed_network_and_twelve_outputs():
    with torch.device("meta"):
        net, summed = GlobalNet(), SummedDDFNet(initial_channels=8)
    shapes = {name: p.shape for name, p in net.state_dict().items()}
    encoder = {n: p.shape for n, p in summed.state_dict().items() if n.startswith(("down", "deep"))}
    inputs = 8 * 2**4 * 6 * 8 * 6  # the deepest map of 96 × 128 × 96 voxels
    assert shapes == encoder | {"connected.weight": (12, inputs), "connected.bias": (12,)}
    counted = sum(n for layer, n in layer_counts(8).items() if layer.startswith(("down", "deep")))
    assert sum(p.numel() for p in net.parameters()) == counted + 12 * (inputs + 1)


def test_gradients_reach_the_affine_map_first_and_every_parameter_of_global_net_after_one_step():
    torch.manual_seed(0)
    net, x = GlobalNet(initial_channels=4), image_pair(32, 32, 32, batch=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        (net(x) - torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1, 1)).square().mean().backward()
        reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        names = {name for name, _ in net.named_parameters()}
        assert reached == (names if step else {name for name in names if name.startswith("connected")})
        optimizer.step()


def test_the_affine_map_is_computed_in_float32_when_global_net_runs_in_half_precision():
    net, x = global_net(), image_pair(16, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    with torch.no_grad():
        full = net(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)


def test_torchscript_gives_the_field_of_global_net(tmp_path):
    net, x = global_net().double(), image_pair(21, 31, 17).double()
    torch.jit.script(net).save(str(tmp_path / "net.ts"))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "net.ts"))(x), net(x), **EXACT)


def composite_net(composed=False, **options):
    local = trained(summands=(0,), **options)
    with torch.no_grad():
        local.summands[0].conv.weight.mul_(0.1)
    return CompositeNet(global_net(**options), local, composed).eval()


def test_a_new_composite_net_predicts_no_displacement():
    for composed in (True, False):
        net = CompositeNet(GlobalNet(2), SummedDDFNet(2, summands=(0,)), composed)
        assert not net(image_pair(17, 20, 31, batch=2)).any()


def test_composite_net_adds_the_field_of_global_net_and_that_of_the_warped_moving_and_the_fixed_image():
    net, x = composite_net(), image_pair(21, 31, 17, batch=2)
    with torch.no_grad():
        whole, ddf = net.global_net(x), net(x)
        seen = torch.stack([torch.cat([pulled(x[b, :1], whole[b]), x[b, 1:]]) for b in range(2)])
        local, of_the_unmoved = net.local_net(seen), net.local_net(x)
    assert whole.abs().max() > 0.5 and (local - of_the_unmoved).abs().max() > 0.1
    torch.testing.assert_close(ddf, whole + local, rtol=1e-4, atol=1e-3)


def test_composed_composite_net_is_the_global_warp_then_the_local_one():
    net, x = composite_net(composed=True), image_pair(21, 31, 17, batch=2)
    with torch.no_grad():
        ddf, (whole, local) = net(x), net.displacement_parts(x)
    for b in range(2):
        torch.testing.assert_close(ddf[b], one_after_the_other([whole[b], local[b]]), rtol=1e-4, atol=1e-4)
    assert (ddf - whole - local).abs().max() > 0.05


def test_composite_net_warps_the_moving_gland_along_with_its_image():
    net, x = CompositeNet(global_net(in_channels=4), torch.nn.Identity()), torch.randn(1, 4, 16, 20, 17)
    with torch.no_grad():
        whole, seen = net.displacement_parts(x)
    torch.testing.assert_close(seen[0, [0, 2]], pulled(x[0, [0, 2]], whole[0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[0, [1, 3]], x[0, [1, 3]])
    assert (seen - x)[0, [0, 2]].abs().max() > 0.1


def test_the_local_gradient_reaches_global_net_through_the_warped_image():
    net = composite_net()
    _, local = net.displacement_parts(image_pair(16, 32, 16))
    local.square().mean().backward()
    assert all(p.grad.any() for p in net.parameters())


def test_the_order_in_which_summands_are_named_does_not_matter():
    x = image_pair(16, 16, 16)
    with torch.no_grad():
        assert torch.equal(trained(summands=(4, 0, 2))(x), trained(summands=(0, 2, 4))(x))


def test_the_skip_of_label_reg_changes_the_field_and_no_parameter():
    plain, other, x = trained(), trained(skip_in_shortcut_only=True), image_pair(16, 32, 16)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (plain, other)]
    assert shapes[0] == shapes[1]
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert (plain(x) - other(x)).abs().max() > 0.05


def test_gradients_reach_the_heads_first_and_every_parameter_after_one_step():
    torch.manual_seed(0)
    net, x = SummedDDFNet(initial_channels=4), image_pair(32, 32, 32, batch=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    target = torch.randn(2, 3, 32, 32, 32)
    for step in range(2):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        names = {name for name, _ in net.named_parameters()}
        assert reached == (names if step else {name for name in names if name.startswith("summands")})
        optimizer.step()


def test_the_summands_are_added_in_float32_when_the_network_runs_in_half_precision():
    net, x = trained(), image_pair(16, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fields = net.displacement_summands(x)
        ddf = net(x)
    assert {f.dtype for f in fields} == {ddf.dtype} == {torch.float32}
    torch.testing.assert_close(ddf, sum(fields))


def test_the_folded_network_is_the_plain_one_in_value_and_gradient():
    net, plain = trained(), trained()
    x = image_pair(16, 32, 16).requires_grad_()
    for conv_bn in [m for m in plain.modules() if isinstance(m, ConvBN)]:
        conv_bn.train()  # runs the convolution, then the normalisation…
        conv_bn.norm.eval()  # … by its running statistics
    fields = [n(x) for n in (net, plain)]
    torch.testing.assert_close(*fields, **CLOSE)
    gradients = [
        torch.autograd.grad(f.square().mean(), [x, *n.parameters()]) for f, n in zip(fields, (net, plain), strict=True)
    ]
    for folded, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_checkpointing_changes_neither_field_nor_gradients_nor_running_statistics():
    net, plain = trained(checkpointing=True).train(), trained().train()
    x = image_pair(17, 20, 31, batch=2)
    for _ in range(2):
        fields = [n(x) for n in (net, plain)]
        assert torch.equal(*fields)
        for field in fields:
            field.square().mean().backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * q.grad.abs().max().item())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in net.state_dict().items())


def test_the_memory_layout_of_the_input_does_not_matter():
    net, x = trained(), image_pair(17, 20, 31)
    with torch.no_grad():
        turned = net(x.transpose(2, 4).contiguous().transpose(2, 4))
        last = net(x.contiguous(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(turned, net(x), **CLOSE)
        torch.testing.assert_close(last, net(x), **CLOSE)


@pytest.mark.parametrize("export", [lambda net: net, torch.jit.script])
def test_at_inference_no_normalisation_is_left(export):
    net, x = export(trained()), image_pair(17, 20, 31)
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(x)
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution" in names and not [name for name in names if "batch_norm" in name]


def test_the_weights_of_a_wide_network_are_channels_last_also_when_loaded_and_exported(tmp_path):
    net = SummedDDFNet(initial_channels=16).eval()
    net.load_state_dict({k: v.contiguous() for k, v in net.state_dict().items()})
    torch.jit.script(net).save(str(tmp_path / "net.ts"))
    for loaded in (net, torch.jit.load(str(tmp_path / "net.ts"))):
        weights = [p for p in loaded.parameters() if p.ndim == 5]
        assert all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights)


def test_the_mean_field_is_one_field_for_every_image_and_can_take_any_linear_one():
    net = MeanField(knots=3, step=10.0)
    images = torch.rand(2, 4, 9, 9, 9)
    assert torch.equal(net(images), torch.zeros(2, 3, 9, 9, 9))
    along = torch.linspace(-1, 1, 3)
    with torch.no_grad():
        net.knots[0, 1] = along[:, None, None] / 10
    field = net(images)
    assert torch.equal(field[0], field[1])
    wanted = torch.linspace(-1, 1, 9)[:, None, None].expand(9, 9, 9)
    assert torch.allclose(field[0, 1], wanted, atol=1e-6) and not field[0, [0, 2]].any()
