"""The bundle as one archive, as MONAI's model zoo wants it: regular files in one folder, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from scripts.data.checks import SUMS, InputError, known_hashes
from scripts.data.files import written_whole
from scripts.data.kept import refuse_overlap
from scripts.data.root import ROOT

NAME = "prostate_mr_trus_registration"
FOLDERS = ("configs", "docs", "models", "scripts")
FILES = ("LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "CITATION.cff", "metadata.json", "requirements.txt")
LARGEST = 25 * 2**20  # bytes of a file, the zoo's limit
DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip knows: when it was packed does not matter


def contents(root: Path) -> dict[str, bytes]:
    """Path below the bundle's folder -> its bytes, sorted; hidden files, caches and what other tools left stay out.

    Raises:
        InputError: a file is missing, or larger than the zoo takes.
    """
    found = [root / name for name in FILES]
    for folder in FOLDERS:
        found += [path for path in (root / folder).rglob("*") if path.is_file()]
    kept: dict[str, bytes] = {}
    for path in sorted(found):
        name = path.relative_to(root)
        # an exported model.ts, for one
        made_here = name.parts[0] == "models" and name.suffix != ".pt" and name.name != SUMS
        if made_here or any(part.startswith((".", "__pycache__")) for part in name.parts):
            continue
        if not path.is_file():
            raise InputError(f"{path}: missing, a release needs it")
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path}: {size} bytes, a file of a release has at most {LARGEST}")
        kept[name.as_posix()] = path.read_bytes()  # of a link, what it points to
    return kept


def build(output_dir: str | Path, root: Path = ROOT) -> Path:
    """Write OUTPUT_DIR/prostate_mr_trus_registration_vVERSION.zip, and its SHA-256 beside it.

    The archive's SHA256SUMS names every other file of it, for `sha256sum -c SHA256SUMS`.

    Returns:
        The archive.

    Raises:
        InputError: see `contents`; the version in metadata.json is not in its changelog; weights that are not those
            of models/SHA256SUMS.
    """
    files = contents(root)
    metadata = json.loads(files["configs/metadata.json"])
    version = metadata["version"]
    if version not in metadata["changelog"]:
        raise InputError(f"configs/metadata.json: version {version} is not in its changelog")
    known = known_hashes(root / "models")
    for name, data in files.items():
        if name.endswith(".pt") and known.get(Path(name).name) != hashlib.sha256(data).hexdigest():
            raise InputError(f"{root / name}: is not what {SUMS} beside it names; for new weights write that anew")
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    files[SUMS] = "".join(sums).encode()
    path = Path(output_dir) / f"{NAME}_v{version}.zip"
    refuse_overlap([root / name for name in files if name != SUMS], [path, path.with_suffix(".zip.sha256")])
    with written_whole(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{NAME}/{name}", DATE)
            entry.external_attr = 0o100644 << 16  # a regular file
            entry.create_system = 3  # whatever the machine is
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
    with written_whole(path.with_suffix(".zip.sha256")) as file:
        file.write(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    return path
