"""`training.deterministic_mode`: the same bits at every run of the same thing.

Only for the same device, layout (with its number of ranks and machines), threads and versions: any
of these changes the order of sums. On Ascend the network's topology counts, too. What torch has no
deterministic operator for raises an error in this mode, and does not fall back.
"""

import os
from collections.abc import MutableMapping

from internlm_lib.errors import InputError
from internlm_lib.experiment.variables import variables_of


def make_deterministic(device: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Switch this rank over, before anything has been computed or sent on its device.

    Variables with `deterministic` values in `experiment/variables.yaml` are set, if they are not.
    Raises InputError if one is set to something else.
    """
    for variable in variables_of(device):
        if not variable.deterministic:
            continue
        found = environment.setdefault(variable.name, variable.deterministic[0])
        if found not in variable.deterministic:
            raise InputError(
                f"training.deterministic_mode = true, but {variable.name} = {found!r} in the "
                f"environment; unset it, or set it to {' or '.join(variable.deterministic)}"
            )
    import torch

    torch.use_deterministic_algorithms(True)
