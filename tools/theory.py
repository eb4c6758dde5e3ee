"""What holds of the theory of resets, and how far?   -> benchmarks/claims/theory.json

    python tools/theory.py [--only bounds|gain|samples|product] [--quick] [--out FILE.json]

Prints a Markdown table for each study, and writes them to FILE. docs/theory.md reads them. Exit
code 1: a bound did not hold. A study's random numbers do not depend on which others are run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from megatron_srpo.theory import cpi, instances, product_rule, sampling
from megatron_srpo.theory.cpi import everywhere, on_improvable
from megatron_srpo.theory.instances import Problem
from megatron_srpo.theory.mdp import Bools, Reals
from megatron_srpo.theory.product_rule import Localizer, Paths, cosine, mean_credit
from megatron_srpo.theory.slopes import log_log_slope

SEED = 20260525
SHARES = (0.4, 0.2, 0.1, 0.05, 0.025, 0.0125)
"""Of improvable states among those of a chain that is still right; p is a little less."""
METHODS = {"CPI-RR": everywhere, "CPI-CARO": on_improvable}
FAILURE = 0.05
ROUNDING = 1e-12
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    problems: int
    gain_chains: int
    sample_chains: int
    repeats: int
    """Of choosing a rule, for a rate of success."""
    tasks: int
    """Enumerated softmax policies of each kind."""


FULL = Sizes(problems=5000, gain_chains=50, sample_chains=12, repeats=1000, tasks=200)
QUICK = Sizes(problems=200, gain_chains=5, sample_chains=2, repeats=200, tasks=20)


# --- bounds ---------------------------------------------------------------------------------------


def bounds(rng: np.random.Generator, sizes: Sizes) -> Rows:
    """Guarantee against exact gain; and bounds that are wrong, to see whether it would show."""
    problems = [instances.random_problem(rng) for _ in range(sizes.problems)]
    traps = [instances.trap(share) for share in np.linspace(0.01, 1, 100)]
    rows: Rows = []
    for place, family in (("random MDPs", problems), ("traps", traps)):
        for name, where in METHODS.items():
            rows += prescribed(f"{name}, {place}", family, where)
    greedy = [cpi.with_greedy_rule(problem) for problem in problems]
    rows += [nowhere_worse(greedy), straight(greedy)]
    rows += [sampled(problems, rng, oracle=oracle) for oracle in (False, True)]
    return rows


def prescribed(name: str, family: Sequence[Problem], where: cpi.Method) -> Rows:
    tried: list[tuple[float, ...]] = []
    for problem in family:
        mixed_HS = where(problem)
        bound = cpi.bound(problem, mixed_HS)
        size = bound.size
        if size:
            far = min(3 * size, 1.0)
            gains = cpi.gain(problem, mixed_HS, size), cpi.gain(problem, mixed_HS, far)
            tried.append((*gains, bound.gain(size), size * bound.advantage))
    gain, gain_far, promised, unpenalized = np.array(tried).T
    return [
        bound_row(f"{name}: a G - 2 a^2 eps W", gain, promised),
        bound_row(f"wrong on purpose, {name}: step tripled", gain_far, promised),
        bound_row(f"wrong on purpose, {name}: a G", gain, unpenalized),
    ]


def bound_row(what: str, gain: Sequence[float] | Reals, promised: Sequence[float] | Reals) -> Any:
    ratios = np.array(gain) / np.array(promised)
    return {
        "bound": what,
        "checked": len(ratios),
        "violated": int((np.array(gain) < np.array(promised) - ROUNDING).sum()),
        "gain / bound, least": float(ratios.min()),
        "median": float(np.median(ratios)),
    }


def nowhere_worse(greedy: Sequence[Problem]) -> Any:
    gains, promised = [], []
    for problem in greedy:
        mixed_HS, size = everywhere(problem), 1 / problem.horizon
        bound = cpi.bound(problem, mixed_HS)
        gains.append(cpi.gain(problem, mixed_HS, size))
        promised.append(bound.gain_if_nowhere_worse(size, problem.horizon))
    return bound_row("CPI-RR, greedy rule, a = 1/H: a (1-a)^(H-1) G", gains, promised)


def straight(greedy: Sequence[Problem]) -> Any:
    gains = [cpi.gain(problem, on_improvable(problem), 1.0) for problem in greedy]
    promised = [problem.p * problem.tau for problem in greedy]
    return bound_row("CPI-CARO, greedy rule, a = 1: p tau", gains, promised)


def sampled(problems: Sequence[Problem], rng: np.random.Generator, *, oracle: bool) -> Any:
    """The whole iteration from draws: a rule of 64 is chosen, and stepped to."""
    gains, promised = [], []
    for problem in problems:
        rules_NHS = rng.integers(
            problem.policy_HSA.shape[2], size=(64, *problem.improvable_HS.shape)
        )
        rules_NHS[0] = cpi.with_greedy_rule(problem).rule_HS
        step = sampling.sampled_step(problem, rules_NHS, oracle=oracle, failure=FAILURE, rng=rng)
        chosen = replace(problem, rule_HS=step.rule_HS)
        mixed_HS = on_improvable(problem) if oracle else everywhere(problem)
        gains.append(cpi.gain(chosen, mixed_HS, step.size))
        promised.append(step.guarantee)
    name = "CPI-CARO" if oracle else "CPI-RR"
    return bound_row(f"{name} from Bernstein's draws, failure {FAILURE}", gains, promised)


# --- claim 1: gain of a step ----------------------------------------------------------------------


def gain(rng: np.random.Generator, sizes: Sizes) -> Rows:
    """Exponents of p: CPI-RR, CPI-CARO, and of 1/p in their ratio."""
    shapes = [instances.random_shape(rng) for _ in range(sizes.gain_chains)]
    chains = [[instances.dialled_chain(shape, share) for share in SHARES] for shape in shapes]
    traps = [[instances.trap(share) for share in np.geomspace(0.0125, 0.4, 40)]]
    drawn = [instances.random_problem(rng) for _ in range(10 * sizes.gain_chains)]
    # Where the rule's advantage is not positive, CPI-RR stays where it is.
    mixed = [problem for problem in drawn if cpi.bound(problem, everywhere(problem)).size]
    places = {
        f"{len(chains)} chains": chains,
        "trap": traps,
        f"{len(mixed)} random MDPs": [mixed],
        f"{len(mixed)} random MDPs, greedy rule": [[cpi.with_greedy_rule(m) for m in mixed]],
    }
    rows: Rows = []
    for place, curves in places.items():
        for step, compute in STEPS.items():
            by_method = {
                name: np.array(
                    [[compute(problem, where(problem)) for problem in c] for c in curves]
                )
                for name, where in METHODS.items()
            }
            rows.append(exponents(f"{step}, {place}", curves, by_method, sign=1))
    return rows


def prescribed_gain(problem: Problem, mixed_HS: Bools) -> float:
    return cpi.gain(problem, mixed_HS, cpi.bound(problem, mixed_HS).size)


def promised_gain(problem: Problem, mixed_HS: Bools) -> float:
    bound = cpi.bound(problem, mixed_HS)
    return bound.gain(bound.size)


def cautious_gain(problem: Problem, mixed_HS: Bools) -> float:
    return cpi.gain(problem, mixed_HS, 1 / problem.horizon)


STEPS: dict[str, Callable[[Problem, Bools], float]] = {
    "guarantee of the prescribed step": promised_gain,
    "gain of the prescribed step": prescribed_gain,
    "gain of a = 1/H": cautious_gain,
    "gain of the best step (line search)": cpi.line_search,
}


def exponents(
    what: str, curves: Sequence[Sequence[Problem]], by_method: dict[str, Reals], *, sign: int
) -> Any:
    """Slopes in p, or in 1/p if the sign is -1, of both methods and of what divides them."""
    x_CP = np.array([[problem.p for problem in curve] for curve in curves]) ** sign
    rr, caro = by_method.values()
    columns = {**by_method, "separation": rr / caro if sign < 0 else caro / rr}
    row: dict[str, Any] = {"what": what}
    for name, y_CP in columns.items():
        along = 1 / x_CP if name == "separation" and sign > 0 else x_CP
        row[name] = exponent(along, y_CP)
    return row


def exponent(x_CP: Reals, y_CP: Reals) -> Any:
    """[slope, low, high]; None where there is a loss instead of a gain."""
    if (y_CP <= 0).any():
        return None
    slope = log_log_slope(x_CP, y_CP)
    return [slope.value, slope.low, slope.high]


# --- claim 2: draws -------------------------------------------------------------------------------


def samples(rng: np.random.Generator, sizes: Sizes) -> Rows:
    """Draws until 9 of 10 repetitions choose the right rule; the oracle's rejections apart."""
    shapes = [instances.random_shape(rng) for _ in range(sizes.sample_chains)]
    curves = [[instances.dialled_chain(shape, share) for share in SHARES] for shape in shapes]

    def needed(problem: Problem, *, oracle: bool) -> tuple[float, float]:
        return sampling.draws_needed(problem, rng, oracle=oracle, rate=0.9, repeats=sizes.repeats)

    def found(draws: float, problem: Problem) -> float:
        return draws + sampling.rejections(math.ceil(draws), problem.p, rng)

    rr_CPW, caro_CPW = (
        np.array([[needed(problem, oracle=oracle) for problem in curve] for curve in curves])
        for oracle in (False, True)
    )
    rows: Rows = []
    for way, choice in enumerate(("a rule of a class of 64", "type by type")):
        rr_CP, caro_CP = rr_CPW[..., way], caro_CPW[..., way]
        seen_CP = np.vectorize(found)(caro_CP, np.array(curves))
        for what, draws_CP in (("accepted draws", caro_CP), ("with rejected states", seen_CP)):
            both = {"CPI-RR": rr_CP, "CPI-CARO": draws_CP}
            row = exponents(f"{choice}, {what}", curves, both, sign=-1)
            for name, y_CP in both.items():
                medians = [f"{draws:.0f}" for draws in np.median(y_CP, axis=0)]
                row[f"{name}, median draws, share {SHARES[0]} to {SHARES[-1]}"] = " ".join(medians)
            rows.append(row)
    return rows


# --- the product rule -----------------------------------------------------------------------------

NUM_RIGHT = (1, 2, 4, 8, 16, 32)
SKILLS = (0.0, 1.5, 3.0)


def product(rng: np.random.Generator, sizes: Sizes) -> Rows:
    """Mean credit against the exact gradient: cosine (median, least), share that points away."""
    rows: Rows = []
    for skill in SKILLS:
        for num_right in NUM_RIGHT:
            tasks = [
                [random_task(rng, num_right=num_right, skill=skill, own_logits=own)]
                for own in (False, True)
                for _ in range(sizes.tasks)
            ]
            for localizer in (product_rule.first_wrong, product_rule.anywhere):
                what = f"{num_right} of 81, skill {skill:g}, {localizer.__name__}"
                rows.append(credit_row(what, tasks, localizer))
    prompts = [eight_prompts(rng) for _ in range(sizes.tasks)]
    rows.append(
        credit_row("8 prompts, 1 of 81 each, shared logits", prompts, product_rule.first_wrong)
    )
    return rows


def random_task(rng: np.random.Generator, **kinds: Any) -> Paths:
    return product_rule.random_paths(rng, horizon=4, num_actions=3, **kinds)


def eight_prompts(rng: np.random.Generator) -> list[Paths]:
    """One policy, and another right path for each prompt."""
    first = random_task(rng, num_right=1, skill=0.0, own_logits=False)
    right = rng.choice(len(first.rewards_Y), 8, replace=False)
    return [replace(first, rewards_Y=np.eye(len(first.rewards_Y))[path]) for path in right]


def credit_row(what: str, tasks: Sequence[Sequence[Paths]], localizer: Localizer) -> Any:
    """A task is one or more prompts of one policy, whose gradients are added up."""
    found: dict[str, list[float]] = {
        name: [] for name in ("masked", "base + masked", "chain", "base + chain", "whole - V")
    }
    identity, passed, flipped = [], [], []
    for task in tasks:
        true_D = total(product_rule.exact_gradient, task)
        chain_D = total(lambda p: mean_credit(p, localizer, prefix=1), task)
        masked_D = total(lambda p: mean_credit(p, localizer, prefix=0), task)
        credits = {
            "masked": masked_D,
            "base + masked": true_D + masked_D,
            "chain": chain_D,
            "base + chain": true_D + chain_D,
            "whole - V": total(lambda p: whole(p, localizer), task),
        }
        for name, credit_D in credits.items():
            found[name].append(cosine(credit_D, true_D))
        identity += [rule_error(paths) for paths in task]
        passed += [product_rule.value(paths, 0)[0][0] for paths in task]
        is_big = np.abs(true_D) > ROUNDING
        flipped.append((true_D * chain_D < 0)[is_big].mean())
    row: dict[str, Any] = {"right paths": what, "V": float(np.mean(passed)), "tasks": len(tasks)}
    for name, cosines in found.items():
        row[name] = [float(f(cosines)) for f in (np.median, np.min)]
        row[f"{name} < 0"] = float((np.array(cosines) < 0).mean())
    row["chain: entries of wrong sign"] = float(np.mean(flipped))
    row["product rule, largest error"] = max(identity)
    return row


def total(compute: Callable[[Paths], Reals], task: Sequence[Paths]) -> Reals:
    return sum((compute(paths) for paths in task), np.zeros(()))


def whole(paths: Paths, localizer: Localizer) -> Reals:
    return mean_credit(
        paths, localizer, prefix=1, baseline=float(product_rule.value(paths, 0)[0][0])
    )


def rule_error(paths: Paths) -> float:
    """sum_z pi(z) [V(z) grad log pi(z) + grad V(z)] less grad V(x), at the worst depth."""
    true_D = product_rule.exact_gradient(paths)
    errors = [
        np.abs(product_rule.of_prefixes(paths, depth) - true_D).max()
        for depth in range(len(paths.logits))
    ]
    return float(max(errors))


# --- out ------------------------------------------------------------------------------------------

STUDIES = {"bounds": bounds, "gain": gain, "samples": samples, "product": product}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the theory of resets.")
    parser.add_argument("--only", choices=STUDIES)
    parser.add_argument("--quick", action="store_true", help="seconds, and wide intervals")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    found: dict[str, Any] = {}
    for index, (name, study) in enumerate(STUDIES.items()):
        if arguments.only in (None, name):
            began = time.process_time()
            rows = study(np.random.default_rng([SEED, index]), sizes)
            found[name] = {"seconds": time.process_time() - began, "rows": rows}
            print(f"## {name}\n\n{study.__doc__}\n\n{table(rows)}\n", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(about() | {"studies": found}, indent=1) + "\n")
    checked = found.get("bounds", {"rows": []})["rows"]
    if any(row["violated"] for row in checked if not row["bound"].startswith("wrong")):
        raise SystemExit(1)


def about() -> dict[str, Any]:
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "hardware": f"1 of {os.cpu_count()} cores, {platform.machine()}, no GPU",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}",
        "seed": SEED,
    }


def table(rows: Rows) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    if isinstance(value, list):
        first, *rest = (f"{number:.3f}" for number in value)
        return f"{first} ({', '.join(rest)})"
    if value is None:
        return "loses"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
