"""`python -m …` in a process of its own without the seconds of importing PyTorch and MONAI each time.

A clean process imports them once and is forked for each command. What it knows of the bundle is what a new interpreter
would know: nothing.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "monai.bundle", "monai.engines", "monai.handlers", "ignite.engine"]
    # what they import at a first use: PyTorch of every optimiser, matplotlib of a contour, PIL of a picture
    + ["torch._dynamo", "contourpy", "PIL.PngImagePlugin", "SimpleITK"]
)


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """`python -m ARGUMENTS` from folder `cwd`, with nothing but that on the path of modules."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(*arguments, cwd=cwd, folder=folder)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        said = [(Path(folder) / name).read_text("utf-8") for name in ("stdout", "stderr")]
    if process.exitcode == -9:
        raise subprocess.TimeoutExpired(arguments, timeout, *said)
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def start(*arguments: str, cwd: Path, folder: str | Path) -> multiprocessing.Process:
    """The same, begun and not waited for; its two streams go into files of `folder`."""
    process = FORKS.Process(target=_command, args=(arguments, str(cwd), str(folder), dict(os.environ)))
    process.start()
    return process


def _command(arguments: tuple[str, ...], cwd: str, folder: str, environment: dict[str, str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update({k: v for k, v in environment.items() if k != "PYTHONPATH"})
    os.chdir(cwd)
    here = Path(__file__).resolve().parent
    sys.path[:] = [cwd] + [p for p in sys.path if p and Path(p).resolve() not in (here, here.parent)]
    sys.argv = [arguments[0], *arguments[1:]]
    multiprocessing.set_start_method("fork", force=True)  # else it would start a server of its own, as this one was
    gc.freeze()  # what it was forked with is no garbage of the command
    code = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
