"""One thread that runs all forwards of a model: of every answer under way a step in turn."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from retention.serving.decoding import Answer


@dataclass
class Job:
    """Answers to be written together, step by step."""

    begin: Callable[[], Iterator[None]]
    answers: Sequence[Answer]
    after: Callable[[], None]
    """Called when they have ended, whatever came of them, before anybody waiting for their end goes on."""


class Engine:
    """Takes turns between at most `active` jobs; further ones wait in the order they came."""

    def __init__(self, active: int = 8) -> None:
        self.active = active
        self._waiting: deque[Job] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job done, as soon as it is its turn.

        Raises:
            RuntimeError: when the engine is closed.
        """
        with self._news:
            if self._closed:
                raise RuntimeError("this pipeline is closed; open another one")
            self._waiting.append(job)
            self._news.notify()

    def close(self) -> None:
        """End what is under way and the thread."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        """The thread: a step of every running job, over and over."""
        running: list[tuple[Job, Iterator[None]]] = []
        while True:
            with self._news:
                while not (self._waiting or running or self._closed):
                    self._news.wait()
                if self._closed:
                    break
                while self._waiting and len(running) < self.active:
                    job = self._waiting.popleft()
                    running.append((job, job.begin()))
            running = [(job, steps) for job, steps in running if _step(job, steps)]
        for job in [*(job for job, _ in running), *self._waiting]:
            _end(job, RuntimeError("this pipeline was closed"))


def _step(job: Job, steps: Iterator[None]) -> bool:
    """One forward of a job; whether there is more to do."""
    if all(answer.cancelled for answer in job.answers):
        _end(job, None)
        return False
    try:
        next(steps)
    except StopIteration:
        _end(job, None)
        return False
    except Exception as error:  # of one job: the others go on
        _end(job, error)
        return False
    return True


def _end(job: Job, error: Exception | None) -> None:
    """Whatever has to follow, and then the news that nothing more will come."""
    for answer in job.answers:
        if answer.reason is None:
            answer.reason = "cancelled" if error is None else "error"
    job.after()
    for answer in job.answers:
        answer.close(error)
