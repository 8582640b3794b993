"""Who encodes: threads of this process, and of others, each a program of its own.

Threads are enough as long as sentencepiece does most of the work, in which they do not wait for
each other; they cost nothing to start and share its model. They do wait in Python: hence other
processes, too. `multiprocessing` would load the caller's main module into each of these: a
notebook's kernel, or a script that starts the same work again because nothing guards it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any, Protocol

from internlm_lib.errors import WorkerError

_AHEAD = 2
"""Batches that a thread has to do, so that it never waits for the next."""


class Encoder(Protocol):
    """It, the batches and what it makes of them travel by pickle."""

    def encode(self, batch: Any) -> Any: ...


class Workers:
    """`processes`, of which this is one, with so many threads each; `close` ends them."""

    def __init__(self, encoder: Encoder, *, threads: int, processes: int) -> None:
        others = (_Other(encoder, threads) for _ in range(processes - 1))
        self._processes: list[_Process] = [*others, _Here(encoder, threads)]
        self.capacity = _AHEAD * threads * processes
        """Most batches that all of them have to do."""

    def submit(self, batch: Any) -> Future[Any] | None:
        """Let one of them encode a batch; None if all have enough to do.

        Raises what ended one of them; so does the result of what it had to do.
        """
        free = max(self._processes, key=lambda process: process.room())
        return free.submit(batch) if free.room() > 0 else None

    def close(self) -> None:
        """End them, other processes whatever they are doing."""
        for process in self._processes:
            process.close()


class _Process(ABC):
    def __init__(self, threads: int) -> None:
        self._capacity = _AHEAD * threads
        self.sent: deque[Future[Any]] = deque()

    def room(self) -> int:
        """How many batches it can take."""
        while self.sent and self.sent[0].done():
            self.sent.popleft()
        return self._capacity - len(self.sent)

    @abstractmethod
    def submit(self, batch: Any) -> Future[Any]: ...

    @abstractmethod
    def close(self) -> None: ...


class _Here(_Process):
    def __init__(self, encoder: Encoder, threads: int) -> None:
        super().__init__(threads)
        self._encoder = encoder
        self._pool = ThreadPoolExecutor(threads)

    def submit(self, batch: Any) -> Future[Any]:
        self.sent.append(self._pool.submit(self._encoder.encode, batch))
        return self.sent[-1]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Other(_Process):
    def __init__(self, encoder: Encoder, threads: int) -> None:
        super().__init__(threads)
        self._ready = False
        self._failure: Exception | None = None
        self._waiting: deque[Future[Any]] = deque()
        self._lock = threading.Lock()
        self._connection, other = Pipe()
        module, numbers = (
            "internlm_lib.data.encoding_worker",
            (other.fileno(), os.getpid(), threads),
        )
        with other:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, numbers)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=2,  # where a handler's prints do not mix with a result
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent, which decides
            )
        self._connection.send(encoder)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def room(self) -> int:
        if self._failure:
            raise self._failure
        return super().room() if self._ready else 0

    def submit(self, batch: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._failure:
                raise self._failure
            self._waiting.append(future)
        self.sent.append(future)
        with contextlib.suppress(OSError):  # where it has just ended, `_receive` will tell
            self._connection.send(batch)
        return future

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._thread.join()
        self._connection.close()

    def _receive(self) -> None:
        try:
            if isinstance(answer := self._connection.recv(), Exception):
                raise answer
            self._ready = True
            while True:
                answer = self._connection.recv()
                future = self._waiting.popleft()
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        except (EOFError, OSError):
            self._fail(self._ended())
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
            while self._waiting:
                self._waiting.popleft().set_exception(error)

    def _ended(self) -> WorkerError:
        code = self._popen.wait()
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return WorkerError(
            f"a process that encodes ended ({by}), perhaps for want of memory: fewer --workers "
            "need less; the same command goes on from here"
        )
