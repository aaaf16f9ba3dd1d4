"""What was given to a config: settings that it has, and texts as they were typed.

MONAI adds a setting that a config does not have and says nothing, Fire reads `2024_01_05` as a number and what follows
a # as a comment, and a # that is left becomes `::` in a config, wherever it stands.
"""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

from scripts.bundle.command_line import LISTS, TEXTS, like, parted
from scripts.data.checks import InputError
from scripts.data.files import listed

MONAI_CLI = ("monai", "bundle", "__main__.py")
SEPARATOR = re.compile("#|::")  # of the parts of an id
REFERENCE = re.compile(r"[@%]((?:\w|#|::)+)")
TRACKED = ("tracking_uri", "experiment_name", "run_name", "save_execute_config")  # of MONAI's tracking by MLflow


class Given(NamedTuple):
    """A run as it was asked for.

    Attributes:
        workflow: MONAI's, whose config is parsed and of which nothing but code has been resolved.
        files: its config and overlays.
        settings: what overrides them.
        typed: the same as text, where it comes from the command line of `monai.bundle run`.
    """

    workflow: Any
    files: Any
    settings: Mapping[str, Any]
    typed: Mapping[str, str]


def check_settings(settings: Iterable[str], files: Any, owner: str, others: Iterable[str] = ()) -> None:
    """Refuse settings that a config does not have, naming the nearest that it has.

    A setting may be new where another value refers to it by @, and an argument of a `_target_` that takes it.

    Args:
        settings: names, `a#b` for what is nested, or a mapping of them to values.
        files: the config and its overlays, as MONAI takes them.
        owner: whose settings these are, for the message.
        others: more names that could have been meant.

    Raises:
        InputError: there is one; a file cannot be read as a config.
    """
    from monai.bundle import ConfigParser

    try:
        config = ConfigParser.load_config_files(files)
        parser = ConfigParser(config=config)
    except Exception as error:  # whatever a damaged or misnamed file raises
        raise InputError(f"{_named(files)}: cannot be read as a config: {str(error).splitlines()[0]}") from error
    values = list(settings.values()) if isinstance(settings, Mapping) else []
    referred = {SEPARATOR.sub("#", name) for text in _texts([config, *values]) for name in REFERENCE.findall(text)}
    ids = {SEPARATOR.sub("#", name.removeprefix("+")): name for name in settings}
    for id, name in ids.items():
        parent, _, last = id.rpartition("#")
        if id in parser or parent in ids or any(f"{one}#".startswith(f"{id}#") for one in referred):
            continue
        around = parser.get(parent) if parent else config
        arguments = _arguments(parser, around)
        if arguments is None or last in arguments:
            continue
        if isinstance(around, dict):
            known = [f"{parent}#{key}" if parent else key for key in (*around, *arguments) if key[:1] != "_"]
        else:
            known = list(_ids(config))
        raise InputError(f"--{name}: no such option of {owner}{like(name, [*known, *others])}")


def take_as_given() -> None:
    """Refuse settings that the config at work does not have, and hand it paths and other texts as they were typed.

    The first that a config calls. It finds its run as `bundle_root` does, in the functions that called it: MONAI's
    `run` and `create_workflow`, or `scripts.bundle.workflow.run_config`. Settings of a `ConfigWorkflow` made in Python
    are its author's: nothing is done.

    Raises:
        InputError: see `check_settings`.
    """
    given = _given()
    if given is None:
        return
    own = set(inspect.signature(type(given.workflow).__init__).parameters)
    own |= {given.workflow.run_id, given.workflow.init_id, given.workflow.final_id}
    if given.settings.get("tracking") is not None:
        own |= set(_tracking_settings(given.settings["tracking"]))
    settings = {k: v for k, v in given.settings.items() if SEPARATOR.split(k.removeprefix("+"))[0] not in own}
    settings = {k: v for k, v in settings.items() if not k.startswith("_meta_")}
    check_settings(settings, given.files, _named(given.files), own - {"self", "override"})
    resolved = given.workflow.parser.ref_resolver.resolved_content
    for name in {*TEXTS, *LISTS} & set(settings):
        value = _as_typed(settings[name], given.typed.get(name), several=name in LISTS)
        if _is_plain(value):
            resolved[name] = value


def _given() -> Given | None:
    workflow = None
    for frame, _ in traceback.walk_stack(None):
        here, where = frame.f_locals, (frame.f_globals.get("__name__"), frame.f_code.co_name)
        if where == ("monai.bundle.workflows", "initialize"):
            workflow = here["self"]
        elif where == ("scripts.bundle.workflow", "run_config") and workflow is not None:
            return Given(workflow, here["files"], here["settings"], {})
        elif where == ("monai.bundle.scripts", "create_workflow") and workflow is not None:
            typed = sys.argv[1:] if Path(sys.argv[0]).parts[-3:] == MONAI_CLI else []
            return Given(workflow, here["config_file"], here["_args"], dict(parted(typed)[0]))
    return None


def _as_typed(value: Any, text: str | None, several: bool) -> Any:
    """The text that was typed, unless it is one that Fire is meant to read: a quoted text, None, a list of several."""
    if not text or text == "None" or (text[0] == text[-1] and text[0] in "'\""):
        return value
    if not several:
        return text
    found = listed(text)
    return found[0] if len(found) == 1 else found


def _is_plain(value: Any) -> bool:
    """Whether a value is text that MONAI is not meant to evaluate, or several such."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, str) and _is_plain(one) for one in value)
    return isinstance(value, str) and value[:1] not in ("$", "@", "%")


def _arguments(parser: Any, around: Any) -> Sequence[str] | None:
    """The arguments that what a part of a config calls takes; none if it calls nothing, None if any."""
    if not isinstance(around, dict) or "_target_" not in around:
        return ()
    from monai.bundle import ConfigComponent

    target = locate(str(ConfigComponent(around, locator=parser.locator).resolve_module_name()))
    try:
        parameters = inspect.signature(target).parameters.values() if callable(target) else None
    except ValueError:  # of what is written in C
        parameters = None
    if parameters is None or any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return [*ConfigComponent.non_arg_keys, *(one.name for one in parameters)]


def _tracking_settings(tracking: Any) -> Iterable[str]:
    """The settings that MONAI's tracking of experiments reads."""
    from monai.bundle import ConfigParser
    from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

    known = DEFAULT_EXP_MGMT_SETTINGS.get(tracking) if isinstance(tracking, str) else None
    found = known or ConfigParser.load_config_files(tracking)
    return [*TRACKED, *found.get("configs", {})]


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and dictionaries, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _ids(config: Any, above: str = "") -> Iterator[str]:
    """The id of everything in a config, `a#b` for what is nested."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield f"{above}{key}"
        if isinstance(value, dict | list):
            yield from _ids(value, f"{above}{key}#")


def _named(files: Any) -> str:
    """Config files by their names, for messages."""
    return ", ".join(Path(str(one)).name for one in ([files] if isinstance(files, str) else files or ["the config"]))
