"""What a check finds, and the two ways of finding out that all checks share.

Whatever imports torch runs in a process of its own: a broken torch_npu must not be able to end the
examination.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from internlm_lib.devices.cann import AUTOLOAD_VARIABLE

INSTALL = "make env"

_SUBPROCESS_SECONDS = 120

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    fix: str = ""
    """What to do; empty where nothing is needed."""


def version_of(package: str) -> str | None:
    """Version of an installed distribution, imported or not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def probe(code: str) -> dict[str, Any] | str:
    """What `code`, run by a fresh interpreter, prints as JSON; or the error that ended it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_SUBPROCESS_SECONDS,
            env={**os.environ, AUTOLOAD_VARIABLE: "0"},
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_SUBPROCESS_SECONDS} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines)[-1]
