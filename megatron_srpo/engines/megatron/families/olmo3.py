"""OLMo 3: OLMo 2, three of four layers with a sliding window, YaRN on the others only.

Windows and rotary frequencies are the config's, layer by layer (`positions.py`).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_srpo.engines.megatron.families import olmo2

FAMILY = replace(
    olmo2.FAMILY, model_type="olmo3", architecture="Olmo3ForCausalLM", has_windows=True
)
