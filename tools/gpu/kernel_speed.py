"""How near are the kernels to what the device can do, and to others?   ratios to floors, rivals

A floor is measured in the same process and in the same shuffled order: bfloat16 matrix products of
the shape, a copy of the logits (one read, one write). With one GPU there is one rank: a vocabulary
of V / 8 stands for a rank's share of eight, without their collectives.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels.group_advantage import group_advantage
from megatron_srpo.kernels.linear_logprob import linear_logprob
from megatron_srpo.kernels.linear_policy_loss import linear_policy_loss
from megatron_srpo.kernels.logits_policy_loss import logits_policy_loss
from megatron_srpo.kernels.logprob_stats import logprob_stats
from megatron_srpo.kernels.policy_loss import policy_loss
from tools.gpu import inputs
from tools.gpu.inputs import Size
from tools.gpu.result import NotRun, Result, failed, is_lost, judged, not_run
from tools.gpu.rivals import RIVALS
from tools.gpu.timing import Timing, Work, kernels_of, measure

PRODUCTS = {"logits product": 1.0, "by_hidden product": 1.0, "by_weight product": 1.0}
GOALS: dict[str, tuple[dict[str, float], float]] = {
    "logits forward": ({"copy": 0.5}, 1.15),
    "logits backward": ({"copy": 1.0}, 1.15),
    "logits backward, entropy": ({"copy": 1.0}, 1.15),
    "one read": ({"copy": 1.0}, 1.2),
    "head forward": ({"logits product": 1.0}, 1.15),
    "head backward": (PRODUCTS, 1.15),
    "head backward, entropy": (PRODUCTS, 1.15),
    "one pass": (PRODUCTS, 1.15),
}
"""Work -> what its floor is made of, and how many times that it may take."""
WORKSPACE_GIB = 1.1
HALF_AT_MOST = 0.55
MICROSECONDS, LAUNCHES = 15.0, 1.0
SHARES = (1.0, 0.5, 0.25)
PPO = LossConfig(surrogate="ppo", importance="token_truncate")
SMALL = ("policy loss of 16,384 tokens", "advantages of 1,024 groups of 16")
Task = tuple[str, Callable[[], list[Result]]]


def speed_tasks(device: torch.device) -> Iterator[Task]:
    """Names and what is behind them; nothing is computed yet."""
    for size in inputs.sizes_for(device):
        names = [f"speed, {size}, {name}" for name in names_of_size()]
        yield f"speed, {size}", on_gpu(partial(speed, size, device), names, device)


def rival_tasks(device: torch.device, deadline: float) -> Iterator[Task]:
    """Likewise; no rival begins after the deadline."""
    for size in inputs.sizes_for(device):
        names = [f"rivals, {size}, {name}" for name in ("ours", *RIVALS)]
        yield f"rivals, {size}", on_gpu(partial(rivals, size, device, deadline), names, device)


def launch_tasks(device: torch.device) -> Iterator[Task]:
    """Likewise."""
    yield "launches", on_gpu(partial(launches, device), list(SMALL), device)


def on_gpu(
    task: Callable[[], list[Result]], names: list[str], device: torch.device
) -> Callable[[], list[Result]]:
    return task if device.type == "cuda" else partial(without_gpu, names)


def without_gpu(names: list[str]) -> list[Result]:
    """A CPU's time says nothing of a GPU's."""
    return [not_run(name, "no GPU") for name in names]


def names_of_size() -> list[str]:
    return [*GOALS, *(f"head both ways, {share:g} of the rows" for share in SHARES)]


# --- our operations ---


def speed(size: Size, device: torch.device) -> list[Result]:
    """Every operation of one shape, against its floors."""
    works, held = head_works(size, device)
    logits_works_, logits_held = logits_works(size, device)
    works |= logits_works_
    held |= logits_held
    broken = failures(works, f"speed, {size}, ", device)
    found = measure({name: work for name, work in works.items() if name not in broken})
    floors = [
        judged(f"speed, {size}, floor: {name}", found[name].numbers())
        for name in (*PRODUCTS, "copy")
        if name in found
    ]
    return [
        *floors,
        *broken.values(),
        *(against_floor(name, size, found, held[name]) for name in GOALS if name in found),
        *shares(size, found),
    ]


def failures(works: dict[str, Work], prefix: str, device: torch.device) -> dict[str, Result]:
    """Of works that cannot be run even once. If one costs the process its GPU, its error."""
    broken: dict[str, Result] = {}
    for name, work in works.items():
        try:
            work()
        except Exception as failure:  # the others' times say something without it
            if is_lost(device):
                raise RuntimeError(f"{name}: {failure}") from failure
            broken[name] = failed(prefix + name, failure)
    return broken


def against_floor(name: str, size: Size, found: dict[str, Timing], held_gib: float) -> Result:
    parts, bound = GOALS[name]
    if not parts.keys() <= found.keys():
        return judged(f"speed, {size}, {name}", found[name].numbers(), {"ratio": bound})
    floor_ms = sum(factor * found[part].median_ms for part, factor in parts.items())
    numbers = found[name].numbers() | {
        "floor_ms": round(floor_ms, 4),
        "ratio": round(found[name].median_ms / floor_ms, 4),
        "workspace_gib": round(found[name].peak_gib - held_gib, 4),
    }
    return judged(
        f"speed, {size}, {name}", numbers, {"ratio": bound, "workspace_gib": WORKSPACE_GIB}
    )


def shares(size: Size, found: dict[str, Timing]) -> list[Result]:
    """Rows that nobody wants should cost nothing."""
    names = {share: f"head both ways, {share:g} of the rows" for share in SHARES}
    results: list[Result] = []
    for share, name in names.items():
        if name in found and names[1.0] in found:
            of_all = found[name].median_ms / found[names[1.0]].median_ms
            numbers = found[name].numbers() | {"of_all_rows": round(of_all, 4)}
            bounds = {"of_all_rows": HALF_AT_MOST} if share == 0.5 else {}
            results.append(judged(f"speed, {size}, {name}", numbers, bounds))
    return results


def head_works(size: Size, device: torch.device) -> tuple[dict[str, Work], dict[str, float]]:
    """What starts from hidden states, with its floors; GiB of what each hands out."""
    hidden, weight, targets = inputs.head(size, device)
    tokens = inputs.tokens(size.num_rows, device)
    product = torch.empty(size.num_rows, size.vocab, device=device, dtype=torch.bfloat16)
    by_hidden, by_weight = torch.empty_like(hidden), torch.empty_like(weight)
    x, w = hidden.detach(), weight.detach()

    def forward() -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, temperature=inputs.TEMPERATURE)

    def both_ways(share: float) -> object:
        rows = torch.arange(int(share * size.num_rows), device=device)
        chosen, of_chosen = hidden.index_select(0, rows), targets[rows]
        found = linear_logprob(chosen, weight, of_chosen, temperature=inputs.TEMPERATURE)
        return torch.autograd.grad(found[0].sum(), [hidden, weight])

    def one_pass() -> object:
        loss, *_ = linear_policy_loss(
            hidden,
            weight,
            targets,
            tokens,
            PPO,
            denominator=float(size.num_rows),
            temperature=inputs.TEMPERATURE,
        )
        return loss

    outputs = functools.cache(forward)  # once, and not here: it may be what is broken
    ones = torch.ones(size.num_rows, device=device)
    grad: Any = partial(torch.autograd.grad, inputs=[hidden, weight], retain_graph=True)
    works: dict[str, Work] = {
        "logits product": lambda: torch.mm(x, w.T, out=product),
        "by_hidden product": lambda: torch.mm(product, w, out=by_hidden),
        "by_weight product": lambda: torch.mm(product.T, x, out=by_weight),
        "head forward": forward,
        "head backward": lambda: grad(outputs()[:1], grad_outputs=[ones]),
        "head backward, entropy": lambda: grad(outputs(), grad_outputs=[ones, ones]),
        "one pass": one_pass,
        **{f"head both ways, {share:g} of the rows": partial(both_ways, share) for share in SHARES},
    }
    gradients_gib = (hidden.nbytes + weight.nbytes) / 2**30
    in_fp32_gib = 4 * weight.numel() / 2**30  # what adds the weight's gradient up over blocks
    backward = ("head backward", "head backward, entropy")
    held = {"head forward": 0.0, "one pass": gradients_gib + in_fp32_gib}
    return works, held | dict.fromkeys(backward, gradients_gib)


def logits_works(size: Size, device: torch.device) -> tuple[dict[str, Work], dict[str, float]]:
    """What starts from logits, with its floor."""
    shape = size.num_rows, size.vocab
    logits = inputs.normal(*shape, device=device, dtype=torch.bfloat16, std=3.0).requires_grad_()
    plain, copy = logits.detach(), torch.empty_like(logits)
    targets, tokens = inputs.targets(size, device), inputs.tokens(size.num_rows, device)
    rows = torch.arange(size.num_rows, device=device)

    def forward() -> tuple[Tensor, Tensor]:
        return logprob_stats(logits, rows, targets, temperature=inputs.TEMPERATURE)

    def one_read() -> object:
        how: dict[str, Any] = {
            "denominator": float(size.num_rows),
            "temperature": inputs.TEMPERATURE,
        }
        return logits_policy_loss(logits, targets, tokens, PPO, **how)[0]

    outputs = functools.cache(forward)  # once, and not here: it may be what is broken
    ones = torch.ones(size.num_rows, device=device)
    grad: Any = partial(torch.autograd.grad, inputs=[logits], retain_graph=True)
    works: dict[str, Work] = {
        "copy": lambda: copy.copy_(plain),
        "logits forward": forward,
        "logits backward": lambda: grad(outputs()[:1], grad_outputs=[ones]),
        "logits backward, entropy": lambda: grad(outputs(), grad_outputs=[ones, ones]),
        "one read": one_read,
    }
    gradient_gib = logits.nbytes / 2**30
    held = dict.fromkeys(("logits backward", "logits backward, entropy", "one read"), gradient_gib)
    return works, held | {"logits forward": 0.0}


def launches(device: torch.device) -> list[Result]:
    """Of what is too short to be timed from outside."""
    tokens = inputs.tokens(16_384, device)
    logprobs = inputs.normal(16_384, device=device, dtype=torch.float32, std=0.1) - 8
    rewards = inputs.normal(16_384, device=device, dtype=torch.float32)
    offsets = torch.arange(0, 16_385, 16, device=device)
    works: dict[str, Work] = {
        SMALL[0]: lambda: policy_loss(logprobs, tokens, PPO, denominator=7.0),
        SMALL[1]: lambda: group_advantage(rewards, offsets),
    }
    results: list[Result] = []
    for name, work in works.items():
        count, microseconds = kernels_of(work)
        numbers = {"launches": float(count), "microseconds": round(microseconds, 2)}
        results.append(judged(name, numbers, {"launches": LAUNCHES, "microseconds": MICROSECONDS}))
    return results


# --- rivals ---


def rivals(size: Size, device: torch.device, deadline: float) -> list[Result]:
    """Forward and backward of the summed log-probs at temperature 1, all rows wanted."""
    hidden, weight, targets = inputs.head(size, device)
    exact = exact_sum(hidden.detach(), weight.detach(), targets)
    works: dict[str, Work] = {}
    errors: dict[str, float] = {}
    results: list[Result] = []

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, targets, temperature=1.0)[0].sum()

    for name, make in {"ours": lambda: ours, **RIVALS}.items():
        title = f"rivals, {size}, {name}"
        try:
            if time.monotonic() > deadline:
                raise NotRun("the budget was spent")
            work = partial(both_ways, make(), hidden, weight, targets)
            errors[name] = abs(work().item() - exact) / size.num_rows
        except NotRun as lacking:
            results.append(not_run(title, str(lacking)))
        except Exception as failure:  # whatever another's code says of this GPU or shape
            if is_lost(device):
                raise RuntimeError(f"{name}: {failure}") from failure
            broken = failed(title, failure)
            results.append(broken if name == "ours" else not_run(title, broken.reason))
        else:
            works[name] = work
        torch.cuda.empty_cache()
    for name, timing in measure(works).items():
        numbers = timing.numbers() | {"error_nats": errors[name]}
        results.append(judged(f"rivals, {size}, {name}", numbers))
    return results


def both_ways(head: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = head(hidden, weight, targets)
    torch.autograd.grad(loss, [hidden, weight])
    return loss.detach()


def exact_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Summed negative log-prob in float64, some rows at a time."""
    wide, total = weight.double(), 0.0
    for rows in torch.arange(len(hidden), device=hidden.device).split(1024):
        ones = torch.ones(len(rows), device=hidden.device)
        total -= inputs.exact(hidden[rows].double() @ wide.T, targets[rows], ones)[0].sum().item()
    return total
