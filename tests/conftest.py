"""One strict JAX for every test: eight CPU devices, no silent rank promotion, no warnings.

The environment is set before anything imports JAX, and processes that tests start inherit it.

Programs are compiled fast rather than well: most run once. The same HLO goes in, so what XLA
counts in it (flops, bytes, collectives) stays; `compiled_as_users_do` is for tests of bits.
"""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

XLA_FLAGS: dict[str, Any] = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_parallel_codegen_split_count": 1,  # threads that compile: every core runs tests
}
if metadata.version("jaxlib").startswith("0.10."):  # later ones have no other emitters
    XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # a third of the time to compile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = os.environ.get("XLA_FLAGS", "")
given = [f"{name}={value}" for name, value in XLA_FLAGS.items() if name not in flags]
os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *given])
# Tests on a full disk must not find one here; tests that compile the same often make their own.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
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


@pytest.fixture(scope="module")
def compiled_as_users_do():
    """All optimisations of the compiler, for a module whose tests compare what rounding leaves."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    # What was compiled the other way rounds differently, and would be found again.
    jax.clear_caches()
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
    jax.clear_caches()


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
