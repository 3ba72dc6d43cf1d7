"""The tokenizer inside a GGUF file, as the ``tokenizers`` library builds and saves it.

vocabulary, merges, special tokens   from the file's arrays
how text is cut before the merges    from the name in ``tokenizer.ggml.pre``, a row of a table here

Byte-level BPE only. A SentencePiece vocabulary is refused: its merges are not in the file.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.io.gguf._header import Header, read_header

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How a published tokenizer cuts text before it merges bytes.

    Attributes:
        pattern: Cut into the matches of this; None means GPT-2's own, in ``ByteLevel``.
        digits: Whether each digit is cut off first.
        nfc: Whether text is normalised to NFC.
        ignore_merges: Whether a piece that is a token is taken whole, whatever the merges say.
        add_bos: Whether a text begins with the bos token where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = PreTokenizer()
_LLAMA3 = PreTokenizer(
    pattern=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt2": _GPT2,
    "gpt-2": _GPT2,
    "smollm": PreTokenizer(digits=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": PreTokenizer(pattern=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True),
}
"""By the value of ``tokenizer.ggml.pre``, as the tokenizers of GPT-2, SmolLM2, Llama 3 and Qwen2
are published."""

_CONTROL, _USER_DEFINED = 3, 4  # of ``tokenizer.ggml.token_type``
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_KNOWN = frozenset(
    (
        *("model", "pre", "tokens", "token_type", "merges", "scores"),
        *("add_bos_token", "add_eos_token", "add_space_prefix"),
    )
)


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, as `transformers` has them.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` with its special tokens and chat template.
        Where the file names no pad token, the eos token pads.

    Raises:
        ValueError: The file has no tokenizer that is known here, or transformers is missing.
    """
    header = read_header(file)
    tokenizer, config = _tokenizer(header), _tokenizer_config(header)
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ValueError(
            "A tokenizer is used through transformers: pip install 'lora_jax[train]'."
        ) from error
    del config["tokenizer_class"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config)


def write_tokenizer(file: Path, directory: Path) -> None:
    """Writes the tokenizer of a GGUF file as the usual libraries read it.

    The files are ``tokenizer.json``, ``tokenizer_config.json`` and, where the file has one,
    the chat template in ``chat_template.jinja``.

    Raises:
        ValueError: The file has no tokenizer that is known here, or tokenizers is missing.
    """
    header = read_header(file)
    tokenizer, config = _tokenizer(header), _tokenizer_config(header)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = config.get("chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _tokenizer(header: Header) -> Any:
    """The ``tokenizers.Tokenizer``."""
    own = _own(header)
    cut = PRE_TOKENIZERS[own["pre"]]
    merges = _merges(header, own)
    try:
        from tokenizers import AddedToken, Tokenizer, models
    except ImportError as error:
        raise ValueError(
            "A tokenizer is built by tokenizers: pip install 'lora_jax[train]'."
        ) from error
    vocabulary = {token: index for index, token in enumerate(own["tokens"])}
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.ignore_merges)
    tokenizer = Tokenizer(bpe)
    _cut(tokenizer, cut)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(own["tokens"], own["token_type"], strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    _add_ends(tokenizer, header, own, cut)
    return tokenizer


def _cut(tokenizer: Any, cut: PreTokenizer) -> None:
    """Sets how text becomes the pieces that are merged, and tokens text again."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()


def _add_ends(tokenizer: Any, header: Header, own: Mapping[str, Any], cut: PreTokenizer) -> None:
    """What is put before and after every text."""
    from tokenizers import processors

    ends = {
        "bos": own.get("add_bos_token", cut.add_bos),
        "eos": own.get("add_eos_token", False),
    }
    tokens = {role: _role(header, own, role) for role, added in ends.items() if added}
    absent = [role for role, token in tokens.items() if token is None]
    if absent:
        raise ValueError(f"{header.file} adds {', '.join(absent)} to a text and names none.")
    if tokens:
        pattern = [tokens.get("bos"), "$A", tokens.get("eos")]
        pair = [*pattern, tokens.get("bos") and f"{tokens['bos']}:1", "$B:1"]
        pair += [tokens.get("eos") and f"{tokens['eos']}:1"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for piece in pattern if piece],
            pair=[piece for piece in pair if piece],
            special_tokens=[(token, own["tokens"].index(token)) for token in tokens.values()],
        )


def _tokenizer_config(header: Header) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says besides the vocabulary."""
    own = _own(header)
    names = {f"{short}_token": _role(header, own, role) for role, short in _ROLES.items()}
    if names["pad_token"] is None:
        names["pad_token"] = names["eos_token"]
    config: dict[str, Any] = {name: token for name, token in names.items() if token is not None}
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    length = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    if type(length) is int:
        config["model_max_length"] = length
    config["clean_up_tokenization_spaces"] = False
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


def _role(header: Header, own: Mapping[str, Any], role: str) -> str | None:
    index = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(own["tokens"]):
        raise ValueError(
            f"{header.file}: 'tokenizer.ggml.{role}_token_id' is {index!r:.80}, of "
            f"{len(own['tokens'])} tokens."
        )
    return own["tokens"][index]


def _own(header: Header) -> dict[str, Any]:
    """The keys under ``tokenizer.ggml.``, checked."""
    prefix = "tokenizer.ggml."
    own = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    tokens = own.get("tokens")
    own.setdefault("token_type", [1] * (len(tokens) if isinstance(tokens, list) else 0))
    problems = [*_of_another_kind(own), *_misshapen(own)]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{header.file} has no tokenizer that is known here:{listed}")
    return own


def _of_another_kind(own: Mapping[str, Any]) -> list[str]:
    problems = []
    if own.get("model") != "gpt2":
        problems.append(
            f"'tokenizer.ggml.model' is {own.get('model')!r:.80}; only 'gpt2', byte-level BPE, is "
            "rebuilt. Use the tokenizer files that the model was published with."
        )
    elif own.get("pre") not in tuple(PRE_TOKENIZERS):  # a tuple: a list does not hash
        near = difflib.get_close_matches(str(own.get("pre")), PRE_TOKENIZERS, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        problems.append(
            f"'tokenizer.ggml.pre' is {own.get('pre')!r:.80}{hint}. Known are "
            f"{', '.join(PRE_TOKENIZERS)}."
        )
    if own.get("add_space_prefix", False) is not False:
        problems.append("'tokenizer.ggml.add_space_prefix' must be false for byte-level BPE.")
    unknown = [key for key in own if key not in _KNOWN and not key.endswith("_token_id")]
    return problems + [f"'tokenizer.ggml.{key}' is unknown." for key in unknown]


def _misshapen(own: Mapping[str, Any]) -> list[str]:
    tokens, kinds, merges = own.get("tokens"), own["token_type"], own.get("merges")
    problems = [
        f"'tokenizer.ggml.{name}' must be a list of strings."
        for name, value in (("tokens", tokens), ("merges", merges))
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value)
    ]
    if problems:
        return problems
    if len(set(tokens or ())) != len(tokens or ()):
        problems.append("'tokenizer.ggml.tokens' has a token twice.")
    if not isinstance(kinds, list) or len(kinds) != len(tokens or ()):
        problems.append("'tokenizer.ggml.token_type' must have one number a token.")
    problems += [
        f"'tokenizer.ggml.{name}' must be true or false."
        for name in ("add_bos_token", "add_eos_token")
        if type(own.get(name, False)) is not bool
    ]
    return problems


def _merges(header: Header, own: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs to merge, best first, each of which makes a token."""
    vocabulary = set(own["tokens"])
    pairs = []
    for merge in own["merges"]:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary:
            raise ValueError(
                f"{header.file}: the merge {merge!r:.80} is not of two tokens that make a third."
            )
        pairs.append((left, right))
    return pairs
