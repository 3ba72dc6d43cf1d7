"""A LoRA training step over 1, 2, 4 and 8 devices: tokens a second, bytes sent, peak memory.

    python -m benchmarks.scaling --cases llama-1b --ways data fsdp --devices 1 2 4 8 --out runs/x

    weak      a device's batch stays as it is, so n devices take n times as many rows a step
    strong    a step has 8 rows, however many devices share them

    efficiency = tokens a second of n devices / (n * tokens a second of one device)

One device is the same program whichever way weights are placed. Every point runs in a process of
its own, which sees all devices and uses the first n of them.
"""
