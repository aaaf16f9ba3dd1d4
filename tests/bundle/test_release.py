"""The archive goes a user's whole way: built, served, downloaded by MONAI, run from another folder."""

import hashlib
import json
import re
import shutil
import stat
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, flags, run

from scripts.bundle.release import FILES, FOLDERS, LARGEST, NAME, SUMS, build, contents
from scripts.data.checks import InputError
from scripts.network.networks import SummedDDFNet


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist"))


def test_two_builds_are_equal_byte_for_byte(archive, tmp_path):
    again = build(tmp_path / "again")
    assert again.read_bytes() == archive.read_bytes()
    digest, name = archive.with_suffix(".zip.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(archive.read_bytes()).hexdigest(), archive.name)


def test_it_holds_regular_files_below_one_folder_each_with_its_hash(archive):
    with zipfile.ZipFile(archive) as found:
        entries = found.infolist()
        assert all(stat.S_ISREG(entry.external_attr >> 16) for entry in entries)
        names = [entry.filename for entry in entries]
        assert names == sorted(names) and all(name.startswith(f"{NAME}/") for name in names)
        assert max(entry.file_size for entry in entries) < LARGEST
        lines = found.read(f"{NAME}/{SUMS}").decode().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        assert {f"{NAME}/{name}" for name in sums} == set(names) - {f"{NAME}/{SUMS}"}
        for name, digest in sums.items():
            assert hashlib.sha256(found.read(f"{NAME}/{name}")).hexdigest() == digest
    wanted = ("LICENSE", "NOTICE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
    assert {*wanted, "docs/README.md", "docs/data_license.txt", "metadata.json"} <= set(sums)
    assert not any("__pycache__" in name or name.endswith(".ts") for name in sums)


def test_a_release_with_a_missing_or_a_huge_file_is_refused(tmp_path):
    root = tmp_path / "bundle"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    for name in FILES[1:]:
        (root / name).touch()
    with pytest.raises(InputError, match="LICENSE: missing"):
        contents(root)
    (root / "LICENSE").touch()
    with (root / "models" / "model.pt").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(InputError, match="model.pt: 26214401 bytes"):
        contents(root)
    shutil.copy(ROOT / "configs" / "metadata.json", root / "configs")
    (root / "models" / "model.pt").write_bytes(b"other weights")
    shutil.copy(ROOT / "models" / SUMS, root / "models")
    with pytest.raises(InputError, match="model.pt: is not what SHA256SUMS beside it names"):
        build(tmp_path / "dist", root)
    (root / "models" / "model.pt").unlink()
    metadata = json.loads((root / "configs" / "metadata.json").read_text()) | {"version": "9.9.9"}
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="version 9.9.9 is not in its changelog"):
        build(tmp_path / "dist", root)


@pytest.fixture(scope="module")
def extracted(archive, tmp_path_factory):
    """The bundle as the archive holds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("models")
    with zipfile.ZipFile(archive) as found:
        found.extractall(folder)
    return folder / NAME


ZOO = """
import sys
from monai.bundle import ckpt_export, create_workflow, verify_metadata, verify_net_in_out

root, schema, pairs = sys.argv[1:]
meta, config, logs = (f"{root}/configs/{name}" for name in ("metadata.json", "inference.json", "logging.conf"))
verify_metadata(meta_file=meta, filepath=schema)
files = {"meta_file": meta, "config_file": config, "bundle_root": root}
verify_net_in_out("network_def", **files)
ckpt_export("network_def", filepath=f"{root}/models/model.ts", ckpt_file=f"{root}/models/model.pt", **files)
workflow = create_workflow(workflow_type="infer", logging_file=logs, dataset_dir=pairs, **files)
missing = workflow.check_properties()
assert not missing, missing
assert workflow.bundle_root == root and next(workflow.network_def.parameters()).ndim == 5
"""


def test_it_passes_the_checks_of_the_model_zoo(extracted, cohort, tmp_path):
    """What the zoo's CI runs on a bundle (its verify_bundle.py), in its order and in one process that starts elsewhere.

    The schema's file is there already, so MONAI does not download it: `metadata_schema.json` says what
    meta_schema_20240725.json says of the keys that are used here.
    """
    metadata = json.loads((extracted / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    assert f"## {metadata['version']}" in (extracted / "CHANGELOG.md").read_text()
    schema = Path(__file__).with_name("metadata_schema.json")
    (tmp_path / "zoo.py").write_text(ZOO)
    result = run("zoo", str(extracted), str(schema), str(cohort), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]

    scripted = torch.jit.load(extracted / "models" / "model.ts")
    weights = torch.load(extracted / "models" / "model.pt", weights_only=True)
    network = SummedDDFNet(8, in_channels=4).eval()
    network.load_state_dict(weights)
    for size in ((17, 32, 21), (32, 32, 32)):  # a trace would know the size it was made with
        image = torch.rand(1, 4, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(image), network(image), rtol=1e-4, atol=1e-4)


def test_the_model_card_has_the_sections_of_the_zoo_in_its_order_and_the_citation_its_version(extracted):
    card = (extracted / "docs" / "README.md").read_text()
    wanted = [
        "Model overview",
        "Data",
        "Training configuration",
        "Performance",
        "Commands example",
        "References",
        "License",
    ]
    assert [title for title in re.findall("^## (.+)$", card, re.M) if title in wanted] == wanted
    citation = yaml.safe_load((extracted / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == json.loads((extracted / "metadata.json").read_text())["version"]


@pytest.mark.parametrize("key", ["version", "network_data_format", "required_packages_version"])
def test_the_schema_refuses_metadata_without_a_key_it_requires(key):
    schema = json.loads(Path(__file__).with_name("metadata_schema.json").read_text())
    metadata = json.loads((ROOT / "metadata.json").read_text())
    jsonschema.validate(metadata, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({k: v for k, v in metadata.items() if k != key}, schema)


def test_downloaded_by_monai_it_registers_as_this_bundle_does(archive, cohort, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    settings = {"name": NAME, "url": url, "bundle_dir": tmp_path / "bundles", "progress": False}
    result = run("monai.bundle", "download", *flags(settings), cwd=tmp_path)
    server.shutdown()
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    downloaded = tmp_path / "bundles" / NAME
    fields = []
    for bundle in (ROOT, downloaded):
        out = tmp_path / f"out{len(fields)}"
        config = str(bundle / "configs" / "inference.json")
        result = run(
            "monai.bundle",
            "run",
            "--config_file",
            config,
            *flags({"dataset_dir": cohort, "output_dir": out, "refine_steps": 2}),
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        fields.append([np.asarray(nib.load(path).dataobj) for path in sorted(out.glob("*/ddf.nii.gz"))])
    assert fields[0] and all(np.array_equal(a, b) for a, b in zip(*fields, strict=True))
    code = f"""import sys, torch
from monai.bundle import load
network = load({NAME!r}, bundle_dir={str(tmp_path / "bundles")!r}, workflow_type="inference")
weights = torch.load({str(downloaded / "models" / "model.pt")!r}, weights_only=True)
assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
print(type(network).__name__, sys.modules["scripts"].__path__[0])
"""
    (tmp_path / "use.py").write_text(code)
    loaded = run("use", cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert loaded.stdout.split()[-2:] == ["SummedDDFNet", str(downloaded / "scripts")]
