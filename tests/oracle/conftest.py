"""What is compared with PyTorch is compiled as users compile it."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _as_users_do(compiled_as_users_do):
    pass
