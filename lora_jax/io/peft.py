"""Adapters in the directory format that PEFT reads and writes.

    base_model.model.<module>.lora_A.weight (rank, in)      our a (in, rank), transposed
    base_model.model.<module>.lora_B.weight (out, rank)     our b (rank, out), transposed
    base_model.model.<module>.weight                        a weight trained in full

Names come from the model's one table (`lora_jax.io.names`). What the format, or this version,
cannot express is an error that names the weight: nothing is dropped and nothing is guessed.
"""

from ._peft_reader import load_adapter as load_adapter
from ._peft_writer import save_adapter as save_adapter
