"""Whether a device that was asked for is there."""

from __future__ import annotations

import torch

from .errors import UserError, first_line


def check_device(device: str) -> None:
    """Try a device.

    Raises:
        UserError: torch does not know it, or it is not on this machine.
    """
    try:
        torch.zeros(1, device=device).item()  # which torch's "meta" has not
    except (RuntimeError, AssertionError) as e:  # a torch without CUDA asserts
        raise UserError(f"--device {device} is not on this machine ({first_line(e)}); use --device cpu") from e
