"""What another process does for `workers.Workers`: it encodes batches until nobody sends any.

    python -m internlm_lib.data.encoding_worker DESCRIPTOR PARENT THREADS

DESCRIPTOR is that of a socket. An encoder comes, then batches, in any number at a time. Back goes
None once the encoder is loaded, and for each batch, in order, what the encoder makes of it; or the
exception that is raised.
"""

import gc
import queue
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.processes import die_with


def main(descriptor: int, parent: int, threads: int) -> None:
    die_with(parent)
    connection = Connection(descriptor)
    try:
        encoder = connection.recv()
        encoder.load()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        connection.send(InputError(f"the handler cannot be loaded by another process: {why}"))
        return
    gc.freeze()  # what is loaded stays: it need not be looked through again and again
    connection.send(None)
    answers: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(connection, answers), daemon=True).start()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            answers.put(pool.submit(encoder.encode, connection.recv()))
    except (EOFError, OSError):
        pool.shutdown(cancel_futures=True)


def _send(connection: Connection, answers: "queue.SimpleQueue[Future[Any]]") -> None:
    while True:
        answer = answers.get()
        connection.send(answer.exception() or answer.result())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
