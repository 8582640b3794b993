"""`python -m internlm_lib.cli` is `internlm`."""

from internlm_lib.cli import main

main()
