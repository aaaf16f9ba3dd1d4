"""What holds on a GPU: it computes what the CPU computes, a step does not wait, a run goes on, refusals are short."""

import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose

from scripts.data.checks import InputError
from scripts.network.losses import BendingEnergy, LabelDrivenLoss, LandmarkDrivenLoss, MultiscaleDiceLoss
from scripts.network.networks import SummedDDFNet
from scripts.network.segmentation import GlandLoss, GlandNetwork
from scripts.network.wrapped import SecondStageNet
from scripts.registration.transforms import PlanFixedGridd
from scripts.training.cohort import CohortLoader, SimulatedPairs
from scripts.training.engine import prepare_batch, prepare_gland_batch
from scripts.training.failures import too_large
from scripts.training.gland_cubes import GlandLoader
from scripts.training.pair_cubes import PairCubeLoader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = "cuda"
LOADERS = pytest.mark.parametrize("kind", [CohortLoader, GlandLoader, PairCubeLoader])


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class WithGlands(SimulatedPairs):
    """Phantoms whose labelled glands count as found."""

    def __getitem__(self, index):
        pair = super().__getitem__(index)
        return pair | {f"{side}_gland": pair[f"{side}_label"][:1] for side in ("moving", "fixed")}


def batches(kind, device, count=3, **settings):
    plan = PlanFixedGridd(3.0) if kind is CohortLoader else None
    simulated = WithGlands("realistic", 7) if kind is PairCubeLoader else SimulatedPairs("realistic", 7, transform=plan)
    return kind([], 2, count, device, simulated=simulated, share=1.0, pool=2, renewal=100, **settings)


def work(kind):
    """A network, its loss, and how a batch is prepared for them."""
    torch.manual_seed(0)
    if kind is GlandLoader:
        return GlandNetwork(), GlandLoss(), prepare_gland_batch
    if kind is CohortLoader:
        return SummedDDFNet(4), LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy()), prepare_batch
    loss = LandmarkDrivenLoss(MultiscaleDiceLoss([0, 2, 4, 8]), BendingEnergy(), 0.33, points=0.13)
    return SecondStageNet(8, images=False), loss, prepare_batch


def on(device, value):
    if isinstance(value, dict):
        return {key: on(device, one) if key != "spacing" else one for key, one in value.items()}
    return value.to(device)


def gradients(network, loss, image, targets):
    """The loss, the prediction, and the gradient of the loss by each weight."""
    predicted = network(image)
    value = loss(predicted, targets)
    value.backward()
    return value.detach(), predicted.detach(), [p.grad for p in network.parameters() if p.grad is not None]


@LOADERS
def test_a_gpu_computes_the_cpu_s_prediction_loss_and_gradients(kind):
    network, loss, prepare = work(kind)
    image, targets = prepare(next(iter(batches(kind, "cpu"))), "cpu")
    wanted = gradients(network, loss, image, targets)
    network = network.to(GPU)
    network.zero_grad()
    found = gradients(network, loss, image.to(GPU), on(GPU, targets))
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-3)
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=0, atol=1e-2)
    one, two = (torch.cat([g.flatten().cpu() for g in side[2]]) for side in (found, wanted))
    assert (one - two).norm() < 1e-2 * two.norm()


def test_a_gpu_computes_the_papers_ddf_and_objective():
    torch.manual_seed(0)
    network, image = SummedDDFNet(4), torch.rand(1, 2, 32, 40, 32)
    for summand in network.summands:
        torch.nn.init.normal_(summand.conv.weight, std=0.02)
    labels = {key: (torch.rand(1, 1, 32, 40, 32) > 0.5).float() for key in ("moving_label", "fixed_label")}
    targets = labels | {"spacing": torch.full((1, 3), 0.8, dtype=torch.float64)}
    objective = LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy())
    wanted = gradients(network, objective, image, targets)
    network = network.to(GPU)
    network.zero_grad()
    found = gradients(network, objective, image.to(GPU), on(GPU, targets))
    assert (found[1].cpu() - wanted[1]).abs().max() < 0.02  # voxels
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-3)


@LOADERS
def test_neither_a_batch_nor_its_forward_and_backward_pass_waits_for_the_gpu(kind):
    network, loss, prepare = work(kind)
    network, stream = network.to(GPU), iter(batches(kind, GPU, 4))

    def step():
        image, targets = prepare(next(stream), GPU)
        loss(network(image), targets).backward()

    for _ in range(3):  # the first times allocate, and choose how to convolve
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def simulated(item):
    return WithGlands("realistic", 7)[item["number"]] | item


@LOADERS
def test_a_batch_from_disk_is_that_from_memory_and_does_not_wait_for_the_gpu(kind, tmp_path):
    plan = [PlanFixedGridd(3.0)] if kind is CohortLoader else []
    pairs = Dataset([{"case": str(k), "number": k} for k in range(3)], Compose([simulated, *plan]))
    memory, disk = (iter(kind(pairs, 2, 4, GPU, folder=folder)) for folder in (None, tmp_path))
    for _ in range(3):  # the first times allocate
        one, other = next(memory), next(disk)
        assert one["case"] == other["case"] and other["image"].device.type == GPU
        torch.testing.assert_close(one["image"], other["image"], rtol=0, atol=1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(disk)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@LOADERS
def test_draws_on_a_gpu_go_on_where_they_stopped(kind):
    loader = batches(kind, GPU, 2)
    for _ in loader:
        pass
    state, wanted = loader.state_dict(), next(iter(loader))
    other = batches(kind, GPU, 2)
    other.load_state_dict(state)
    found = next(iter(other))
    assert found["case"] == wanted["case"]
    torch.testing.assert_close(found["image"], wanted["image"], rtol=0, atol=1e-5)
    assert found["image"].device.type == GPU


def test_phantoms_are_made_ahead_beside_a_gpu():
    loader = GlandLoader([], 2, 3, GPU, simulated=SimulatedPairs(seed=2), share=1.0, pool=2, renewal=1, num_workers=2)
    assert [len(batch["case"]) for batch in loader] == [2] * 3 and loader.pool.made == 5


def test_memory_that_is_too_small_says_what_fits_in_one_line():
    from monai.engines import SupervisedTrainer

    pairs = SimulatedPairs("realistic", 1, transform=PlanFixedGridd(1.0))
    loader = CohortLoader([], 16, 1, "cpu", simulated=pairs, share=1.0, pool=2)
    network = SummedDDFNet(32).to(GPU)
    objective = LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy())
    adam = torch.optim.Adam(network.parameters())
    trainer = SupervisedTrainer(GPU, 1, loader, network, adam, objective, prepare_batch=prepare_batch, decollate=False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4e9) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError) as error:
            trainer.run()
        said = too_large(trainer, error.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(said, InputError) and "\n" not in str(said) and "fits" in str(said)
