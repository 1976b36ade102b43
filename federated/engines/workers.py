"""Worker processes: a round's clients shared out over forked copies of this process.

Where it stands in a round: inside the in-process grid, when `engine.workers` is above 1. A worker inherits
model, data and caches (copy-on-write) when it is forked, at the first batch of messages, and then serves one
batch after another: requests bring each client's message and state through a pipe, answers bring its reply
and new state back, all in Flower's own serialisation. When what workers inherited is no longer what this
process has (an aggregator merged into the base weights), they are forked anew. Results are those of one
process, bit by bit. A worker that dies takes only its own clients with it: they get error replies.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import os
import selectors
import signal
import struct
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from models.errors import UserError

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What came of a message.

    Attributes:
        message: The message.
        reply: The client's reply, or an error.
        state: What its ``Context.state`` is from now on; None leaves it as it was.
    """

    message: Message
    reply: Message
    state: RecordDict | None


@dataclass(frozen=True)
class Request:
    """A worker's share of a batch of messages.

    Attributes:
        messages: To run in this order.
        states: What the client of each message has in its ``Context.state``.
        deadline: On the monotonic clock, after which no further client starts; None: there is none.
    """

    messages: Sequence[Message]
    states: Sequence[RecordDict]
    deadline: float | None


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
        self._end = weakref.finalize(self, _end, self._workers, os.getpid())

    def run(
        self, messages: Sequence[Message], states: Sequence[RecordDict], deadline: float | None
    ) -> Iterator[Answer]:
        """Run messages; yield answers as they come, and none for what the deadline left out.

        Args:
            messages: Dealt out in turn: worker k runs messages k, k + num_workers, ...
            states: What each message's client remembers.
            deadline: On the monotonic clock, or None.
        """
        self._bring_up_to_date()
        busy = self._workers[: len(messages)]
        step = len(busy)
        try:
            for first, worker in enumerate(busy):
                worker.give(Request(messages[first::step], states[first::step], deadline))
            yield from self._collect(busy)
        except BaseException:  # the caller gave up: what is still running has no one to answer to
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the next batch of messages forks new ones."""
        _end(self._workers, os.getpid())

    def _bring_up_to_date(self) -> None:
        """Fork what is missing; all anew where something has changed that they inherited."""
        inherited = self._inherited()
        if inherited != self._forked_with:
            self.close()
            self._forked_with = inherited
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
                    chunk = os.read(worker.answers, _READ_BYTES)
                    worker.buffer += chunk
                    yield from worker.answers_so_far()
                    if worker.is_done or not chunk:
                        selector.unregister(worker.answers)
                    if not chunk:
                        self._workers.remove(worker)
                        yield from worker.bury()


@dataclass(eq=False)
class _Worker:
    """One forked process, seen from its parent.

    Attributes:
        process_id: Its number.
        requests: Where requests go, a file descriptor.
        answers: Where answers come from.
        messages: What it is running.
        waiting: Which of them it has not answered.
        buffer: What it has sent and nobody has read.
        is_done: Whether it waits for the next request.
    """

    process_id: int
    requests: int
    answers: int
    messages: Sequence[Message] = ()
    waiting: set[int] = field(default_factory=set)
    buffer: bytearray = field(default_factory=bytearray)
    is_done: bool = True

    def give(self, request: Request) -> None:
        """Send its share of a batch; should it have died meanwhile, reading its answers will show it."""
        self.messages, self.waiting, self.is_done = request.messages, set(range(len(request.messages))), False
        with (
            contextlib.suppress(BrokenPipeError),
            os.fdopen(self.requests, "wb", closefd=False, buffering=_READ_BYTES) as stream,
        ):
            _write(stream, _parts_of(request))

    def answers_so_far(self) -> Iterator[Answer]:
        """Take the complete answers out of what was read."""
        while (parts := _first_frame(self.buffer)) is not None:
            if not parts:
                self.is_done = True
                continue
            head, reply, *state = parts
            number = int.from_bytes(head, "little")
            self.waiting.discard(number)
            yield Answer(
                self.messages[number],
                message_from_proto(ProtoMessage.FromString(reply)),
                _records_from(state[0]) if state else None,
            )

    def bury(self) -> Iterator[Answer]:
        """Answer for the clients that a dead worker leaves."""
        os.close(self.requests)
        os.close(self.answers)
        _, status = os.waitpid(self.process_id, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        reason = (
            f"worker process {how} (out of memory?); {len(self.waiting)} clients of its share did not finish"
        )
        log.warning("%s", reason)
        for number in sorted(self.waiting):
            message = self.messages[number]
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            yield Answer(message, Message(error, reply_to=message), None)


def _end(workers: list[_Worker], owner: int) -> None:
    """Kill processes and forget them: they hold nothing unsent. In a forked copy of the owner, do nothing."""
    if os.getpid() != owner:
        return
    while workers:
        worker = workers.pop()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process_id, signal.SIGKILL)
        os.waitpid(worker.process_id, 0)
        os.close(worker.requests)
        os.close(worker.answers)


# ---- in the worker


def _fork(work: Work, others: Sequence[_Worker]) -> _Worker:
    sys.stdout.flush()
    sys.stderr.flush()
    requests_out, requests_in = os.pipe()
    answers_out, answers_in = os.pipe()
    process_id = os.fork()
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
        os._exit(status)  # nothing of the parent's may run again here: no handlers, no buffers


def _serve(work: Work, requests: int, answers: int) -> None:
    """Run one request after another until the parent closes the pipe, or is gone."""
    gc.freeze()  # collecting what was inherited would copy its pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with os.fdopen(requests, "rb") as incoming, os.fdopen(answers, "wb") as outgoing:
        while (parts := _read(incoming)) is not None:
            request = _request_from(parts)
            numbers = {message.metadata.message_id: n for n, message in enumerate(request.messages)}
            for answer in work(request):
                number = numbers[answer.message.metadata.message_id]
                state = [] if answer.state is None else [_bytes_of(answer.state)]
                reply = message_to_proto(answer.reply).SerializeToString()
                _write(outgoing, [number.to_bytes(4, "little"), reply, *state])
            sys.stdout.flush()
            _write(outgoing, [])


# ---- what goes through the pipes


def _parts_of(request: Request) -> list[bytes]:
    """Return a request as byte strings: a broadcast's content once, then each message's head and state."""
    contents = {id(message.content): message.content for message in request.messages}
    places = {key: place for place, key in enumerate(contents)}
    of_message = [places[id(message.content)] for message in request.messages]
    head = json.dumps({"deadline": request.deadline, "contents": len(contents), "of_message": of_message})
    parts = [head.encode(), *(_bytes_of(content) for content in contents.values())]
    for message, state in zip(request.messages, request.states, strict=True):
        shell = copy.copy(message)
        shell.content = RecordDict()
        parts += [message_to_proto(shell).SerializeToString(), _bytes_of(state)]
    return parts


def _request_from(parts: Sequence[bytes]) -> Request:
    head = json.loads(parts[0])
    first = 1 + head["contents"]
    contents = [_records_from(part) for part in parts[1:first]]
    messages = [message_from_proto(ProtoMessage.FromString(part)) for part in parts[first::2]]
    for message, place in zip(messages, head["of_message"], strict=True):
        message.content = contents[place]
    return Request(messages, [_records_from(part) for part in parts[first + 1 :: 2]], head["deadline"])


def _bytes_of(records: RecordDict) -> bytes:
    return recorddict_to_proto(records).SerializeToString()


def _records_from(part: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(part))


def _write(stream: BinaryIO, parts: Sequence[bytes]) -> None:
    """Write byte strings as one frame: how many, their lengths, themselves."""
    stream.write(struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def _read(stream: BinaryIO) -> list[bytes] | None:
    """Read one frame; None at the end of the pipe."""
    if len(head := stream.read(4)) < 4:
        return None
    (count,) = struct.unpack("<I", head)
    return [stream.read(size) for size in struct.unpack(f"<{count}Q", stream.read(8 * count))]


def _first_frame(buffer: bytearray) -> list[bytes] | None:
    """Take the first frame out of a buffer; None where it is not complete."""
    if len(buffer) < 4:
        return None
    (count,) = struct.unpack_from("<I", buffer)
    end = 4 + 8 * count
    if len(buffer) < end:
        return None
    sizes = struct.unpack_from(f"<{count}Q", buffer, 4)
    if len(buffer) < end + sum(sizes):
        return None
    parts = []
    for size in sizes:
        parts.append(bytes(buffer[end : end + size]))
        end += size
    del buffer[:end]
    return parts
