"""The words of a command line -> arguments of a verb: text stays as it was typed, a mistake is one line.

Fire, which shows the help of the verbs, would read `2024_01_05` and `1e5` as numbers, `12,34` as a pair and what
follows a # as a comment, and answers an unknown option with pages.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.data.checks import InputError
from scripts.data.files import listed

# Settings of the configs that are text whatever they look like, and those that are one or several
TEXTS = (
    *("dataset_dir", "output_dir", "ckpt_dir", "initial_weights", "weights_name"),
    *("initial_transform", "start", "patient_pattern", "device", "cohort_device", "cohort_dir"),
)
LISTS = ("ckpt_path", "segmentation_path", "start_path", "formats")
FLAG = re.compile("--|-[a-zA-Z]")  # how an option begins: -1 is a number
SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parted(words: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """The options among the words of a command line, each with its value or None, and the other words."""
    options: list[tuple[str, str | None]] = []
    others, left = [], list(words)
    while left:
        word = left.pop(0)
        if not FLAG.match(word):
            others.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            value = left.pop(0) if left and not FLAG.match(left[0]) else None
        options.append((name.replace("-", "_"), value))
    return options, others


def call(verbs: Mapping[str, Callable[..., None]], words: Sequence[str]) -> None:
    """Call the verb that the first word names with what the others say.

    Raises:
        InputError: no such verb; see `arguments`.
    """
    name = words[0].replace("-", "_")
    if name not in verbs:
        raise InputError(f"{words[0]}: no such verb{like(name, verbs, '')}; python -m scripts --help lists them")
    verbs[name](**arguments(verbs[name], words[1:]))


def arguments(verb: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a verb, by name, of the types that it declares.

    Options that are none of its own are settings, where it takes settings; those it has to judge itself.

    Args:
        verb: a function; text, numbers and switches are told apart by its annotations.
        words: `--name value`, `--name=value`, `--switch`, `--noswitch`, or a value alone, in the verb's order.

    Raises:
        InputError: an unknown option, a value too many, too few, or of another kind.
    """
    known = inspect.signature(verb).parameters
    hints = typing.get_type_hints(verb)
    open_ended = any(one.kind is one.VAR_KEYWORD for one in known.values())
    own = [name for name, one in known.items() if one.kind is not one.VAR_KEYWORD]
    options, others = parted(words)
    found: dict[str, Any] = {}
    for name, text in options:
        initial = [one for one in own if len(name) == 1 and one.startswith(name)]
        name = initial[0] if len(initial) == 1 else name
        if text is None and name not in own and name[:2] == "no" and (name[2:] in own or open_ended):
            name, text = name[2:], "False"
        if name in own:
            found[name] = read(name, text, hints[name])
        elif open_ended and name:
            found[name] = read_setting(name, text)
        else:
            raise InputError(f"--{name}: no such option of {verb.__name__}{like(name, own)}")
    for name in own:
        if others and name not in found:
            found[name] = read(name, others.pop(0), hints[name])
    if others:
        raise InputError(f"{others[0]}: one value too many for {verb.__name__}; name it by an option")
    lacking = [f"--{name}" for name in own if name not in found and known[name].default is inspect.Parameter.empty]
    if lacking:
        raise InputError(f"{verb.__name__} needs {' and '.join(lacking)}; --help says more")
    return found


def read(name: str, text: str | None, hint: Any) -> Any:
    """A value of the kind that an annotation declares; `text` is None where the option stands alone.

    Raises:
        InputError: it is none.
    """
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    if text is None and bool in kinds:
        return True
    if not text:
        raise InputError(f"--{name}: give a value; one that begins with - is written --{name}=VALUE")
    if str in kinds:
        return text
    if text == "None" and types.NoneType in kinds:
        return None
    if bool in kinds:
        if text.lower() not in SWITCHES:
            raise InputError(f"--{name} {text}: expected True or False")
        return SWITCHES[text.lower()]
    if {list[int], list[float]} & kinds:
        value = fire_value(text)
        several = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in several):
            raise InputError(f"--{name} {text}: expected numbers, for example '[1,2]'")
        return value if float in kinds and not isinstance(value, list | tuple) else several
    number = int if int in kinds else float
    try:
        if "_" in text:
            raise ValueError(text)
        return number(text)
    except ValueError:
        raise InputError(f"--{name} {text}: expected a {'whole ' * (number is int)}number") from None


def read_setting(name: str, text: str | None) -> Any:
    """A setting of a config: as Python reads it, if it is not one that is text or a list of texts.

    Raises:
        InputError: it is, and has no value.
    """
    if name not in (*TEXTS, *LISTS):
        return True if text is None else fire_value(text)
    if not text:
        raise InputError(f"--{name}: give a value; one that begins with - is written --{name}=VALUE")
    if text == "None":
        return None
    several = listed(text) if name in LISTS else [text]
    return several[0] if len(several) == 1 else several


def fire_value(text: str) -> Any:
    """A number, a list, a dictionary … as Fire reads it; what it cannot read is text."""
    from fire.parser import DefaultParseValue

    return DefaultParseValue(text)


def like(name: str, known: Sequence[str] | Mapping[str, Any], dashes: str = "--") -> str:
    """ "; did you mean --NAME?" for the known name that is most like one, or nothing if none is."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {dashes}{found[0].replace('_', '-') if not dashes else found[0]}?" if found else ""
