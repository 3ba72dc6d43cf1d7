"""Makes the committed codes of bitsandbytes, of small weights.

    python -m tests.references.make_bitsandbytes_references    (torch, bitsandbytes; from the root)

One ``bitsandbytes/SCHEME-NAME.npz`` a case: the weight ``(out, in)`` as float32, its ``dtype``, the
``block`` of nf4, and the codes, scales and values that bitsandbytes gives on a CPU.
"""

from pathlib import Path

import numpy as np

from tests.oracle import bitsandbytes_cases as cases

FOLDER = Path(__file__).parent / "bitsandbytes"
# Name -> shape, dtype, block, whether to quantise twice.
NF4 = {
    "two-groups": ((130, 66), "bfloat16", 32, True),
    "last-block-short": ((20, 90), "float32", 64, True),
    "odd": ((11, 35), "float16", 64, True),
    "single": ((20, 64), "bfloat16", 64, False),
}
INT8 = {"bfloat16": (12, 50), "float32": (6, 40), "float16": (5, 33)}


def main() -> None:
    """Writes every file."""
    FOLDER.mkdir(exist_ok=True)
    for name, (shape, dtype, block, double) in NF4.items():
        weight = cases.drawn(shape, dtype)
        found = cases.nf4(weight, dtype, block, double)
        np.savez_compressed(
            FOLDER / f"nf4-{name}.npz", weight=weight, dtype=dtype, block=block, **found
        )
    for dtype, shape in INT8.items():
        weight = cases.drawn(shape, dtype)
        weight[~weight.any(1)] = 2**-9
        found = cases.int8(weight, dtype)
        np.savez_compressed(FOLDER / f"int8-{dtype}.npz", weight=weight, dtype=dtype, **found)


if __name__ == "__main__":
    main()
