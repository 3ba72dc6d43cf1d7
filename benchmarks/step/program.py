"""What a compiled program's text says of its operations.

%fused (p: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%p, %p), metadata={op_name="jit(train_step)/mlp/add"}
}
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
"""

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) \w")
_NAMED = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_NOISE = re.compile(r"jit\(train_step\)/|^main\.\d+/")
_NUMBER = re.compile(r"(?<=/)\d+(?=/)")
LENGTH = 110


def names_of(program: str) -> dict[str, str]:
    """Operation -> where it comes from, the path that JAX gives it; a fusion's is its result's.

    >>> found = names_of(__doc__)
    >>> found["fusion.3"]
    'mlp/add'
    """
    names, calls, last, inside = {}, {}, {}, ""
    for line in program.splitlines():
        if opened := _COMPUTATION.match(line):
            inside = opened[1]
        elif operation := _OPERATION.match(line):
            if named := _NAMED.search(line):
                names[operation[1]] = last[inside] = _shortened(named[1])
            elif called := _CALLS.search(line):
                calls[operation[1]] = called[1]
    return names | {name: last[body] for name, body in calls.items() if body in last}


def shapes_of(program: str) -> dict[str, str]:
    """Operation -> its shape, a tuple's in parentheses."""
    found = (_OPERATION.match(line) for line in program.splitlines())
    return {operation[1]: operation[2] for operation in found if operation}


def place(name: str) -> str:
    """A path without the numbers of layers, so that all layers are one place.

    >>> place("jvp(Llama)/layers/12/mlp/up/dot_general")
    'jvp(Llama)/layers/*/mlp/up/dot_general'
    """
    return _NUMBER.sub("*", name)


def _shortened(path: str) -> str:
    path = _NOISE.sub("", path)
    return path if len(path) <= LENGTH else "..." + path[3 - LENGTH :]
