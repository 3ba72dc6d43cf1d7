"""What ``python -m train`` returns. Beside these, 128 + the number of a signal that it obeyed."""

FAILED = 1  # a fault of the program or the machine: the traceback says which
BAD_INPUT = 2  # the config, the data or the command line is wrong
NOT_FINITE = 3  # the loss or the gradient is not finite
PEER_GONE = 4  # another process of the run is gone
INTERRUPTED = 130
