"""A training step of PyTorch, measured: forwards, backwards, AdamW, one after another."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.step.batches import batches, endless
from benchmarks.step.cases import LEARNING_RATE, WEIGHT_DECAY
from benchmarks.step.job import Job
from benchmarks.step.timing import timed_steps
from benchmarks.stopwatch import Stopwatch


def measure(
    job: Job,
    make_model: Callable[[str], Any],
    versions: dict[str, str],
    *,
    autocast: bool = False,
    rows: slice = slice(None),
    passes: int = 1,
) -> dict[str, Any]:
    """All figures of a step.

    Args:
        job: Which case, how many steps.
        make_model: Makes the adapted model on a device, by name.
        versions: Of the packages that matter, for the record.
        autocast: Whether the forward pass runs under bfloat16 autocast.
        rows: Of each batch, those that this process takes.
        passes: Into how many its rows are taken apart, one after the other.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    stopwatch = Stopwatch()
    print("making the model", file=sys.stderr, flush=True)
    model = make_model(device)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=device == "cuda"
    )
    data = [_on_device(batch, device, rows) for batch in batches(job.work)]
    figures: dict[str, Any] = {"trained": sum(weight.numel() for weight in trained)}
    figures |= {"setup_peak_bytes": _peak(device), "setup_seconds": stopwatch.lap()}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    print("running", file=sys.stderr, flush=True)
    advance = stepper(model, optimizer, data, device if autocast else None, passes)
    figures |= timed_steps(job, advance, lambda loss: loss.item())
    figures["first_step_seconds"] = figures["first_run_seconds"]
    figures |= {"peak_bytes": _peak(device), "device": _name(device)}
    return figures | {"versions": {"torch": torch.__version__} | versions}


def stepper(
    model: Any, optimizer: torch.optim.Optimizer, data: list, autocast: str | None, passes: int
) -> Callable[[], torch.Tensor]:
    """A function that takes one step further each time, and gives the loss.

    Gradients of several processes are summed in the last pass alone, as trainers do it.
    """
    coming = endless(data)

    def gradient(part: dict[str, torch.Tensor], *, alone: bool) -> torch.Tensor:
        context = torch.autocast(autocast, torch.bfloat16) if autocast else contextlib.nullcontext()
        with model.no_sync() if alone else contextlib.nullcontext():
            with context:
                loss = model(**part).loss / passes
            loss.backward()
        return loss.detach()

    def advance() -> torch.Tensor:
        whole = {name: rows.chunk(passes) for name, rows in next(coming).items()}
        parts = [dict(zip(whole, part, strict=True)) for part in zip(*whole.values(), strict=True)]
        losses = [gradient(part, alone=part is not parts[-1]) for part in parts]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(losses)

    return advance


def _on_device(batch: dict[str, Any], device: str, rows: slice) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array[rows]).long().to(device) for name, array in batch.items()}


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device
