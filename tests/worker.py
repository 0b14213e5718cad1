"""An example of a worker that obeys: it hears of an emergency stop, drops its work, and confirms that it has.

Its role needs EXECUTE on get_job and confirm_stopped, and what the application lets it write: see sql/README.md.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    def confirm(self, execution_id: Any) -> bool:
        """Tell the operators that this execution has been dropped; returns whether a stop had failed it.

        While the database is away it returns False, and the thread confirms it later.
        """
        try:
            with self.connect() as connection:
                return connection.execute("SELECT confirm_stopped(%s)", ([execution_id],)).fetchone() == (1,)
        except psycopg.OperationalError:
            with self.lock:
                self.unconfirmed.append(execution_id)
            return False

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True)

    def look(self, connection: psycopg.Connection[Any], id: str) -> None:
        """Ask what has become of the job, and tell its blocks if it has ended or is gone."""
        query = "SELECT answer ->> 'error', answer ->> 'status' FROM get_job(%s) AS answer"  # metadata can be any size
        error, status = connection.execute(query, (id,)).fetchone() or (None, None)
        if error or status in TERMINAL:
            with self.lock:
                for event in self.blocks.get(id, ()):
                    event.set()

    def send_confirmations(self, connection: psycopg.Connection[Any]) -> None:
        if dropped := list(self.unconfirmed):
            connection.execute("SELECT confirm_stopped(%s)", (dropped,))  # a second time does no harm
            with self.lock:
                del self.unconfirmed[: len(dropped)]

    def run(self) -> None:
        while True:
            try:
                with self.connect() as connection:
                    connection.execute("LISTEN emergency_stop")  # first this, then a look: nothing falls in between
                    named, next_look = set[str](), 0.0
                    while True:
                        with self.lock:
                            watched = set(self.blocks)
                        if time.monotonic() >= next_look:
                            named, next_look = watched, time.monotonic() + self.poll_seconds
                            self.send_confirmations(connection)
                        for id in named & watched:
                            self.look(connection, id)
                        seconds = max(0, next_look - time.monotonic())
                        named = {named_job(each.payload) for each in connection.notifies(timeout=seconds, stop_after=1)}
            except psycopg.Error:  # the connection dropped, or the database is being changed
                time.sleep(0.2)


def named_job(payload: str) -> str:
    """The job that a notification names, or "". Everybody may notify, so the payload may be anything."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        return ""
    id = message.get("job_id") if isinstance(message, dict) else None
    return id if isinstance(id, str) else ""


def work(watch: StopWatch, job_id: str, execution_id: Any, steps: Iterable[Callable[[], Any]]) -> bool:
    """Do the steps one after the other; False if the job was stopped meanwhile, which is then confirmed."""
    with watch.job(job_id) as stopped:
        for step in steps:
            try:
                if not stopped.is_set():
                    step()
                    continue
                watch.confirm(execution_id)
            except psycopg.errors.ObjectNotInPrerequisiteState:  # what PostgreSQL refuses after a stop is dropped, too
                if not watch.confirm(execution_id):
                    raise
            return False
    return True
