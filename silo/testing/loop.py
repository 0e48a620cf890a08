"""A deterministic event loop: virtual time, seeded interleavings, deadlocks found instead of waited for.

A *scenario* is a coroutine function that takes a `SimulatedClock`. `run_simulated` runs it on a loop of its
own on which

* time stands still while anything can run and then jumps to the next timer, so that an hour costs nothing;
* tasks that can run at the same instant run in an order drawn from the seed. Plain callbacks keep the order
  that asyncio promises for them;
* a call in an executor happens on the loop's own thread at one drawn instant, and its future completes at a
  later one, so that what other tasks do before, between and after is explored. An executor with a limited
  number of workers makes its calls wait for one another, in order;
* nothing can come from outside: no sockets, no threads, no signals. When nothing is ready and no timer is
  set, nothing will ever happen again, and `Deadlock` tells which task waits where.

The same seed gives the same run on the same version of Python, as long as the scenario takes time and chance
only from the clock and does not depend on the order of a set of objects. `SimulatedClock.digest` names the
run so far, for tests of exactly that. `explore` runs a scenario over many seeds; whatever is raised carries
a note with its seed.

The loop overrides one private method of asyncio's base loop and uses its two queues; everything else,
futures, tasks, locks and timeouts, is asyncio's own and unchanged. `silo.testing.process` adds processes
that can be killed.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import heapq
import random
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar, TypeVarTuple

from silo.abc import Clock

__all__ = ["Deadlock", "SimulatedClock", "SimulatedLoop", "SimulationError", "explore", "run_simulated"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ROUNDS_MAX = 2_000_000
"""A scenario that goes on for longer than this (some ten seconds of real time) will not end."""

CLEANUP_ROUNDS_MAX = 10_000
"""What is left, after the limit, for cancelled tasks to end."""

WALL_START = 2_000_000_000.0
"""Every simulation begins in May 2033."""

HOP_MAX_S = 0.02
"""Longest drawn wait before and after a call in an executor; about two seeks of a slow disk."""


class SimulationError(Exception):
    """The scenario itself is at fault: it left tasks behind, or it does not end."""


class Deadlock(SimulationError):
    """Nothing is ready and no timer is set, or the scenario runs in circles: it will never end."""


class Mortal(Protocol):
    """Something that owns tasks and callbacks and may die; `silo.testing.process` has the one that there is."""

    killed: bool

    def lives_on(self) -> bool:
        """Asked before each of its steps; after the first False nothing of it ever runs again."""


owner: contextvars.ContextVar[Mortal | None] = contextvars.ContextVar("owner", default=None)
"""Whose context this is. Tasks, timers and executor calls inherit it from where they were started."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """The loop itself. Scenarios see it only through asyncio and their `SimulatedClock`."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, seed: int, *, rounds_max: int = ROUNDS_MAX) -> None:
        super().__init__()
        self.seed = seed
        self.random = random.Random(f"scenario {seed}")
        """Chance for the scenario; apart from the scheduler's, so that drawing here shifts nothing there."""
        self._order = random.Random(f"order {seed}")
        # Code that reads another clock than the loop's sees times that make no sense, and fails at once.
        self._now = float(self._order.randrange(10_000, 1_000_000))
        self._rounds_left = rounds_max
        self._trace = hashlib.blake2b(digest_size=16)
        self._task_count = 0
        self._numbers: weakref.WeakKeyDictionary[asyncio.Task[Any], int] = weakref.WeakKeyDictionary()
        self._owners: weakref.WeakKeyDictionary[asyncio.Task[Any], Mortal] = weakref.WeakKeyDictionary()
        self._calls: weakref.WeakKeyDictionary[asyncio.Future[Any], Mortal] = weakref.WeakKeyDictionary()
        self._dropped: list[asyncio.Handle] = []
        self._unwinding = False
        self._workers: weakref.WeakKeyDictionary[Executor, list[float]] = weakref.WeakKeyDictionary()

    def time(self) -> float:
        return self._now

    def digest(self) -> str:
        """A name of everything that has run so far, in its order and at its time."""
        return self._trace.hexdigest()

    def create_task(self, coro: Any, *, name: object = None, **options: Any) -> asyncio.Task[Any]:
        # asyncio counts over all loops of a process; a run must not depend on what ran before it.
        self._task_count += 1
        task = super().create_task(coro, name=str(name or f"task-{self._task_count}"), **options)
        self._numbers[task] = self._task_count
        mortal = (options.get("context") or contextvars.copy_context()).get(owner)
        if mortal is not None:
            self._owners[task] = mortal
        return task

    def living_tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks that have not ended, in the order of their creation, without those of the dead."""
        tasks = [
            task
            for task in asyncio.all_tasks(self)
            if (mortal := self._owners.get(task)) is None or not mortal.killed
        ]
        return sorted(tasks, key=self._numbers.__getitem__)

    def unwind(self) -> None:
        """The scenario is over: the tasks of the dead end now, by cancellation, and nobody hears of it.

        Their timers and calls are forgotten; the rest of what they missed is made up for, since the end of a
        task is itself a chain of callbacks.
        """
        self._unwinding = True
        dead = [task for task, mortal in self._owners.items() if mortal.killed]
        if not dead:
            return
        self.set_exception_handler(lambda _loop, _context: None)
        calls = [future for future, mortal in self._calls.items() if mortal.killed]
        timers = [timer for timer in self._scheduled if (mortal := _owner_of(timer)) and mortal.killed]
        doomed: list[asyncio.Future[Any] | asyncio.Handle] = [*dead, *calls, *timers]
        for each in doomed:
            each.cancel()
        self._ready.extend(handle for handle in self._dropped if not isinstance(handle, asyncio.TimerHandle))

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Call ``func`` after one drawn wait and complete the future after another.

        A future cancelled before the call may or may not have been in time to prevent it, as with threads.
        """
        future: asyncio.Future[T] = self.create_future()
        mortal = owner.get()
        if mortal is not None:
            self._calls[future] = mortal

        def call() -> None:
            if future.cancelled() and self._order.random() < 0.5:
                return
            try:
                result = func(*args)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                self.call_later(self._draw_hop(), deliver, future.set_exception, error)
            else:
                self.call_later(self._draw_hop(), deliver, future.set_result, result)

        def deliver(settle: Callable[[Any], None], outcome: object) -> None:
            if not future.done():
                settle(outcome)

        self.call_at(self._draw_start(executor), call)
        return future

    def _draw_hop(self) -> float:
        """Half of the hops are as good as instant: near misses are where the bugs are."""
        return self._order.choice((0.0, self._order.uniform(0.0, HOP_MAX_S)))

    def _draw_start(self, executor: Executor | None) -> float:
        """When the call happens: after its drawn wait, and not before a worker is free."""
        workers: int | None = getattr(executor, "_max_workers", None)
        if executor is None or workers is None:
            return self._now + self._draw_hop()
        free = self._workers.setdefault(executor, [0.0] * workers)
        start = max(self._now, free[0]) + self._draw_hop() + 1e-6
        heapq.heapreplace(free, start)
        return start

    def _run_once(self) -> None:
        """One round: everything that is ready now, in the drawn order; what it makes ready waits for the next."""
        self._rounds_left -= 1
        if self._rounds_left < 0:
            self._rounds_left = CLEANUP_ROUNDS_MAX
            raise Deadlock(f"the scenario runs in circles{self._waiting()}")
        self._take_due_timers()
        for handle in self._draw_order():
            if handle.cancelled():
                continue
            if not self._lives_on(handle):
                self._dropped.append(handle)
                continue
            self._trace.update(f"{self._now} {self._label(handle)}\n".encode())
            handle._run()

    def _lives_on(self, handle: asyncio.Handle) -> bool:
        mortal = _owner_of(handle)
        return mortal is None or self._unwinding or mortal.lives_on()

    def _take_due_timers(self) -> None:
        timers = self._scheduled
        while timers and timers[0].cancelled():
            heapq.heappop(timers)
        if not self._ready and not self._stopping:
            if not timers:
                raise Deadlock(f"nothing will ever happen again{self._waiting()}")
            self._now = max(self._now, timers[0].when())
        while timers and timers[0].when() <= self._now:
            self._ready.append(heapq.heappop(timers))

    def _draw_order(self) -> list[asyncio.Handle]:
        """Empty the ready queue. Tasks come in any order, plain callbacks in theirs, mixed in any way.

        Tasks are sorted first, because the order in which they became ready may come from a set of tasks,
        and so from their addresses in memory.
        """
        ready = list(self._ready)
        self._ready.clear()
        if len(ready) < 2:
            return ready
        tasks = [handle for handle in ready if self._number(handle)]
        callbacks = iter([handle for handle in ready if not self._number(handle)])
        tasks.sort(key=self._number)
        self._order.shuffle(tasks)
        places = [True] * len(tasks) + [False] * (len(ready) - len(tasks))
        self._order.shuffle(places)
        shuffled = iter(tasks)
        return [next(shuffled if place else callbacks) for place in places]

    def _number(self, handle: asyncio.Handle) -> int:
        """The number of the task that the handle continues, or 0 for a plain callback."""
        owner = getattr(getattr(handle, "_callback", None), "__self__", None)
        return self._numbers.get(owner, 0) if isinstance(owner, asyncio.Task) else 0

    def _label(self, handle: asyncio.Handle) -> str:
        if number := self._number(handle):
            return f"task {number}"
        callback = getattr(handle, "_callback", None)
        callback = getattr(callback, "func", callback)  # a functools.partial
        return str(getattr(callback, "__qualname__", type(callback).__qualname__))

    def _waiting(self) -> str:
        return "".join(f"\n  {task.get_name()} waits in {_place(task)}" for task in self.living_tasks())

    def _write_to_self(self) -> None:
        """Nothing sleeps in a system call that would have to be woken."""


def _owner_of(handle: asyncio.Handle) -> Mortal | None:
    context: contextvars.Context = handle._context  # type: ignore[attr-defined]  # get_context() is of 3.12
    return context.get(owner)


def _place(task: asyncio.Task[Any]) -> str:
    """Where a suspended task waits: its coroutines from the outermost to the innermost, and what they await."""
    steps: list[str] = []
    waits: Any = task.get_coro()
    while (frame := getattr(waits, "cr_frame", None)) is not None:
        steps.append(f"{waits.__qualname__} ({frame.f_code.co_filename}:{frame.f_lineno})")
        waits = waits.cr_await
    return " > ".join(steps) if steps else repr(task)


class SimulatedClock(Clock):
    """The loop's virtual time and seeded chance, behind the port that all of Silo takes them from.

    Several clocks on one loop stand for several hosts; ``wall_skew_s`` sets the calendars apart.
    """

    def __init__(self, loop: SimulatedLoop, *, wall_skew_s: float = 0.0) -> None:
        self.loop = loop
        self._wall_offset_s = WALL_START - loop.time() + wall_skew_s

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.loop.seed

    @property
    def random(self) -> random.Random:
        """Seeded chance for the scenario's own decisions."""
        return self.loop.random

    def monotonic(self) -> float:
        return self.loop.time()

    def boottime(self) -> float:
        return self.loop.time()

    def wall(self) -> float:
        return self.loop.time() + self._wall_offset_s

    def token(self, size: int) -> bytes:
        return self.loop.random.randbytes(size)

    def digest(self) -> str:
        """A name of everything that has run so far: equal for equal seeds."""
        return self.loop.digest()


Scenario = Callable[[SimulatedClock], Coroutine[Any, Any, T]]


def run_simulated(scenario: Scenario[T], *, seed: int, rounds_max: int = ROUNDS_MAX) -> T:
    """Run a scenario to its end and return what it returns.

    Whatever it raises leaves with a note that names the seed. Raises `Deadlock` when it cannot end, and
    `SimulationError` when it leaves tasks behind. Not to be called where an event loop runs already.
    """
    try:
        with asyncio.Runner(loop_factory=lambda: SimulatedLoop(seed, rounds_max=rounds_max)) as runner:
            return runner.run(_run_scenario(scenario))
    except BaseException as error:
        name = getattr(scenario, "__qualname__", repr(scenario))
        error.add_note(f"simulated with seed {seed}; again with run_simulated({name}, seed={seed})")
        raise


async def _run_scenario(scenario: Scenario[T]) -> T:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    try:
        result = await scenario(SimulatedClock(loop))
        left = [task for task in loop.living_tasks() if task is not asyncio.current_task()]
    finally:
        loop.unwind()
    if left:
        names = ", ".join(f"{task.get_name()} in {_place(task)}" for task in left)
        raise SimulationError(f"the scenario left tasks behind: {names}")
    return result


def explore(scenario: Scenario[T], *, seeds: Iterable[int] = range(100)) -> list[T]:
    """Run a scenario once per seed and return the results. The first failure ends it, and names its seed."""
    return [run_simulated(scenario, seed=seed) for seed in seeds]
