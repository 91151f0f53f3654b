"""Run a function in several processes joined by gloo, for the tests of Transformers that are about distribution.

The names in `TESTING_UTILITIES` and their signatures are those that Transformers' mixins call. Processes are kept from
one test to the next: starting one costs many times what a test of a tiny model does.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist

Target = Callable[..., None]
PATIENCE = 300
"""Seconds after which ranks that have not answered are taken to wait for each other."""


class Named:
    """A function as its module and name, under which another process finds it once the fetched tests are loaded."""

    def __init__(self, function: Target) -> None:
        self.module, self.name = function.__module__, function.__qualname__

    def find(self) -> Target:
        """Return the function."""
        from tests.transformers_suite import upstream

        prefix = f"{upstream.PACKAGE}."
        if self.module.startswith(prefix):
            home = upstream.load(self.module.removeprefix(prefix))
        else:
            home = import_module(self.module)
        found: Target = getattr(home, self.name)
        return found


def _pack(value: Any) -> Any:
    """Replace functions, also those inside of tuples, by their names."""
    if isinstance(value, tuple):
        return tuple(_pack(part) for part in value)
    return Named(value) if isinstance(value, FunctionType) else value


def _unpack(value: Any) -> Any:
    """Undo `_pack`."""
    if isinstance(value, tuple):
        return tuple(_unpack(part) for part in value)
    return value.find() if isinstance(value, Named) else value


def _serve(rank: int, connection: Connection) -> None:
    """Call what arrives with this process's rank and answer with a traceback, or with None where nothing was raised."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    import optimum_mla  # noqa: F401  (registers the classes that configs name)

    while True:
        try:
            target, args = connection.recv()
        except EOFError:  # the process that sends the work has ended
            return
        try:
            _unpack(target)(rank, *_unpack(args))
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())


class Ranks:
    """Processes that wait for work and end with this one.

    Args:
        count: How many there are.
    """

    kept: dict[int, Ranks] = {}  # noqa: RUF012  (one set of processes for each count, shared by all tests)

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(count)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, theirs), daemon=True) for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    @classmethod
    def of(cls, count: int) -> Ranks:
        """Return the processes that were started before, or start them."""
        return cls.kept.get(count) or cls.kept.setdefault(count, cls(count))

    def run(self, target: Target, args: tuple[Any, ...]) -> None:
        """Call `target(rank, *args)` in every process and wait for all.

        Raises:
            RuntimeError: A process raised, ended, or did not answer in time; the message holds its traceback.
        """
        for connection in self.connections:
            connection.send((_pack(target), _pack(args)))
        waiting, failures = set(self.connections), []
        while waiting:
            ready = wait(waiting, timeout=10 if failures else PATIENCE)
            if not ready:
                failures.append("A process did not answer: it waits for another.")
                break
            for connection in ready:
                waiting.discard(connection)  # type: ignore[arg-type]
                try:
                    answer = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answer = "A process ended."
                if answer is not None:
                    failures.append(answer)
        if failures:
            self.end()
            raise RuntimeError("\n".join(failures))

    def end(self) -> None:
        """End the processes; the next test starts others."""
        for count, ranks in list(self.kept.items()):
            if ranks is self:
                del self.kept[count]
        for process in self.processes:
            process.kill()
            process.join()


def start_rank_processes(target: Target, args: tuple[Any, ...], nprocs: int) -> None:
    """Call `target(rank, *args)` in `nprocs` processes and wait for all of them."""
    Ranks.of(nprocs).run(target, args)


def _in_group(rank: int, rendezvous: str, world_size: int, target: Target, args: tuple[Any, ...]) -> None:
    """Join a gloo group, call a function and leave the group."""
    # What Transformers reads where a model is spread over processes.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        target(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Target], Callable[..., None]]:
    """Return what turns `function(rank, *args)` into `function(*args)` on `world_size` processes of one gloo group."""

    def decorate(target: Target) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = str(Path(folder) / "rendezvous")
                start_rank_processes(_in_group, (rendezvous, world_size, target, args), world_size)

        return run

    return decorate


TESTING_UTILITIES: dict[str, Any] = {
    "run_distributed": run_distributed,
    "_start_rank_processes": start_rank_processes,
    "_get_distributed_device_type": lambda: "cpu",
    "_get_distributed_backend": lambda: "gloo",
    "_get_rank_device": lambda rank: torch.device("cpu"),
    "_set_rank_device": lambda rank, *args: None,
}
"""The content of `distributed_testing_utils`, which the mixins about distribution import."""
