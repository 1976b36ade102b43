"""What goes through the pipes between the in-process grid and its workers: requests one way, answers back.

Messages and records travel in Flower's own serialisation, framed as lists of byte strings; a broadcast's
content travels once a request.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

Frame = list[bytes]

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
        messages: To run in this order, each to another client.
        states: What the client of each message has in its ``Context.state``.
        deadline: On the monotonic clock, after which no further client starts; None: there is none.
    """

    messages: Sequence[Message]
    states: Sequence[RecordDict]
    deadline: float | None


def request_to_frame(request: Request) -> Frame:
    """Return a request as byte strings: the contents, then each message's head and its client's state."""
    contents = {id(message.content): message.content for message in request.messages}
    places = {key: place for place, key in enumerate(contents)}
    of_message = [places[id(message.content)] for message in request.messages]
    head = json.dumps({"deadline": request.deadline, "contents": len(contents), "of_message": of_message})
    frame = [head.encode(), *map(_records_to_bytes, contents.values())]
    for message, state in zip(request.messages, request.states, strict=True):
        shell = copy.copy(message)
        shell.content = RecordDict()
        frame += [message_to_proto(shell).SerializeToString(), _records_to_bytes(state)]
    return frame


def request_from_frame(frame: Frame) -> Request:
    """Return the request; messages that shared their content share it again."""
    head = json.loads(frame[0])
    first = 1 + head["contents"]
    contents = [_records_from_bytes(part) for part in frame[1:first]]
    messages = [message_from_proto(ProtoMessage.FromString(part)) for part in frame[first::2]]
    for message, place in zip(messages, head["of_message"], strict=True):
        message.content = contents[place]
    return Request(messages, [_records_from_bytes(part) for part in frame[first + 1 :: 2]], head["deadline"])


def answer_to_frame(answer: Answer, place: int) -> Frame:
    """Return an answer as byte strings; ``place`` is that of its message in the request."""
    state = [] if answer.state is None else [_records_to_bytes(answer.state)]
    return [place.to_bytes(4, "little"), message_to_proto(answer.reply).SerializeToString(), *state]


def answer_from_frame(frame: Frame, messages: Sequence[Message]) -> tuple[int, Answer]:
    """Return the place of an answer's message among those of the request, and the answer."""
    head, reply, *state = frame
    place = int.from_bytes(head, "little")
    return place, Answer(
        messages[place],
        message_from_proto(ProtoMessage.FromString(reply)),
        _records_from_bytes(state[0]) if state else None,
    )


def _records_to_bytes(records: RecordDict) -> bytes:
    return recorddict_to_proto(records).SerializeToString()


def _records_from_bytes(part: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(part))


# ---- frames in a pipe: how many byte strings, their lengths, themselves


def write_frame(pipe: int, frame: Frame) -> None:
    """Write a frame to a file descriptor, waiting where the pipe is full."""
    head = struct.pack(f"<I{len(frame)}Q", len(frame), *map(len, frame))
    for part in (head, *frame):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(pipe, rest) :]


class FrameReader:
    """Takes frames out of a file descriptor.

    Args:
        pipe: Where to read.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._buffer = bytearray()

    def read_some(self) -> bool:
        """Read what is there, waiting for the first byte; False at the end of the pipe."""
        chunk = os.read(self._pipe, _READ_BYTES)
        self._buffer += chunk
        return bool(chunk)

    def complete_frames(self) -> Iterator[Frame]:
        """Yield the frames that have been read whole, once each."""
        while (frame := self._take()) is not None:
            yield frame

    def _take(self) -> Frame | None:
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        (count,) = struct.unpack_from("<I", buffer)
        end = 4 + 8 * count
        if len(buffer) < end:
            return None
        sizes = struct.unpack_from(f"<{count}Q", buffer, 4)
        if len(buffer) < end + sum(sizes):
            return None
        frame = []
        for size in sizes:
            frame.append(bytes(buffer[end : end + size]))
            end += size
        del buffer[:end]
        return frame
