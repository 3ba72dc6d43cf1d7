"""Text out of a decoder: greedy, sampled or by beam search, with a key-value cache.

    options = GenerationOptions(max_new_tokens=64, num_beams=10, length_penalty=0.8, eos_token_id=2)
    tokens, lengths, scores = generate(model, params, input_ids, attention_mask, options)

``params`` are plain weights or adapted ones, as `lora_jax.combine` makes them: then nothing is
merged. `generate_text` goes from prompts to texts, `read_options` reads a checkpoint's settings.
"""

from ._ends import end_tokens as end_tokens, with_tokens_of as with_tokens_of
from ._generate import generate as generate
from ._generation_config import read_options as read_options
from ._options import GenerationOptions as GenerationOptions
from ._program import Generated as Generated
from ._text import (
    generate_text as generate_text,
    generate_tokens as generate_tokens,
)
