"""Weights of several kinds, and what bitsandbytes makes of them on a CPU.

Its weights are ours transposed: ``(out, in)``.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
functional = pytest.importorskip(
    "bitsandbytes.functional", reason="bitsandbytes is not installed (make test-oracle)"
)

# Decoding an odd number of columns compiles first, for a minute, and computes the same.
torch.compiler.set_stance("force_eager")


def drawn(shape: tuple[int, ...], dtype: str, width: float = 0.02, seed: int = 0) -> np.ndarray:
    """A normal weight with outliers, rounded to ``dtype``, as float32.

    A large one has an output of zeros, and a block of zeros.
    """
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, width, shape)
    weight[rng.random(shape) < 0.002] *= 10
    if weight.size > 128:
        weight[-1] = 0
        weight.reshape(-1)[:64] = 0
    return torch.from_numpy(weight).to(getattr(torch, dtype)).float().numpy()


def nf4(weight: np.ndarray, dtype: str, block: int = 64, double: bool = True) -> dict:
    """Codes, scales and values of a ``(out, in)`` weight, the values float32."""
    given = torch.from_numpy(weight).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(
        given, blocksize=block, compress_statistics=double, quant_type="nf4"
    )
    found = {"codes": codes.reshape(-1), "absmax": state.absmax}
    if double:
        found |= {"scale": state.state2.absmax, "offset": state.offset}
    found["values"] = functional.dequantize_4bit(codes, state).float()
    return {name: array.numpy() for name, array in found.items()}


def int8(weight: np.ndarray, dtype: str) -> dict:
    """Codes, row statistics and values of a ``(out, in)`` weight, the values float32."""
    given = torch.from_numpy(weight).to(getattr(torch, dtype))
    codes, absmax, _ = functional.int8_vectorwise_quant(given)
    values = functional.int8_vectorwise_dequant(codes, absmax).to(given.dtype).float()
    return {"codes": codes.numpy(), "absmax": absmax.numpy(), "values": values.numpy()}


def absmax_codes(absmax: np.ndarray, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of double quantisation, of numbers that a mean is taken from."""
    codes, state = functional.quantize_blockwise(torch.from_numpy(absmax - offset), blocksize=256)
    return codes.numpy(), state.absmax.numpy()
