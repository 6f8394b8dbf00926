"""Many runs over all cores: worker processes that hold what every run needs, and that never outlive whoever asked for them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, TypeVar

from control_plane.errors import ControlPlaneError

J = TypeVar("J")
R = TypeVar("R")

#: of a worker process: what it does with a job
_WORK: Final[list[Callable[[Any], Any]]] = []


def each_in(processes: int, make: Callable[..., Callable[[J], R]], given: tuple[Any, ...], jobs: Sequence[J]) -> Iterator[R]:
    """What ``make(*given)`` makes of each job, in ``processes`` of them, in the order in which they are done. ``make`` is called once in
    each process; it, ``given`` and the jobs are pickled.

    Raises what a job raises, and ControlPlaneError where a process is gone. Whatever ends it: no process goes on with a job.
    """
    if processes == 1 or len(jobs) < 2:
        yield from map(make(*given), jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=_begin, initargs=(make, given))
    with pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(_do, job) for job in jobs]):
                yield future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():  # nobody waits for a run of minutes that nobody wants
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ControlPlaneError("a process that ran the comparison is gone (out of memory?); fewer --jobs need less") from error
            raise


def usable_cores() -> int:
    """Cores that this process may run on, where the system tells; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(make: Callable[..., Callable[[Any], Any]], given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; one of them speaks
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _WORK[:] = [make(*given)]


def _do(job: Any) -> Any:
    return _WORK[0](job)


def _end_with_the_parent() -> None:
    """Killed, it can tell nobody; its workers would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
