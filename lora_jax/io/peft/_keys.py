"""Keys of an adapter's file: which published tensor each is about, and in what role.

    base_model.model.<module>.lora_A.weight        a of <module>.weight       (rank, in)
    base_model.model.<module>.lora_B.weight        b                          (out, rank)
    base_model.model.<module>.lora_embedding_A     a of an embedding          (rank, rows)
    base_model.model.<module>.lora_embedding_B     b                          (features, rank)
    base_model.model.<module>.base_layer.bias      a bias of an adapted module
    base_model.model.<module>.weight               a weight of a module that is not adapted

Without the prefix PEFT loads nothing.
"""

import re
from typing import Literal, NamedTuple

from lora_jax.io.names import Kind
from lora_jax.io.peft._config import PREFIX

Role = Literal["a", "b", "base", "full", "copy", "unused"]
"""What a tensor of the file is: a factor; a tensor of the layer under the factors; a weight
trained in full; that weight once more; or a weight that PEFT keeps and does not use."""

_FACTORS: dict[str, tuple[str, str]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "conv1d": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}

# Of a saved module that holds others, PEFT leaves the adapter's name, "default", in the key.
_OWNED = r"(?P<module>.+?)\.{}\.(?:default\.)?(?P<own>.+)"
_FORMS: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"(?P<module>.+)\.(?P<factor>lora_(?:A\.weight|embedding_A))"), "a"),
    (re.compile(r"(?P<module>.+)\.(?P<factor>lora_(?:B\.weight|embedding_B))"), "b"),
    (re.compile(_OWNED.format("base_layer")), "base"),
    (re.compile(_OWNED.format("modules_to_save")), "copy"),
    (re.compile(_OWNED.format("original_module")), "unused"),
)


class Key(NamedTuple):
    """What one key says.

    Attributes:
        tensor: The published tensor that it is about, such as ``"classifier.weight"``.
        role: What the file's tensor is to that one.
        factor: The part of the key that names a factor, if it does.
    """

    tensor: str
    role: Role
    factor: str = ""

    def fits(self, kind: Kind) -> bool:
        """Whether a module of this kind has such a key."""
        return not self.factor or self.factor in _FACTORS.get(kind, ())


def parse(name: str) -> Key | None:
    """Reads a key; None if it lacks the prefix, without which PEFT loads nothing."""
    bare = name.removeprefix(PREFIX)
    if bare == name:
        return None
    for form, role in _FORMS:
        if match := form.fullmatch(bare):
            groups = match.groupdict()
            return Key(f"{match['module']}.{groups.get('own', 'weight')}", role,
                       groups.get("factor", ""))  # fmt: skip
    return Key(bare, "full")


def factor_keys(module: str, kind: Kind) -> tuple[str, str]:
    """The keys of ``a`` and ``b``.

    Raises:
        KeyError: Modules of this kind have no factors; see `is_adaptable`.
    """
    a, b = _FACTORS[kind]
    return f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}"


def base_key(tensor: str) -> str:
    """The key of a tensor that an adapted module has beside its factors, such as a bias."""
    module, _, own = tensor.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{own}"


def is_adaptable(kind: Kind) -> bool:
    """Whether PEFT's format has factors for modules of this kind."""
    return kind in _FACTORS
