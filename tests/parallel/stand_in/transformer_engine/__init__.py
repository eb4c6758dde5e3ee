"""Not Transformer Engine: its names, signatures and parameters (2.14.1), in torch on a CPU.

Tests of the wiring alone: which module gets which weight, which number of tokens, which FP8 recipe.
It proves nothing about what Transformer Engine computes; `tools/gpu_check.py` asks that.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.14.1"
