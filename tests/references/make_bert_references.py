"""Makes the committed BERT and RoBERTa references: tiny checkpoints and what PyTorch computes.

    python tests/references/make_bert_references.py     (torch, transformers)

A folder a family: ``config.json``; ``encoder.safetensors``; ``<task>.safetensors`` with the
tensors of that task's head; ``outputs.npz`` with inputs and, a task, the logits. Together an
encoder and a head are a checkpoint in two shards, as `checkpoint` of the tests assembles it.
All weights are drawn, biases and norms too, wide enough that a mix-up shows.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
FAMILIES = {
    "bert": ("Bert", {"pad_token_id": 0, "type_vocab_size": 2}),
    "roberta": ("Roberta", {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
}
HEADS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
}


def draw(model: torch.nn.Module, seed: int) -> None:
    """Redraws every weight: normal of width 0.2, scales of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            centre = float(name.lower().endswith(("layernorm.weight", "layer_norm.weight")))
            weight.copy_(centre + 0.2 * torch.randn(weight.shape, generator=generator))


def inputs(family: str, pad: int) -> dict[str, np.ndarray]:
    """Three rows of 12 tokens: full, padded at the right, padded at the left."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, SIZES["vocab_size"], (3, 12))
    mask = np.ones((3, 12), np.int64)
    mask[1, 7:], mask[2, :4] = 0, 0
    types = (np.arange(12) >= 5).astype(np.int64)[None].repeat(3, 0)
    return {
        "input_ids": np.where(mask == 1, ids, pad),
        "attention_mask": mask,
        "token_type_ids": types if family == "bert" else np.zeros_like(types),
    }


def logits(output) -> np.ndarray:
    """The logits; of question answering, start and end as the last axis."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    return output.logits.numpy()


def make(family: str) -> None:
    """Writes one family's folder."""
    name, own = FAMILIES[family]
    folder = HERE / family
    folder.mkdir(exist_ok=True)
    config = getattr(transformers, f"{name}Config")(**SIZES, **own)
    fields = config.to_dict()
    fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    given = inputs(family, own["pad_token_id"])
    outputs = dict(given)
    # The pooler comes with sequence classification and belongs to the encoder.
    encoder: dict[str, torch.Tensor] = {}
    for seed, (task, suffix) in enumerate(HEADS.items()):
        config.num_labels = 2 if task == "question-answering" else 3
        model = getattr(transformers, f"{name}{suffix}")(config).eval()
        draw(model, seed)
        model.load_state_dict(encoder, strict=False)
        tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
        tensors = {k: v for k, v in tensors.items() if ".decoder." not in k}
        encoder = encoder or {k: v for k, v in tensors.items() if k.startswith(f"{family}.")}
        head = {k: v for k, v in tensors.items() if not k.startswith(f"{family}.")}
        save_file(head, folder / f"{task}.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            tensor_inputs = {k: torch.from_numpy(v) for k, v in given.items()}
            outputs[task] = logits(model(**tensor_inputs))
            if task != "masked-lm":
                outputs[f"{task}, ids alone"] = logits(model(tensor_inputs["input_ids"]))
    save_file(encoder, folder / "encoder.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    for each in FAMILIES:
        make(each)
