"""Adapters in the directory format that PEFT reads and writes.

    base_model.model.<module>.lora_A.weight (rank, in)      our a (in, rank), transposed
    base_model.model.<module>.lora_B.weight (out, rank)     our b (rank, out), transposed
    base_model.model.<module>.lora_embedding_A, _B          the same of an embedding
    base_model.model.<module>.weight                        a weight trained in full
    base_model.model.<module>.base_layer.bias               a trained bias of an adapted module

Names come from the model's one table (`lora_jax.io.names`). What the format, or this version,
cannot express is an error that names the weight: nothing is dropped and nothing is guessed.

A tied embedding is one weight here, adapted in both uses, and two modules in a file, which must
agree (``_tied.py``). A kernel adapted in part is one block adapter there (``_parts.py``).
"""

from ._reader import load_adapter as load_adapter
from ._writer import save_adapter as save_adapter
