"""What a tensor in a file is to whoever reads checkpoints, whichever format the file has."""

from pathlib import Path
from typing import Protocol

import numpy as np


class Tensor(Protocol):
    """A tensor in a file, not read yet."""

    @property
    def file(self) -> Path:
        """The file."""
        ...

    @property
    def name(self) -> str:
        """What it is called as published."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as published."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of what `read` gives, as safetensors spells it: ``"F32"``."""
        ...

    def read(self) -> np.ndarray:
        """Its values."""
        ...
