"""How well do batches' gradients point where the pass rate rises?   gradients -> cosines -> ratios

A batch's gradient is signal and noise. Its cosine c with the true gradient says how much of each:
SNR = c^2 / (1 - c^2), which is proportional to the batch while it is small, so that ratios of it at
equal tokens are ratios of tokens. A large sample of fresh rollouts stands for the truth, in two
halves; their cosine r with each other says how good it is. That of their sum with the truth is
sqrt(2 r / (1 + r)) (Spearman and Brown), and cosines with the sum are divided by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from megatron_srpo.payoff import predicted_gain
from tools.studies.table import ARMS, OTHERS, STUDIES, Settings

Gradient = npt.NDArray[np.float64]
"""[D] of all parameters."""
STATES = {
    "h8": {"start": 0.0, "0.25": 0.25, "0.5": 0.5},
    **{regime: {"start": 0.0} for regime in OTHERS},
}
"""Regime -> policies: the warm start, and the first of a GRPO run to pass so often."""
MEASURED = tuple(dict.fromkeys((*STUDIES["methods"].arms, *STUDIES["splits"].arms)))
"""Arms, in this order."""
SURE = 2.0
"""A baseline whose cosine is fewer standard errors above 0 has no ratio to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured at once. Known by its settings, as runs are."""

    regime: str
    state: str
    settings: Settings
    """Sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """What is kept of it: a line."""

    cell: Cell
    passed: float
    """The policy's held-out pass@1."""
    num_prompts: int
    """A batch."""
    tokens: float
    """Generated for a batch, of all kinds: the mean."""
    cosines: list[float]
    """Of each batch's gradient with the reference, as they are."""
    together: float
    """Of the sum of all batches' gradients."""
    halves: float
    """Of the reference's halves with each other."""
    payoff: dict[str, float]
    """`megatron_srpo.payoff`'s metrics of these rollouts; none where nothing is reset."""
    seconds: float
    commit: str = ""

    @property
    def quality(self) -> float:
        """Cosine of the reference with the truth."""
        return quality(self.halves)

    @property
    def predicted(self) -> float | None:
        """The rule of thumb's gain over GRPO; None where it says nothing."""
        return predicted_gain([self.payoff])

    @property
    def cosine(self) -> float:
        """Of a batch with the truth."""
        return fmean(self.cosines) / self.quality

    @property
    def error(self) -> float:
        """Standard error of `cosine`, the reference taken as given: it is the same for all arms."""
        return stdev(self.cosines) / math.sqrt(len(self.cosines)) / self.quality


def quality(halves: float) -> float:
    """Cosine of the sum of two halves with what both estimate, from theirs with each other.

    >>> quality(1.0), round(quality(0.5), 3)
    (1.0, 0.816)
    """
    if halves <= 0:
        raise ValueError(f"halves with a cosine of {halves:.2f} are a reference for nothing")
    return math.sqrt(2 * halves / (1 + halves))


def cosine(one: Gradient, other: Gradient) -> float:
    """0 if either is 0: nothing points nowhere."""
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else 0.0


def snr(cosine: float) -> float:
    """Signal to noise, of squares; none against the direction.

    >>> snr(0.6), snr(-0.6)
    (0.5625, 0.0)
    """
    return max(cosine, 0.0) ** 2 / (1 - cosine**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    value: float
    log_error: float
    """Standard error of its logarithm, to first order."""


def relative(one: Alignment, baseline: Alignment) -> Ratio | None:
    """SNR per generated token over the baseline's; None where that is not above its noise."""
    if baseline.cosine < SURE * baseline.error:
        return None
    per_token, base = snr(one.cosine) / one.tokens, snr(baseline.cosine) / baseline.tokens
    return Ratio(value=per_token / base, log_error=math.hypot(*map(_log_error, (one, baseline))))


def _log_error(one: Alignment) -> float:
    c = one.cosine
    return 2 * one.error / (c * (1 - c * c)) if c > 0 else math.inf


def prompts_for(tokens: float, num_tokens: float, *, num_prompts: int) -> int:
    """How many prompts generate `tokens`, if `num_prompts` have generated `num_tokens`.

    >>> prompts_for(2400, 9600, num_prompts=64), prompts_for(10, 9600, num_prompts=64)
    (16, 1)
    """
    return max(1, round(tokens * num_prompts / num_tokens))


def cell(regime: str, state: str, arm: str) -> Cell:
    """The arm's."""
    return Cell(regime=regime, state=state, settings=tuple(sorted(ARMS[arm])))


def path_in(folder: Path) -> Path:
    """The file beside those of the runs."""
    return folder / "gradients.jsonl"


def read(path: Path) -> dict[Cell, Alignment]:
    """All lines; none without a file."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {each.cell: each for each in map(parse, lines)}


def add(path: Path, alignment: Alignment) -> None:
    """In one write, as runs are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(dump(alignment))


def dump(alignment: Alignment) -> str:
    """One line."""
    values = asdict(alignment)
    of = values.pop("cell")
    return json.dumps(of | values, separators=(",", ":")) + "\n"


def parse(line: str) -> Alignment:
    """Of `dump`."""
    values = json.loads(line)
    of = {name: values.pop(name) for name in ("regime", "state", "settings")}
    return Alignment(cell=Cell(**{**of, "settings": tuple(of["settings"])}), **values)


def missing(regime: str, path: Path) -> list[Cell]:
    """What has no line yet: all arms of a state before the next state."""
    known = read(path)
    wanted = [cell(regime, state, arm) for state in STATES[regime] for arm in MEASURED]
    return [each for each in wanted if each not in known]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of a prediction with what was measured; of pairs of which both are above 0 and finite."""

    num: int
    correlation: float
    """Of logarithms (Pearson)."""
    factor: float
    """exp of the root mean square of log(predicted / measured): 1 is right."""
    bias: float
    """Median of measured / predicted."""


def agreement(points: Sequence[tuple[float, float]]) -> Agreement | None:
    """Of (predicted, measured); None of fewer than three. Nothing is fitted."""
    logs = np.log([point for point in points if min(point) > 0 and max(point) < math.inf])
    if len(logs) < 3:
        return None
    gaps = logs[:, 0] - logs[:, 1]
    return Agreement(
        num=len(logs),
        correlation=float(np.corrcoef(logs.T)[0, 1]),
        factor=float(np.exp(np.sqrt(np.mean(gaps**2)))),
        bias=float(np.exp(-np.median(gaps))),
    )
