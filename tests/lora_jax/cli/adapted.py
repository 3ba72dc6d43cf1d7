"""Bases, adapters and runs on disk, for what takes them from a command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import yaml

from lora_jax import LoraConfig, cli, save_adapter, split
from lora_jax.models import from_pretrained, save_pretrained
from tests.references.checkpoints import checkpoint

SEQUENCE = "sequence-classification"
GPT2 = {"model_type": "gpt2", "vocab_size": 19, "n_embd": 8, "n_layer": 2, "n_head": 2}
GPT2 |= {"n_positions": 16, "architectures": ["GPT2LMHeadModel"]}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
DECODERS = {"gpt2": GPT2, "llama": LLAMA}
TARGETS = {"gpt2": ("attention/qkv", "mlp/up"), "llama": ("attention/(query|value)",)}


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Runs the command; exit code, standard output, standard error."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def listing(directory: Path) -> list[str]:
    """Every file and directory below a directory."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def moved(tree, key):
    """Every leaf moved by a draw of its own; shapes become draws."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    shapes = isinstance(leaves[0], jax.ShapeDtypeStruct)
    steps = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    if shapes:
        return treedef.unflatten(steps)
    return treedef.unflatten(
        (x + step).astype(x.dtype) for x, step in zip(leaves, steps, strict=True)
    )


class Shelf:
    """Bases and adapters, each made once; whoever changes one takes a copy."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.made: dict[str, Path] = {}

    def base(self, family: str, task: str | None = SEQUENCE, dtype: str = "float32") -> Path:
        """A base model: a committed encoder with the head of a task, or a drawn decoder."""
        return self._once(f"{family}-{task}-{dtype}", lambda new: _base(new, family, task, dtype))

    def adapter(self, base: Path, task: str = SEQUENCE, num_labels: int | None = None, **changes):
        """An adapter of a base, everything that trains moved; ``changes`` go to its config."""
        name = f"{base.name}-{task}-{num_labels}-{changes}"
        return self._once(name, lambda new: _adapter(new, base, task, num_labels, changes))

    def _once(self, name: str, make: Callable[[Path], Path]) -> Path:
        if name not in self.made:
            self.made[name] = make(self.directory / str(len(self.made)))
        return self.made[name]


def _base(directory: Path, family: str, task: str | None, dtype: str) -> Path:
    published = directory.with_name(f"{directory.name}-published")
    if family in DECODERS:
        published.mkdir()
        (published / "config.json").write_text(json.dumps(DECODERS[family]))
        model = from_pretrained(published, "causal-lm", abstract=True)
        params = moved(model.params, jax.random.key(0))
    else:
        checkpoint(published, family, task)
        model = from_pretrained(published, task or "feature-extraction")
        params = model.params
    (published / "tokenizer.json").write_text("{}")
    return save_pretrained(directory, model, params, dtype=dtype)


def _adapter(directory: Path, base: Path, task: str, num_labels: int | None, changes: dict) -> Path:
    model = from_pretrained(
        base, task, num_labels=num_labels, new_head=True if num_labels else None
    )
    targets = TARGETS.get(model.config_json["model_type"], ("attention/(query|value)",))
    train = ("classifier/.*",) if task == SEQUENCE else ()
    fields = {"rank": 2, "alpha": 3.0, "targets": targets, "train": train}
    config = LoraConfig(**(fields | changes))
    _, trainable = split(model.params, config, jax.random.key(1))
    return save_adapter(directory, moved(trainable, jax.random.key(2)), config, model)


def copy_of(source: Path, target: Path) -> Path:
    """A copy of a directory."""
    return Path(shutil.copytree(source, target))


def run_of(directory: Path, adapter: Path, base: str) -> Path:
    """Makes what a run of ``lora-jax train`` leaves of an adapter."""
    copy_of(adapter, directory / "adapter")
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": {"path": base}}))
    return directory
