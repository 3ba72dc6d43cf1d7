"""Assertions on trees, for the tests of this library and of its users."""

from typing import Any

import jax
import numpy as np

from ._paths import flatten


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Same structure, and every leaf equal bit for bit (a NaN equals a NaN).

    Raises:
        AssertionError: Names the first leaf that differs.
    """
    _compare(actual, expected, np.testing.assert_array_equal)


def assert_trees_close(actual: Any, expected: Any, *, relative: float) -> None:
    """Same structure, and every leaf within ``relative`` times the expected leaf's largest value.

    Args:
        actual: A tree of arrays.
        expected: The tree that it should be.
        relative: Largest error allowed, as a fraction of the leaf's largest magnitude.

    Raises:
        AssertionError: Names the first leaf that is further away.
    """

    def close(leaf, wanted, err_msg):
        wanted = np.asarray(wanted)
        if wanted.dtype.kind not in "fcV":
            return np.testing.assert_array_equal(leaf, wanted, err_msg)
        leaf, wanted = np.asarray(leaf, np.float64), np.asarray(wanted, np.float64)
        largest = np.abs(wanted).max(initial=0.0)
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=relative * largest, err_msg=err_msg)

    _compare(actual, expected, close)


def _compare(actual: Any, expected: Any, check: Any) -> None:
    (leaves, structure), (wanted, wanted_structure) = flatten(actual), flatten(expected)
    assert structure == wanted_structure, f"{structure} is not {wanted_structure}"
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) or hasattr(leaf, "dtype"):
            assert leaf.dtype == wanted[path].dtype, f"{path}: {leaf.dtype}"
        check(leaf, wanted[path], err_msg=path)
