"""Models are compiled fast here rather than well: many small programs, each run a few times.

The parity tests of tests/oracle compile the same models as their users do.
"""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
    # What was compiled so rounds differently, and would be found again by tests of other modules.
    jax.clear_caches()
