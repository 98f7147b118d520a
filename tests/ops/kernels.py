"""Triton kernels in fresh interpreters, as Triton decides at its import whether it interprets, and without a GPU."""

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")

INTERPRETED = """
import json
from retention.ops.{kernel} import {form}
from tests.ops.{cases} import CASES, error
print(json.dumps({{case: error({form}, case) for case in CASES}}))
"""

REFUSED = """
from retention.ops.{kernel} import {form}
from tests.ops.{cases} import error
try:
    error({form}, "plain")
except ValueError as problem:
    print(problem)
"""


def fresh(code, **given):
    """What a new interpreter prints."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", **given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def interpreted_errors(**names):
    """Errors of all cases of a test module (`cases`) under Triton's interpreter, of a `form` of a `kernel` module."""
    if tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 fails with NumPy 2.4")
    return json.loads(fresh(INTERPRETED.format(**names), TRITON_INTERPRET="1"))


def refusal(**names):
    """What a form says on a CPU without the interpreter."""
    return fresh(REFUSED.format(**names))


def build(module, function, constants, types, aligned, **options):
    """A kernel compiled for Hopper: the compiler and ptxas come with Triton, and are stricter than its interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module.tl = triton.language
    names = list(inspect.signature(function).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    wide = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in aligned]
    given = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(triton.jit(function), signature, given, {(i,): [["tt.divisibility", 16]] for i in wide})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
