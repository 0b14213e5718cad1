"""An example of a worker that obeys: it hears of an emergency stop, drops its work, and confirms that it has.

Its role needs EXECUTE on get_job and confirm_stopped, and what the application lets it write: see sql/README.md.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

TERMINAL = ("completed", "failed", "cancelled")  # any other state, an application's own included, is not the end


class StopWatch:
    """Tells a worker's threads that their job has ended: in milliseconds while it is connected, else by polling."""

    def __init__(self, url: str, poll_seconds: float = 10) -> None:
        self.url, self.poll_seconds = url, poll_seconds
        self.lock = threading.Lock()
        self.blocks: dict[str, list[threading.Event]] = {}  # for each job the events of all blocks that work on it
        self.unconfirmed: list[Any] = []  # executions that were dropped
        threading.Thread(target=self.run, daemon=True).start()

    @contextmanager
    def job(self, id: str) -> Iterator[threading.Event]:
        """For the time of a block: an event to look at between two steps of the work, or to wait for."""
        event = threading.Event()
        with self.lock:
            self.blocks.setdefault(id, []).append(event)
        try:
            with self.connect() as connection:  # the job may have been stopped before the block began
                self.look(connection, id)
            yield event
        finally:
            with self.lock:
                self.blocks[id].remove(event)
                if not self.blocks[id]:
                    del self.blocks[id]

    def confirm(self, *execution_ids: Any) -> None:
        """Tell the operators that these executions have been dropped; while the database is away, later."""
        with self.lock:
            self.unconfirmed += execution_ids
        with suppress(psycopg.OperationalError), self.connect() as connection:
            self.send_confirmations(connection)

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True)

    def look(self, connection: psycopg.Connection[Any], id: str) -> None:
        """Ask what has become of the job, and tell its blocks if it has ended or is gone."""
        (answer,) = connection.execute("SELECT get_job(%s)", (id,)).fetchone() or ({},)
        if "error" in answer or answer["status"] in TERMINAL:
            with self.lock:
                for event in self.blocks.get(id, ()):
                    event.set()

    def send_confirmations(self, connection: psycopg.Connection[Any]) -> None:
        with self.lock:
            dropped = list(self.unconfirmed)
        if dropped:
            connection.execute("SELECT confirm_stopped(%s)", (dropped,))  # a second time does no harm
            with self.lock:
                self.unconfirmed = [id for id in self.unconfirmed if id not in dropped]

    def run(self) -> None:
        while True:
            try:
                with self.connect() as connection:
                    connection.execute("LISTEN emergency_stop")  # first this, then a look: nothing falls in between
                    named = None
                    while True:
                        self.send_confirmations(connection)
                        for id in [id for id in list(self.blocks) if named is None or id in named]:
                            self.look(connection, id)
                        named = self.wait(connection)
            except psycopg.Error:  # the connection dropped, or the database is being changed
                time.sleep(0.2)

    def wait(self, connection: psycopg.Connection[Any]) -> set[str] | None:
        """The jobs that notifications name, or None when it is time to look at all of them."""
        received = list(connection.notifies(timeout=self.poll_seconds, stop_after=1))
        return {id for each in received if (id := named_job(each.payload)) is not None} if received else None


def named_job(payload: str) -> str | None:
    """The job that a notification names. Everybody may notify, so it may be anything."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    id = message.get("job_id") if isinstance(message, dict) else None
    return id if isinstance(id, str) else None


def work(watch: StopWatch, job_id: str, execution_id: Any, steps: Iterable[Callable[[], Any]]) -> bool:
    """Do the steps one after the other; False if the job was stopped meanwhile, which is then confirmed."""
    with watch.job(job_id) as stopped:
        for step in steps:
            try:
                if not stopped.is_set():
                    step()
                    continue
            except psycopg.errors.ObjectNotInPrerequisiteState:  # PostgreSQL refuses what a stopped worker reports
                pass
            watch.confirm(execution_id)
            return False
    return True
