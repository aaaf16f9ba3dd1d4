"""Hostile weights, configs, archives and names: each does nothing. What it would do is shown where it can be."""

import contextlib
import hashlib
import json
import pickle
import shutil
import stat
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from ignite.engine import Engine
from monai.apps import extractall
from monai.bundle import ConfigParser, ConfigWorkflow, download

from scripts.bundle.config_check import judge, table
from scripts.bundle.release import contents
from scripts.bundle.workflow import register, run_config
from scripts.data.checks import SUMS, InputError, check_case_name, refusal, sha256
from scripts.data.weights import check_weights, load_weights
from scripts.registration.segmentation import SegmentGlandsd
from scripts.training.checkpoints import Checkpoints

AFFINE_ONLY = {"initial_transform": "centre", "spacing": 4.0, "refine_steps": 0, "use_network": False, "weights": None}
AFFINE_ONLY |= {"glands": False}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def write_pickle(path, canary, kind):
    if kind == "plain":
        path.write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save({"weight": torch.zeros(1, 1), "more": Payload(canary)}, path)
    return path


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_the_payload_works_where_pickles_are_trusted(kind, tmp_path):
    with contextlib.suppress(RuntimeError):  # "invalid magic number", afterwards
        torch.load(write_pickle(tmp_path / "evil.pt", tmp_path / "canary", kind), weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize("role", ["weights", "initial_weights", "segmentation_path", "checkpoint"])
@pytest.mark.filterwarnings("ignore:.*damaged", "ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused_in_each_role(role, kind, canary, tmp_path):
    evil = str(write_pickle(tmp_path / "checkpoint_epoch=1.pt", canary, kind))
    network = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="not a readable weights file|none of 1 checkpoints"):
        if role == "weights":
            check_weights(evil, network)
        elif role == "initial_weights":
            load_weights(evil, network)
        elif role == "segmentation_path":
            SegmentGlandsd(network, evil)({})
        else:
            whole = Path(evil).read_bytes()
            Path(evil).write_bytes(whole + hashlib.sha256(whole).digest())  # as if a training had written it
            engine = Engine(lambda engine, batch: None)
            Checkpoints(str(tmp_path), {"network": network}, resume=True).attach(engine)
            engine.run([0], max_epochs=1)


def test_register_refuses_such_weights_and_writes_nothing(canary, cohort, tmp_path):
    moving, fixed = (next((cohort / "test" / f"{side}_images").iterdir()) for side in ("moving", "fixed"))
    evil = write_pickle(tmp_path / "evil.pt", canary, "torch")
    settings = {"moving": moving, "fixed": fixed, "output_dir": tmp_path / "out", "ckpt_path": evil}
    with pytest.raises(Exception) as refused:
        register(**settings)
    assert str(refusal(refused.value)) == f"{evil}: not a readable weights file of plain tensors"
    assert not (tmp_path / "out").exists()


def test_a_wrong_hash_is_refused_before_the_file_is_opened_and_an_unknown_one_loads(canary, tmp_path):
    network = torch.nn.Linear(2, 1)
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    assert check_weights(str(path), network) == str(path)
    expected = sha256(path)
    (tmp_path / SUMS).write_text(f"{expected}  model.pt\n")
    assert check_weights(str(path), network) == str(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), pickle.dumps(Payload(canary))):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as refused:
            check_weights(str(path), network)
        assert all(text in str(refused.value) for text in (str(path), expected, sha256(path)))
        assert "\n" not in str(refused.value)


EXPRESSIONS = [
    "$__import__('os').system('id')",
    "$open('CANARY', 'w')",
    "$eval('1')",
    "$torch.os.system('id')",
    "$torch.load('x.pt', weights_only=False)",
    "$torch.hub.load('someone/repo', 'entry')",
    "$monai.bundle.run(config_file='other.json')",
    "$monai.transforms.LoadImaged([], 'subprocess.Popen', args='id')",
    "$().__class__.__base__.__subclasses__()",
    "$@imports::1.modules['os'].system('id')",
    "$(lambda: torch.os)().system('id')",
    "$[f(1) for f in [@x]]",
    "$@x()",
    "$(f := @x)",
    "$f'{@x.secret}'",
    "$'{0.__class__}'.format(@x)",
    "$getattr(torch, 'load')",
    "$import os",
    "$import evil",
    "$from os import system as max",
    "$import torch; 1 +",
    "$1 +",
]
TARGETS = [
    "os.system",
    "exec",
    "__import__",
    "subprocess.Popen",
    "torch.load",
    "torch.hub.load",
    "torch.os.system",
    "monai.bundle.run",
    "run",
    "monai.networks.nets.unet.warnings.sys.exit",
    "PerceptualLoss",
    "monai.data.load_net_with_metadata",
    "scripts.data.files.os.system",
    "scripts.registration.outputs.shutil.rmtree",
    "scripts.registration.outputs.shutil",
    "scripts.study.crossval.cross_validate",
    "scripts.bundle.workflow.run_config",
    "evil",
    "$@network.forward",
    "@x",
    7,
]
ENTRIES = [
    {"_target_": "LoadImaged", "keys": [], "reader": "subprocess.Popen", "args": "id"},
    {"_target_": "LoadImaged", "keys": [], "reader": ["ITKReader", "open"]},
    {"_target_": "SlidingWindowSplitter", "merger_cls": "os.system"},
    {"_target_": "NumpyReader", "allow_pickle": True},
    {"_target_": "PersistentDataset", "weights_only": False},
    {"_target_": "PersistentDataset", "weights_only": "@x"},
    {"_target_": "Compose", "_mode_": "debug"},
    {"_target_": "LoadImage", "_mode_": "callable", "args": "id", "shell": True},  # its first argument is called
    "%other.json::network_def",
]


@pytest.mark.parametrize(
    "entry", [*EXPRESSIONS, *({"_target_": t} for t in TARGETS), *ENTRIES], ids=lambda entry: ascii(entry)[:60]
)
def test_what_a_config_should_not_execute_is_a_finding_and_is_not_executed(entry, canary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `import evil` would find this
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"x": {"deep": [entry]}}).replace("CANARY", str(canary)))
    assert [e.where for e in judge(path) if e.finding][0].startswith("x::deep::0")


def test_overlays_reach_into_configs_by_paths_and_may_move_the_code(tmp_path):
    path = tmp_path / "overlay.yaml"
    lines = ["load#_target_: os.system", "+load#reader: os.system", "bundle_root: /tmp/evil"]
    # what is called there is handed on uncalled, so that its first argument, the reader, comes from elsewhere
    lines += ["evaluator#prepare_batch#_target_: LoadImage", "+evaluator#prepare_batch: {_target_: LoadImage}"]
    path.write_text("\n".join(lines))
    assert len([entry for entry in judge(path) if entry.finding]) == len(lines)


def test_a_config_that_cannot_be_read_or_holds_billions_is_a_finding(tmp_path):
    levels = ["a0: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
    for name, text in (
        ("bomb.yaml", "\n".join(levels)),
        ("deep.json", "[" * 100_000),
        ("python.yaml", "!!python/object/apply:os.system [id]"),
        ("cycle.yaml", "a: &a [*a]"),
    ):
        (tmp_path / name).write_text(text)
        (entry,) = [entry for entry in judge(tmp_path / name) if entry.finding]
        assert "cannot be read" in entry.finding or "entries" in entry.finding


def test_check_config_lists_what_a_config_would_do_with_exit_code_1(canary, tmp_path):
    text = f"$__import__('pathlib').Path({str(canary)!r}).touch()"
    (tmp_path / "evil.json").write_text(json.dumps({"run": [text], "\x1b[2J": "$1"}))
    result = run("scripts", "check-config", str(tmp_path / "evil.json"))
    assert result.returncode == 1 and not canary.exists()
    assert ascii(text)[1:-1] in result.stdout and "dangerous: __import__" in result.stdout
    assert "2 entries that would be executed, 1 findings" in result.stdout and "\x1b" not in result.stdout
    ConfigParser(config={"run": text}).get_parsed_content("run")  # what MONAI would have done
    canary.unlink()


def test_this_bundle_as_released_passes_and_what_is_added_to_it_is_named(tmp_path):
    for name, data in contents(ROOT).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    own = judge(tmp_path)
    assert [entry for entry in own if entry.finding] == []
    listed = {entry.what for entry in own}
    assert {"$@evaluator.run()", "scripts.network.networks.SummedDDFNet", "(sys.stdout,)", "$import sys"} <= listed
    assert "ok puts the bundle's folder on sys.path" in table(own)
    (tmp_path / "scripts" / "network" / "networks.py").write_text("class SummedDDFNet: ...")
    (tmp_path / "scripts" / "extra.py").touch()
    (tmp_path / "models" / "model.pt").write_bytes(b"other weights")
    (tmp_path / "models" / "cache.pkl").touch()
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / ".hidden").mkdir()
    found = {entry.file for entry in judge(tmp_path) if entry.finding}
    added = {
        "scripts/network/networks.py",
        "scripts/extra.py",
        "models/model.pt",
        "models/cache.pkl",
        "link",
        ".hidden",
    }
    assert found - added == {entry.file for entry in own if entry.what.startswith("scripts.network.networks.")}
    assert added <= found


@pytest.mark.parametrize(
    ("section", "option", "monai_refuses"),
    [
        ("handler_h", "args=(open('CANARY', 'w'),)", True),
        ("handler_h", "class=open", True),
        ("handler_h", "kwargs={'stream': open('CANARY', 'w')}", True),
        ("formatter_f", "class=evil.Formatter", True),
        ("formatter_f", "defaults=open('CANARY', 'w')", False),  # evaluated from Python 3.12 on
        ("DEFAULT", "args=(open('CANARY', 'w'),)", True),
        ("handler_h", "class=FileHandler\nargs=('CANARY', 'w')", False),
    ],
)
def test_a_hostile_logging_conf_is_a_finding(section, option, monai_refuses, canary, tmp_path):
    text = "[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=f\n[logger_root]\nhandlers=h\n"
    path = tmp_path / "logging.conf"
    kept = "" if "class" in option or "args" in option else "class=StreamHandler\n"
    sections = {"handler_h": kept, "formatter_f": "format=%(message)s\n", "DEFAULT": ""}
    sections[section] += option.replace("CANARY", str(canary)) + "\n"
    path.write_text(text + "".join(f"[{name}]\n{lines}" for name, lines in sections.items()))
    assert any(entry.finding for entry in judge(path))
    if monai_refuses:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="refusing to apply logging config"):
            ConfigWorkflow(str(tmp_path / "config.json"))


def entry_of(name, mode):
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, mode << 16
    return entry


def hostile_archive(kind, folder, outside):
    """An archive that would write to `outside`."""
    if kind.startswith("tar"):
        path = folder / "bundle.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            link = tarfile.TarInfo("bundle/link")
            link.type, link.linkname = (tarfile.SYMTYPE if "symbolic" in kind else tarfile.LNKTYPE), str(outside)
            archive.addfile(link)
        return path
    path = folder / "bundle.zip"
    with zipfile.ZipFile(path, "w") as archive:
        if kind == "zip, link":
            archive.writestr(entry_of("bundle/link", stat.S_IFLNK | 0o777), str(outside.parent))
            archive.writestr(f"bundle/link/{outside.name}", "evil")
        else:
            archive.writestr({"zip, ..": f"bundle/../../{outside.name}", "zip, absolute": str(outside)}[kind], "evil")
    return path


@pytest.mark.parametrize("kind", ["zip, ..", "zip, absolute", "zip, link", "tar, symbolic link", "tar, hard link"])
def test_monai_extracts_nothing_outside_the_folder(kind, canary, tmp_path):
    archive = hostile_archive(kind, tmp_path, canary)
    with pytest.raises((ValueError, OSError)):
        extractall(archive, tmp_path / "bundles")
    assert not [path for path in (tmp_path / "bundles").rglob("*") if path.is_symlink()]


def test_monai_downloads_no_archive_that_leaves_its_folder(canary, tmp_path):
    archive = hostile_archive("zip, ..", tmp_path, canary)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    with pytest.raises(ValueError, match="Unsafe path detected in archive"):
        download("bundle", url=url, bundle_dir=tmp_path / "a" / "bundles", progress=False)
    server.shutdown()


NAMES = ["$open('canary', 'w')", "@canary", "%canary"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_and_folders_are_never_evaluated(name, cohort, tmp_path, canary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side in ("moving", "fixed"):
        for folder in (tmp_path, tmp_path / name / "data" / f"{side}_images"):
            folder.mkdir(parents=True, exist_ok=True)
            image = next((cohort / "test" / f"{side}_images").iterdir())
            shutil.copy(image, folder / f"{name}.{'mov' if folder == tmp_path and side == 'moving' else ''}.nii.gz")
    register(f"{name}.mov.nii.gz", f"{name}..nii.gz", f"{name}/out", **AFFINE_ONLY)
    record = json.loads((tmp_path / name / "out" / "qc.json").read_text("utf-8"))
    assert record["case"] == f"{name}."
    settings = {"dataset_dir": str(tmp_path / name / "data"), "output_dir": str(tmp_path / "all")} | AFFINE_ONLY
    run_config("inference.json", **settings)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {f"{name}.", "index.html"}


@pytest.mark.parametrize("case", ["../../escaped", "/tmp/escaped", "..", ".", "", "a/b", "a\\b", ".hidden"])
def test_a_case_name_that_is_a_path_is_refused(case):
    with pytest.raises(InputError, match="must be a name, not a path"):
        check_case_name(case)


def test_a_case_of_a_datalist_cannot_leave_the_output_folder(cohort, tmp_path):
    images = {
        f"{side}_image": str(next((cohort / "test" / f"{side}_images").iterdir())) for side in ("moving", "fixed")
    }
    (tmp_path / "data.json").write_text(json.dumps({"test": [images | {"case": "../escaped"}]}))
    settings = {"dataset_dir": str(tmp_path / "data.json"), "output_dir": str(tmp_path / "out")} | AFFINE_ONLY
    with pytest.raises(Exception) as refused:
        run_config("inference.json", **settings)
    assert str(refusal(refused.value)).startswith("case '../escaped': ")
    assert not (tmp_path / "escaped").exists()
