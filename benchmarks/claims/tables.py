"""Results as Markdown: a section for each part, what was not measured named below its table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

PAPER_LATENCY = (
    "The paper's table 1 (GPT-2 medium, one forward pass): adapter layers add 2.2 to 3.0 % at "
    "32 x 512 tokens, 5.0 to 8.4 % at 16 x 256 and 20.7 to 30.3 % at 1 x 128; merged LoRA adds "
    "nothing."
)


def page(results: Mapping[str, Any]) -> str:
    """All parts that there are results of."""
    parts = (SECTIONS[part](found) for part, found in sorted(results.items()))
    return "# What LoRA is for\n\n" + "\n\n".join(parts) + "\n"


def arithmetic(found: Row) -> str:
    """Part a."""
    header = (
        *("model", "parameters", "factors", "trained with the head", "paper says, M"),
        *("full checkpoint", "adapter file", "ratio", "optimizer, full", "optimizer, LoRA"),
        *("weights + optimizer, full", "LoRA", "less"),
    )
    body = [_arithmetic_cells(row) for row in found["rows"]]
    files = [
        (row["size"], *(f"{row[f'{kind}_{how}']:,}" for kind in ("full", "adapter") for how in HOW))
        for row in found["written"]
    ]
    return _section(
        "a. Parameters and bytes, exact",
        "Computed from shapes; no accelerator. Ranks and targets are the paper's for GPT-2, "
        "RoBERTa and GPT-3 (query and value), rank 16 on every matrix of the layers for Llama. "
        "The optimizer is AdamW; files are safetensors with their header, as one file.",
        table(header, body),
        *_about_the_paper(found["rows"]),
        "Files of small models, written for real (bytes):",
        table(("model", "full, predicted", "written", "adapter, predicted", "written"), files),
    )


HOW = ("predicted", "written")


def _arithmetic_cells(row: Row) -> tuple[str, ...]:
    trained, total = (f"{n:g}" if n else "" for n in (row["paper_trained"], row["paper_total"]))
    paper = f"{trained} of {total}".strip() if total else ""
    return (
        f"{row['size']}, r={row['rank']}, {row['dtype']}",
        f"{row['parameters']:,}",
        f"{row['factors']:,}",
        f"{row['trained']:,}",
        paper,
        stored(row["full_file_bytes"]),
        stored(row["adapter_file_bytes"]),
        f"{row['full_file_bytes'] / row['adapter_file_bytes']:,.0f} x",
        stored(row["full_optimizer_bytes"]),
        stored(row["lora_optimizer_bytes"]),
        stored(row["full_state_bytes"]),
        stored(row["lora_state_bytes"]),
        f"{row['full_state_bytes'] / row['lora_state_bytes']:.2f} x",
    )


def _about_the_paper(rows: Iterable[Row]) -> Iterable[str]:
    """What differs from the paper's figures, and why."""
    by_size = {row["size"]: row for row in rows}
    if "gpt2-medium" in by_size:
        yield (
            "GPT-2 medium: the paper says 0.35 M; its code trains 24 * 2 * 4 * (1024 + 1024) = "
            "393,216, and so does this. PEFT's file holds query and value of the fused kernel as "
            "one adapter of twice the rank, half of whose numbers are zeros."
        )
    if "roberta-base" in by_size:
        yield "RoBERTa: the paper's figures are of the factors alone, without the classifier."
    if row := by_size.get("gpt3-175b"):
        half = 2 * row["factors"]
        yield (
            f"GPT-3 175B: the paper says 350 GB to 35 MB, about 10,000 x. Its factors in 16 bits "
            f"are {half:,} bytes ({half / 2**20:.1f} MiB) beside {stored(row['full_file_bytes'])}: "
            f"{row['full_file_bytes'] / half:,.0f} x. It says 1.2 TB to 350 GB of memory while "
            f"training; weights and optimizer alone are {stored(row['full_state_bytes'])} and "
            f"{stored(row['lora_state_bytes'])} here, a third."
        )


def steps(found: Row) -> str:
    """Part b."""
    rows = _measured(found)
    full = {row["size"]: row for row in rows if row["method"] == "full"}
    header = (
        *("model", "tokens", "what trains", "ms a step [95 %]", "tokens/s", "faster than full"),
        *("memory (XLA)", "of it temporaries", "device peak", "activations kept"),
        *("optimizer", "compile, s"),
    )
    body = [
        (
            row["size"],
            f"{row['batch']} x {row['length']}",
            row["method"],
            milliseconds(row["step_seconds"]),
            f"{row['batch'] * row['length'] / row['step_seconds']['median']:,.0f}",
            _faster(row, full.get(row["size"])),
            *(held(row[name]) for name in ("memory_bytes", "temp_bytes", "device_peak_bytes")),
            held(row["activation_bytes"]),
            held(row["optimizer_bytes"]),
            f"{row['compile_seconds']:.1f}",
        )
        for row in rows
    ]
    return _section(
        "b. One training step: LoRA against full fine-tuning",
        _machine(found),
        f"{_arithmetic_of(rows)} Memory is XLA's plan: arguments, outputs and temporaries. "
        "Activations kept are what differentiation keeps of the forward pass, counted on shapes "
        "before the compiler leaves out what it can compute again. The device's peak is of the "
        "process, and empty where an earlier point's was higher.",
        table(header, body),
        "The paper reports 25 % more throughput than full fine-tuning on GPT-3 175B (section 4.2).",
        *_missing(found),
    )


def _faster(row: Row, full: Row | None) -> str:
    if full is None or row is full:
        return ""
    return f"{full['step_seconds']['median'] / row['step_seconds']['median']:.2f} x"


def inferences(found: Row) -> str:
    """Part c."""
    header = (
        *("model", "tokens", "base, ms [95 %]", "base again / base", "merged / base"),
        *("factors beside / base", "one program", "rounds"),
    )
    body = [
        (
            row["size"],
            f"{row['batch']} x {row['length']}",
            milliseconds(row["seconds"]),
            *(interval(row[f"{name}_ratio"]) for name in ("again", "merged", "factors")),
            "yes" if row["same_hlo"] else "yes, but compiled apart",
            str(row["rounds"]),
        )
        for row in _measured(found)
    ]
    return _section(
        "c. Inference: merged weights add no latency",
        _machine(found),
        "The unmodified function on merged weights and on base weights, in turns; ratios are "
        "medians over rounds with their 95 % interval. `base again` is the base once more: what "
        "noise alone looks like. `factors beside` is the adapted function, not merged.",
        table(header, body),
        PAPER_LATENCY,
        *_missing(found),
    )


def growth(found: Row) -> str:
    """Part d."""
    header = (
        *("model", "rank", "tokens", "ms a step [95 %]", "tokens/s", "memory (XLA)"),
        *("of it temporaries", "device peak", "activations kept"),
    )
    rows, blocks = _measured(found), []
    for series in sorted({row["series"] for row in rows}):
        chosen = sorted((row for row in rows if row["series"] == series), key=lambda r: r[series])
        body = [_growth_cells(row) for row in chosen]
        blocks += [f"Against {series}:", table(header, body)]
    return _section(
        "d. Growth with rank, length and batch",
        _machine(found),
        f"LoRA's training step. {_arithmetic_of(rows)}",
        *blocks,
        *_missing(found),
    )


def _growth_cells(row: Row) -> tuple[str, ...]:
    memory = ("memory_bytes", "temp_bytes", "device_peak_bytes", "activation_bytes")
    return (
        row["size"],
        str(row["rank"]),
        f"{row['batch']} x {row['length']}",
        milliseconds(row["step_seconds"]),
        f"{row['batch'] * row['length'] / row['step_seconds']['median']:,.0f}",
        *(held(row[name]) for name in memory),
    )


def cpu(found: Row) -> str:
    """Part e."""
    blocks = [block for row in _measured(found) for block in row["tables"]]
    title = "e. On the CPU: the quickstart's step, and what tracing costs"
    return _section(title, _machine(found), *blocks, *_missing(found))


SECTIONS: dict[str, Callable[[Row], str]] = {
    "a": arithmetic,
    "b": steps,
    "c": inferences,
    "d": growth,
    "e": cpu,
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def stored(count: float) -> str:
    """Bytes of a file: ``3.15 MB``, of a thousand each."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def held(count: float | None) -> str:
    """Bytes of memory: ``19.4 GiB``; nothing where nobody could tell."""
    return "" if count is None else _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.3g} {units[power]}" if count < 1000 else f"{count:.0f} {units[power]}"


def milliseconds(spread: Row) -> str:
    """A median and its interval."""
    median, low, high = (1e3 * spread[name] for name in ("median", "low", "high"))
    digits = 2 if median < 10 else 1
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def interval(spread: Row) -> str:
    """A ratio and its interval."""
    return f"{spread['median']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]"


def _section(title: str, *blocks: str) -> str:
    return "\n\n".join((f"## {title}", *blocks))


def _measured(found: Row) -> list[Row]:
    return [row for row in found["rows"] if row["status"] == "measured"]


def _missing(found: Row) -> Iterable[str]:
    """One list of the points without figures."""
    lines = [
        f"- {row['size']} {row['method']}{_place(row)}: {row['status']} ({row['why']})"
        for row in found["rows"]
        if row["status"] != "measured"
    ]
    if lines:
        yield "\n".join(["Without figures:", *lines])


def _place(row: Row) -> str:
    return f", rank {row['rank']}, {row['batch']} x {row['length']}" if row["batch"] else ""


def _machine(found: Row) -> str:
    """What the part ran on, where one call did another than the other too."""
    lines = dict.fromkeys(
        f"{machine['device']}"
        + (f", {machine['cores']} cores" if machine["platform"] == "cpu" else "")
        + f", JAX {machine['jax']}, Python {machine['python']}"
        for machine in found["machines"]
    )
    return "; ".join(lines) + "."


def _arithmetic_of(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    row = rows[0]
    layers = "scanned" if row["scan_layers"] else "unrolled"
    return (
        f"Weights and arithmetic in {row['dtype']}, factors in float32, AdamW, layers {layers}, "
        f"recomputation: {row['remat']}, dropout off."
    )
