"""Several runs in one process that take turns: a thread for each, of which only one works at any moment.

A run passes its turn on after every training step and scored batch (`pass_on`), and while it waits for the device
(`settle`) or for a disk (`aside`). On a GPU each run has a CUDA stream of its own, so kernels of different runs
overlap. Process-wide state (random streams, switches, warning filters) is saved and restored with the turn, so every
run computes exactly what it computes alone.

Outside of `take`, `pass_on`, `aside` and `own_stream` do nothing, and `settle` synchronises.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from anomaly_lab import switches

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Own = tuple[Callable[[], Any], Callable[[Any], None]]
"""Global state that each run has for itself: how it is read, and how it is put back."""


class Stopped(BaseException):
    """Raised in every run at its next turn to end it; not a failure of the run."""


def _random_streams() -> list[tuple[torch.Generator, torch.Tensor]]:
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return [(generator, generator.get_state()) for generator in generators]


def _set_random_streams(states: list[tuple[torch.Generator, torch.Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


def _filters() -> list[Any]:
    return warnings.filters  # type: ignore[return-value]


def _set_filters(filters: list[Any]) -> None:
    warnings.filters = filters  # else the catch_warnings() of one run would restore another's


OWN: tuple[Own, ...] = (
    (_random_streams, _set_random_streams),
    (switches.current, switches.apply),
    (_filters, _set_filters),
)


class _Run:
    """One job, and its copy of the process-wide state."""

    def __init__(self, number: int, job: Callable[[], Any], states: list[Any]) -> None:
        self.number, self.job, self.states = number, job, states
        self.turn = threading.Lock()  # released by the run that passes the turn on
        self.turn.acquire()


class _Group:
    def __init__(self, jobs: Sequence[Callable[[], Any]], own: Sequence[Own]) -> None:
        self._own = own
        self._at_first = [read() for read, _ in own]
        self._left = deque(enumerate(jobs))
        self._waiting: deque[_Run] = deque()  # first come, first served
        self._taken = True  # whether some run has the turn; at first the maker of the group
        self._alive = 0
        self._threads: list[threading.Thread] = []
        self._mutex = threading.Lock()  # guards the five above; never held for long
        self.stop = False
        self._over = threading.Event()
        self.results: dict[int, Any] = {}
        self.fault: BaseException | None = None

    def begin(self, at_once: int) -> None:
        with self._mutex:
            for _ in range(min(at_once, len(self._left))):
                self._next_job()
        if not self._alive:
            self._over.set()
        self._leave()

    def _next_job(self) -> None:
        number, job = self._left.popleft()
        run = _Run(number, job, self._at_first)
        self._alive += 1
        self._waiting.append(run)
        # Daemon threads: a second Ctrl-C ends the process at once.
        self._threads.append(threading.Thread(target=self._live, args=(run,), name=f"run {number}", daemon=True))
        self._threads[-1].start()

    def _live(self, run: _Run) -> None:
        _mine.group, _mine.run = self, run
        try:
            self._take_up(run)
            self.results[run.number] = run.job()
        except Stopped:
            pass
        except BaseException as error:  # jobs record the failures of runs; this ends all of them
            self.fault, self.stop = self.fault or error, True
        try:
            with self._mutex:
                self._alive -= 1
                if self._left and not self.stop:
                    self._next_job()
        except BaseException as error:  # no thread can be started any more
            self.fault, self.stop, self._alive = self.fault or error, True, self._alive - 1
        over = not self._alive
        self._leave()
        if over:
            self._over.set()

    def wait(self) -> None:
        """Join all threads. A daemon thread alive at interpreter exit would be killed inside C++ code."""
        self._over.wait()
        for thread in self._threads:
            thread.join()

    def pass_on(self, run: _Run) -> bool:
        """Give each waiting run a turn; False if none waits."""
        if self.stop:
            raise Stopped
        if not self._waiting:
            return False
        run.states = [read() for read, _ in self._own]
        with self._mutex:
            self._waiting.append(run)
            following = self._waiting.popleft()
        following.turn.release()
        self._take_up(run)
        return True

    @contextmanager
    def aside(self, run: _Run) -> Iterator[None]:
        run.states = [read() for read, _ in self._own]
        self._leave()
        try:
            yield
        finally:
            with self._mutex:
                if self._taken:
                    self._waiting.append(run)
                else:
                    self._taken = True
                    run.turn.release()
            self._take_up(run)

    def _leave(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().turn.release()
            else:
                self._taken = False

    def _take_up(self, run: _Run) -> None:
        run.turn.acquire()
        for (_, put_back), state in zip(self._own, run.states, strict=True):
            put_back(state)
        if self.stop:
            raise Stopped

    def finish(self) -> None:
        for (_, put_back), state in zip(self._own, self._at_first, strict=True):
            put_back(state)


class _Mine(threading.local):
    group: _Group | None = None
    run: _Run


_mine = _Mine()


def take(jobs: Sequence[Callable[[], T]], at_once: int, own: Sequence[Own] = ()) -> list[T]:
    """What each of ``jobs`` returns, in their order. ``at_once`` of them take turns; the next begins when one ends.

    An exception in a job or in the calling thread (Ctrl-C) stops every job at its next turn and is raised at the end.

    Args:
        own: further global state that each job has for itself, beside torch's and Python's.
    """
    group = _Group(jobs, (*OWN, *own))
    group.begin(at_once)
    try:
        group.wait()
    except BaseException:
        group.stop = True
        group.wait()
        raise
    finally:
        group.finish()
    if group.fault is not None:
        raise group.fault
    return [group.results[number] for number in range(len(jobs))]


def shared() -> bool:
    """Whether the calling thread is one of several runs that take turns."""
    return _mine.group is not None


def pass_on() -> None:
    """Give each waiting run a turn. Call it between steps, never while a graph is captured."""
    if _mine.group is not None:
        _mine.group.pass_on(_mine.run)


def after_step(detector: Any) -> None:
    """Call the detector's ``after_step`` and give each waiting run a turn."""
    if detector.has("after_step"):
        settle(detector.device)  # the method reads values; other runs work meanwhile
    detector.after_step()
    pass_on()


@contextmanager
def aside() -> Iterator[None]:
    """Give the turn away during the block, which must touch neither torch nor the device."""
    if _mine.group is None:
        yield
    else:
        with _mine.group.aside(_mine.run):
            yield


def settle(device: torch.device) -> None:
    """Synchronise the calling run with ``device``; meanwhile other runs have their turns.

    It polls: a CUDA graph must not be captured while another thread blocks on the device.
    """
    if device.type != "cuda":
        return
    import torch

    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        if _mine.group is None or not _mine.group.pass_on(_mine.run):
            done.synchronize()


def own_stream(device: torch.device) -> None:
    """Give the calling thread a CUDA stream of its own if its run takes turns with others.

    Call before the run's first work on ``device``: tensors must not cross streams without synchronisation.
    """
    if device.type == "cuda" and _mine.group is not None:
        import torch

        torch.cuda.set_stream(torch.cuda.Stream(device))
