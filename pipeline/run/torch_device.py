"""The device on which torch computes in the stages calibrate and reference and in those that run the solver."""

import os
from typing import Any

from pipeline.common.errors import PipelineError

OVERRIDE = "PHI3_TORCH_DEVICE"


def torch_device() -> Any:
    """Return the torch.device that OVERRIDE in the environment names, or a CUDA GPU where there is one, or the CPU.

    Raises PipelineError when torch has no such device.
    """
    import torch

    name = os.environ.get(OVERRIDE) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise PipelineError(
            f"{OVERRIDE}={name}: torch cannot use this device ({str(error).splitlines()[0]})."
        ) from error
