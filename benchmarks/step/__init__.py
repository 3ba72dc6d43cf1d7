"""One LoRA training step, ours beside the peers', on the same work: tokens a second, peak memory.

    python -m benchmarks.step --cases llama-1b --contenders ours unsloth --out runs/step.json

Weights and tokens are random: neither changes what a step costs. Each contender runs in a process
of its own, so its memory is its own, and a peer that is not installed is a line that says so.
Ratios are to ours, measured in the same run.
"""
