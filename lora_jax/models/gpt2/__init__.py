"""GPT-2: a decoder with learned positions.

    wte/embedding                     (vocab, width)
    layers/0/attention/qkv/kernel     (width, 3 * width)
    layers/0/mlp/up/kernel            (width, inner)

Query, key and value are the three equal parts of one kernel, as the published weights have
them; `LoraConfig.parts` adapts some of the three. With ``scan_layers`` the layers are one
``nn.scan`` and their weights carry a leading axis of layers.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from ._config import (
    MODEL_TYPES as MODEL_TYPES,
    Gpt2Config as Gpt2Config,
    config_fields as config_fields,
    read_config as read_config,
)
from ._module import Gpt2 as Gpt2, make_module as make_module
from ._names import TASKS as TASKS, architecture as architecture, name_table as name_table
