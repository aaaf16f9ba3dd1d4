"""A bundle judged before it is run: what its configs would evaluate, call, import and load, without doing any of it.

A MONAI config is a program: text that begins with $ goes to Python's `eval`, import statements among it first of all,
what a `_target_` names is called, and logging.conf has fields that are evaluated. Here files are parsed, nothing more,
and whatever is not on the lists below is a finding. These lists say what does nothing but compute; a config decides
which files are read and written, and that is not judged. It helps a reader to judge a bundle, and is no sandbox.
"""

from __future__ import annotations

import ast
import configparser
import filecmp
import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.data.checks import InputError, check_hash
from scripts.data.root import ROOT

CONFIGS, LOGGING = (".json", ".yaml", ".yml"), (".conf", ".ini", ".cfg")
CODE = (".py", ".pyc", ".pyw", ".so", ".pyd", ".dll", ".dylib", ".sh", ".ts")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib", ".npy", ".npz")
MOST = 100_000  # entries of a config; a YAML file of some lines can hold billions by its aliases

# What an expression may name: these alone, whole. Modules hold other modules, `torch.os` for one.
NAMES = {
    *("torch.device", "torch.cuda.is_available", "torch.cuda.device_count", "torch.float32", "torch.float16"),
    *("numpy.float32", "np.float32", "glob.glob"),
    *("monai.utils.set_determinism", "monai.handlers.from_engine", "monai.engines.utils.default_prepare_batch"),
    "torch.distributed.destroy_process_group",
    *("abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min", "range", "round"),
    *("set", "sorted", "str", "sum", "tuple", "zip"),
}
ATTRIBUTES = {"attach", "cuda", "eval", "items", "keys", "parameters", "run", "shape", "split", "state_dict", "to"}
# to import; what is used counts
IMPORTS = {*("glob", "ignite", "math", "monai", "numpy", "pathlib", "sys", "torch", "traceback")}
NODES = (
    *(ast.Module, ast.Expr, ast.Constant, ast.Name, ast.Attribute, ast.Call, ast.keyword, ast.Subscript, ast.Slice),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Starred),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Lambda, ast.arguments, ast.arg),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)
REVIEWED = {  # SHA-256 of expressions that are allowed as they stand, although they reach into Python: this bundle's
    "5b063dde9567f4b800492f0ded7b04dc4411bc8ed77eceee040013600b14bfec": "finds the bundle's folder in its caller",
    "1c5276912d363c74d311c6fb67969d23574f34cfdea7f5aae78ed2985bb9e4a2": "puts the bundle's folder on sys.path",
}

# What `_target_` may name: what these modules define, not what they import, without what is dangerous all the same.
MODULES = (
    *("monai.transforms", "monai.networks.nets", "monai.networks.blocks", "monai.networks.layers", "monai.losses"),
    *("monai.metrics", "monai.inferers", "monai.engines", "monai.handlers", "monai.data", "ignite.metrics"),
    *("torch.nn", "torch.optim", "torch.utils.data.dataloader", "torch.utils.data.sampler"),
)
TARGETS = {"torch.distributed.get_rank", "torch.distributed.get_world_size"}  # and these
BARRED = {
    "monai.losses.perceptual": "runs code from the internet (torch.hub)",
    "monai.networks.nets.transchex": "downloads weights",
    "monai.data.torchscript_utils": "loads TorchScript, which is code",
    "monai.handlers.mlflow_handler": "sends files to a server",
    "monai.handlers.clearml_handlers": "sends files to a server",
}
SCRIPTS = {  # modules of this bundle made for configs; the others run configs, start processes or replace folders
    *("network.networks", "network.losses", "network.pyramid", "network.wrapped", "network.segmentation"),
    *("data.checks", "data.datalist", "data.gate", "data.pairs", "data.renamed", "data.weights"),
    *("registration.transforms", "registration.segmentation", "registration.segment", "registration.refine"),
    *("registration.ensemble", "registration.pairwise", "registration.outputs", "registration.precision"),
    *("registration.progress", "registration.view", "registration.index"),
    *("study.evaluation", "training.checkpoints", "training.cohort", "training.distributed", "training.engine"),
    *("training.failures", "training.gland_cubes", "training.pair_cubes", "bundle.settings"),
}
LOCATED = ("reader", "writer", "merger_cls")  # arguments whose text MONAI looks up and calls as it does `_target_`
PATCHED = "changes what another config calls, with arguments that are not seen here"
SAFE = {"weights_only": [True], "allow_pickle": [False], "_debug_": [False]}

DANGEROUS = {
    *("eval", "exec", "compile", "open", "input", "getattr", "setattr", "globals", "locals", "vars", "breakpoint"),
    *("os", "sys", "subprocess", "builtins", "importlib", "runpy", "pty", "pdb", "code", "ctypes", "socket", "shutil"),
    *("pickle", "marshal", "shelve", "urllib", "requests", "tempfile", "multiprocessing", "antigravity", "pathlib"),
    *("system", "popen", "Popen", "modules", "f_locals", "f_globals", "load", "hub", "jit", "package", "ops"),
    *("classes", "load_library", "cpp_extension", "save", "bundle", "apps", "instantiate", "optional_import"),
}


class Entry(NamedTuple):
    """Something in a file that would be executed.

    Attributes:
        file, where: path below the folder that is judged, and id of the config's entry.
        what: its text.
        finding: why it is not on the lists; empty if it is.
    """

    file: str
    where: str
    what: str
    finding: str = ""


def judge(path: str | Path) -> list[Entry]:
    """What a config file, or everything in a bundle's folder, would execute.

    Raises:
        InputError: not there, or a file of another kind.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise InputError(f"{path}: not found; give a config or a bundle's folder")
    folder = path if path.is_dir() else path.parent
    if path != folder and path.suffix.lower() not in (*CONFIGS, *LOGGING):
        raise InputError(f"{path}: not a config; expected {', '.join((*CONFIGS, *LOGGING))}, or a folder")
    root = next((place for place in (folder, folder.parent) if (place / "scripts").is_dir()), ROOT)
    files = [path] if path != folder else _files(folder)
    return [
        entry._replace(file=file.relative_to(folder).as_posix()) for file in files for entry in _judge_file(file, root)
    ]


def _files(root: Path) -> Iterator[Path]:
    """Files, links and hidden folders below a folder, in order; links and hidden folders are not gone into."""
    for folder, below, files in os.walk(root):
        kept = [name for name in below if not name.startswith(".") and not (Path(folder) / name).is_symlink()]
        yield from sorted(Path(folder) / name for name in {*files, *below} - {*kept})
        below[:] = sorted(kept)


def _judge_file(path: Path, root: Path) -> list[Entry]:
    suffix = path.suffix.lower()
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        return [Entry("", "", f"link to {os.readlink(path)}", "leaves the folder")]
    if path.is_dir():
        return [] if path.is_symlink() else [Entry("", "", "hidden folder", "not looked into; remove it")]
    if suffix in CONFIGS:
        return list(_judge_config(path, root))
    if suffix in LOGGING:
        return list(_judge_logging(path))
    if suffix in CODE and not _is_ours(path, root):
        return [Entry("", "", "code", "runs when the bundle is used; read it")]
    if suffix in PICKLES and not _is_ours(path, root):
        return [Entry("", "", "pickle", "can run code unless it is loaded as tensors only (weights_only=True)")]
    return []


def _is_ours(path: Path, root: Path) -> bool:
    """Whether a file is, byte for byte, the one of that name in the bundle that runs this check."""
    ours = ROOT / path.relative_to(root)
    try:
        check_hash(path)
    except InputError:
        return False
    return ours.is_file() and filecmp.cmp(path, ours, shallow=False)


def _judge_config(file: Path, root: Path) -> Iterator[Entry]:
    from monai.bundle import ConfigParser

    try:
        content = ConfigParser.load_config_file(str(file))  # plain JSON, or YAML by a safe loader: as MONAI reads it
    except Exception as error:  # whatever a hostile file raises
        yield Entry("", "", "", f"cannot be read: {type(error).__name__}")
        return
    todo: list[tuple[str, Any, Any, Any]] = [("", content, None, None)]  # id, value, key, the dictionary it is in
    count = 0
    while todo:
        where, value, key, owner = todo.pop()
        count += 1
        if count > MOST:
            yield Entry("", where, "", f"more than {MOST} entries; not judged further")
            return
        path = f"{where}::" if where else ""
        if isinstance(value, dict):
            todo += reversed([(f"{path}{k}", v, k, value) for k, v in value.items()])
        elif isinstance(value, list):
            todo += reversed([(f"{path}{i}", v, key, owner) for i, v in enumerate(value)])
        elif isinstance(value, str) and value.startswith("$"):
            yield Entry("", where, value, judge_expression(value))
        elif isinstance(value, str) and value.startswith("%") and ConfigParser.split_path_id(value[1:])[0]:
            yield Entry("", where, value, "takes another file's content; judge that too")
        last = str(key).replace("::", "#").split("#")[-1].removeprefix("+")  # the key of an overlay may be a path
        if last == "_target_" or (last in LOCATED and isinstance(value, str)):
            patch = "" if where[:1] != "+" and key == last or str(value).startswith("scripts.") else PATCHED
            yield Entry("", where, str(value), judge_target(value, root) or patch)
        elif last in SAFE and value not in SAFE[last]:
            yield Entry("", where, str(value), "lets pickles run code, or opens a debugger")
        elif last == "_mode_" and value != "default" and not str(owner.get("_target_")).startswith("scripts."):
            yield Entry("", where, str(value), "is called later, with what is not seen here")
        elif last == "bundle_root" and where == last and _digest(value) not in REVIEWED:
            yield Entry("", where, str(value), "moves the folder that code is imported from")


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def as_evaluated(text: str) -> str:
    """The Python that MONAI makes of text with $ before it: references become look-ups, inside quotes as well."""
    from monai.bundle import ReferenceResolver

    return ReferenceResolver.update_refs_pattern(text, dict.fromkeys(ReferenceResolver.match_refs_pattern(text)))[1:]


def judge_expression(text: str) -> str:
    """Why an expression, text with $ before it, is a finding; empty if all it names is on the lists."""
    if _digest(text) in REVIEWED:
        return ""
    try:
        tree = ast.parse(as_evaluated(text))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "cannot be parsed"
    if tree.body and isinstance(tree.body[0], ast.Import | ast.ImportFrom):
        return _judge_import(tree.body[0])
    found = _Expression(tree).found
    return _finding(found) if found else ""


def _judge_import(node: ast.Import | ast.ImportFrom) -> str:
    """MONAI imports what the first statement names, and leaves the rest of the text."""
    if isinstance(node, ast.ImportFrom):
        return _finding([f"{node.module}.{alias.name}" for alias in node.names])
    return _finding([alias.name for alias in node.names if alias.name not in IMPORTS])


class _Expression(ast.NodeVisitor):
    """Collects what is not on the lists."""

    def __init__(self, tree: ast.AST) -> None:
        nodes = list(ast.walk(tree))
        self.found: list[str] = []
        self.bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.visit(tree)

    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, NODES):
            self.found.append(type(node).__name__)
        super().generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id not in NAMES | self.bound:
            self.found.append(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = ast.unparse(node)
        if path in NAMES:
            return
        root = path.split(".")[0]
        if path.replace(".", "").isidentifier() and root not in self.bound:
            self.found.append(path)
            return
        if node.attr not in ATTRIBUTES:
            self.found.append(f".{node.attr}")
        self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        of_config = isinstance(node.value, ast.Name) and node.value.id == "__local_refs"  # what @id becomes
        if not (of_config and isinstance(node.slice, ast.Constant)):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        named = isinstance(node.func, ast.Name) and node.func.id not in self.bound
        if not named and not isinstance(node.func, ast.Attribute):
            self.found.append(f"a call of {ast.unparse(node.func)}")
        self.generic_visit(node)


def _finding(names: list[str]) -> str:
    """Names that are not on the lists, the dangerous ones said to be so."""
    names = list(dict.fromkeys(names))
    bad = [name for name in names if any(part in DANGEROUS or part[:1] == "_" for part in name.split("."))]
    said = [f"dangerous: {', '.join(bad)}"] if bad else []
    rest = [name for name in names if name not in bad]
    return "; ".join(said + ([f"not on the list: {', '.join(rest)}"] if rest else []))


@functools.cache
def _components():
    """MONAI's table of its own names, as `_target_` is looked up; of installed modules only."""
    import ignite.metrics  # noqa: F401
    from monai.bundle import ComponentLocator

    return ComponentLocator()


def judge_target(target: Any, root: Path = ROOT) -> str:
    """Why what a `_target_` names is a finding; empty if it is on the lists.

    Args:
        target: the value of `_target_`.
        root: the bundle's folder, whose `scripts` it may name.
    """
    if not isinstance(target, str) or target[:1] in ("$", "@", "%"):
        return "what is called is computed"
    if target in TARGETS:
        return ""
    if target.startswith("scripts."):
        return _judge_script(target, root)
    modules = _components().get_component_module_name(target)
    path = f"{modules if isinstance(modules, str) else modules[0]}.{target}" if modules else target
    module, _, name = path.rpartition(".")
    # only modules that are loaded already are asked: a name in a file must not import anything
    thing = vars(sys.modules[module]).get(name) if module in sys.modules else None
    defined = getattr(thing, "__module__", "") or ""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)) or not _within(defined, MODULES):
        return _finding([path])
    return next((f"dangerous: {why}" for barred, why in BARRED.items() if _within(defined, [barred])), "")


def _within(module: str, packages) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _judge_script(target: str, root: Path) -> str:
    module, _, name = target.removeprefix("scripts.").rpartition(".")
    file = root / "scripts" / f"{module.replace('.', '/')}.py"
    if module not in SCRIPTS:
        return _finding([target])
    if not file.is_file() or not _is_ours(file, root):
        return "code of that bundle, scripts/; read it"
    defined = [node.name for node in ast.parse(file.read_text("utf-8")).body if hasattr(node, "name")]
    return "" if name in defined else f"dangerous: {target} is not defined there, but imported"


def _judge_logging(path: Path) -> Iterator[Entry]:
    """`logging.config.fileConfig` evaluates class, args and kwargs of handlers, and defaults of formatters."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text("utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        yield Entry("", "", "", f"cannot be read: {type(error).__name__}")
        return
    harmless = {"StreamHandler", "logging.StreamHandler", "logging.Formatter", "(sys.stdout,)", "(sys.stderr,)", "()"}
    for section in parser.sections():
        for option in ("class", "args", "kwargs", "defaults"):
            text = parser.get(section, option, fallback=None)
            if text is not None:
                finding = "" if text.strip() in harmless else "is evaluated, or writes elsewhere than to the console"
                yield Entry("", f"{section}.{option}", text, finding)


def table(entries: list[Entry]) -> str:
    """Entries to read, the findings last; what a file says is escaped, so that it cannot steer a terminal."""
    lines = []
    for entry in sorted(entries, key=lambda entry: bool(entry.finding)):
        verdict = f"FINDING {entry.finding}" if entry.finding else f"ok {REVIEWED.get(_digest(entry.what), '')}".strip()
        where = "  ".join(ascii(text)[1:-1] for text in (entry.file, entry.where) if text)
        lines.append(f"{where}  {ascii(entry.what)[1:-1]}\n    {verdict}")
    found = sum(bool(entry.finding) for entry in entries)
    lines.append(f"{len(entries)} entries that would be executed, {found} findings. Nothing was executed here.")
    return "\n".join(lines)
