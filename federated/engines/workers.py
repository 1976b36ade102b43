"""Worker processes: a round's clients shared out over forked copies of this process.

Where it stands in a round: inside the in-process grid, when `engine.workers` is above 1. A worker inherits
model and data when it is forked, at the first batch of messages (what is cached lies in shared memory), and
then serves one batch after another through a pair of pipes (``federated.engines.pipes``). When what workers
inherited is no longer what this process has (an aggregator merged into the base weights), they are forked
anew. Results are those of one process, bit by bit. A worker that dies takes only its own clients with it:
they get error replies, and another takes its place.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import signal
import sys
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
            self._bring_up_to_date()
            busy = self._workers[: len(messages)]
            step = len(busy)
            for first, worker in enumerate(busy):
                worker.give(Request(messages[first::step], states[first::step], deadline))
            yield from self._collect(busy)
        except BaseException:  # what is still running has no one to answer to
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the next batch of messages forks new ones."""
        _end_all(self._workers, self._owner)

    def _bring_up_to_date(self) -> None:
        """Fork what is missing or has died; all anew where something has changed that they inherited."""
        inherited = self._inherited()
        if inherited != self._forked_with or not all(worker.is_done for worker in self._workers):
            self.close()
        self._forked_with = inherited
        for worker in [worker for worker in self._workers if worker.has_ended()]:
            self._workers.remove(worker)
        while len(self._workers) < self._num_workers:
            self._workers.append(_fork(self._work, self._workers))

    def _collect(self, busy: Sequence[_Worker]) -> Iterator[Answer]:
        """Read until all workers have said that they are done, or have died."""
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            while selector.get_map():
                for key, _ in selector.select():
                    worker = key.data
                    is_alive = worker.reader.read_some()
                    yield from worker.answers_so_far()
                    if worker.is_done or not is_alive:
                        selector.unregister(worker.answers)
                    if not is_alive:
                        self._workers.remove(worker)
                        yield from worker.bury()


@dataclass(eq=False)
class _Worker:
    """One forked process, seen from its parent.

    Attributes:
        process_id: Its number.
        requests: Where requests go, a file descriptor.
        answers: Where answers come from.
        reader: Reads them.
        messages: What it is running.
        waiting: Which of them it has not answered.
        is_done: Whether it waits for the next request.
    """

    process_id: int
    requests: int
    answers: int
    reader: FrameReader = field(init=False)
    messages: Sequence[Message] = ()
    waiting: set[int] = field(default_factory=set)
    is_done: bool = True

    def __post_init__(self) -> None:
        self.reader = FrameReader(self.answers)

    def give(self, request: Request) -> None:
        """Send its share of a batch; should it die meanwhile, reading its answers will show it."""
        self.messages, self.waiting, self.is_done = request.messages, set(range(len(request.messages))), False
        with contextlib.suppress(BrokenPipeError):
            write_frame(self.requests, request_to_frame(request))

    def answers_so_far(self) -> Iterator[Answer]:
        """Yield the answers that have been read; an empty frame says that there are no more."""
        for frame in self.reader.complete_frames():
            if not frame:
                self.is_done = True
                continue
            place, answer = answer_from_frame(frame, self.messages)
            self.waiting.discard(place)
            yield answer

    def has_ended(self) -> bool:
        """Whether it has died while it waited; then nothing is left of it."""
        ended, _ = _wait(self.process_id, os.WNOHANG)
        if ended:
            self._close_pipes()
        return bool(ended)

    def bury(self) -> Iterator[Answer]:
        """Answer for the clients that a dead worker leaves."""
        self._close_pipes()
        _, status = _wait(self.process_id)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        guess = " (out of memory?)" if code == -signal.SIGKILL else ""
        reason = f"worker process {how}{guess}; {len(self.waiting)} clients of its share did not finish"
        log.warning("%s", reason)
        for place in sorted(self.waiting):
            message = self.messages[place]
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            yield Answer(message, Message(error, reply_to=message), None)

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
        for pipe in (requests_in, answers_out, *(pipe for o in others for pipe in (o.requests, o.answers))):
            os.close(pipe)  # else a worker would outlive this process as long as another one does
        _serve(work, requests_out, answers_in)
        status = 0
    finally:
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
            log.error("a worker process cannot go on", exc_info=error)  # no client's: the grid catches those
        os._exit(status)  # nothing of the parent's may run again here: no handlers, no buffers


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
