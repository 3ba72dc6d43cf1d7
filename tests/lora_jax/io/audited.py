"""Loads hostile directories under an audit hook, and prints as JSON what Python did meanwhile.

Run as a script with an empty directory. Every module of a hostile directory writes a file when it
is imported, and what is loaded is loaded once before in its harmless form, so that nothing of ours
or of the libraries is left to import. Only transformers, which looks tokenizers up in a registry of
its own, may import more of itself, from where it is installed.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from lora_jax import LoraConfig, split
from lora_jax.generation import read_options
from lora_jax.io import load_adapter, save_adapter
from lora_jax.io.tokenizers import load_tokenizer
from lora_jax.models import from_pretrained
from tests.lora_jax.generation import toys
from tests.references.checkpoints import checkpoint, sharded

TASK = "sequence-classification"
CODE = (
    "import pathlib\npathlib.Path(__file__).with_suffix('.ran').write_text('')\nclass Evil: pass\n"
)
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
FORBIDDEN += ("socket.connect", "ctypes.dlopen", "import", "exec", "open")
INSTALLED = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)})


class Audit:
    """What Python does while a directory is loaded."""

    def __init__(self):
        self.directory: Path | None = None
        self.may_import = False
        self.events: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if self.directory is None or event not in FORBIDDEN or self._is_allowed(event, args):
            return
        self.events.append(f"{event} {args[0]!r:.200}")

    def _is_allowed(self, event: str, args: tuple) -> bool:
        if event == "open":
            if isinstance(args[0], int):  # opened already
                return True
            path = os.path.realpath(os.fsdecode(args[0]))
            return _is_in(path, (str(self.directory),)) or (
                self.may_import and _is_in(path, INSTALLED)
            )
        if event == "import":
            return self.may_import and args[0].partition(".")[0] == "transformers"
        if event == "exec":  # dataclasses write their methods as "<string>"
            name = args[0].co_filename
            return self.may_import and (name == "<string>" or _is_in(name, INSTALLED))
        return False


def _is_in(path: str, directories: tuple[str, ...]) -> bool:
    return any(Path(path).is_relative_to(directory) for directory in directories)


def edited(directory: Path, name: str, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    file = directory / name
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | fields))


def one_shard(directory: Path, name: str) -> None:
    """Has an index name one file for all of a model's tensors."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


EVIL_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil"] * 2}
ELSEWHERE = {"base_model_class": "system", "parent_library": "evil"}

# Name: what it is a copy of, what is changed, and whether it may load all the same.
CASES: dict[str, tuple[str, Callable[[Path], None], bool]] = {
    "model-code": ("model", lambda d: edited(d, "config.json", auto_map=EVIL_MAP), False),
    "model-trust": ("model", lambda d: edited(d, "config.json", trust_remote_code=True), False),
    "model-type": ("model", lambda d: edited(d, "config.json", model_type="evil"), False),
    "model-names": (
        "model",
        lambda d: edited(
            d, "config.json", architectures=["evil.Evil"], torch_dtype="evil.Evil",
            tokenizer_class="evil.Evil", attn_implementation="evil", _name_or_path="/etc/passwd",
        ),
        True,
    ),
    "model-function": ("model", lambda d: edited(d, "config.json", hidden_act="evil.Evil"), False),
    "shard-up": ("model", lambda d: one_shard(d, "../outside.safetensors"), False),
    "shard-absolute": (
        "model",
        lambda d: one_shard(d, str(d.parent / "outside.safetensors")),
        False,
    ),
    "shard-link": ("model", lambda d: one_shard(d, "link.safetensors"), False),
    "shard-nul": ("model", lambda d: one_shard(d, "a\0.safetensors"), False),
    "shard-pickle": ("model", lambda d: one_shard(d, "evil.bin"), False),
    "weights-pickle": ("model", lambda d: (d / "model.safetensors").unlink(), False),
    "adapter-names": (
        "adapter",
        lambda d: edited(
            d, "adapter_config.json", auto_mapping=ELSEWHERE, megatron_core="evil",
            base_model_name_or_path="/etc/passwd", revision="../..",
        ),
        True,
    ),
    "adapter-code": (
        "adapter",
        lambda d: edited(d, "adapter_config.json", auto_map=EVIL_MAP, trust_remote_code=True),
        False,
    ),
    "adapter-type": ("adapter", lambda d: edited(d, "adapter_config.json", peft_type="E"), False),
    "adapter-pickle": ("adapter", lambda d: (d / "adapter_model.safetensors").unlink(), False),
    "options": (
        "options",
        lambda d: edited(d, "generation_config.json", custom_generate="evil.Evil"),
        False,
    ),
    "tokenizer-code": (
        "tokenizer",
        lambda d: edited(d, "tokenizer_config.json", auto_map=EVIL_MAP, trust_remote_code=True),
        True,
    ),
    "tokenizer-config-code": (
        "tokenizer",
        lambda d: edited(d, "config.json", auto_map=EVIL_MAP, model_type="evil"),
        True,
    ),
    "tokenizer-class": (
        "tokenizer",
        lambda d: edited(d, "tokenizer_config.json", tokenizer_class="evil.Evil"),
        True,
    ),
    **{
        f"tokenizer-{field}-{kind}": (
            "tokenizer",
            lambda d, field=field, kind=kind: edited(
                d, "tokenizer_config.json", tokenizer_class=kind,
                **{field: str(d.parent / "outside.json")},
            ),
            True,
        )
        for field in ("tokenizer_file", "vocab_file", "merges_file", "vocab", "gguf_file")
        for kind in ("PreTrainedTokenizerFast", "BertTokenizer", "GPT2Tokenizer", "LlamaTokenizer")
    },
    "tokenizer-versions": (
        "tokenizer",
        lambda d: edited(
            d, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"]
        ),
        False,
    ),
}  # fmt: skip


def main(root: Path) -> None:
    warnings.simplefilter("ignore")  # one that is shown has its line of source opened
    root = root.resolve()
    good = {name: root / "good" / name for name in ("model", "adapter", "options", "tokenizer")}
    model = from_pretrained(checkpoint(good["model"], "bert", TASK))
    from_pretrained(sharded(root / "good" / "sharded", "bert", TASK))
    config = LoraConfig(rank=2, alpha=4.0, targets=("attention/query",), train=("classifier/.*",))
    _, trainable = split(model.params, config, jax.random.key(0))
    save_adapter(good["adapter"], trainable, config, model)
    good["options"].mkdir()
    edited(good["options"], "generation_config.json", do_sample=True)
    toys.tokenizer("a", "b").save_pretrained(good["tokenizer"])
    loaders: dict[str, Callable[[Path], Any]] = {
        "model": lambda d: from_pretrained(d, TASK),
        "adapter": lambda d: load_adapter(d, model),
        "options": read_options,
        "tokenizer": load_tokenizer,
    }
    for kind, load in loaders.items():
        load(good[kind])
    audit, events, unexpected = Audit(), {}, {}
    for name, (kind, change, may_load) in CASES.items():
        directory = root / name
        shutil.copytree(good[kind], directory)
        for file in ("evil.py", "evil.bin", "modeling_evil.py"):
            (directory / file).write_text(CODE)
        save_file({"x": np.zeros(2)}, root / "outside.safetensors")
        shutil.copy(good["tokenizer"] / "tokenizer.json", root / "outside.json")
        shutil.copy(good["tokenizer"] / "tokenizer.json", root / "tokenizer.4.0.0.json")
        os.symlink("../outside.safetensors", directory / "link.safetensors")
        change(directory)
        sys.path.insert(0, str(directory))  # an import by name would find it
        audit.events, audit.may_import = [], kind == "tokenizer"
        audit.directory = directory
        try:
            loaders[kind](directory)
            outcome = "loaded"
        except ValueError:
            outcome = "refused"
        except Exception as error:
            outcome = repr(error)
        audit.directory = None
        sys.path.remove(str(directory))
        audit.events += [f"ran {file.name}" for file in directory.rglob("*.ran")]
        if audit.events:
            events[name] = audit.events
        if outcome != "refused" and not (may_load and outcome == "loaded"):
            unexpected[name] = outcome
    print(json.dumps({"events": events, "unexpected": unexpected, "heard": _heard(audit, root)}))


def _heard(audit: Audit, root: Path) -> list[str]:
    """Which of the three the hook hears when they do happen."""
    audit.events, audit.may_import, audit.directory = [], False, root / "good"
    (root / "heard.py").write_text("")
    sys.path.insert(0, str(root))
    __import__("heard")
    audit.directory = None
    return sorted({event.partition(" ")[0] for event in audit.events})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
