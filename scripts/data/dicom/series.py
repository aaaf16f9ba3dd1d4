"""Which DICOM frames are one volume: by series, size, direction, what their elements say, and what shares a place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.dicom.frames import REPEAT_TAGS, VOLUME_TAGS, Frame, by, frame_count, pixel_size
from scripts.data.dicom.pixels import equal

SAME_PLACE = 0.01  # mm
TURNED = 1e-3  # difference of direction cosines beyond which two images are not parallel
ACROSS = ("sagittal", "coronal", "axial")  # images across left–right, front–back, feet–head
PLACES = (  # what puts images in order that state no position
    ("InStackPositionNumber", "FrameContentSequence"),
    ("SliceLocation", None),
    ("InstanceNumber", None),
)
SHOWN = 6  # volumes or files that a message lists


class Volume(NamedTuple):
    """The frames of one volume, and what sets it apart from the others of its file or folder."""

    labels: dict[str, str]
    frames: list[Frame]


def one_volume(
    path: str | Path, frames: list[Frame], chosen: str | int | None = None, side: str | None = None
) -> list[Frame]:
    """The frames of the one volume that there is, or that is chosen; copies of a frame are left out, aloud.

    Args:
        chosen: its number in the list that the refusal shows, or NAME=VALUE of DICOM elements, separated by commas.
        side: "moving" or "fixed", whose option a refusal names.

    Raises:
        InputError: several volumes, which are listed; nothing that is chosen.
    """
    volumes = volumes_of(path, _without_copies(path, frames))
    option = f"--{side}_series" if side else "the series"
    if chosen is not None:
        volumes = _chosen(path, volumes, str(chosen).strip(), option)
    if len(volumes) > 1:
        how = f"choose one, for example {option} {_name(volumes[-1])}" if side else "keep the one that is meant"
        raise InputError(f"{path}: {_listed(volumes)}; {how}")
    return volumes[0].frames


def volumes_of(path: str | Path, frames: list[Frame]) -> list[Volume]:
    """Frames sorted into volumes."""
    volumes = [Volume({}, frames)]
    for split in (_by_series, _by_size, _by_direction, *map(_by_tag, VOLUME_TAGS), _by_place):
        volumes = [
            Volume(volume.labels | part.labels, part.frames)
            for volume in volumes
            for part in split(path, volume.frames)
        ]
    return volumes


def _split(frames: Sequence[Frame], name: str, text: Callable[[Frame], str]) -> list[Volume]:
    """Groups of equal text, labelled with it if there are several, in the order of the numbers they are."""
    groups = defaultdict(list)
    for frame in frames:
        groups[text(frame)].append(frame)
    ordered = sorted(groups.items(), key=lambda item: _number(item[0]))
    return [Volume({name: value} if len(ordered) > 1 else {}, group) for value, group in ordered]


def _number(text: str) -> tuple[bool, float, str]:
    """A text to sort by, numbers first."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _by_series(path: str | Path, frames: list[Frame]) -> list[Volume]:
    volumes = _split(frames, "SeriesInstanceUID", lambda f: f.text("SeriesInstanceUID"))
    numbers = _split(frames, "SeriesNumber", lambda f: f.text("SeriesNumber"))
    return numbers if len(numbers) == len(volumes) and "none" not in numbers[0].labels.values() else volumes


def _by_size(path: str | Path, frames: list[Frame]) -> list[Volume]:
    """By columns, rows and the distance between them."""
    groups: list[tuple[np.ndarray, list[Frame]]] = []
    for frame in frames:
        flat = pixel_size(frame)
        size = np.array([*frame.shape, *((0, 0) if flat is None else flat)])
        group = next((group for other, group in groups if np.allclose(size, other, rtol=1e-3)), None)
        if group is None:
            groups.append((size, group := []))
        group.append(frame)
    sizes = [f"{by(size[:2])}" + f" of {by(size[2:])} mm" * bool(size[2]) for size, _ in groups]
    return [Volume({"size": s} if len(groups) > 1 else {}, g) for s, (_, g) in zip(sizes, groups, strict=True)]


def _by_direction(path: str | Path, frames: list[Frame]) -> list[Volume]:
    groups: list[list[Frame]] = []
    for frame in frames:
        group = next((group for group in groups if _parallel(group[0], frame)), None)
        if group is None:
            groups.append(group := [])
        group.append(frame)
    if len(groups) == 1:
        return [Volume({}, frames)]
    planes = ["none" if g[0].axes is None else ACROSS[int(np.abs(g[0].normal).argmax())] for g in groups]
    return [Volume({"plane": plane}, group) for plane, group in zip(planes, groups, strict=True)]


def _parallel(one: Frame, other: Frame) -> bool:
    if one.axes is None or other.axes is None:
        return one.axes is other.axes
    return bool(np.abs(one.axes - other.axes).max() < TURNED)


def _by_tag(name: str) -> Callable[[str | Path, list[Frame]], list[Volume]]:
    """A split by an element that all images of one volume share."""

    def split(path: str | Path, frames: list[Frame]) -> list[Volume]:
        parts = _split(frames, name, lambda f: f.text(name, VOLUME_TAGS[name]))
        stated = [part for part in parts if part.labels.get(name) != "none"]  # left out of some, it tells nothing apart
        numbers_slices = max(len(part.frames) for part in parts) == 1
        return [Volume({}, frames)] if len(stated) < 2 or numbers_slices else parts

    return split


def _by_place(path: str | Path, frames: list[Frame]) -> list[Volume]:
    """Different images at one place belong to different volumes; equal ones are copies, left out aloud."""
    places = places_of(frames)
    if places is None:
        return [Volume({}, frames)]
    at = defaultdict(list)
    for frame, place in zip(frames, places, strict=True):
        at[place].append(frame)
    most = max(map(len, at.values()))
    if most == 1:
        return [Volume({}, frames)]
    if len(at) == 1:
        raise InputError(f"{path}: {most} images at one place, a film of a single slice; give the whole volume")
    place_of = {(f.path, f.index): place for f, place in zip(frames, places, strict=True)}
    for name, group in (VOLUME_TAGS | REPEAT_TAGS).items():
        parts = _split(frames, name, lambda f, n=name, g=group: f.text(n, g))
        repeats = max(max(Counter(place_of[f.path, f.index] for f in part.frames).values()) for part in parts)
        if len(parts) == most and repeats == 1:
            return parts
    several_files = len({f.path for f in frames}) >= most  # one file has no copies
    from_the_middle = sorted(at, key=lambda place: abs(2 * place - len(at)))  # the ends are alike: air
    if several_files and all(equal(at[place]) for place in from_the_middle):
        _say_copies(path, [frame for group in at.values() for frame in group[1:]])
        return [Volume({}, [group[0] for group in at.values()])]
    if min(map(len, at.values())) < most:
        one, other = next(group for group in at.values() if len(group) == most)[:2]
        raise InputError(f"{path}: different images at one place, {called(one)} and {called(other)}; keep one")
    ordered = [sorted(at[place], key=_recorded) for place in sorted(at)]
    return [Volume({f"image {k + 1} at each place": ""}, [group[k] for group in ordered]) for k in range(most)]


def _recorded(frame: Frame) -> tuple:
    """When an image was recorded, to sort by."""
    return _number(frame.text("AcquisitionTime")), _number(frame.text("InstanceNumber")), frame.index


def places_of(frames: Sequence[Frame]) -> list[int] | None:
    """The number of each frame's place along the normal, or of the place it states; None where nothing states any."""
    if all(f.position is not None and f.axes is not None for f in frames):
        along = np.array([f.position @ frames[0].normal for f in frames])
    else:
        along = next((found for name, group in PLACES if (found := numbers(frames, name, group)) is not None), None)
    if along is None:
        return None
    order = np.argsort(along, kind="stable")
    places = np.empty(len(frames), int)
    places[order] = np.concatenate([[0], np.cumsum(np.diff(along[order]) > SAME_PLACE)])
    return places.tolist()


def numbers(frames: Sequence[Frame], name: str, group: str | None = None) -> np.ndarray | None:
    """An element of each frame as a number, shape (N,); None where one lacks it, or shares it with all of its file."""
    if any(frame_count(f.header) > 1 and (group is None or name in f.header) for f in frames):
        return None
    try:
        found = np.array([float(f.find(name, group)) for f in frames])
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found).all() else None


def _without_copies(path: str | Path, frames: list[Frame]) -> list[Frame]:
    """Frames without those of files that are copies of others.

    Raises:
        InputError: two files say that they are one instance, and are not equal.
    """
    first, copies = {}, []
    for frame in frames:
        uid = frame.text("SOPInstanceUID")
        other = first.setdefault((frame.path if uid == "none" else uid, frame.index), frame)
        if other is frame:
            continue
        if not equal([other, frame]):
            raise InputError(
                f"{path}: {other.path.name} and {frame.path.name} differ, but have one SOPInstanceUID; keep one"
            )
        copies.append(frame)
    _say_copies(path, copies)
    return list(first.values())


def _say_copies(path: str | Path, copies: Sequence[Frame]) -> None:
    names = list(dict.fromkeys(called(frame) for frame in copies))
    if names:
        shown = ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
        checks.repaired(path, f"copies of other images of it are left out: {shown}")


def called(frame: Frame) -> str:
    """A frame as a message names it."""
    return frame.path.name + f" frame {frame.index + 1}" * (frame_count(frame.header) > 1)


def _name(volume: Volume) -> str:
    """What chooses a volume by its elements, or by its number, the last."""
    named = {name: value for name, value in volume.labels.items() if name in VOLUME_TAGS | REPEAT_TAGS | SERIES}
    whole = len(named) == len(volume.labels) and not any(set(value) & set(", ;'\"") for value in named.values())
    return ",".join(f"{name}={value}" for name, value in named.items()) if whole else "1"


SERIES = {"SeriesNumber": None, "SeriesInstanceUID": None}


def _listed(volumes: Sequence[Volume]) -> str:
    """What there is, numbered."""
    series = {volume.frames[0].text("SeriesInstanceUID") for volume in volumes}
    rows = []
    for k, (labels, frames) in enumerate(volumes[:SHOWN], start=1):
        title = frames[0].text("SeriesDescription")
        says = [f"{name}={value}" if value else name for name, value in labels.items()]
        says += [title] * (len(series) > 1 and title != "none")
        rows.append(f"{k}: {', '.join([*says, _count(frames, 'image')])}")
    what = f"{len(series)} DICOM series in one folder" if len(series) > 1 else _count(volumes, "volume")
    return f"{what} ({'; '.join(rows)}{'; …' * (len(volumes) > SHOWN)})"


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}" + "s" * (len(things) != 1)


def _chosen(path: str | Path, volumes: list[Volume], chosen: str, option: str) -> list[Volume]:
    """The volume of a number, or those whose frames have the given elements."""
    if chosen.isdecimal():
        if not 1 <= int(chosen) <= len(volumes):
            raise InputError(f"{path}: {option} is {chosen}; found {_listed(volumes)}")
        return [volumes[int(chosen) - 1]]
    wanted = [[text.strip() for text in part.partition("=")[::2]] for part in chosen.split(",")]
    if not all(name and value for name, value in wanted):
        raise InputError(f"{option} {chosen}: expected a number, or NAME=VALUE of DICOM elements, separated by commas")
    found = [volume for volume in volumes if all(_says(volume, name, value) for name, value in wanted)]
    if not found:
        raise InputError(f"{path}: none is {option} {chosen}; found {_listed(volumes)}")
    return found


def _says(volume: Volume, name: str, value: str) -> bool:
    """Whether an element of a volume has a value, as text or as a number."""
    said: Any = volume.labels.get(name)
    if said is None:
        said = volume.frames[0].text(name, (VOLUME_TAGS | REPEAT_TAGS).get(name))
    return said == value or _number(said)[:2] == _number(value)[:2] and not _number(value)[0]
