"""Llama and its kin: Mistral, Qwen2, Qwen3, SmolLM2 and the text models of Gemma 3.

    embed_tokens/embedding                        (vocab, hidden)
    layers/0/attention/query/kernel               (hidden, heads * head_dim)
    layers/0/mlp/gate/kernel                      (hidden, intermediate)
    lm_head/kernel                                (hidden, vocab), where it is not tied

With ``scan_layers`` the layers' weights carry a leading axis: ``layers/attention/query/kernel``
``(layers, hidden, heads * head_dim)``.

Touvron et al. 2023 (https://arxiv.org/abs/2307.09288), Grattafiori et al. 2024
(https://arxiv.org/abs/2407.21783), Jiang et al. 2023 (https://arxiv.org/abs/2310.06825), Yang et
al. 2024 (https://arxiv.org/abs/2407.10671), Yang et al. 2025 (https://arxiv.org/abs/2505.09388),
Allal et al. 2025 (https://arxiv.org/abs/2502.02737), Gemma Team 2025
(https://arxiv.org/abs/2503.19786).
"""

from ._config import LlamaConfig as LlamaConfig
from ._module import Llama as Llama, make_module as make_module
from ._names import TASKS as TASKS, architecture as architecture, name_table as name_table
from ._published import (
    MODEL_TYPES as MODEL_TYPES,
    config_fields as config_fields,
    read_config as read_config,
)
