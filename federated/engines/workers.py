"""Worker processes: a round's clients shared out over forked copies of this process.

A worker inherits model and data when it is forked, at the first batch of messages (what is cached lies in
shared memory), and then serves one batch after another through a pair of pipes (``federated.engines.pipes``).
When what workers inherited is no longer what this process has (an aggregator merged into the base weights),
they are forked anew. Results are those of one process, bit by bit.

A worker that dies fails the client that it was running, and no other: a new worker runs the rest of its
share. So it does, too, when one client takes half of the time that is left; that client may go on until the
deadline, when every worker that still runs one is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
import selectors
import signal
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from federated.engines.pipes import (
    Answer,
    FrameReader,
    Request,
    answer_from_frame,
    answer_to_frame,
    request_from_frame,
    request_to_frame,
    write_frame,
)
from models.errors import UserError

log = logging.getLogger(__name__)

_LONGEST_WAIT = 3600.0
"""Seconds; the system's calls take no more than some days."""

_KILL_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""

Work = Callable[[Request], Iterator[Answer]]
"""Runs messages one after another; may end early, at a deadline."""


def check_workers(num_workers: int) -> None:
    """Refuse workers where forking is impossible or unsafe.

    Raises:
        UserError: Says what stands in the way.
    """
    if num_workers < 2:
        return
    if not sys.platform.startswith("linux"):
        raise UserError(
            f"engine.workers={num_workers} forks processes, which needs Linux: set engine.workers=1"
        )
    if torch.get_num_threads() > 1:
        raise UserError(
            f"engine.workers={num_workers} with engine.threads={torch.get_num_threads()}: a process with "
            "several torch threads cannot be forked safely; set engine.threads=1 (the workers use the cores)"
        )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise UserError(
            f"engine.workers={num_workers}: a process that uses a GPU cannot be forked; set "
            "engine.workers=1, or model.device=cpu"
        )


class Workers:
    """Processes forked from this one that run clients.

    Args:
        num_workers: How many.
        work: What each of them does with its share of a batch of messages.
        inherited: Stands for what workers have from this process; they are forked anew when it changes.
    """

    def __init__(self, num_workers: int, work: Work, inherited: Callable[[], object] = lambda: None) -> None:
        check_workers(num_workers)
        self._num_workers = num_workers
        self._work = work
        self._inherited = inherited
        self._forked_with: object = None
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        weakref.finalize(self, _end_all, self._workers, self._owner)

    def run(
        self, messages: Sequence[Message], states: Sequence[RecordDict], deadline: float | None
    ) -> Generator[Answer, None, None]:
        """Run messages; yield answers as they come, and none for what the deadline left out.

        Close the generator when giving up before its end: that ends the processes that still run clients.

        Args:
            messages: Each to another client; worker k runs messages k, k + num_workers, ...
            states: What each message's client remembers.
            deadline: On the monotonic clock, or None.
        """
        try:
            self._bring_up_to_date(min(self._num_workers, len(messages)))
            busy = self._workers[: len(messages)]
            step = len(busy)
            for first, worker in enumerate(busy):
                worker.give(Request(messages[first::step], states[first::step], deadline))
            yield from self._collect(busy, deadline)
        except BaseException:  # what is still running has no one to answer to
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the next batch of messages forks new ones."""
        _end_all(self._workers, self._owner)

    def _bring_up_to_date(self, num_needed: int) -> None:
        """Fork what is missing of so many; all anew where something has changed that they inherited."""
        inherited = self._inherited()
        if inherited != self._forked_with or not all(worker.is_done for worker in self._workers):
            self.close()
        self._forked_with = inherited
        for worker in [worker for worker in self._workers if worker.has_ended()]:
            self._workers.remove(worker)
        while len(self._workers) < num_needed:
            self._workers.append(_fork(self._work, self._workers))

    def _collect(self, busy: Sequence[_Worker], deadline: float | None) -> Iterator[Answer]:
        """Read until all workers have said that they are done, or have died, or the time is over."""
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            while selector.get_map():
                running: list[_Worker] = [key.data for key in selector.get_map().values()]
                if deadline is not None and time.monotonic() >= deadline:
                    self._give_up(running)
                    return
                stuck = [worker for worker in running if time.monotonic() >= worker.stuck_from()]
                for worker in stuck:
                    self._go_on(worker.leave_rest(), selector)
                times = [key.data.stuck_from() for key in selector.get_map().values()]
                for key, _ in selector.select(_seconds_until(times, deadline)):
                    yield from self._read(key.data, selector)

    def _read(self, worker: _Worker, selector: selectors.BaseSelector) -> Iterator[Answer]:
        """Take what a worker has written; bury it where it has died, end it where it is one too many."""
        is_alive = worker.reader.read_some()
        yield from worker.answers_so_far()
        if not worker.is_done and is_alive:
            return
        selector.unregister(worker.answers)
        if not is_alive:
            self._workers.remove(worker)
            answer, rest = worker.bury()
            if answer is not None:
                yield answer
            self._go_on(rest, selector)
        elif worker.has_left_rest or len(self._workers) > self._num_workers:
            self._workers.remove(worker)
            worker.end()

    def _go_on(self, rest: Request, selector: selectors.BaseSelector) -> None:
        """Let a new worker run what another one cannot."""
        if rest.messages:
            worker = _fork(self._work, self._workers)
            self._workers.append(worker)
            worker.give(rest)
            selector.register(worker.answers, selectors.EVENT_READ, worker)

    def _give_up(self, running: Sequence[_Worker]) -> None:
        """Kill the workers that the deadline found running."""
        for worker in running:
            self._workers.remove(worker)
            worker.end()


def _seconds_until(times: Sequence[float], deadline: float | None) -> float | None:
    """Return the seconds to wait at most; None where there is no deadline."""
    return (
        None if deadline is None else min(max(0.0, min([*times, deadline]) - time.monotonic()), _LONGEST_WAIT)
    )


@dataclass(eq=False)
class _Worker:
    """One forked process, seen from its parent.

    Attributes:
        process_id: Its number.
        requests: Where requests go, a file descriptor.
        answers: Where answers come from.
        reader: Reads them.
        request: What it is running.
        waiting: The places of the messages in it that are not answered, in order; it is on the first.
        patience_ends: When, on the monotonic clock, its client has taken half of the time that was left.
        has_left_rest: Whether another runs its other clients; then only the answer of this one is wanted.
        is_done: Whether it waits for the next request, or nothing of it is wanted any more.
    """

    process_id: int
    requests: int
    answers: int
    reader: FrameReader = field(init=False)
    request: Request = field(default_factory=lambda: Request((), (), None))
    waiting: list[int] = field(default_factory=list)
    patience_ends: float = math.inf
    has_left_rest: bool = False
    is_done: bool = True

    def __post_init__(self) -> None:
        self.reader = FrameReader(self.answers)

    def give(self, request: Request) -> None:
        """Send its share of a batch; should it die meanwhile, reading its answers will show it."""
        self.request, self.waiting, self.is_done = request, list(range(len(request.messages))), False
        self._be_patient()
        with contextlib.suppress(BrokenPipeError):
            write_frame(self.requests, request_to_frame(request))

    def answers_so_far(self) -> Iterator[Answer]:
        """Yield the answers that have been read; an empty frame says that there are no more."""
        for frame in self.reader.complete_frames():
            if self.is_done:  # it has gone on with what another one runs
                return
            if not frame:
                self.is_done = True
                continue
            place, answer = answer_from_frame(frame, self.request.messages)
            self.waiting.remove(place)
            self.is_done = self.has_left_rest
            self._be_patient()
            yield answer

    def _be_patient(self) -> None:
        deadline, now = self.request.deadline, time.monotonic()
        self.patience_ends = math.inf if deadline is None else now + (deadline - now) / 2

    def stuck_from(self) -> float:
        """Return when the rest of its share, if there is any, waits no longer."""
        return self.patience_ends if len(self.waiting) > 1 else math.inf

    def unanswered(self, first: int = 0) -> Request:
        """Return what it has not answered, without the first so many."""
        messages, states = self.request.messages, self.request.states
        places = self.waiting[first:]
        return Request([messages[p] for p in places], [states[p] for p in places], self.request.deadline)

    def leave_rest(self) -> Request:
        """Take away all but the client that it is on, and return it."""
        rest = self.unanswered(1)
        self.waiting, self.has_left_rest = self.waiting[:1], True
        return rest

    def has_ended(self) -> bool:
        """Whether it has died while it waited; then nothing is left of it."""
        ended, _ = _wait(self.process_id, os.WNOHANG)
        if ended:
            self._close_pipes()
        return bool(ended)

    def bury(self) -> tuple[Answer | None, Request]:
        """Return the answer for the client that it was on when it died, and what it had not begun."""
        self._close_pipes()
        _, status = _wait(self.process_id)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        guess = " (out of memory?)" if code == -signal.SIGKILL else ""
        reason = f"its worker process {how}{guess}"
        log.warning("a worker process %s%s", how, guess)
        if not self.waiting:
            return None, self.unanswered()
        message = self.request.messages[self.waiting[0]]
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        return Answer(message, Message(error, reply_to=message), None), self.unanswered(1)

    def end(self) -> None:
        """Kill it: it holds nothing that was not sent."""
        self._close_pipes()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process_id, signal.SIGKILL)
        _wait(self.process_id)

    def _close_pipes(self) -> None:
        os.close(self.requests)
        os.close(self.answers)


def _wait(process_id: int, options: int = 0) -> tuple[int, int]:
    """Return ``os.waitpid``'s answer; one that somebody else has waited for has ended, nobody knows how."""
    try:
        return os.waitpid(process_id, options)
    except ChildProcessError:
        return process_id, 0


def _end_all(workers: list[_Worker], owner: int) -> None:
    """End processes and forget them; a forked copy of their owner must leave them alone."""
    while workers and os.getpid() == owner:
        workers.pop().end()


def _fork(work: Work, others: Sequence[_Worker]) -> _Worker:
    """Return a new worker; the child stays inside until its parent closes the pipe, or is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pipes = [*os.pipe(), *os.pipe()]
    requests_out, requests_in, answers_out, answers_in = pipes
    try:
        process_id = os.fork()
    except OSError:
        for pipe in pipes:
            os.close(pipe)
        raise
    if process_id:
        os.close(requests_out)
        os.close(answers_in)
        return _Worker(process_id, requests_in, answers_out)
    status = 1
    try:
        end_with(parent)
        for pipe in (requests_in, answers_out, *(pipe for o in others for pipe in (o.requests, o.answers))):
            os.close(pipe)  # else a worker would outlive this process as long as another one does
        _serve(work, requests_out, answers_in)
        status = 0
    finally:
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
            log.error("a worker process cannot go on (%s: %s)", type(error).__name__, error)
            log.debug("a worker process cannot go on", exc_info=error)  # no client's: the grid has those
        os._exit(status)  # nothing of the parent's may run again here: no handlers, no buffers


def end_with(parent: int) -> None:
    """Have the system kill this process once its parent has ended, even if that was killed.

    Else a client that sleeps would sleep on, with the lock of the run's folder in its hands.
    """
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _serve(work: Work, requests: int, answers: int) -> None:
    """Run one request after another, in the child."""
    gc.freeze()  # collecting what was inherited would copy its pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = FrameReader(requests)
    while reader.read_some():
        for frame in reader.complete_frames():
            request = request_from_frame(frame)
            places = {message.metadata.message_id: n for n, message in enumerate(request.messages)}
            for answer in work(request):
                place = places[answer.message.metadata.message_id]
                write_frame(answers, answer_to_frame(answer, place))
            sys.stdout.flush()
            write_frame(answers, [])
