"""A tiny cohort and a tiny training, shared by the tests that need real files and real weights.

Heavy imports live inside the functions: the process that only hands out tests to others starts at once.
"""

import gc
import locale
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
LOCALE = locale.setlocale(locale.LC_ALL)
TINY = {"initial_channels": 4, "spacing": 4.0, "initial_transform": "centre"}
QUICK = TINY | {"iterations": 2, "epoch_length": 2, "val_interval": 1, "batch_size": 2}

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core of its own, and so have the processes it starts
    os.environ["OMP_NUM_THREADS"] = "1"

# files whose tests load ITK, a quarter of a minute: one worker runs them all
ITK = "pairwise names slicer register formats transforms dicom checks other_tools invert sweep apply kept".split()
# the other long files, the longest first: one that began last would keep one worker busy while the rest are idle
LONG = "tutorial own_pairs bundle report readme weights release distributed hostile figures phantom".split()
LONG += "segmentation faults qc labels_gone demo networks cohort view".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate([*ITK, *LONG])}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` hands out files in the order above, those that load ITK as one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "itk" if Path(file).stem.removeprefix("test_") in ITK else file

    config.option.loadscopereorder = False  # by the number of their tests
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """A million objects of PyTorch and MONAI stay until the end; looking through them for garbage takes a third of a
    second each time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def threads():
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def flags(settings: dict) -> list[str]:
    """Settings as command-line flags."""
    return [part for k, v in settings.items() for part in (f"--{k}", str(v))]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`python -m …` in another process, from folder `cwd`; the bundle's own folder is on no path unless it is `cwd`."""
    return warm.run(*arguments, cwd=cwd)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a training: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("events.out.tfevents*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


@pytest.fixture(autouse=True)
def same_locale():
    """Reading or writing DICOM can leave a process in the C locale, and the tests after it with it."""
    yield
    locale.setlocale(locale.LC_ALL, LOCALE)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, for `browser.Page`."""
    from browser import SOFTWARE, started

    driver = started(*SOFTWARE)
    yield driver
    driver.quit()


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A good pair on disk: 3 labels, moving and fixed on one grid."""
    from synthetic import content, write

    from scripts.data.datalist import KEYS

    label = content()[1]
    images = {"moving_image": content()[0], "fixed_image": content(seed=1)[0]}
    return {key: write(tmp_path / f"{key}.nii.gz", images.get(key, label)) for key in KEYS}


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """Five phantoms at 4 mm, split into train, val and test."""
    from scripts.phantoms.phantom import write_cohort

    folder = tmp_path_factory.mktemp("phantoms") / "cohort"
    return write_cohort(
        folder,
        patients=5,
        seed=3,
        split=(0.6, 0.2, 0.2),
        fixed_shape=(22, 30, 22),
        fixed_spacing=3.0,
        moving_shape=(26, 26, 20),
        moving_spacing=(2.8, 2.8, 3.6),
    )


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory) -> Path:
    """The folder of a two-step training, run as MONAI's users type it, from another folder."""
    import torch

    folder = tmp_path_factory.mktemp("trained")
    settings = {"dataset_dir": cohort, "output_dir": folder, "ckpt_dir": folder} | QUICK
    config = str(ROOT / "configs" / "train.json")
    result = run("monai.bundle", "run", "--config_file", config, *flags(settings), cwd=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    # zero-initialised heads leave a tiny training close to the identity: make the field worth testing
    weights = torch.load(folder / "model.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if name.startswith("summands"):
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    torch.save(weights, folder / "moving_model.pt")
    return folder
