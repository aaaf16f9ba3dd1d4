"""A scripted module of 3D Slicer that registers an MR to a TRUS volume of the scene. Research use only.

Slicer's own Python is left alone: the module runs `python -m scripts register` of the bundle in an environment of
yours. Installation: docs/guides/deploy-and-slicer.md.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

try:
    import ctk
    import qt
    import slicer
    from slicer.ScriptedLoadableModule import (
        ScriptedLoadableModule,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleWidget,
    )
except ImportError:  # outside Slicer, where the logic's `run` works all the same
    ScriptedLoadableModule = ScriptedLoadableModuleLogic = ScriptedLoadableModuleWidget = object

TITLE = "Prostate MR to TRUS"
NOTICE = "Research use only. Not for clinical decisions."
WARPED, TRANSFORM, RECORD = "warped_moving_image.nii.gz", "ddf.h5", "qc.json"  # what `register` leaves
FIELD = "ddf.nii.gz"  # the same transform, which knows the TRUS's grid


class ProstateMRTRUS(ScriptedLoadableModule):
    """What Slicer's list of modules shows."""

    def __init__(self, parent) -> None:
        super().__init__(parent)
        parent.title = TITLE
        parent.categories = ["Registration"]
        parent.helpText = (
            f"{NOTICE}<p>Registers an MR to a TRUS volume and shows the warped MR over the TRUS. Targets on the MR, a"
            " segmentation or markups, are taken to the TRUS, and what has no place there is named. The transform is"
            " loaded too: put whatever lies on the MR under it to see it on the TRUS."
        )


class ProstateMRTRUSLogic(ScriptedLoadableModuleLogic):
    """What is computed; `run` and `summary` need no scene."""

    @staticmethod
    def run(
        python: str, bundle: str, moving: str, fixed: str, output_dir: str, environment: dict | None = None
    ) -> dict:
        """Register two files by the bundle.

        Args:
            python: the interpreter that has the bundle's requirements.
            bundle: the bundle's folder.
            moving, fixed: files of the MR and the TRUS, full paths.
            output_dir: where to write, full path.
            environment: of the process; None for this one's.

        Returns:
            The QC record.

        Raises:
            RuntimeError: it could not be run, or refused its input; the message says why in one line.
        """
        words = ["register", "--moving", moving, "--fixed", fixed, "--output_dir", output_dir, "--formats", "slicer"]
        ProstateMRTRUSLogic.command(python, bundle, words, environment)
        return json.loads((Path(output_dir) / RECORD).read_text(encoding="utf-8"))

    @staticmethod
    def carry(
        python: str, bundle: str, targets: str, output: str, output_dir: str, environment: dict | None = None
    ) -> list[str]:
        """Take targets on the MR to the TRUS by the registration in a folder.

        Args:
            targets: a file of markups (.mrk.json), or of a segmentation (.seg.nrrd).
            output: where to write, .mrk.json or .nii.gz.
            python, bundle, output_dir, environment: as of `run`.

        Returns:
            What is to be checked, a line each: targets without a place on the TRUS.

        Raises:
            RuntimeError: as of `run`.
        """
        words = ["apply", "--transform", str(Path(output_dir) / FIELD), "--output", output]
        if targets.endswith(".mrk.json"):
            words += ["--points", targets, "--points_from", "moving"]
        else:
            words += ["--moving", targets, "--label", "True"]
        said = ProstateMRTRUSLogic.command(python, bundle, words, environment)
        return [line for line in said.splitlines() if "CHECK" in line]

    @staticmethod
    def command(python: str, bundle: str, words: list[str], environment: dict | None = None) -> str:
        """What a command of the bundle prints; see `run`."""
        command = [python, "-m", "scripts", *words]
        hidden = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # no console on Windows
        try:
            result = subprocess.run(
                command, cwd=bundle, env=environment, capture_output=True, encoding="utf-8", creationflags=hidden
            )
        except OSError as error:
            raise RuntimeError(f"{error.filename}: {error.strerror}; set Python and the bundle's folder") from error
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
            raise RuntimeError(next((line for line in lines if line.startswith("error:")), lines[-1]))
        return result.stdout or ""

    @staticmethod
    def summary(record: dict) -> str:
        """A QC record in lines: the notice, what to check, figures."""
        lines = [record["notice"], *(f"CHECK: {flag}" for flag in record["flags"])]
        lines += [f"Folded voxels: {record['folded_percent']:.2f} %"]
        lines += [f"Largest displacement: {record['max_displacement_mm']:.1f} mm"]
        lines += [f"The MR covers {record['covered_percent']:.0f} % of the TRUS volume"]
        return "\n".join(lines)

    def register(
        self, python: str, bundle: str, moving_node, fixed_node, output_dir: str, segmentation=None, markups=None
    ) -> str:
        """Register two volumes of the scene, load the warped one, transform and targets; what the panel then says."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = {str(folder / "moving.nrrd"): moving_node, str(folder / "fixed.nrrd"): fixed_node}
        for file, node in files.items():
            slicer.util.exportNode(node, file, world=True)  # with the transforms it is under
        # without Slicer's own libraries and Python on the paths
        record = self.run(python, bundle, *files, output_dir, slicer.util.startupEnvironment())
        warped = slicer.util.loadVolume(str(folder / WARPED))
        warped.SetName(f"{moving_node.GetName()} warped")
        slicer.util.loadTransform(str(folder / TRANSFORM)).SetName(f"{moving_node.GetName()} to {fixed_node.GetName()}")
        slicer.util.setSliceViewerLayers(background=fixed_node, foreground=warped, foregroundOpacity=0.5)
        checks = []
        if markups is not None:
            source, target = str(folder / "targets.mrk.json"), str(folder / "targets_on_trus.mrk.json")
            slicer.util.exportNode(markups, source, world=True)
            checks += self.carry(python, bundle, source, target, output_dir, slicer.util.startupEnvironment())
            slicer.util.loadMarkups(target).SetName(f"{markups.GetName()} on {fixed_node.GetName()}")
        if segmentation is not None:
            source, target = str(folder / "segmentation.seg.nrrd"), str(folder / "segmentation_on_trus.nii.gz")
            slicer.util.exportNode(segmentation, source, world=True)
            checks += self.carry(python, bundle, source, target, output_dir, slicer.util.startupEnvironment())
            carried = slicer.util.loadSegmentation(target)
            carried.SetName(f"{segmentation.GetName()} on {fixed_node.GetName()}")
        return "\n".join([self.summary(record), *checks])


class ProstateMRTRUSWidget(ScriptedLoadableModuleWidget):
    """The panel: two volumes and the targets, three paths that are remembered, a button, the QC record."""

    def setup(self) -> None:
        super().setup()
        self.logic = ProstateMRTRUSLogic()
        form = qt.QFormLayout()
        self.layout.addLayout(form)
        form.addRow(qt.QLabel(f"<b>{NOTICE}</b>"))
        volume = "vtkMRMLScalarVolumeNode"
        self.moving, self.fixed = self._node(form, "MR (moving)", volume), self._node(form, "TRUS (fixed)", volume)
        self.segmentation = self._node(form, "Segmentation of the MR", "vtkMRMLSegmentationNode", optional=True)
        self.markups = self._node(form, "Markups on the MR", "vtkMRMLMarkupsFiducialNode", optional=True)
        self.paths = {
            "python": self._path(form, "Python", "python", ctk.ctkPathLineEdit.Files),
            "bundle": self._path(form, "Bundle's folder", "bundle", ctk.ctkPathLineEdit.Dirs),
            "output_dir": self._path(form, "Output folder", "output_dir", ctk.ctkPathLineEdit.Dirs),
        }
        button = qt.QPushButton("Register")
        button.connect("clicked()", self.onRegister)
        form.addRow(button)
        self.report = qt.QPlainTextEdit()
        self.report.readOnly = True
        form.addRow(self.report)
        self.layout.addStretch(1)

    @staticmethod
    def _node(form, label: str, kind: str, optional: bool = False):
        box = slicer.qMRMLNodeComboBox()
        box.nodeTypes = [kind]
        box.noneEnabled = optional
        box.addEnabled = box.removeEnabled = False
        box.setMRMLScene(slicer.mrmlScene)
        form.addRow(label, box)
        return box

    @staticmethod
    def _path(form, label: str, name: str, kind):
        line = ctk.ctkPathLineEdit()
        line.filters = kind
        line.currentPath = qt.QSettings().value(f"ProstateMRTRUS/{name}", "")
        form.addRow(label, line)
        return line

    def onRegister(self) -> None:
        paths = {name: line.currentPath for name, line in self.paths.items()}
        self.report.plainText = ""
        with slicer.util.tryWithErrorDisplay("Registration failed.", waitCursor=True):
            moving, fixed = self.moving.currentNode(), self.fixed.currentNode()
            if not all((moving, fixed, *paths.values())):
                raise RuntimeError("Choose an MR, a TRUS volume, and the three paths.")
            for name, path in paths.items():
                qt.QSettings().setValue(f"ProstateMRTRUS/{name}", path)
            targets = {
                "segmentation": self.segmentation.currentNode(),
                "markups": self.markups.currentNode(),
            }
            self.report.plainText = self.logic.register(moving_node=moving, fixed_node=fixed, **paths, **targets)
