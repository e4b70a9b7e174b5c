"""Where randomness comes from."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def generator(seed: int, name: str, device: torch.device | str) -> Generator:
    """A generator of its own for each use of randomness, so that one method's draws cannot change what another sees."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
