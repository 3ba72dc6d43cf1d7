"""What the layers of the decoder see: every token, or a window that slides.

views = Views(view_of(config, placed, sliding=False))        layers are all alike
views = both_views(config, placed)                            a scan over layers of both kinds
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.models._attention import Placement, causal_mask, explicit_mask
from lora_jax.models.llama._config import LlamaConfig
from lora_jax.models.llama._rotary import Angles, angles


class View(NamedTuple):
    """What a layer sees of the tokens: their angles, and the mask of `causal_mask`."""

    angles: Angles
    mask: jax.Array | None


class Views(NamedTuple):
    """The views of a stack of layers.

    Attributes:
        whole: Of layers that see everything, or of all layers where they are of one kind.
        sliding: Of layers that see a window, where a scan runs over both kinds.
    """

    whole: View
    sliding: View | None = None


def view_of(config: LlamaConfig, placed: Placement, sliding: bool) -> View:
    """The view of layers of one kind."""
    own = config.sliding_rope if sliding else None
    rope = config.rope if own is None else own
    window = config.sliding_window if sliding else None
    turned = angles(rope, config.head_dim, placed.positions)
    return View(turned, causal_mask(placed, window))


def both_views(config: LlamaConfig, placed: Placement) -> Views:
    """Both views, with masks to choose between where one of them has one."""
    whole, sliding = (view_of(config, placed, kind) for kind in (False, True))
    if whole.mask is None and sliding.mask is not None:
        whole = whole._replace(mask=explicit_mask(placed))
    return Views(whole, sliding)


def chosen(views: Views, sliding: jax.Array | None) -> View:
    """The view of a layer, of which a scan knows at run time whether it slides."""
    if sliding is None:
        return views.whole
    return jax.tree.map(lambda s, w: jnp.where(sliding, s, w), views.sliding, views.whole)
