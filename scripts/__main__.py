"""`python -m scripts VERB`: register, view, segment, apply, invert, prepare, check, learn, crossval and others.

Heavy imports live inside the verbs, so that --help answers at once.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path


def register(
    moving: str,
    fixed: str,
    output_dir: str,
    initial_transform: str | None = None,
    moving_labels: str | None = None,
    fixed_labels: str | None = None,
    overlay: str | None = None,
    **settings,
) -> None:
    """Register one MR to one TRUS volume by running configs/inference.json. Research use only.

    The weights are those in models/, which find the glands in both images first, unless --ckpt_path names others.

    Example:
        python -m scripts register --moving mr.nii.gz --fixed trus.nii.gz --output_dir out

    Writes warped_moving_image.nii.gz, ddf.nii.gz, overview.png and qc.json, and with labels
    warped_moving_label.nii.gz. ddf.nii.gz maps the original fixed world to the original moving world, in LPS mm, as ITK
    and ANTs read it: applied to the original moving image it gives the warped one. For other tools, --formats names
    any of: itk and slicer (ddf.h5), ants (ddf.nii.gz itself), niftyreg (niftyreg.nii.gz), elastix (transformix.txt),
    dicom (registration.dcm and the series warped_moving_image/, if both images are DICOM).

    Args:
        moving: the MR, a NIfTI, MetaImage, NRRD or DICOM file, or a folder with a DICOM series.
        fixed: the TRUS volume, likewise.
        output_dir: where to write; made if it does not exist.
        initial_transform: as the weights were trained: "learned" (the glands found in the two images coincide), which
            is the default; "centre" (the volumes' centres coincide); "header" (world coordinates as they are); "rigid"
            (by elastix, from the centres on); or a transform file that maps fixed to moving points, linear or a field,
            see docs/transforms.md, for example an earlier ddf.nii.gz.
        moving_labels: label file of the moving image, warped as well.
        fixed_labels: label file of the fixed image; with moving_labels, DSC and TRE are reported.
        overlay: a config with the settings other weights were trained with, for example configs/baseline.yaml.
        settings: any setting of configs/inference.json, for example --ckpt_path FILE or --formats itk,niftyreg. Of
            images: --moving_spacing and --fixed_spacing '[x,y,z]', the voxel size in mm of one that states none;
            --moving_series and --fixed_series, which of several volumes of a DICOM file or folder, by its number in
            the list that the refusal shows, or by elements, for example EchoTime=100; --moving_axes and --fixed_axes,
            where the three voxel axes run to if a header does not tell the truth, for example LPS: the files that are
            written stay in the worlds of the headers. --write_glands True writes moving_gland.nii.gz and
            fixed_gland.nii.gz, the glands found, each on its image's grid; --write_spread True writes spread.nii.gz,
            how far the networks' fields are apart at each voxel, in mm. Targets are doubted by both, see apply. --view
            True writes the glands and view.html, a page to look through the registration, see the verb view; it needs
            requirements-view.txt.
    """
    from scripts.bundle.workflow import register

    if initial_transform is not None:
        settings["initial_transform"] = initial_transform
    register(moving, fixed, output_dir, moving_labels, fixed_labels, overlay, **settings)


def view(
    output_dir: str,
    fixed: str | None = None,
    moving: str | None = None,
    points: str | None = None,
    points_from: str | None = None,
    coordinates: str | None = None,
) -> None:
    """Write a page to look through a registration, for any browser, without network; needs requirements-view.txt.

    Example:
        python -m scripts view out
        python -m scripts view out --points targets.mrk.json --points_from moving

    Writes view.html into the folder of a registration, one file: TRUS and MR, registered or as it came, in three linked
    planes, to scroll, zoom and blink; outlines of the glands found, if register kept them (--view True or
    --write_glands True), and of labels; targets to jump to; the deformation; and the figures and flags of qc.json.
    Research use only.

    Args:
        output_dir: the --output_dir of a registration.
        fixed, moving: where the images are now, if they are not where they were.
        points: targets, a file of points as for apply.
        points_from: the image they were marked in, "fixed" or "moving".
        coordinates: of columns x, y, z, "RAS" or "LPS".
    """
    from scripts.registration.view import view

    print(view(output_dir, fixed, moving, points, points_from, coordinates))


def segment(
    image: str,
    output: str,
    modality: str = "auto",
    labels: str | None = None,
    probability: bool = False,
    **settings,
) -> None:
    """Find the prostate gland in an MR or a TRUS volume, or in all of a folder. Research use only.

    Example:
        python -m scripts segment mr.nii.gz --output gland.nii.gz
        python -m scripts segment images --output glands --labels labels

    Writes gland.nii.gz on the image's own grid, gland.png, which shows it, and gland.json: its volume, how sure the
    networks are, and flags where their figures leave the limits. Of a folder it writes such files for each image and
    glands.csv, a table.

    Args:
        image: a NIfTI, MetaImage, NRRD or DICOM file, or a folder with a DICOM series; or a folder of those; or a data
            set, of pairs or of single images.
        output: the mask (.nii.gz); of several images a folder.
        modality: "mr", "us", or "auto", which goes by the file or by what the image looks like.
        labels: a label file of the image, or a folder of them with the same names, to be compared with: Dice.
        probability: True writes the probability of the gland too, gland_probability.nii.gz.
        settings: any setting of configs/segment.yaml or inference.json, for example --segmentation_path FILE; of
            images as of register: --image_spacing, --image_series and --image_axes.
    """
    from scripts.bundle.workflow import segment

    segment(image, output, modality, labels, probability, **settings)


def apply(
    transform: str | list[str],
    output: str,
    moving: str | None = None,
    reference: str | None = None,
    label: bool = False,
    interpolation: str | None = None,
    points: str | None = None,
    points_from: str | None = None,
    coordinates: str | None = None,
    moving_spacing: list[float] | None = None,
    moving_series: str | None = None,
) -> None:
    """Warp images or labels by a registration, or take points and surfaces to the other image. Research use only.

    Example:
        python -m scripts apply --transform out/ddf.nii.gz --moving mr_2.nii.gz --output warped.nii.gz
        python -m scripts apply --transform out/ddf.nii.gz --moving mr_zones.nii.gz --label True --output zones.nii.gz
        python -m scripts apply --transform out/ddf.nii.gz --points targets.mrk.json --points_from moving \\
            --output targets_in_fixed.mrk.json
        python -m scripts apply --transform out/ddf.nii.gz --points lesion.stl --points_from moving --output on_trus.stl
        python -m scripts apply --transform out/ddf.nii.gz --moving seg.dcm --label True --reference TRUS_SERIES \
            --output seg_on_trus.dcm

    The transform takes points of the fixed image to points of the moving image, and so pulls moving images onto the
    fixed grid. Points marked in the fixed image go forward through it, points marked in the moving image through its
    inverse, whose residual is stated; a point outside the field, or whose inverse is off by more than 0.1 mm or lies
    in a fold, is written without a position and named; a surface with such a vertex is refused, because one with holes
    shows a smaller target. Beyond the grid of a field images are 0.

    A table with a column radius, in mm, is of targets: what becomes of a sphere around each, and, from what register
    --write_glands True --write_spread True leaves beside ddf.nii.gz, how far it lies outside the glands that were found
    and how far the networks' fields are apart there. CHECK names what makes a place doubtful; none of it is an error.

    Several transforms, separated by commas, are in the order in which the moving image goes through them: for A,B it
    is warped by A and the result by B, in one interpolation; a point x of the fixed image goes to A(B(x)). That is the
    order of adding to an ITK composite, and the reverse of the order of antsApplyTransforms -t.

    Args:
        transform: one or several of ddf.nii.gz, a displacement image of ITK, ANTs or NiftyReg (NIfTI, NRRD,
            MetaImage); a .h5, .tfm or .txt of ITK; a .mat of ANTs; linear, fields or composites.
        output: the image (.nii.gz); the folder, if moving is one; of a DICOM segmentation also another (.dcm), which
            refers to the DICOM series that reference names; or the points, a file like the one given.
        moving: an image or labels of the moving world at any resolution, a folder with one DICOM series, or a folder
            of such files and folders, which are all warped.
        reference: an image whose grid to warp onto; the default is the transform's own grid.
        label: True for labels, an integer index map or one binary map a channel: each label is interpolated on its
            own, and the result holds no other values.
        interpolation: of images: "linear", the default, "cubic" (B-spline) or "nearest".
        points: a .csv with the columns x, y, z in mm, or a table, .fcsv or .mrk.json of 3D Slicer; or a surface of
            triangles, .stl, .obj, .ply or .vtp, whose vertices they are (requirements-surfaces.txt).
        points_from: the image the points were marked in, "fixed" or "moving".
        coordinates: of columns x, y, z, "RAS" or "LPS"; the result has the same. Other files say it themselves, and
            surfaces are LPS where they do not.
        moving_spacing, moving_series: of moving, as for register.
    """
    from scripts.data.files import listed
    from scripts.registration.apply import apply

    told = {"moving_spacing": moving_spacing, "moving_series": moving_series}
    paths = (output, moving, reference)
    apply(listed(transform), *paths, label, interpolation, points, points_from, coordinates, **told)


def invert(transform: str | list[str], reference: str, output: str) -> None:
    """Write the inverse of a registration as a displacement field of its own. Research use only.

    Example:
        python -m scripts invert --transform out/ddf.nii.gz --reference mr.nii.gz --output out/inverse.nii.gz
        python -m scripts apply --transform out/inverse.nii.gz --moving trus.nii.gz --output trus_on_mr.nii.gz

    The inverse takes points of the moving image to points of the fixed image, and so pulls fixed images onto the moving
    grid. Beside it is written where it is known (inverse_known.nii.gz): 0 for voxels that the fixed image does not
    show, that lie in a fold or whose residual is above 0.1 mm; these have the displacement of the nearest that is.

    Args:
        transform: one or several, as of apply.
        reference: the moving image, or another whose grid to write the inverse on.
        output: the displacement (.nii.gz), LPS mm, as ITK, SimpleITK, 3D Slicer and ANTs read it.
    """
    from scripts.data.files import listed
    from scripts.registration.invert import invert

    invert(listed(transform), reference, output)


def check(
    dataset_dir: str,
    label_values: list[int] | None = None,
    labels: bool = True,
    patient_pattern: str | None = None,
    num_workers: int | None = None,
    moving_spacing: list[float] | None = None,
    fixed_spacing: list[float] | None = None,
    moving_series: str | None = None,
    fixed_series: str | None = None,
) -> None:
    """Check a whole data set before training, by the gate that training, evaluation and registration use.

    Example:
        python -m scripts check DIR
        python -m scripts check datalist.json --label_values '[1,2,3]'

    Prints what is refused and what is repaired, by case, and a summary. Exit code 1 if anything is refused.

    Args:
        dataset_dir: the data set's folder, or a datalist JSON.
        label_values: of integer index maps, the gland first; a number for one structure.
        labels: False for pairs that are only to be registered.
        patient_pattern: regular expression whose first group, in the case name, is the patient; with it, a patient in
            two splits is refused.
        num_workers: processes that read; the default is one per core, 8 at most.
        moving_spacing, fixed_spacing: voxel size '[x,y,z]' in mm of images that state none, as for register.
        moving_series, fixed_series: which of several volumes of a DICOM file or folder, as for register.
    """
    from scripts.data.gate import check_dataset

    options = {
        "moving_spacing": moving_spacing,
        "fixed_spacing": fixed_spacing,
        "moving_series": moving_series,
        "fixed_series": fixed_series,
    }
    if check_dataset(dataset_dir, label_values, labels, patient_pattern, num_workers, **options):
        sys.exit(1)


def prepare(
    name: str,
    source: str,
    output_dir: str,
    limit: int | None = None,
    num_workers: int | None = None,
    targets: bool | None = None,
    last_mr: bool | None = None,
    mapping: str | None = None,
    label_values: list[int] | None = None,
    moving_axes: str | None = None,
    fixed_axes: str | None = None,
) -> None:
    """Make a data set of pairs of a public cohort as it is downloaded, or of your own files. Research use only.

    Example:
        python -m scripts prepare tcia DOWNLOADED --output_dir DIR

    Cohorts: tcia (Prostate-MRI-US-Biopsy: DICOM and STL), mrus (the example data of the paper's authors), regpro
    (µ-RegPro), and folder (files of any names, and a table that says which is what). Writes moving_images,
    fixed_images, moving_labels and fixed_labels, NIfTI with true headers, the gland first and the patient in the name;
    cases.csv; left_out.csv, what is not there and why; SOURCE.txt, licence and citation. Then it checks them as the
    verb check does. Run again after an interruption, it goes on. Exit code 1 if the check refuses a pair.

    Args:
        name: "tcia", "mrus", "regpro" or "folder".
        source: the folder of the download, unpacked; its own tree may be of any depth.
        output_dir: new or empty, or one that the same command began to fill.
        limit: the first so many pairs only.
        num_workers: processes; the default is one per core, 8 at most.
        targets: of tcia: True adds, after the gland, targets that have a surface on both sides. Those on the TRUS were
            carried there by the fusion device: they are its registration, not independent truth.
        last_mr: of tcia: True takes, of several MR with a surface, the last before the TRUS; else they are left out.
        mapping: of folder: a CSV with the columns case, moving_image, fixed_image, moving_label, fixed_label, and more,
            see docs/guides/public-cohorts.md; the default is mapping.csv in the source.
        label_values: of folder: the values of index maps, the gland first.
        moving_axes, fixed_axes: of folder and regpro: where voxel axes run to if headers do not tell the truth, as for
            register.
    """
    from scripts.cohorts.prepare import prepare

    options = {"targets": targets, "last_mr": last_mr, "mapping": mapping, "label_values": label_values}
    options |= {"moving_axes": moving_axes, "fixed_axes": fixed_axes}
    if prepare(name, source, output_dir, limit, num_workers, **options):
        sys.exit(1)


def phantom(
    output_dir: str,
    patients: int = 20,
    seed: int = 0,
    mode: str = "realistic",
    pairs_per_patient: int = 1,
    like_paper: bool = False,
) -> None:
    """Simulate a cohort of MR-TRUS pairs with labels and the true displacement.

    Example:
        python -m scripts phantom --output_dir cohort --patients 76 --seed 1

    Args:
        output_dir: a folder that is empty or does not exist; gets train, val and test sub-folders.
        patients: how many.
        seed: the same seed gives the same cohort.
        mode: "realistic"; "randomised": any contrast, noise and field of view, to pretrain on; or "clinical": sharp
            slices of a whole pelvis, endorectal coils and full rectums (seconds and some 10 MB a pair).
        pairs_per_patient: the most pairs of a patient; above 1 the files are called patient000000_1.nii.gz.
        like_paper: 76 patients, 108 pairs and 834 labels in the paper's proportions, not split, for crossval; of the
            other arguments only the seed counts.
    """
    if like_paper:
        from scripts.phantoms.paper_cohort import write_paper_cohort

        print(", ".join(f"{count} {kind}" for kind, count in write_paper_cohort(output_dir, seed).items()))
        return
    from scripts.data.checks import InputError
    from scripts.phantoms.phantom import write_cohort

    try:
        write_cohort(output_dir, patients, seed, mode=mode, pairs_per_patient=pairs_per_patient)
    except ValueError as error:
        raise InputError(str(error)) from error


def sweep(
    frames: str,
    output: str,
    axis_offset: float,
    angles: str | None = None,
    pixel_spacing: list[float] | None = None,
    spacing: float | list[float] = 0.8,
    max_gap: float = 5.0,
    probe: str = "top",
    superior: str = "right",
) -> None:
    """Make a Cartesian TRUS volume of the frames of a rotational sweep. Research use only.

    Example:
        python -m scripts sweep --frames sweep.dcm --angles angles.csv --axis_offset 10 --output trus.nii.gz

    Writes trus.nii.gz, RAS mm from the probe's axis, and trus_inside.nii.gz, the mask of what the sweep covers.

    Args:
        frames: a DICOM multi-frame file, a NIfTI, MetaImage or NRRD stack (column, row, frame), a .npy (frame, row,
            column), or a folder of PNG files; rows go away from the probe, columns along its axis.
        output: the volume's name, ending in .nii.gz.
        axis_offset: distance in mm from the probe's axis to the first row.
        angles: CSV with the column angle_deg, and frame if its rows are out of order; 0 is straight anterior, positive
            to the patient's right. The default is angles.csv beside the frames.
        pixel_spacing: '[depth,axial]' in mm; the default is the file's, if it has one.
        spacing: voxel size in mm, one number or '[x,y,z]'.
        max_gap: largest gap between two frames that is bridged, in degrees; a wider one is left outside.
        probe: where the frames show the probe, "top" or "bottom".
        superior: which side of the frames is superior, "right" or "left".
    """
    from scripts.phantoms.sweep import convert

    convert(frames, output, axis_offset, angles, pixel_spacing, spacing, max_gap, probe, superior)


def demo(
    output_dir: str = "demo", pairs: str | None = None, train: bool = False, iterations: int | None = None
) -> None:
    """Register phantoms with the weights in models/ and show what came of it; or train on phantoms first.

    Example:
        python -m scripts demo --output_dir demo

    Args:
        output_dir: the demonstration's own folder; an earlier demonstration in it is replaced.
        pairs: a data set of real pairs with labels; its first pair is registered as well.
        train: train the learned initial transform on phantoms for about two minutes, from nothing, and register by it.
        iterations: training steps; the default is that of configs/demo.yaml.
    """
    from scripts.data.checks import InputError
    from scripts.study.demo import register_phantoms, train_on_phantoms

    if train and pairs is not None:
        raise InputError("--pairs has no meaning with --train True")
    if iterations is not None and not train:
        raise InputError("--iterations has no meaning without --train True")
    folder = Path(output_dir).absolute()
    if train:
        train_on_phantoms(folder, iterations)
    else:
        register_phantoms(folder, pairs)


def learn(
    dataset_dir: str,
    output_dir: str,
    folds: int = 4,
    patient_pattern: str | None = None,
    label_values: list[int] | None = None,
    moving_axes: str | None = None,
    fixed_axes: str | None = None,
    moving_spacing: list[float] | None = None,
    fixed_spacing: list[float] | None = None,
    moving_series: str | None = None,
    fixed_series: str | None = None,
    segmentation_iterations: int | None = None,
    second_stage_iterations: int | None = None,
    cores: int | None = None,
    cohort_device: str | None = None,
) -> None:
    """Learn both stages, finding the gland and deforming it, from your own labelled pairs. Research use only.

    Example:
        python -m scripts learn DIR --output_dir learned --patient_pattern '(p[0-9]+)_'

    Each of the folds' networks learns from the patients of the others, from the weights in models/ on, and is tested on
    its own: what held-out pairs gain is printed at the end. Run again after an interruption, it goes on. Writes
    weights.yaml, with which all networks together register:
        python -m scripts register --moving mr.nii.gz --fixed trus.nii.gz --output_dir out \\
            --overlay learned/weights.yaml
    and cases.csv, landmarks.csv, patients.csv and statistics.csv, the scores of the held-out pairs. weights.yaml names
    the files in runs/ by their full paths: leave the folder where it is.

    Args:
        dataset_dir: a data set that is not split, or a datalist JSON; some 20 pairs at least, the gland their first
            label, with as many landmarks as there are.
        output_dir: where to write.
        folds: how many; patients are dealt at random.
        patient_pattern: regular expression whose first group, in the case name, is the patient.
        label_values: of integer index maps, the gland first.
        moving_axes, fixed_axes, moving_spacing, fixed_spacing, moving_series, fixed_series: of images whose headers do
            not say it, as for register.
        segmentation_iterations, second_stage_iterations: training steps of each stage; the defaults are those of
            configs/own_pairs.yaml and configs/second_stage.yaml.
        cores: CPU cores to use; the default is all.
        cohort_device: cpu or disk for a cohort that does not fit the GPU's memory or the computer's; disk keeps what a
            step needs in OUTPUT_DIR/cohort, which may be deleted afterwards.
    """
    from scripts.study.own_pairs import learn

    data = {"patient_pattern": patient_pattern, "label_values": label_values}
    data |= {"moving_axes": moving_axes, "fixed_axes": fixed_axes, "moving_spacing": moving_spacing}
    data |= {"fixed_spacing": fixed_spacing, "moving_series": moving_series, "fixed_series": fixed_series}
    steps = {"segmentation": segmentation_iterations, "second_stage": second_stage_iterations}
    given = {stage: count for stage, count in steps.items() if count is not None}
    failed = learn(dataset_dir, output_dir, folds, data, given, cores, cohort_device)
    if failed:
        sys.exit(f"error: {failed} failed or stopped, see above; the same command goes on where they stopped")


def crossval(
    dataset_dir: str,
    output_dir: str,
    folds: int = 12,
    variants: str | list[str] = "baseline",
    fold_seed: int = 0,
    address: str | None = None,
    cores_per_fold: int | None = None,
    only: str | None = None,
    base: str | None = None,
    **settings,
) -> None:
    """Cross-validate the Baseline and its variants by patient, on Ray; needs requirements-crossval.txt.

    Example:
        python -m scripts crossval --dataset_dir DIR --folds 12 --variants baseline,delta0 --output_dir cv

    Run again after an interruption, it goes on: folds that are done stay, others resume from their checkpoints. One
    fold, without Ray, as a SLURM array has it; the command without --only then writes the tables:
        python -m scripts crossval --dataset_dir DIR --folds 12 --variants baseline --output_dir cv \\
            --only baseline:$SLURM_ARRAY_TASK_ID

    Writes folds.json, runs/VARIANT/foldK, and of the variants that are complete cases.csv, landmarks.csv, patients.csv
    and statistics.csv: paired Wilcoxon tests against the first variant. Exit code 1 if a fold failed.

    Args:
        dataset_dir: a data set that is not split.
        output_dir: where to write; on a cluster, a folder that all machines share.
        folds: how many; patients are dealt at random.
        variants: "baseline", names of configs/variant_NAME.yaml, overlay files; separated by commas, and the first is
            what the others are compared with. + joins several into one: "delta0+l2". Without training: "none",
            "none+centroids", and elastix by "nmi", "ncc", "ssd", each also "+rigid" or "+centroids".
        fold_seed: the same seed gives the same folds.
        address: of a Ray cluster to join, for example "auto"; the default is this machine.
        cores_per_fold: CPU cores of a fold; without a GPU at most 4 by default.
        only: one fold of one variant as VARIANT:FOLD, or several, separated by commas.
        base: an overlay for all variants, below their own, for example configs/real_pairs_cpu.yaml.
        settings: any setting of configs/train.json, for all folds, for example --iterations 20000.
    """
    from scripts.data.files import listed
    from scripts.data.renamed import SETTINGS, current
    from scripts.study.crossval import cross_validate

    failed = cross_validate(
        *(dataset_dir, output_dir, folds, listed(variants), fold_seed),
        address,
        cores_per_fold,
        None if only is None else listed(only),
        base,
        current(settings, SETTINGS),
    )
    if failed:
        sys.exit(f"error: {failed} failed, see above; the same command goes on where they stopped")


def release(output_dir: str = "dist") -> None:
    """Pack this bundle as one archive, as MONAI's model zoo wants it, and its SHA-256.

    Example:
        python -m scripts release --output_dir dist

    Args:
        output_dir: where prostate_mr_trus_registration_vVERSION.zip is written.
    """
    from scripts.bundle.release import build

    print(build(output_dir))


def report(output_dir: str, variant: str | None = None, dataset_dir: str | None = None) -> None:
    """Make a page of what a cross-validation found: tables, box plots, the best, median and worst case.

    Example:
        python -m scripts report cv

    Writes into OUTPUT_DIR/report: report.html, one file with everything on it; its figures as PNG files and as
    figures.pdf; table1.csv, the trained variants; table2.csv, what there is without training; cases/CASE, the
    registrations that are shown, which a second call does not repeat.

    Args:
        output_dir: the --output_dir of a cross-validation.
        variant: whose cases are shown; the trained one with the best median TRE by default.
        dataset_dir: where the data set is now, if it is not where it was.
    """
    from scripts.study.report import report as write

    print(write(output_dir, variant, dataset_dir))


def check_config(path: str) -> None:
    """List what a config, or a bundle's folder, would execute, without executing any of it; exit code 1 on findings.

    Example:
        python -m scripts check-config downloaded/some_bundle

    Lists each expression ($), each thing called (_target_) and what logging.conf evaluates; of a folder also code,
    pickles, links and hidden folders, unless they equal this bundle's own. A finding is what is not on the lists of
    scripts/bundle/config_check.py, and is to be read before the bundle is run. What is on them computes; which files a
    config reads and writes is not judged.

    Args:
        path: a .json, .yaml or logging .conf file, or a bundle's folder.
    """
    from scripts.bundle.config_check import judge, table

    entries = judge(path)
    print(table(entries))
    if any(entry.finding for entry in entries):
        sys.exit(1)


def main() -> None:
    words = sys.argv[1:]
    verbs = (register, view, segment, apply, invert, check, prepare, learn, crossval, report, phantom, sweep, demo)
    verbs += (release, check_config)
    named = {verb.__name__: verb for verb in verbs}
    try:
        if not words or {"-h", "--help"} & set(words):  # a bare --help of a verb with required arguments is an error
            import fire

            shown = [word for word in words[:1] if not word.startswith("-")]
            fire.Fire(named, [*shown, *["--", "--help"] * bool(words)], name="python -m scripts")
        else:
            from scripts.bundle.command_line import call

            call(named, words)
    except KeyboardInterrupt:
        from scripts.data.checks import INTERRUPTED

        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells say it
    except Exception as error:
        from scripts.data.checks import one_line, refusal

        refused = refusal(error)
        if refused is None:
            raise
        print(f"error: {one_line(refused)}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # nothing is collected again on the way out


if __name__ == "__main__":
    main()
