"""Models: published encoders as Flax modules, loaded by name.

    model = from_pretrained("google-bert/bert-base-uncased", num_labels=2)
    logits = model.apply(model.params, input_ids, attention_mask)

One family a file, which holds its module, its config and its table of published names.
"""

from ._pretrained import (
    NewHeadWarning as NewHeadWarning,
    Pretrained as Pretrained,
    from_pretrained as from_pretrained,
    save_pretrained as save_pretrained,
)
from .bert import Bert as Bert, BertConfig as BertConfig
