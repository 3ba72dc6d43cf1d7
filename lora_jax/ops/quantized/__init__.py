"""Quantised weights: one scheme a file, and the functions that turn trees into them and back.

    nf4   4.13 bits an entry   quantiles of a normal distribution, blocks of 64
    int8  8 bits               steps of one size, a scale for each output
    fp8   8 bits               float8_e4m3fn, a scale for each output

Codes and values equal those of bitsandbytes (nf4, int8), which rules out qwix's quantised arrays:
their nf4 has no double quantisation (4.5 bits), and blocks that must divide an axis.
"""

from ._fp8 import Fp8Weight as Fp8Weight
from ._int8 import Int8Weight as Int8Weight
from ._nf4 import Nf4Weight as Nf4Weight
from ._quantize import (
    SCHEMES as SCHEMES,
    dequantize as dequantize,
    quantize as quantize,
    quantize_weight as quantize_weight,
)
