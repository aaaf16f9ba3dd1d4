"""A simulated cohort shaped as the paper's (Hu et al. 2018, §3.1): patients, pairs, and labels of each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scripts.phantoms.anatomy import POLES, Anatomy
from scripts.phantoms.phantom import PhantomPair, new_folder, simulate_pair, write_pair

PAIRS_OF = {1: 50, 2: 20, 3: 6}  # patients by their number of pairs: 76 patients, 108 pairs
LABELS = {"gland": 108, "poles": 213, "zones": 214, "urethra": 37, "specific": 262}  # 834
ZONES = ("transition_zone", "peripheral_zone")
SHAPES = {"fixed_shape": (58, 44, 46), "fixed_spacing": 1.6, "moving_shape": (48, 48, 44)}


def kind_of(name: str) -> str:
    """Which of `LABELS` a label belongs to."""
    return "poles" if name in POLES else "zones" if name in ZONES else name if name in LABELS else "specific"


def with_peripheral_zone(pair: PhantomPair) -> PhantomPair:
    """The pair with one more label behind the others, what of the gland is no transition zone."""
    zone = pair.label_names.index("transition_zone")
    labels = [
        torch.cat([label, (label[..., :1] & (1 - label[..., zone : zone + 1]))], dim=-1)
        for label in (pair.moving_label, pair.fixed_label)
    ]
    names = (*pair.label_names, "peripheral_zone")
    return pair._replace(moving_label=labels[0], fixed_label=labels[1], label_names=names)


def write_paper_cohort(output_dir: str | Path, seed: int = 0) -> dict[str, int]:
    """Write 108 pairs of 76 patients with 834 labels, not split: patient00_1.nii.gz and so on, for `crossval`.

    The shares of the labels are the paper's: 12.9 % glands, 25.5 % apex and base, 25.7 % zones, 4.4 % urethra, 31.4 %
    specific to the patient. Which labels a pair lacks is drawn at random; the gland comes first and is never missing.

    Args:
        output_dir: new or empty.
        seed: the same seed gives the same cohort.

    Returns:
        The number of labels of each kind.

    Raises:
        InputError: the folder is not empty.
    """
    output_dir = new_folder(output_dir)
    random = np.random.default_rng(seed)
    counts = random.permutation(np.repeat(list(PAIRS_OF), list(PAIRS_OF.values())))
    pairs: dict[str, PhantomPair] = {}
    for patient, count in enumerate(tqdm(counts.tolist(), desc="phantom", unit="patient")):
        anatomy = Anatomy(np.random.default_rng([seed, patient]), keep=(1, 0.8, 0.5))
        for k in range(1, count + 1):
            rng = np.random.default_rng([seed, patient, k])
            made = with_peripheral_zone(simulate_pair(rng, anatomy=anatomy, **SHAPES))
            pairs[f"patient{patient:02d}_{k}"] = made
    every = [(case, m, kind_of(name)) for case, pair in pairs.items() for m, name in enumerate(pair.label_names)]
    kept: dict[str, list[int]] = {case: [] for case in pairs}
    found = {}
    for kind, wanted in LABELS.items():
        own = [(case, m) for case, m, its in every if its == kind]
        chosen = [own[i] for i in random.permutation(len(own))[:wanted]]
        found[kind] = len(chosen)
        for case, m in chosen:
            kept[case].append(m)
    for case, pair in pairs.items():
        channels = sorted(kept[case])
        labels = {f"{side}_label": getattr(pair, f"{side}_label")[..., channels] for side in ("moving", "fixed")}
        write_pair(output_dir, case, pair._replace(**labels))
    return found
