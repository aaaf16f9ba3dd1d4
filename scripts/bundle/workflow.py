"""How a config of this bundle is run, and one pair through configs/inference.json."""

from __future__ import annotations

import gc
from pathlib import Path

from scripts.data import renamed
from scripts.data.datalist import case_name
from scripts.data.root import CONFIGS

NAMED = ("centre", "header", "learned", "rigid")  # initial transforms; another is a file


def absolute(path: object) -> str | list[str]:
    """A path, or each of several, with / at its start: a config value that starts with $, @ or % would be evaluated."""
    return [absolute(one) for one in path] if isinstance(path, list | tuple) else str(Path(str(path)).resolve())


def run_config(name: str, *overlays: str | Path | None, **settings) -> None:
    """Run a config of this bundle in this process, as `python -m monai.bundle run` does; an overlay may be None."""
    import logging

    gc.disable()  # while a million objects are imported that live to the end: a second of a cold start
    from monai.bundle import ConfigWorkflow

    gc.freeze()
    gc.enable()

    if "datalist" in settings:  # in a list MONAI evaluates a file's name that starts with $; it leaves tuples alone
        settings["datalist"] = tuple(settings["datalist"])
    for noisy in ("monai", "monai.bundle.workflows", "ignite", "py.warnings"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # an error is raised as well, and said once
    files = [str(CONFIGS / name)] + [str(Path(overlay).resolve()) for overlay in overlays if overlay]
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
    """Register one pair by configs/inference.json; the arguments are those of the verb `register`."""
    pair = {"moving_image": moving, "fixed_image": fixed, "moving_label": moving_labels, "fixed_label": fixed_labels}
    pair = {k: absolute(v) for k, v in pair.items() if v is not None}
    settings = renamed.current(settings, renamed.SETTINGS)
    paths = {"ckpt_path", "segmentation_path"}
    if settings.get("initial_transform") not in (None, *NAMED):
        paths.add("initial_transform")
    for name in paths & set(settings):
        settings[name] = absolute(settings[name])
    pair |= {"case": case_name(fixed), "patient": case_name(fixed)}
    run_config(
        "inference.json",
        overlay,
        datalist=[pair],
        output_dir=absolute(output_dir),
        case_folders=False,
        **settings,
    )
