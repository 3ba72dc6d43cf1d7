"""What LoRA is for: the paper's claims, reproduced on this library. One command, one figure.

    python -m benchmarks.claims --out DIR

    a  arithmetic    trained parameters, bytes of checkpoints and of optimizer state
    b  step          LoRA against full fine-tuning: time, memory
    c  inference     merged weights cost what base weights cost; factors beside them do not
    d  growth        step time and memory against rank, length and batch
    e  cpu           the quickstart's step, and what tracing costs

Hu et al. 2021, https://arxiv.org/abs/2106.09685. What is measured is measured in processes of
their own (`worker`), so that one that dies takes no other's figures along.
"""
