"""`internlm preprocess`, which makes small batches and commits each, and uses processes for little.

`python -m tests.faults.preprocess_worker ARGUMENTS`, those of the command.
"""

import sys
from collections.abc import Sequence

from internlm_lib.cli import main
from internlm_lib.data import corpus, encoding, preprocess
from internlm_lib.data.documents import Span
from internlm_lib.data.records import Row, text_of
from internlm_lib.data.tokenizer import Tokenizer


class Own:
    """A handler that is none of the kit's: every worker is a process of its own."""

    name, kind = "own", "pretrain"
    columns, optional_columns = ("instruction", "output"), ("input",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        pass

    def document(self, row: Row) -> Sequence[Span]:
        return [Span(f"{text_of(row, 'instruction')} {text_of(row, 'output')}")]


if __name__ == "__main__":
    encoding._BATCH_ROWS = 50
    corpus._PACKED_BATCHES = 2
    corpus._COMMIT_SECONDS = 0
    preprocess._BYTES_PER_PROCESS = 1
    sys.argv[1:1] = ["preprocess"]
    main()
