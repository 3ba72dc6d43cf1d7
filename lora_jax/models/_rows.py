"""Rows of a family's table of names for the modules that most families have."""

from lora_jax.io.names import Kind, Row


def kernel_rows(path: str, module: str, kind: Kind = "linear") -> tuple[Row, ...]:
    """A matrix and its bias."""
    return Row(f"{path}/kernel", f"{module}.weight", kind), Row(f"{path}/bias", f"{module}.bias")


def norm_rows(path: str, module: str) -> tuple[Row, ...]:
    """A layer norm's scale and bias."""
    return Row(f"{path}/scale", f"{module}.weight"), Row(f"{path}/bias", f"{module}.bias")
