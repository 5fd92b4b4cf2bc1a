"""Small training runs in forked children that are killed at any moment; imports are paid once.

`Forks` starts `python -m tests.killing`, a process that imports everything and computes nothing
(so that it can be forked): a request comes in as a line of JSON, the answer goes out as one.
What is killed is a whole process group: the training, and every process it started.
"""

import ctypes
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LONGEST = 240  # seconds for one child; then it hangs, and is killed


class Forks:
    """The other end of the pipe: `train` runs `tests.train_small.run` in a child of the server."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.killing"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._server = subprocess.Popen(command, **pipes)

    def train(self, folder: Path, name: str, values: dict, **how) -> dict:
        """What became of a run: {"status", "notes": [[seconds, words], ...], "log"}.

        how: resume, processes, record, files, kill_at as in train_small. kill [n, seconds]:
        SIGKILL so long after its n-th step began. die_at [n, manner]: before the n-th change to
        its folder, or ("torn") a few bytes into it. status 0: it came to its end.
        """
        request = dict(folder=str(folder), name=name, values=values, **how)
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def close(self):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


# -- in the server ---------------------------------------------------------------------------


def attempt(request: dict) -> dict:
    """Fork a child that trains, watch it, kill it where asked, and wait for all it started."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()  # a process group of its own
        os.close(reading)
        _train(request, writing)
    os.close(writing)
    notes = _watch(reading, child, *request.get("kill", (0, 0.0)))
    os.close(reading)
    _, status = os.waitpid(child, 0)
    try:
        while True:  # its own children, who are ours now
            os.waitpid(-child, 0)
    except ChildProcessError:
        pass
    log = Path(request["folder"], request["name"] + ".log").read_text()
    return {"status": os.waitstatus_to_exitcode(status), "notes": notes, "log": log[-4000:]}


def _watch(reading: int, child: int, kill_after: int, wait: float) -> list[tuple[float, str]]:
    """What the child notes until the last process of its tree is gone."""
    notes, rest, end = [], b"", time.monotonic() + LONGEST
    kill_when = None
    while True:
        until = kill_when or end
        if not select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
            os.killpg(child, signal.SIGKILL)
            kill_when, end = None, time.monotonic() + 10
            continue
        if not (read := os.read(reading, 65536)):
            return notes
        *lines, rest = (rest + read).split(b"\n")
        notes += [(time.monotonic(), line.decode()) for line in lines]
        begun = sum(words.startswith("step") for _, words in notes)
        if kill_after and begun >= kill_after:
            kill_after, kill_when = 0, time.monotonic() + wait


def _import_all():
    """What a training run imports on its way, imported now."""
    import accelerate
    import torch._dynamo
    import torch.distributed.launcher.api
    import torch.utils.tensorboard  # noqa: F401

    from tests import train_small

    train_small.model(train_small.data(53).tokenizer, dropout=0.0)  # transformers is a lazy one
    assert accelerate.PartialState._shared_state == {}


def serve():
    import torch

    torch.set_num_threads(1)  # no pool of threads: none of them would live on in a fork
    _import_all()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: no zombies of killed children
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)
    os._exit(0)  # at once


# -- in the child ----------------------------------------------------------------------------


def _train(request: dict, notes: int):
    from tests import train_small

    status, folder = 1, Path(request["folder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / f"{request['name']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        tempfile.tempdir = str(folder)  # what a killed launch leaves behind goes with the folder
        train_small.Dying.notes = notes
        _note_writes(lambda words: os.write(notes, f"{words}\n".encode()))
        if "die_at" in request:
            _die_at_change(folder / request["name"], *request["die_at"])
        train_small.launch(
            request["folder"],
            request["name"],
            request["values"],
            request.get("resume", False),
            request.get("kill_at", -1),
            request.get("record", False),
            request.get("files", False),
            processes=request.get("processes", 1),
        )
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _note_writes(note: Callable[[str], object]):
    """Note when the writing of a checkpoint begins, and when it has its name."""
    import torch

    save, replace = torch.save, os.replace

    def noting_save(state, file, *args, **options):
        if hasattr(file, "name"):  # not the bytes that processes send each other
            note(f"writing {_name(file.name)}")
        save(state, file, *args, **options)

    def noting_replace(source, target, **options):
        replace(source, target, **options)
        if str(target).endswith(".pth"):
            note(f"written {_name(target)}")

    torch.save, os.replace = noting_save, noting_replace


def _name(path) -> str:
    """state.pth, for .state.pth.0123456789ab.tmp too."""
    return re.sub(r"^\.(.+)\.\w+\.tmp$", r"\1 (temporary)", Path(path).name)


def _change(event: str, args: tuple) -> tuple[str, Path] | None:
    """(what, which file) of an audit event that is about to change a file."""
    what = {"open": "write", "os.rename": "rename", "os.remove": "remove"}.get(event)
    if what is None or not isinstance(args[0], str | os.PathLike):
        return None
    if what == "write" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    path = Path(args[1] if what == "rename" else args[0])
    if what == "remove":
        if args[1] != -1:  # shutil.rmtree goes by open folders
            path = Path(os.readlink(f"/proc/self/fd/{args[1]}")) / path
        if not path.exists():
            return None
    return what, path


def _die_at_change(folder: Path, number: int, manner: str):
    """SIGKILL before the `number`-th change to a run's folder, or in the middle of its write.

    manner "torn": the kernel lets so many bytes through and then kills (RLIMIT_FSIZE, SIGXFSZ).
    """
    from tests import train_small

    seen = [0]
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def hook(event: str, args: tuple):
        what, path = _change(event, args) or ("", Path())
        if folder not in path.parents or "tfevents" in path.name:
            return
        seen[0] += 1
        if seen[0] != number:
            return
        os.write(train_small.Dying.notes, f"dies at {what} {_name(path)}\n".encode())
        if manner == "before" or what != "write":
            os.kill(os.getpid(), signal.SIGKILL)
        appended = path.stat().st_size if "a" in (args[1] or "") else 0
        limit = appended + (100_003 if ".pth" in path.name else 97)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
