"""The published names of BERT's and RoBERTa's weights, with the head of each task.

encoder/layers/{layer}/attention/query/kernel
bert.encoder.layer.{layer}.attention.self.query.weight
"""

from lora_jax.io.names import NameTable, Row, expand
from lora_jax.models._rows import kernel_rows, norm_rows
from lora_jax.models.bert._config import BertConfig

TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "feature-extraction",
)


def name_table(config: BertConfig, task: str, *, scan_layers: bool) -> NameTable:
    """The published names of a model's weights.

    The bare encoder's names have no prefix, as in the files of the published encoder.

    Raises:
        ValueError: The config does not allow the task.
    """
    if task == "masked-lm" and not config.tie_word_embeddings:
        raise ValueError("`tie_word_embeddings` is false; masked-lm has a tied decoder only.")
    heads, tied = _HEADS[config.model_type], _TIED[config.model_type]
    prefix = "" if task == "feature-extraction" else f"{config.model_type}."
    rows = (*_encoder_rows(prefix), *heads[task])
    of_other_tasks = {row.tensor for head in heads.values() for row in head}
    return NameTable(
        expand(rows, config.num_hidden_layers, stacked=scan_layers),
        prefix=config.model_type,
        unused=frozenset({*_UNUSED, *of_other_tasks, *tied}),
        renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
        tied=tied if task == "masked-lm" else {},
        heads=("classifier", "qa_outputs", "lm_head"),
        drawn=("classifier", "qa_outputs", "lm_head", "pooler"),
    )


def architecture(config: BertConfig, task: str) -> str:
    """The name of the published class, such as ``"BertForMaskedLM"``."""
    ends = {
        "sequence-classification": "ForSequenceClassification",
        "token-classification": "ForTokenClassification",
        "question-answering": "ForQuestionAnswering",
        "masked-lm": "ForMaskedLM",
        "feature-extraction": "Model",
    }
    return {"bert": "Bert", "roberta": "Roberta"}[config.model_type] + ends[task]


def _encoder_rows(prefix: str) -> tuple[Row, ...]:
    ours, theirs = "encoder/layers/{layer}", f"{prefix}encoder.layer.{{layer}}"
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return (
        *(
            Row(f"embeddings/{t}/embedding", f"{prefix}embeddings.{t}.weight", "embedding")
            for t in tables
        ),
        *norm_rows("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
        *kernel_rows(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
        *kernel_rows(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
        *kernel_rows(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
        *kernel_rows(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
        *norm_rows(f"{ours}/attention/norm", f"{theirs}.attention.output.LayerNorm"),
        *kernel_rows(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
        *kernel_rows(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        *norm_rows(f"{ours}/mlp/norm", f"{theirs}.output.LayerNorm"),
    )


_HEADS: dict[str, dict[str, tuple[Row, ...]]] = {
    "bert": {
        "sequence-classification": (
            *kernel_rows("pooler", "bert.pooler.dense"),
            *kernel_rows("classifier", "classifier"),
        ),
        "token-classification": kernel_rows("classifier", "classifier"),
        "question-answering": kernel_rows("qa_outputs", "qa_outputs"),
        "masked-lm": (
            *kernel_rows("lm_head/dense", "cls.predictions.transform.dense"),
            *norm_rows("lm_head/norm", "cls.predictions.transform.LayerNorm"),
            Row("lm_head/bias", "cls.predictions.bias"),
        ),
        "feature-extraction": (),
    },
    "roberta": {
        "sequence-classification": (
            *kernel_rows("classifier/dense", "classifier.dense"),
            *kernel_rows("classifier/out_proj", "classifier.out_proj"),
        ),
        "token-classification": kernel_rows("classifier", "classifier"),
        "question-answering": kernel_rows("qa_outputs", "qa_outputs"),
        "masked-lm": (
            *kernel_rows("lm_head/dense", "lm_head.dense"),
            *norm_rows("lm_head/norm", "lm_head.layer_norm"),
            Row("lm_head/bias", "lm_head.bias"),
        ),
        "feature-extraction": (),
    },
}

_UNUSED = (
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)

_TIED = {
    "bert": {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
}
