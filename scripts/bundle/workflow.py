"""How a config of this bundle is run, and one pair, or the gland of single images, through configs/inference.json."""

from __future__ import annotations

import gc
from pathlib import Path

from scripts.bundle.settings import check_settings
from scripts.data import renamed
from scripts.data.checks import InputError
from scripts.data.datalist import (
    FOLDERS,
    SINGLE_FOLDERS,
    SPLITS,
    SUFFIXES,
    case_name,
    check_output,
    image_files,
    single_images,
)
from scripts.data.files import readable
from scripts.data.root import CONFIGS

NAMED = ("centre", "header", "learned", "rigid")  # initial transforms; another is a file
OPTIONS = ("moving", "fixed", "output_dir", "initial_transform", "moving_labels", "fixed_labels", "overlay")
OWN = ("datalist", "dataset_dir", "split", "case_folders")  # settings that a single pair has no use for


def absolute(path: object) -> str | list[str]:
    """A path, or each of several, with / at its start: a config value that starts with $, @ or % would be evaluated.

    Links are not followed: what they lead to may have no suffix, or none of the files beside them.
    """
    return [absolute(one) for one in path] if isinstance(path, list | tuple) else str(Path(str(path)).absolute())


def import_monai() -> None:
    """Import MONAI; while it makes a million objects that live to the end none is collected, a second of a start."""
    gc.disable()
    import monai.bundle  # noqa: F401

    gc.freeze()
    gc.enable()


def run_config(name: str, *overlays: str | Path | None, **settings) -> None:
    """Run a config of this bundle in this process, as `python -m monai.bundle run` does; an overlay may be None."""
    import logging

    import_monai()
    from monai.bundle import ConfigWorkflow

    if "datalist" in settings:  # in a list MONAI evaluates a file's name that starts with $; it leaves tuples alone
        settings["datalist"] = tuple(settings["datalist"])
    for noisy in ("monai", "monai.bundle.workflows", "ignite", "py.warnings"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # an error is raised as well, and said once
    files = [str(CONFIGS / name)] + [str(absolute(overlay)) for overlay in overlays if overlay]
    kind = "train" if name.startswith("train") else "infer"
    workflow = ConfigWorkflow(files, logging_file=False, workflow_type=kind, **settings)
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def register(
    moving: str,
    fixed: str,
    output_dir: str,
    moving_labels: str | None = None,
    fixed_labels: str | None = None,
    overlay: str | None = None,
    **settings,
) -> None:
    """Register one pair by configs/inference.json; the arguments are those of the verb `register`.

    Raises:
        InputError: a setting that there is none of, an output that would replace an input, any refusal of the config.
    """
    pair = {"moving_image": moving, "fixed_image": fixed, "moving_label": moving_labels, "fixed_label": fixed_labels}
    pair = {k: absolute(readable(v)) for k, v in pair.items() if v is not None}
    settings = renamed.current(settings, renamed.SETTINGS)
    for name in settings:
        if name in OWN:
            raise InputError(f"--{name}: has no meaning for one pair; register many by configs/inference.json")
    if overlay is not None and not Path(overlay).is_file():
        raise InputError(f"{overlay}: overlay not found")
    overlay = overlay and str(absolute(overlay))
    import_monai()
    check_settings(settings, [str(CONFIGS / "inference.json"), *([overlay] if overlay else [])], "register", OPTIONS)
    paths = {"ckpt_path", "segmentation_path"}
    if settings.get("initial_transform") not in (None, *NAMED):
        paths.add("initial_transform")
    for name in paths & {name for name, value in settings.items() if value is not None}:
        given = settings[name]
        settings[name] = absolute(given if isinstance(given, list | tuple) else readable(given))
    pair |= dict.fromkeys(("case", "patient"), case_name(Path(fixed).absolute()))
    inputs = [overlay, settings.get("ckpt_path"), settings.get("segmentation_path"), settings.get("initial_transform")]
    check_output(str(output_dir), [pair], inputs, case_folders=False)
    run_config(
        "inference.json",
        overlay,
        datalist=[pair],
        output_dir=absolute(output_dir),
        case_folders=False,
        **settings,
    )


def segment(
    image: str, output: str, modality: str = "auto", labels: str | None = None, probability: bool = False, **settings
) -> None:
    """Find the gland in an image, or in those of a folder; the arguments are those of the verb `segment`.

    Raises:
        InputError: see `register`.
    """
    from scripts.data.dicom.reader import holds_slices

    for name in (*OWN, "output_dir"):
        if name in settings:
            raise InputError(f"--{name}: has no meaning for segment; IMAGE and --output say it")
    path, out, overlay = Path(readable(image)), Path(output), str(CONFIGS / "segment.yaml")
    several = path.is_dir() and not holds_slices(path)
    if several and any((path / name).is_dir() for name in (*SPLITS, SINGLE_FOLDERS[0], *sum(FOLDERS, ()))):
        items = [item for split in SPLITS for item in single_images(str(path), split, labels=False)]
        items = list({item["image"]: item for item in items}.values())
        twice = len({item["case"] for item in items}) < len(items)  # the two images of a pair
        cases = [f"{i['case']}_{i['group'].split()[-1]}" if twice else i["case"] for i in items]
        items = [{k: v for k, v in i.items() if k != "group"} | {"case": c} for i, c in zip(items, cases, strict=True)]
    elif several:
        items = [{"case": case, "image": str(file)} for case, file in image_files(path).items()]
        if not items:
            raise InputError(f"{path}: no images; expected files ending in {', '.join(SUFFIXES)}, or folders")
    else:
        items = [{"case": case_name(out), "image": str(path)}]
    if not several and not output.lower().endswith(".nii.gz"):
        raise InputError(f"--output {output}: expected a name that ends in .nii.gz")
    if several and output.lower().endswith((".nii.gz", ".nii")):
        raise InputError(f"--output {output}: expected a folder, since {image} holds several images")
    there = {} if labels is None else image_files(Path(labels)) if several else {items[0]["case"]: Path(labels)}
    for item in items:
        item |= {"label": str(there[item["case"]])} if item["case"] in there else {}
        item |= {key: absolute(item[key]) for key in ("image", "label") if key in item}
    import_monai()
    settings |= {"modality": modality, "write_probability": probability}
    files = [str(CONFIGS / "inference.json"), overlay]
    check_settings(settings, files, "segment", ("image", "output", "modality", "labels", "probability"))
    if settings.get("segmentation_path") is not None:
        settings["segmentation_path"] = absolute(settings["segmentation_path"])
    folder = absolute(out if several else out.parent)
    run_config("inference.json", overlay, datalist=items, output_dir=folder, **settings)
