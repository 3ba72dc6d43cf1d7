"""BERT and RoBERTa: encoders with a head for each task.

Every matrix that LoRA is likely to adapt is a plain ``(in, out)`` kernel: query, key, value
and out of the attention, up and down of the MLP. With ``scan_layers`` the layers are one
``nn.scan`` and their weights carry a leading axis of layers: ``(layers, in, out)``.

    encoder/layers/0/attention/query/kernel    unrolled
    encoder/layers/attention/query/kernel      scanned

Devlin et al. 2019 (https://arxiv.org/abs/1810.04805), Liu et al. 2019
(https://arxiv.org/abs/1907.11692).
"""

from ._config import (
    MODEL_TYPES as MODEL_TYPES,
    BertConfig as BertConfig,
    config_fields as config_fields,
    read_config as read_config,
)
from ._module import Bert as Bert, make_module as make_module
from ._names import TASKS as TASKS, architecture as architecture, name_table as name_table
