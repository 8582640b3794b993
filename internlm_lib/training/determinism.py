"""`training.deterministic_mode`: the same bits at every run of the same thing.

Only for the same device, layout (with its number of ranks and machines), threads and versions: any
of these changes the order of sums. On Ascend the network's topology counts, too. What torch has no
deterministic operator for raises an error in this mode, and does not fall back.
"""

import os
from collections.abc import MutableMapping

from internlm_lib.errors import InputError

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "HCCL_DETERMINISTIC": ("true", "strict"),
}
"""Environment variable → values that are deterministic; the first is set where none is. Sources:
torch.use_deterministic_algorithms (cuBLAS), Megatron-LM's arguments.py (NCCL), CANN's list of
environment variables (HCCL)."""


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Switch this rank over, before anything of torch has touched a device.

    Returns what each of `VARIABLES` is set to. A value that is set already is kept.
    Raises InputError if it is not a deterministic one.
    """
    for name, allowed in VARIABLES.items():
        found = environment.setdefault(name, allowed[0])
        if found not in allowed:
            raise InputError(
                f"training.deterministic_mode = true, but {name} = {found!r} in the environment; "
                f"unset it, or set it to {' or '.join(allowed)}"
            )
    import torch

    torch.use_deterministic_algorithms(True)
    return {name: environment[name] for name in VARIABLES}
