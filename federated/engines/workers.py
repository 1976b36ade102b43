"""Worker processes: a round's clients shared out over forked copies of this process.

Where it stands in a round: inside the in-process grid, when `engine.workers` is above 1. Each batch of
messages forks afresh, so that a worker inherits model, caches and contexts as they are (copy-on-write) and
can leave nothing behind: what it answers comes back through a pipe in Flower's own serialisation, with the
client's new state. Results are those of one process, bit by bit. A worker that dies takes only its own
clients with it: they get error replies.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from models.errors import UserError

log = logging.getLogger(__name__)

_HEAD = struct.Struct(
    "<IQQ?"
)  # number of the message in its share, bytes of reply and state, whether there is one
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


Work = Callable[[Sequence[Message]], Iterator[Answer]]
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


@dataclass(eq=False)
class _Worker:
    """One forked process, seen from its parent."""

    process_id: int
    pipe: int
    share: Sequence[Message]
    waiting: set[int] = field(default_factory=set)
    buffer: bytearray = field(default_factory=bytearray)


def run_forked(messages: Sequence[Message], num_workers: int, work: Work) -> Iterator[Answer]:
    """Run messages in forked processes; yield answers as they come.

    Args:
        messages: Dealt out in turn: worker k runs messages k, k + num_workers, ...
        num_workers: Processes.
        work: What each process does with its share.
    """
    shares = [messages[first::num_workers] for first in range(min(num_workers, len(messages)))]
    workers: list[_Worker] = []
    try:
        for share in shares:
            workers.append(_fork(share, work, [worker.pipe for worker in workers]))
        yield from _collect(workers)
    finally:
        for worker in workers:  # only those still there when the caller gave up
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process_id, signal.SIGKILL)
            os.waitpid(worker.process_id, 0)
            os.close(worker.pipe)


def _fork(share: Sequence[Message], work: Work, others: Sequence[int]) -> _Worker:
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    process_id = os.fork()
    if process_id:
        os.close(writing)
        return _Worker(process_id, reading, share, set(range(len(share))))
    status = 1
    try:
        for pipe in (reading, *others):
            os.close(pipe)
        _work_in_child(share, work, writing)
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's may run again here: no handlers, no buffers


def _work_in_child(share: Sequence[Message], work: Work, writing: int) -> None:
    gc.freeze()  # collecting what was inherited would copy its pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    numbers = {message.metadata.message_id: number for number, message in enumerate(share)}
    with os.fdopen(writing, "wb") as stream:
        for answer in work(share):
            reply = message_to_proto(answer.reply).SerializeToString()
            state = b"" if answer.state is None else recorddict_to_proto(answer.state).SerializeToString()
            number = numbers[answer.message.metadata.message_id]
            stream.write(_HEAD.pack(number, len(reply), len(state), answer.state is not None))
            stream.write(reply)
            stream.write(state)
            stream.flush()


def _collect(workers: list[_Worker]) -> Iterator[Answer]:
    """Read all pipes until they end; take workers that ended off the list."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.pipe, selectors.EVENT_READ, worker)
        while workers:
            for key, _ in selector.select():
                worker = key.data
                chunk = os.read(worker.pipe, _READ_BYTES)
                worker.buffer += chunk
                yield from _answers_in(worker)
                if not chunk:
                    selector.unregister(worker.pipe)
                    workers.remove(worker)
                    os.close(worker.pipe)
                    yield from _bury(worker)


def _answers_in(worker: _Worker) -> Iterator[Answer]:
    """Take the complete answers out of what was read so far."""
    while len(worker.buffer) >= _HEAD.size:
        number, reply_bytes, state_bytes, has_state = _HEAD.unpack_from(worker.buffer)
        middle = _HEAD.size + reply_bytes
        end = middle + state_bytes
        if len(worker.buffer) < end:
            return
        reply = message_from_proto(ProtoMessage.FromString(bytes(worker.buffer[_HEAD.size : middle])))
        proto = ProtoRecordDict.FromString(bytes(worker.buffer[middle:end]))
        del worker.buffer[:end]
        worker.waiting.discard(number)
        yield Answer(worker.share[number], reply, recorddict_from_proto(proto) if has_state else None)


def _bury(worker: _Worker) -> Iterator[Answer]:
    """Answer for the clients that a dead worker leaves; one that ended in order stopped at its deadline."""
    _, status = os.waitpid(worker.process_id, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    reason = (
        f"worker process {how} (out of memory?); {len(worker.waiting)} clients of its share did not finish"
    )
    log.warning("%s", reason)
    for number in sorted(worker.waiting):
        message = worker.share[number]
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        yield Answer(message, Message(error, reply_to=message), None)
