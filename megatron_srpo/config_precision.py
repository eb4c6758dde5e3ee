"""In what numbers do both engines compute, and how far may they then be apart?

dtype, `fp8` -> precision -> the defaults that it asks for
"""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import model_validator

from megatron_srpo.config_sections import Count, CountOrZero, Positive, Section

Precision = Literal["float32", "bfloat16", "fp8"]
"""The coarsest that a token meets, in the trainer or in the rollout engine."""
PRECISIONS: dict[Precision, dict[str, dict[str, Any]]] = {
    "float32": {},
    "bfloat16": {"": {"max_logprob_diff": 0.5}, "mismatch": {"max_mean": 0.05, "max_kl": 0.01}},
    "fp8": {
        "": {"max_logprob_diff": 1.0},
        "mismatch": {"max_mean": 0.15, "max_kl": 0.05},
        "loss": {"importance": "token_truncate"},
    },
}
"""Section -> what a config means that does not say it; those of the sections themselves are
float32's. The bounds are a judgement: nobody has measured them here."""


class Fp8Config(Section):
    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """How the trainer's layers scale what they multiply in FP8, in Megatron-Core's words. Log-probs
    are computed as ever: the head multiplies in bf16 and sums in fp32."""
    first_last_bf16: CountOrZero = 0
    """So many of the first layers, and so many of the last, multiply in bf16."""
    param_gather: bool = False
    """Layers hold their weights in FP8 and get them so after a step; the optimizer's stay fp32."""
    rollout: bool = False
    """vLLM quantizes the weights that it is sent, layer by layer, at each sync."""

    @property
    def token_multiple(self) -> int:
        """Divides the number of tokens that a process multiplies at a time."""
        return {"none": 1, "mxfp8": 32}.get(self.recipe, 16)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Fp8Config:
        if self.recipe == "none" and (self.first_last_bf16 or self.param_gather):
            raise ValueError("first_last_bf16 and param_gather need a recipe: recipe is none")
        if self.recipe == "delayed" and self.first_last_bf16:
            raise ValueError(
                "first_last_bf16 does not go with recipe=delayed, whose scales follow all layers"
            )
        if self.recipe == "delayed" and self.param_gather:
            raise ValueError(
                "param_gather does not go with recipe=delayed: weights would be rounded under a "
                "scale that has not seen them; recipe=tensorwise or blockwise"
            )
        return self


class MismatchConfig(Section):
    """Bounds of the difference between the trainer's log-probs and the rollout engine's on what a
    step is trained on; defaults by precision."""

    max_mean: Positive = 1e-5
    """Mean absolute difference, nats."""
    max_kl: Positive = 1e-5
    """k3 estimate of KL(rollout engine, trainer), nats per token."""
    patience: Count = 3
    """The run stops after so many steps in a row above one of them."""


def precision_of(dtype: object, recipe: object, quantizes_rollouts: object) -> Precision:
    """Of values as a config gives them, perhaps wrong ones."""
    if recipe not in (None, "none") or quantizes_rollouts not in (None, False):
        return "fp8"
    return "bfloat16" if dtype == "bfloat16" else "float32"


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """A config's values, and what their precision means where they say nothing."""
    fp8 = _stated(given.get("fp8"))
    precision = precision_of(given.get("dtype"), fp8.get("recipe"), fp8.get("rollout"))
    meant = PRECISIONS[precision]
    sections = {
        name: defaults | _stated(given.get(name)) for name, defaults in meant.items() if name
    }
    return meant.get("", {}) | given | sections


def _stated(section: object) -> dict[str, Any]:
    """What a section says, be it a file's or another config's."""
    if isinstance(section, Section):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return cast(dict[str, Any], section) if isinstance(section, dict) else {}
