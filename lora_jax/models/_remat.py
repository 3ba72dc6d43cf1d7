"""Rematerialisation by name: what a layer keeps of its forward pass for its backward pass.

    "none"        everything                           fastest, most memory
    "dots"        the results of products of matrices
    "named"       what no product is computed again for; norms and activations are
    "attention"   the results of attention
    "full"        nothing but the layer's input        slowest, least memory

or the name of any policy of ``jax.checkpoint_policies`` that takes no arguments. Modules name what
they compute by ``checkpoint_name``:

    query, key, value   as attention gets them, or before their own norm where they have one
    attention           what the heads mixed, unless a fused kernel did
    residual            the stream between attention and MLP
    gate, up            before the activation
    out, down           in place of ``residual``, what a norm after attention and MLP reads
    low_rank            the input times the first factor of every adapted matrix, by `adapt`

A fused kernel of attention has a backward pass of its own, which reads its result and what its
softmax was divided by. Both are kept by the kernel's primitive: a name would mark a copy of the
result, and the kernel would run again for the original.
"""

from typing import Any

import flax.linen as nn
import jax

from lora_jax._products import LOW_RANK

NAMES = (
    *("query", "key", "value", "attention", "residual", "gate", "up", "out", "down"),
    LOW_RANK,
)
KERNELS = ("dot_product_attention_fwd_wrapper",)  # JAX's primitive for cuDNN's attention


def _named(*names: str) -> Any:
    """Keeps what goes by these names, and the results of the kernels of attention."""
    by_name = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        return primitive.name in KERNELS or by_name(primitive, *args, **params)

    return policy


_OWN = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": _named(*NAMES),
    "attention": _named("attention"),
}
_POLICIES = (
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
REMAT_POLICIES = ("none", *_OWN, *_POLICIES)


def remat_layer(layer: type[nn.Module], remat: bool | str, *, scanned: bool) -> type[nn.Module]:
    """The layer's class, made to recompute what the policy does not keep.

    Args:
        layer: A Linen module's class.
        remat: A name of `REMAT_POLICIES`; True is ``"full"``, False is ``"none"``.
        scanned: Whether a scan applies it: there nothing could be shared by the compiler, and
            the barrier against that is left out.

    Raises:
        ValueError: The policy is unknown.
    """
    name = remat if isinstance(remat, str) else "full" if remat else "none"
    if name not in REMAT_POLICIES:
        raise ValueError(f"`remat` must be a bool or one of {REMAT_POLICIES}, got {remat!r}.")
    if name == "none":
        return layer
    policy = _OWN[name] if name in _OWN else getattr(jax.checkpoint_policies, name)
    return nn.remat(layer, policy=policy, prevent_cse=not scanned)
