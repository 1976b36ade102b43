"""The default engine: a Flower grid that runs every client in this process, one after another.

It hands each message to the very ``ClientApp`` that Flower's simulation or deployment engine would run, so
nothing above or below it knows which engine carries the messages.

What it guarantees:

* clients cannot leak state into each other: each message arrives as a copy of its containers, each client
  works on a copy of its own ``Context.state``, and a failed client's state is not committed;
* a client that raises becomes a Flower error reply, and the round goes on;
* memory does not grow with the number of clients: a client's ``Context`` exists once it has been called.

All use of Flower's internals by this project is in this folder (message identity, run, task identity, and for
workers its serialisation) and in ``federated.communication.byte_counts`` (serialised size). Tested with the
versions in ``TESTED_FLOWER``.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from federated.communication.byte_counts import wire_bytes
from federated.communication.foreign_text import shown
from federated.engines.pipes import Answer, Request
from federated.engines.workers import Workers
from models.errors import ROUND_FAILURE

TESTED_FLOWER = ("1.41", "1.42")
"""Flower releases (major.minor) whose internals this file is tested with."""

FIRST_NODE_ID = 1000
"""Node id of client 0; node ids are stable, so two runs address the same clients."""

_RUN_ID = 1

_Record = ArrayRecord | ConfigRecord | MetricRecord

log = logging.getLogger(__name__)


def node_id_of(client_id: int) -> int:
    """Return the grid's node id of a client."""
    return FIRST_NODE_ID + client_id


class InProcessGrid(Grid):
    """Carries messages to clients that live in this process.

    Args:
        client_app: The Flower app that every client runs.
        num_clients: Number of clients; client ``i`` is node ``1000 + i``.
        run_config: What each client finds in ``Context.run_config``.
        execution_order: Reorders the messages of a batch before they run; results must not depend on it.
        on_reply: Called after each client with ``(client_id, "ok" or "failed")``, for progress displays.
        num_workers: Processes that share each batch of messages (``federated.engines.workers``).
        prepare: Shown each batch of messages before it runs, with the contexts of their clients, which it
            must leave as they are.
        inherited: Stands for what workers have from this process; they are forked anew when it changes.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        *,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        execution_order: Callable[[Sequence[Message]], Sequence[Message]] | None = None,
        on_reply: Callable[[int, str], None] | None = None,
        prepare: Callable[[Sequence[Message], Sequence[Context]], None] | None = None,
        num_workers: int = 1,
        inherited: Callable[[], object] = lambda: None,
    ) -> None:
        self._client_app = client_app
        self._num_clients = num_clients
        self._run_config = dict(run_config or {})
        self._order = execution_order
        self._on_reply = on_reply
        self._prepare = prepare
        self._workers = Workers(num_workers, self._serve_request, inherited) if num_workers > 1 else None
        self._contexts: dict[int, Context] = {}
        self._changed: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=_RUN_ID)
        # Message() reads these process-wide identifiers and refuses to exist without them.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN_ID, 1, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Replace Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def context(self, client_id: int) -> Context:
        """Return a client's context, creating it at its first use."""
        if client_id not in self._contexts:
            self._contexts[client_id] = self._new_context(client_id, RecordDict())
        return self._contexts[client_id]

    def changed_clients(self) -> set[int]:
        """Return the clients whose state has changed since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def _new_context(self, client_id: int, state: RecordDict) -> Context:
        node_config: UserConfig = {"partition-id": client_id, "num-partitions": self._num_clients}
        return Context(_RUN_ID, node_id_of(client_id), node_config, state, dict(self._run_config))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (part of Flower's grid interface)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all clients, in client order."""
        return [node_id_of(client_id) for client_id in range(self._num_clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients the messages are addressed to; return the message ids."""
        return self._execute(messages, timeout=None)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that exist, and forget them."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the addressed clients and return their replies.

        A client that has not answered when ``timeout`` seconds have passed gives no reply at all, as in
        Flower's own engines. With workers it is ended; in one process a client that is running cannot be
        interrupted, so its reply comes late and counts, and a warning says so.
        """
        return self.pull_messages(self._execute(messages, timeout=timeout))

    def _execute(self, messages: Iterable[Message], *, timeout: float | None) -> list[str]:
        stamped = [_stamp(message, SUPERLINK_NODE_ID) for message in messages]
        deadline = None if timeout is None else time.monotonic() + timeout
        ordered = stamped if self._order is None else self._order(stamped)
        with contextlib.closing(self._run_all(ordered, deadline)) as answers:
            for answer in answers:
                self._take(answer)
        silent = [m for m in stamped if m.metadata.message_id not in self._replies]
        if silent:
            clients = sorted(_client_of(message) for message in silent)
            log.warning("timeout: no reply from clients %s", clients, extra={ROUND_FAILURE: None})
        return [message.metadata.message_id for message in stamped]

    def _run_all(self, messages: Sequence[Message], deadline: float | None) -> Generator[Answer, None, None]:
        clients = [_client_of(message) for message in messages]
        if self._workers is None or not 0 < len(messages) == len(set(clients)):  # a client's are run in turn
            return self._answers_here(messages, deadline)
        return self._workers.run(messages, [self.context(client_id).state for client_id in clients], deadline)

    def _answers_here(
        self, messages: Sequence[Message], deadline: float | None
    ) -> Generator[Answer, None, None]:
        """Run messages in this process; a client that the deadline finds running is named."""
        running: list[int] = []

        def state_of(client_id: int) -> RecordDict:
            running[:] = [client_id]
            return self.context(client_id).state

        with _warning_at(deadline, running):
            for answer in self._answers(messages, deadline, state_of):
                running.clear()
                late = 0.0 if deadline is None else time.monotonic() - deadline
                if late > 0:
                    client_id = _client_of(answer.message)
                    log.warning("client %d ended %.1f s after federation.timeout_seconds", client_id, late)
                yield answer

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self._workers is not None:
            self._workers.close()

    def _serve_request(self, request: Request) -> Iterator[Answer]:
        """Run a worker's share, in the worker, which keeps no client's state for the next request."""
        self._contexts.clear()
        clients = [_client_of(message) for message in request.messages]
        states = dict(zip(clients, request.states, strict=True))
        return self._answers(request.messages, request.deadline, states.__getitem__)

    def _answers(
        self, messages: Sequence[Message], deadline: float | None, state_of: Callable[[int], RecordDict]
    ) -> Generator[Answer, None, None]:
        """Run messages one after another, until the deadline.

        Args:
            messages: To run in this order.
            deadline: On the monotonic clock, or None.
            state_of: What a client has in its ``Context.state`` when its turn comes.
        """
        if self._prepare is not None:
            clients = [_client_of(message) for message in messages]
            self._prepare(messages, [self._new_context(c, state_of(c)) for c in clients])
        for message in messages:
            if deadline is not None and time.monotonic() >= deadline:
                return
            yield self._run_client(message, state_of(_client_of(message)))

    def _run_client(self, message: Message, state: RecordDict) -> Answer:
        """Run the client that a message is addressed to, on copies of the message and of its own state."""
        client_id = _client_of(message)
        working = self._new_context(client_id, _clone(state))
        inbox = copy.copy(message)
        inbox.content = _clone(message.content)
        try:
            reply = self._client_app(message=inbox, context=working)
            if not isinstance(reply, Message) or not isinstance(working.state, RecordDict):
                kinds = f"{type(reply).__name__} (state: {type(working.state).__name__})"
                raise TypeError(f"a client returns a Message and keeps a RecordDict; this one: {kinds}")
            wire_bytes(reply), wire_bytes(working.state)  # raises over what Flower could not send
            return Answer(message, reply, working.state)
        except KeyboardInterrupt:  # the user's
            raise
        except BaseException as error:  # the one place where a client's crash becomes an error reply
            reason, failed = shown(_words_of(error)), {ROUND_FAILURE: client_id}
            log.warning("client %d failed: %s", client_id, reason, extra=failed)
            log.debug("client %d failed", client_id, exc_info=True)
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            return Answer(message, reply, None)

    def _take(self, answer: Answer) -> None:
        """Commit a client's new state and keep its reply until it is asked for."""
        client_id = _client_of(answer.message)
        if answer.state is not None:
            self.context(client_id).state = answer.state
            self._changed.add(client_id)
        if self._on_reply is not None:
            self._on_reply(client_id, "failed" if answer.reply.has_error() else "ok")
        self._replies[answer.message.metadata.message_id] = _stamp(answer.reply, node_id_of(client_id))


@contextlib.contextmanager
def _warning_at(deadline: float | None, running: Sequence[int]) -> Iterator[None]:
    """Warn, should the deadline come inside the block, of the client that is running then."""

    def warn() -> None:
        for client_id in running:
            log.warning(
                "client %d still runs after federation.timeout_seconds: in one process it cannot be "
                "interrupted, a worker could be ended (engine.workers=2)",
                client_id,
            )

    seconds = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
    timer = threading.Timer(seconds, warn) if seconds < threading.TIMEOUT_MAX else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()


def _words_of(error: BaseException) -> str:
    """Return what a client's exception says, and its type alone where it cannot say anything."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__} (its text cannot be had)"


def _client_of(message: Message) -> int:
    return message.metadata.dst_node_id - FIRST_NODE_ID


def _stamp(message: Message, source_node_id: int) -> Message:
    """Give a message its identity; Flower itself writes these read-only fields through ``__dict__``."""
    message.metadata.__dict__.update(
        _message_id=str(uuid.uuid4()), _run_id=_RUN_ID, _src_node_id=source_node_id
    )
    return message


def _clone(content: RecordDict) -> RecordDict:
    """Copy the containers; the arrays' bytes are immutable and stay shared.

    A strategy puts one record into many messages: a client that edits its message in place must not
    reach the next client's.
    """
    return RecordDict({key: _clone_record(record) for key, record in content.items()})


def _clone_record(record: _Record) -> _Record:
    twin = record.copy()
    if not isinstance(twin, ArrayRecord):
        for key, value in twin.items():
            if isinstance(value, list):
                twin[key] = list(value)  # type: ignore[assignment]
    return twin
