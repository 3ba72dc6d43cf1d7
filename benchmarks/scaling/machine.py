"""What the points will run on, asked of a process that gives the devices back."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ASK = """
import json, jax
kind = jax.devices()[0].device_kind
print(json.dumps({"count": len(jax.devices()), "kind": kind, "jax": jax.__version__}))
"""


def machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """``count`` of devices, their ``kind``, and the version of ``jax``.

    Args:
        environment: The variables of a point's process.
    """
    done = subprocess.run(
        (sys.executable, "-c", ASK), env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])
