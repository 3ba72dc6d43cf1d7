"""What a run is measured by: scikit-learn's metrics of the predictions, and their loss."""

import warnings
from typing import Any

import numpy as np
import sklearn.metrics


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of predicted classes.

    Args:
        logits: ``(examples, classes)``.
        labels: ``(examples,)``, the right class of each.

    Returns:
        ``accuracy``; ``f1`` of class 1 where there are two, else the mean over classes;
        ``matthews``, the correlation coefficient; ``loss``, the mean cross-entropy in nats.
    """
    logits = np.asarray(logits, np.float64)
    predicted = logits.argmax(axis=1)
    average: Any = "binary" if logits.shape[1] == 2 else "macro"
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    losses = np.log(np.exp(shifted).sum(axis=1)) - chosen
    never: Any = 0  # the score of a class that is never predicted
    f1 = sklearn.metrics.f1_score(labels, predicted, average=average, zero_division=never)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of labels that are all the same
        matthews = sklearn.metrics.matthews_corrcoef(labels, predicted)
    return {
        "accuracy": float(sklearn.metrics.accuracy_score(labels, predicted)),
        "f1": float(f1),
        "matthews": float(matthews),
        "loss": float(losses.mean()),
    }


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax over classes, ``(examples, classes)``."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
