"""Rematerialisation by name: what a layer keeps of its forward pass for its backward pass.

    "none"   everything                           fastest, most memory
    "dots"   the results of products of matrices
    "full"   nothing but the layer's input        slowest, least memory

or the name of any policy of ``jax.checkpoint_policies`` that takes no arguments.
"""

import flax.linen as nn
import jax

_SHORT = {"full": "nothing_saveable", "dots": "dots_with_no_batch_dims_saveable"}
_POLICIES = (
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
POLICIES = ("none", *_SHORT, *_POLICIES)


def remat_layer(layer: type[nn.Module], remat: bool | str, *, scanned: bool) -> type[nn.Module]:
    """The layer's class, made to recompute what the policy does not keep.

    Args:
        layer: A Linen module's class.
        remat: A name of `POLICIES`; True is ``"full"``, False is ``"none"``.
        scanned: Whether a scan applies it: there nothing could be shared by the compiler, and
            the barrier against that is left out.

    Raises:
        ValueError: The policy is unknown.
    """
    name = remat if isinstance(remat, str) else "full" if remat else "none"
    if name not in POLICIES:
        raise ValueError(f"`remat` must be a bool or one of {POLICIES}, got {remat!r}.")
    if name == "none":
        return layer
    policy = getattr(jax.checkpoint_policies, _SHORT.get(name, name))
    return nn.remat(layer, policy=policy, prevent_cse=not scanned)
