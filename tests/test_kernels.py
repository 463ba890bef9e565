"""The Triton kernels where there is no GPU: what they compute, and what they compile to."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as m

pytest.importorskip("triton", reason="Triton has no build for this system; the references serve here")
TESTS = Path(__file__).resolve().parent


def test_cpu_tensors_take_the_references():
    assert not m.use_kernels(torch.zeros(1))


def test_kernels_in_the_interpreter():
    """tests/kernel_cases.py, in a process of its own."""
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", TESTS / "kernel_cases.py"], text=True,
                            capture_output=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    print(result.stdout, result.stderr)
    assert result.returncode == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_compile_for(arch):
    """Kernels as they would be launched break no rule of tests/tools/aot.py: no spills, no loop that waits, ..."""
    result = subprocess.run([sys.executable, TESTS / "tools/aot.py", arch], text=True, capture_output=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    for kernel in ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv", "cross_entropy"):
        assert f"| {kernel} |" in result.stdout
