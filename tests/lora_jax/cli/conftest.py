"""One shelf of bases and adapters for a whole session."""

import pytest

from tests.lora_jax.cli.adapted import Shelf


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))
