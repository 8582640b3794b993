"""Looks at this machine and this environment: what is there, what is missing, what to do."""

from internlm_lib.doctor.finding import Finding
from internlm_lib.doctor.machine import KERNEL, examine, locked_versions, print_findings

__all__ = ["KERNEL", "Finding", "examine", "locked_versions", "print_findings"]
