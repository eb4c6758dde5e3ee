"""docs/claims.md and its pictures, from finished runs alone.   store -> page

Sentences that depend on numbers are made from them; what people read out of them stands in
docs/claims_reading.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tools.studies import alignment
from tools.studies.breakdown import (
    bias_part,
    correction_part,
    cost_part,
    dial_part,
    localization_part,
)
from tools.studies.cells import mean, spread, table
from tools.studies.comparison import common_steps, comparison, runs_of
from tools.studies.hypotheses import hypotheses_part
from tools.studies.plan import best_lr, sweep_areas
from tools.studies.plots import draw_curves
from tools.studies.regimes import REGIMES
from tools.studies.rule_of_thumb import gradients_part
from tools.studies.store import Store
from tools.studies.table import (
    LEARNING_RATES,
    SEEDS,
    STUDIES,
    TUNED,
    TUNING_SEEDS,
    Study,
    regimes_of,
)

DRAWN = ("grpo", "half", "rrpo", "srpo", "oracle", "chain", "chain26", "chain26 random")
"""Arms in the pictures."""
INTRODUCTION = """\
# The claims, tested on this project's own loop

`make claims` made this page from the runs in `benchmarks/claims/*.jsonl`; nothing in it is
written by hand. What is to be made of it stands in [claims_reading.md](claims_reading.md).

A run spends its regime's budget of generated tokens (of all kinds: base rollouts, seeds,
localization, suffixes; evaluations are left out) on one method, through Megatron-Core and vLLM,
on CPUs. All arms of a regime begin with one warm start; those of one seed see the same prompts in
the same order and are evaluated on the same 256 held-out problems with the same draws. They share
the learning rate that is GRPO's best, and the labelled retention loss of the localizer, except
where a study changes it.

**AUC** is the mean held-out pass@1: per token, while the budget is spent; per step, over so many
steps as every run of the table has made. **Differences** are paired by seed: mean [95 % interval
by Student's t], wins/pairs; bold: the interval leaves out 0. p: two-sided sign test, Wilcoxon's
signed-rank test, each of one comparison alone. "Tokens to" are medians of curves that are
straight between evaluations.

Policies write the right digit before each verdict when they localize, which makes them better at
it (`exact` below) than those of earlier studies in plain torch, whose answers were bare verdicts
(.87): numbers of the two are not comparable. A rollout's loss is the mean over its tokens
(`credit.aggregation=sequence_mean`). Under the paper's credit these are its own, so that the
tokens of a short suffix weigh more than those of a long one; under chain credit all tokens of a
response weigh alike.
"""


def write_page(store: Store, page: Path, pictures: Path) -> None:
    """Of what there is."""
    parts = [
        INTRODUCTION,
        _origin(store),
        regimes_part(store),
        hypotheses_part(store, SEEDS),
        *(part for name, study in STUDIES.items() for part in _study(name, study, store, pictures)),
        dial_part(store, SEEDS, pictures),
        localization_part(store, SEEDS),
        correction_part(store, SEEDS),
        bias_part(store, SEEDS),
        gradients_part(alignment.read(alignment.path_in(store.folder)), store, SEEDS),
        cost_part(store, SEEDS),
    ]
    page.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _origin(store: Store) -> str:
    commits = sorted({record.commit for record in store.records})
    tuning = sorted({seed for seeds in TUNING_SEEDS.values() for seed in seeds})
    return (
        f"{len(store.records)} runs, made at commits {', '.join(commits)}. Seeds "
        f"{', '.join(map(str, tuning))} chose the learning rates and are reported nowhere else; "
        f"seeds {SEEDS.start} to {SEEDS.stop - 1} are reported, and chose nothing.\n"
    )


def regimes_part(store: Store) -> str:
    """What the policies are like at the start, and how the learning rates were chosen."""
    rows: list[list[str]] = []
    tuned: list[list[str]] = []
    for name, regime in REGIMES.items():
        runs = [record for record in store.records if record.job.regime == name]
        if not runs:
            continue
        asked = [r for r in runs if "algorithm.resets=self" in r.job.settings]
        rows.append(
            [
                *(name, regime.title, str(regime.num_prompts), f"{regime.budget // 1000}k"),
                f"{fmean(r.passed[0] for r in runs):.3f}",
                *(mean([r.exact[0] for r in asked]), mean([r.clean[0] for r in asked])),
                best_lr(name, store) or "",
            ]
        )
        areas = sweep_areas(name, store)
        seeds = ", ".join(map(str, TUNING_SEEDS[name]))
        tuned.append([name, seeds, *(spread(areas[lr]) for lr in LEARNING_RATES)])
    header = ["regime", "what", "prompts a step", "tokens", "start pass@1"]
    header += ["exact, first steps", "clean", "learning rate"]
    words = f"AUC per token of {TUNED} by learning rate:\n"
    tuning = table(["regime", "seeds", *LEARNING_RATES], tuned)
    return "\n".join(["## Regimes\n", table(header, rows), words, tuning])


def _study(name: str, study: Study, store: Store, pictures: Path) -> Iterator[str]:
    """A table for each regime that has runs of two arms at least."""
    title = f"## {study.title}\n"
    for regime_name in regimes_of(name):
        regime = REGIMES[regime_name]
        by = runs_of(study.arms, regime_name, SEEDS, store, study.lr)
        if len(by) < 2 or study.baseline not in by:
            continue
        yield title
        title = ""
        yield f"### {regime_name}: {regime.title}\n"
        if name == "methods":
            drawn = {arm: [*by[arm].values()] for arm in DRAWN if arm in by}
            words, steps = f"{regime_name}: held-out pass@1 over seeds", common_steps(by)
            out = pictures / regime_name
            draw_curves(drawn, out, title=words, budget=regime.budget, num_steps=steps)
            yield f"![{regime_name}](../benchmarks/claims/{regime_name}.svg)\n"
        yield comparison(by, study.baseline, regime)
