"""What makes it fast, or small: operations with a plain equivalent that they are tested against."""

from ._chunks import sum_in_chunks as sum_in_chunks
from ._gradients import with_gradient_of as with_gradient_of
from .quantized import (
    dequantize as dequantize,
    quantize as quantize,
    quantize_weight as quantize_weight,
)
