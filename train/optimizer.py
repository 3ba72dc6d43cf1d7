"""The optimizer as one Optax chain: clipping, then AdamW under a schedule with warm-up."""

import re
from typing import Any

import jax
import optax

from .config import TrainingSection

# Biases, and the scales of norms under every name they go by.
NOT_DECAYED = re.compile(r"(^|/)(bias|scale)$|norm", re.IGNORECASE)


def make_optimizer(section: TrainingSection, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of ``steps`` steps."""
    adamw = optax.adamw(
        learning_rate_schedule(section, steps),
        b1=section.betas[0],
        b2=section.betas[1],
        weight_decay=section.weight_decay,
        mask=decay_mask,
    )
    tx = adamw
    if section.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(section.clip_norm), adamw)
    if section.skip_not_finite:
        tx = optax.apply_if_finite(tx, section.skip_not_finite)
    return tx


def left_out(opt_state: optax.OptState) -> jax.Array | int:
    """How many steps have changed nothing, since their gradients were not finite."""
    is_counted = isinstance(opt_state, optax.ApplyIfFiniteState)
    return opt_state.total_notfinite if is_counted else 0


def learning_rate_schedule(section: TrainingSection, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then cosine or linear decay to zero at ``steps``, or neither."""
    warmup = warmup_steps(section, steps)
    peak, rest = section.learning_rate, max(1, steps - warmup)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[section.schedule]
    # The first step would have a rate of zero, and be wasted: the ramp starts one step up.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
    return optax.join_schedules([ramp, decay], [warmup])


def warmup_steps(section: TrainingSection, steps: int) -> int:
    """Warm-up in steps: a share of ``steps`` below 1, as many as it says from 1 on."""
    return round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)


def decay_mask(trainable: dict[str, Any]) -> dict[str, Any]:
    """Which leaves decay: all but biases and norms, told by their path."""

    def mark(path: str, weight: Any) -> Any:
        decays = not NOT_DECAYED.search(path)
        return jax.tree.map(lambda _: decays, weight)

    return {path: mark(path, weight) for path, weight in trainable.items()}
