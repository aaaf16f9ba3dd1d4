"""A MONAI Deploy application: finds one MR and one TRUS series among DICOM files and registers them. Research use only.

    pip install -r requirements-deploy.txt
    python integrations/deploy/app.py --input DICOM_DIR --output OUT_DIR

It leaves what `python -m scripts register --formats dicom` leaves, the warped MR as a DICOM series and the Deformable
Spatial Registration object among it, and each DICOM segmentation of that MR on the TRUS, as a segmentation of the TRUS
series. A GPU is used where there is one, and not needed.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, Fragment, Operator, OperatorSpec
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the bundle

from scripts.bundle.workflow import register  # noqa: E402
from scripts.data.checks import InputError, refusal  # noqa: E402
from scripts.registration.apply import apply_to_segmentations  # noqa: E402

RULES = {  # of the SDK's series selector; narrow them where a study has more than one such series
    "moving": {"Modality": "MR"},
    "fixed": {"Modality": "US"},
    "targets": {"Modality": "SEG"},  # of the MR; any number, none too
}


class RegistrationOperator(Operator):
    """Register the two selected series.

    Named input:
        study_selected_series_list: with one series selected as "moving" and one as "fixed", in one study or in two, and
            those selected as "targets".

    Args:
        output_folder: what `register` writes is written there.

    Raises:
        InputError: not one series of each; any refusal of `register`.
    """

    def __init__(self, fragment: Fragment, *args, output_folder: Path, **kwargs) -> None:
        self.output_folder = output_folder
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("study_selected_series_list")

    def compute(self, op_input, op_output, context) -> None:
        studies = op_input.receive("study_selected_series_list")
        selected = [chosen for study in studies for chosen in study.selected_series]
        with TemporaryDirectory() as folder:
            found = {name: [one.series for one in selected if one.selection_name == name] for name in RULES}
            for name in ("moving", "fixed"):
                if len(found[name]) != 1:
                    raise InputError(
                        f"{len(found[name])} series in the input match {RULES[name]}; expected one, see RULES"
                    )
            files = {name: [self._saved(one, Path(folder)) for one in series] for name, series in found.items()}
            (moving,), (fixed,) = files["moving"], files["fixed"]
            register(moving=moving, fixed=fixed, output_dir=self.output_folder, formats="dicom")
            targets = [file for series in files["targets"] for file in sorted(series.iterdir())]
            apply_to_segmentations(self.output_folder / "ddf.nii.gz", targets, moving, fixed, self.output_folder)

    @staticmethod
    def _saved(series, folder: Path) -> Path:
        """A folder with the files of a series."""
        target = folder / str(series.SeriesInstanceUID)
        target.mkdir()
        for i, instance in enumerate(series.get_sop_instances()):
            instance.get_native_sop_instance().save_as(target / f"{i}.dcm")
        return target


class RegistrationApp(Application):
    """Load the studies of the input folder, select the two series, register them."""

    def compose(self) -> None:
        paths = Application.init_app_context(self.argv)
        rules = {"selections": [{"name": name, "conditions": rule} for name, rule in RULES.items()]}
        loader = DICOMDataLoaderOperator(
            self, CountCondition(self, 1), input_folder=Path(paths.input_path), name="load"
        )
        selector = DICOMSeriesSelectorOperator(self, rules=json.dumps(rules), all_matched=True, name="select")
        registration = RegistrationOperator(self, output_folder=Path(paths.output_path), name="register")
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, registration, {("study_selected_series_list", "study_selected_series_list")})


if __name__ == "__main__":
    try:
        RegistrationApp().run()
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        sys.exit(f"error: {refused}")
