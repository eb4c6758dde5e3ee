"""What happens inside the runs?   localization, correction, bias of the base, cost"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from tools.studies.analysis import correction, merged, paired, thirds, token_area
from tools.studies.cells import mean, shown, spread, table
from tools.studies.comparison import runs_of
from tools.studies.plots import draw_dial
from tools.studies.regimes import REGIMES
from tools.studies.store import Record, Store
from tools.studies.table import ARMS, STUDIES

LOCALIZING = (
    *("srpo", "chain", "chain26", "chain26 initial", "chain26 verified", "chain26 none"),
    "srpo none",
)
RESETTING = ("rrpo", "srpo", "chain26", "chain26 random")
KINDS = ("base", "seed", "localize", "suffix")
PHASES = ("generate", "localize", "suffix", "reward", "train", "sync")


def localization_part(store: Store, seeds: range) -> str:
    """How good the localizer is, early and late."""
    rows: list[list[str]] = []
    for name in REGIMES:
        for arm, runs in runs_of(LOCALIZING, name, seeds, store).items():
            parts = [[*thirds(r.exact), *thirds(r.clean)] for r in runs.values()]
            rows.append([name, arm, str(len(runs)), *map(mean, zip(*parts, strict=True))])
    header = ["regime", "arm", "seeds", *(f"{w}, {t}" for w in ("exact", "clean") for t in THIRDS)]
    words = (
        "Share of named thoughts that are the first wrong one (exact), or that or an earlier one "
        "(clean).\n"
    )
    return "\n".join(["## Localization over training\n", words, table(header, rows)])


THIRDS = ("1st third", "2nd", "3rd")


def correction_part(store: Store, seeds: range) -> str:
    """Of suffixes from clean and from erroneous prefixes."""
    rows: list[list[str]] = []
    for name in REGIMES:
        for arm, runs in runs_of(RESETTING, name, seeds, store).items():
            total = correction(merged(r.depth for r in runs.values()))
            if total is None:
                continue
            found = [correction(r.depth) for r in runs.values()]
            gaps = [each.stratified for each in found if each is not None]
            ratio = f"{total.clean / total.erroneous:.1f}" if total.erroneous else "∞"
            rates = [f"{total.clean:.3f}", f"{total.erroneous:.3f}", ratio]
            at_depth = shown(paired(gaps, [0.0] * len(gaps)))
            rows.append([name, arm, str(len(runs)), *rates, at_depth])
    header = ["regime", "arm", "seeds", "clean", "erroneous", "ratio", "same depth: difference"]
    return "\n".join(["## Do clean prefixes correct more often?\n", EXPLAINED, table(header, rows)])


EXPLAINED = """\
Share of right suffixes after prefixes without a mistake, and with one. Same depth: the difference
between suffixes that continue equally many thoughts, a mean over depths (Mantel-Haenszel weights)
and over seeds. Where all thoughts must be right (all regimes but h8) an erroneous prefix cannot
be corrected at all.
"""


def dial_part(store: Store, seeds: range, pictures: Path) -> str:
    """The gain as a function of how often the localizer is right; empty without such runs."""
    arms = [arm for arm in ARMS if arm.startswith("dial")]
    by = runs_of([*arms, "grpo", "chain26"], "h8", seeds, store)
    budget = REGIMES["h8"].budget
    areas = {arm: [token_area(r, budget) for r in runs.values()] for arm, runs in by.items()}
    points = {float(arm.split()[1]): areas[arm] for arm in arms if len(areas.get(arm, ())) > 1}
    if not points:
        return ""
    lines = {arm: fmean(areas[arm]) for arm in ("grpo", "chain26") if arm in areas}
    draw_dial(points, pictures / "dial", lines=lines)
    return "![dial](../benchmarks/claims/dial.svg)\n"


def bias_part(store: Store, seeds: range) -> str:
    """A failed rollout that is taken out makes the base look better than the policy."""
    rows: list[list[str]] = []
    for arm, runs in runs_of(STUDIES["seeds"].arms, "h8", seeds, store).items():
        base = [fmean(v for v in r.base if v is not None) for r in runs.values()]
        fresh = [fmean(v for v in r.fresh if v is not None) for r in runs.values()]
        rows.append([arm, str(len(runs)), spread(base), spread(fresh), shown(paired(base, fresh))])
    if not rows:
        return ""
    header = ["arm", "seeds", "pass rate of the base group", "of all fresh rollouts", "difference"]
    return "\n".join(["## Bias of a base without its seed (h8)\n", table(header, rows)])


def cost_part(store: Store, seeds: range) -> str:
    """What a method spends its tokens and its time on."""
    words = (
        "Shares of generated tokens, and of time without evaluations: medians over runs, on two "
        "cores that other work shared.\n"
    )
    parts = ["## Cost\n", words]
    for name in REGIMES:
        by = runs_of(STUDIES["methods"].arms, name, seeds, store)
        rows = [[arm, *_cost([*runs.values()])] for arm, runs in by.items()]
        header = ["arm", *KINDS, "seconds", *(f"time: {phase}" for phase in PHASES)]
        header += ["tokens a second", "response, tokens"]
        parts += [f"### {name}\n", table(header, rows)] if rows else []
    return "\n".join(parts)


def _cost(records: Sequence[Record]) -> list[str]:
    tokens = [sum(r.kinds.values()) for r in records]
    seconds = [r.seconds["step"] - r.seconds.get("eval", 0.0) for r in records]
    kinds = [
        median(r.kinds[kind] / all_ for r, all_ in zip(records, tokens, strict=True))
        for kind in KINDS
    ]
    phases = [
        median(r.seconds.get(phase, 0.0) / all_ for r, all_ in zip(records, seconds, strict=True))
        for phase in PHASES
    ]
    return [
        *(f"{share:.0%}" for share in kinds),
        f"{median(seconds):.0f}",
        *(f"{share:.0%}" for share in phases),
        f"{median(t / s for t, s in zip(tokens, seconds, strict=True)):.0f}",
        f"{fmean(r.length for r in records):.1f}",
    ]
