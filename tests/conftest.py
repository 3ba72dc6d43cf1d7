"""One strict JAX for every test: eight CPU devices, no silent rank promotion, no warnings.

The environment is set before anything imports JAX, and processes that tests start inherit it.
"""

import os
from pathlib import Path

DEVICES = 8
COUNT_FLAG = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COUNT_FLAG}={DEVICES}".strip()
# Nothing here may ask a hub; a test that tries fails at once instead of hanging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles, so neither a deadline nor a speed check says anything.
hypothesis.settings.register_profile(
    "local", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data sets; a test that needs one is skipped where it is absent."""
    places = [Path(__file__).parents[2] / "shared" / "data"]
    if given := os.environ.get("LORA_JAX_DATA"):
        places.insert(0, Path(given))
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"No data sets: $LORA_JAX_DATA is not set and {places[-1]} does not exist.")
