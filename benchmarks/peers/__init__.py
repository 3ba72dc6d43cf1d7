"""The peers' own training step, for `benchmarks.step`: PEFT, Liger and Unsloth, on PyTorch.

Each is optional, and versions are in ``requirements.txt``. Settings are those that its users run,
and where a choice was left, the one that favours it.
"""
