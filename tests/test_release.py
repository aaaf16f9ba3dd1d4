"""The archive goes a user's whole way: built, served, downloaded by MONAI, run from another folder."""

import hashlib
import json
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, flags, run

from scripts.checks import InputError
from scripts.release import FILES, FOLDERS, LARGEST, NAME, SUMS, build, contents


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
    wanted = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/data_license.txt")
    assert {*wanted, "docs/README.md", "metadata.json"} <= set(sums)
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
            *flags({"dataset_dir": cohort, "output_dir": out}),
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        fields.append([np.asarray(nib.load(path).dataobj) for path in sorted(out.glob("*/ddf.nii.gz"))])
    assert fields[0] and all(np.array_equal(a, b) for a, b in zip(*fields, strict=True))
    code = (
        f"from monai.bundle import load; print(type(load({NAME!r}, bundle_dir={str(tmp_path / 'bundles')!r})).__name__)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert loaded.stdout.split()[-1] == "SummedDDFNet"
