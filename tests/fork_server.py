"""Whole commands of probecache, each in a process of its own, without importing torch each time.

`Commands` starts one fresh process, which imports everything once, has one thread, and forks a
child per command; the child runs `probecache.cli.main`. So a command may be killed for real, a
hundred times in a minute. Nothing is flushed to disk meanwhile: a kill, unlike power loss, takes
nothing from the kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = (
    "transformers.models.llama.modeling_llama",
    "probecache.api",
    "probecache.streaming",
    "probecache.workflow.train",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code or minus the signal, and what it said."""

    code: int
    out: str
    err: str


class Commands:
    """Context manager: the process that forks commands."""

    def __enter__(self) -> Commands:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, *arguments: object, count: int = 1, flock: bool = True, **more: Any) -> list:
        """Start the same command so many times at once; gives the process ids.

        Args:
            flock: False makes file locks have no effect.
            more: `pause`: the process stops, as by Ctrl-Z, once it has recorded so many times what
                is on disk, which it then does after every batch.
        """
        words = [str(word) for word in arguments]
        return self._ask({"words": words, "count": count, "flock": flock, **more})

    def wait(self) -> list[Ended]:
        """Wait for what was started."""
        return [Ended(*one) for one in self._ask(None)]

    def run(self, *arguments: object, **more: Any) -> Ended:
        """Start a command and wait for it."""
        self.start(*arguments, **more)
        (ended,) = self.wait()
        return ended

    def _ask(self, request: Any) -> Any:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


# ---------------------------------------------------------------- in the process that forks


def serve() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    children: list[tuple[int, list[Any]]] = []
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            answer: Any = [ended(*child) for child in children]
            children = []
        else:
            children = begin_together(request)
            answer = [pid for pid, _ in children]
        print(json.dumps(answer), flush=True)


def begin_together(request: dict[str, Any]) -> list[tuple[int, list[Any]]]:
    gate, open_gate = os.pipe()
    children = []
    for _ in range(request["count"]):
        said = [os.memfd_create("out"), os.memfd_create("err")]
        child = os.fork()
        if child == 0:
            os.close(open_gate)
            os.read(gate, 1)
            run_command(request, said)
        children.append((child, said))
    os.close(gate)
    os.close(open_gate)  # all begin now
    return children


def run_command(request: dict[str, Any], said: list[int]) -> None:
    from probecache import cli
    from probecache.store import writer

    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, handle in enumerate([nothing, *said]):
        os.dup2(handle, number)
    writer._RECORD_S = 0.05
    writer._RECORD_SHARE = 0
    os.fsync = lambda _: None  # what a killed process has written, the kernel has
    if "pause" in request:
        writer._RECORD_S = 0
        pause_after(writer.CacheWriter, request["pause"])
    if not request["flock"]:
        import fcntl

        fcntl.flock = lambda *_: None
    code = 1
    try:
        cli.main(request["words"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pause_after(writer: Any, records: int) -> None:
    real, calls = writer.record, []

    def record(self: Any) -> None:
        real(self)
        calls.append(None)
        if len(calls) == records:
            os.kill(os.getpid(), signal.SIGSTOP)

    writer.record = record


def ended(child: int, said: list[int]) -> list[Any]:
    _, status = os.waitpid(child, 0)
    words = []
    for handle in said:
        words.append(os.pread(handle, 1 << 20, 0).decode(errors="replace"))
        os.close(handle)
    return [os.waitstatus_to_exitcode(status), *words]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve()
