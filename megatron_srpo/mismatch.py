"""Do trainer and rollout engine still speak of one policy?   a step's metrics -> go on, warn, stop

In float32 the two agree on every token, or something is broken: one token above its bound stops the
run. In bf16 and FP8 single rare tokens may be whole nats apart while nothing is wrong; what counts
is the mean, and the KL divergence that it adds up to. There a step above a bound may be an accident
(importance weights take the edge off it), and several in a row are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_srpo.config import Config
from megatron_srpo.config_precision import MismatchConfig
from megatron_srpo.types import AlarmError

FAR = 10.0
"""A step so many times above a bound is warned of at once."""


@dataclass(slots=True)
class MismatchAlarm:
    """Hears of every step that trained on rollouts of this run's own engine."""

    bounds: MismatchConfig
    max_token: float | None
    """Of any trained token, nats; None: not bounded."""
    num_above: int = 0
    """Steps in a row above a bound; a run that is started again counts anew."""

    @classmethod
    def of(cls, cfg: Config) -> MismatchAlarm:
        max_token = cfg.max_logprob_diff if cfg.precision == "float32" else None
        return cls(cfg.mismatch, max_token)

    def hear(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, or None. Raises `AlarmError` if the run must not go on; a step without trained
        tokens says nothing and changes nothing."""
        if "mismatch/logprob_abs_mean" not in metrics:
            return None
        difference = metrics["mismatch/logprob_abs_max"]
        if self.max_token is not None and not difference <= self.max_token:
            raise AlarmError(
                f"step {step}: the trainer's log-probs differ from the rollout engine's by "
                f"{difference:.2g} nats on a trained token (max_logprob_diff={self.max_token:g})"
            )
        times, words = worst(metrics, self.bounds)
        self.num_above = 0 if times <= 1 else self.num_above + 1
        if self.num_above >= self.bounds.patience:
            raise AlarmError(
                f"step {step}: trainer and rollout engine are too far apart in {self.num_above} "
                f"steps in a row (mismatch.patience={self.bounds.patience}): {words}"
            )
        if times <= FAR:
            return None
        return f"step {step}: trainer and rollout engine are far apart: {words}"


def worst(metrics: Mapping[str, float], bounds: MismatchConfig) -> tuple[float, str]:
    """How many times its bound a metric is at most, and that metric in words. What is not a number
    is above every bound."""
    pairs = (
        ("mismatch/logprob_abs_mean", "max_mean", bounds.max_mean),
        ("mismatch/kl_k3", "max_kl", bounds.max_kl),
    )
    found: list[tuple[float, str]] = []
    for name, field, bound in pairs:
        value = metrics[name]
        times = value / bound if value == value else float("inf")
        found.append((times, f"{name} is {value:.2g} (mismatch.{field}={bound:g})"))
    return max(found)
