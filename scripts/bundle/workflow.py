"""How a config of this bundle is run, and one pair through configs/inference.json."""

from __future__ import annotations

import gc
from pathlib import Path

from scripts.bundle.settings import check_settings
from scripts.data import renamed
from scripts.data.checks import InputError
from scripts.data.datalist import case_name, check_output
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
