"""How long each part of something takes."""

import time


class Stopwatch:
    """Seconds between one look and the next."""

    def __init__(self):
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last look, or since it was made."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since
