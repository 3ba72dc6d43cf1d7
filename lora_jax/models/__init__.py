"""Models: published encoders and decoders as Flax modules, loaded by name.

    model = from_pretrained("google-bert/bert-base-uncased", num_labels=2)
    logits = model.apply(model.params, input_ids, attention_mask)

One package a family (``bert``, ``gpt2``, ``llama``): its config (``_config``), its module
(``_module``) and the published names of its weights (``_names``). The files beside them are what
the families share.
"""

from ._cache import Cache as Cache, init_cache as init_cache
from ._flax_params import (
    from_flax_params as from_flax_params,
    to_flax_params as to_flax_params,
)
from ._matching import NewHeadWarning as NewHeadWarning
from ._pretrained import Pretrained as Pretrained, from_pretrained as from_pretrained
from ._remat import REMAT_POLICIES as REMAT_POLICIES
from ._save import save_merged as save_merged, save_pretrained as save_pretrained
from .bert import Bert as Bert, BertConfig as BertConfig
from .gpt2 import Gpt2 as Gpt2, Gpt2Config as Gpt2Config
from .llama import Llama as Llama, LlamaConfig as LlamaConfig
