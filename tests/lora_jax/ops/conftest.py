"""Codes and values are promised bit for bit, so they are compiled as users compile them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _as_users_do(compiled_as_users_do):
    pass
