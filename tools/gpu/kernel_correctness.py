"""Are the kernels right on this device?   every operation against float64, and the edges

Each check gives numbers and their bounds. What a CPU's tests cover by the interpreter and by
emulation is looked at here where it counts: in the compiled kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.config_sections import LossConfig
from megatron_srpo.kernels import logits_policy_loss as one_read
from megatron_srpo.kernels import nvcc, products
from megatron_srpo.kernels.group_advantage import group_advantage
from megatron_srpo.kernels.linear_logprob import linear_logprob
from megatron_srpo.kernels.linear_policy_loss import linear_policy_loss
from megatron_srpo.kernels.logprob_stats import logprob_stats
from megatron_srpo.kernels.policy_loss import policy_loss
from megatron_srpo.loss import policy_loss as written_out_loss
from tools.gpu import inputs
from tools.gpu.inputs import Size
from tools.gpu.result import NotRun, Numbers

LOGPROB_ERROR = 5e-6
"""Nats, of fp32 statistics of the logits that there are."""
PRODUCT_ERROR = 2e-4
"""Nats, with the logits' own error: tensor cores cut digits of what they add up."""
BF16_ERROR = 6e-3
"""Of the largest gradient: rounded twice to bfloat16 where it goes through a matrix product."""
CONFIGS = {
    "reinforce": LossConfig(),
    "ppo": LossConfig(surrogate="ppo", importance="token_truncate"),
}
Task = tuple[str, Callable[[], tuple[Numbers, Numbers]]]


def tasks(device: torch.device) -> Iterator[Task]:
    """Names and what is behind them; nothing is computed yet."""
    for vocab, dtype in itertools.product((1, 17, 1000, 9001), (torch.float32, torch.bfloat16)):
        size = Size(num_rows=64, vocab=vocab, hidden=64)
        check = partial(logits_error, size, dtype)
        yield f"logits, {size} {str(dtype).removeprefix('torch.')}", partial(check, device)
    large = Size(num_rows=24, vocab=inputs.VOCAB, hidden=inputs.HIDDEN)
    size = large if device.type == "cuda" else inputs.SMOKE[0]
    yield f"head, {size}", partial(head_error, size, device)
    yield "gradient added in fp32", partial(main_grad_error, device)
    for name, cfg in CONFIGS.items():
        yield f"one pass, {name}", partial(one_pass_error, cfg, device)
        yield f"one read, {name}", partial(one_read_error, cfg, device)
        yield f"policy loss, {name}", partial(loss_error, cfg, device)
    yield "one read is the CUDA kernel", partial(cuda_kernel, device)
    yield "extreme logits", partial(edges, device)
    yield "group advantage", partial(advantages_error, device)
    yield "no rows", partial(no_rows, device)
    yield "duplicate rows", partial(duplicates, device)
    yield "70,000 rows", partial(many_rows, device)
    yield "2^31 logits", partial(long_offsets, device)
    yield "two runs", partial(same_bits, device)


def largest(found: Tensor, right: Tensor) -> float:
    """Difference, also where both are the same infinity."""
    both = found.double(), right.double()
    return torch.where(both[0] == both[1], 0.0, (both[0] - both[1]).abs()).max().item()


def relative(found: Tensor, right: Tensor) -> float:
    """Difference over the largest that is right."""
    return largest(found, right) / max(right.abs().max().item(), 1e-30)


def gradients(outputs: tuple[Tensor, Tensor], to: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every row counts otherwise."""
    factor = torch.linspace(-1, 2, len(outputs[0]), device=outputs[0].device).to(outputs[0].dtype)
    return torch.autograd.grad((outputs[0] * factor).sum() + (outputs[1] * factor.cos()).sum(), to)


def logits_error(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Numbers, Numbers]:
    """`logprob_stats`, both ways, with a padded vocabulary."""
    num_real = max(1, size.vocab - size.vocab // 9)
    drawn = inputs.normal(size.num_rows, size.vocab, device=device, dtype=dtype, std=3.0)
    logits, target_ids = drawn.requires_grad_(), inputs.targets(size, device) % num_real
    temperature = torch.linspace(0.5, 1.5, size.num_rows, device=device)
    chosen = torch.arange(0, size.num_rows, 2, device=device)
    at = target_ids[chosen], temperature[chosen]
    found = logprob_stats(logits, chosen, at[0], temperature=at[1], num_real=num_real)
    wide = logits.detach().double().requires_grad_()
    right = inputs.exact(wide[chosen, :num_real], *at)
    (by_found,), (by_right,) = gradients(found, [logits]), gradients(right, [wide])
    bound = BF16_ERROR if dtype == torch.bfloat16 else LOGPROB_ERROR
    numbers = {
        "logprob": largest(found[0], right[0]),
        "entropy": largest(found[1], right[1]),
        "gradient": relative(by_found, by_right),
    }
    return numbers, {"logprob": LOGPROB_ERROR, "entropy": LOGPROB_ERROR, "gradient": bound}


def head_error(size: Size, device: torch.device) -> tuple[Numbers, Numbers]:
    """`linear_logprob` of bfloat16, in the vocabulary's full size on a GPU: against float64 from
    the device's own logits (`product_...` is how far these are off), and from hidden states on."""
    hidden, weight, target_ids = inputs.head(size, device)
    temperature = torch.full((size.num_rows,), inputs.TEMPERATURE, device=device)
    found = linear_logprob(hidden, weight, target_ids, temperature=inputs.TEMPERATURE)
    with torch.no_grad():
        pieces = products.chunks(weight, size.vocab, products.CHUNK)
        logits = torch.cat([products.product(hidden, piece.T) for _, piece in pieces], 1)
    of_logits = inputs.exact(logits, target_ids, temperature)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = inputs.exact(wide[0] @ wide[1].T, target_ids, temperature)
    pairs = zip(gradients(found, [hidden, weight]), gradients(right, wide), strict=True)
    by_hidden, by_weight = (relative(one, other) for one, other in pairs)
    numbers = {
        "statistics_logprob": largest(found[0], of_logits[0]),
        "statistics_entropy": largest(found[1], of_logits[1]),
        "logprob": largest(found[0], right[0]),
        "entropy": largest(found[1], right[1]),
        "product_logprob": largest(of_logits[0], right[0]),
        "product_entropy": largest(of_logits[1], right[1]),
        "by_hidden": by_hidden,
        "by_weight": by_weight,
    }
    bounds = {"statistics_logprob": LOGPROB_ERROR, "statistics_entropy": LOGPROB_ERROR}
    bounds |= {"logprob": PRODUCT_ERROR, "entropy": PRODUCT_ERROR}
    return numbers, bounds | {"by_hidden": BF16_ERROR, "by_weight": BF16_ERROR}


def main_grad_error(device: torch.device) -> tuple[Numbers, Numbers]:
    """The weight's gradient, added in fp32 to what is there; also that of no rows."""
    size = Size(num_rows=96, vocab=1001, hidden=64)
    hidden, weight, target_ids = inputs.head(size, device)
    temperature = torch.full((size.num_rows,), inputs.TEMPERATURE, device=device)
    before = inputs.normal(size.vocab, size.hidden, device=device, dtype=torch.float32)
    main_grad = before.clone()
    left = torch.zeros((), device=device)
    for num_rows in (0, size.num_rows):
        found = linear_logprob(
            hidden[:num_rows],
            weight,
            target_ids[:num_rows],
            temperature=inputs.TEMPERATURE,
            chunk=300,
            main_grad_VH=main_grad,
        )
        (by_weight,) = gradients(found, [weight])
        left += by_weight.abs().max() + (0 if num_rows else (main_grad - before).abs().max())
    wide = weight.detach().double().requires_grad_()
    right = inputs.exact(hidden.detach().double() @ wide.T, target_ids, temperature)
    (by_right,) = gradients(right, [wide])
    numbers = {"added": relative(main_grad.double() - before, by_right), "left": left.item()}
    return numbers, {"added": BF16_ERROR, "left": 0.0}


def one_pass_error(cfg: LossConfig, device: torch.device) -> tuple[Numbers, Numbers]:
    """`linear_policy_loss` in blocks of a few rows."""
    size = Size(num_rows=96, vocab=1001, hidden=64)
    hidden, weight, target_ids = inputs.head(size, device)
    tokens = inputs.tokens(size.num_rows, device, share=0.8)
    loss, *_ = linear_policy_loss(
        hidden,
        weight,
        target_ids,
        tokens,
        cfg,
        denominator=7.0,
        temperature=inputs.TEMPERATURE,
        workspace=40 * size.vocab * 4,
        chunk=256,
    )
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    temperature = torch.full((size.num_rows,), inputs.TEMPERATURE, device=device)
    logprob, _ = inputs.exact(wide[0] @ wide[1].T, target_ids, temperature)
    right, _ = written_out_loss(logprob, inputs.in_float64(tokens), cfg, denominator=7.0)
    pairs = zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(right, wide), strict=True
    )
    by_hidden, by_weight = (relative(one, other) for one, other in pairs)
    numbers = {"loss": relative(loss, right), "by_hidden": by_hidden, "by_weight": by_weight}
    return numbers, {"loss": 1e-5, "by_hidden": BF16_ERROR, "by_weight": BF16_ERROR}


def one_read_error(cfg: LossConfig, device: torch.device) -> tuple[Numbers, Numbers]:
    """`logits_policy_loss`, of both dtypes, rows that begin anywhere, in all clusters."""
    worst = {"loss": 0.0, "logprob": 0.0, "entropy": 0.0, "fp32": 0.0, "bf16": 0.0}
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for vocab, kind in itertools.product((1, 37, 1000, 30_001), kinds):
        size = Size(num_rows=64, vocab=vocab, hidden=1)
        logits = inputs.normal(64, vocab, device=device, dtype=kinds[kind], std=3.0)
        logits.requires_grad_()
        tokens, target_ids = inputs.tokens(64, device, share=0.8), inputs.targets(size, device)
        temperature = torch.linspace(0.5, 1.5, 64, device=device)
        loss, _, logprob, entropy = one_read.logits_policy_loss(
            logits, target_ids, tokens, cfg, temperature=temperature, denominator=7.0
        )
        wide, is_trained = logits.detach().double().requires_grad_(), tokens.loss_weight_T != 0
        right_logprob, right_entropy = inputs.exact(wide, target_ids, temperature)
        right, _ = written_out_loss(right_logprob, inputs.in_float64(tokens), cfg, denominator=7.0)
        (by_found,), (by_right,) = (
            torch.autograd.grad(3 * each, to) for each, to in ((loss, logits), (right, wide))
        )
        found = {
            "loss": relative(loss, right),
            "logprob": largest(logprob, torch.where(is_trained, right_logprob, 0.0)),
            "entropy": largest(entropy, torch.where(is_trained, right_entropy, 0.0)),
            kind: relative(by_found, by_right),
        }
        worst |= {key: max(worst[key], value) for key, value in found.items()}
    bounds = {"loss": 1e-5, "logprob": LOGPROB_ERROR, "entropy": LOGPROB_ERROR}
    return worst, bounds | {"fp32": 1e-5, "bf16": BF16_ERROR}


def cuda_kernel(device: torch.device) -> tuple[Numbers, Numbers]:
    """That the CUDA kernel is what was just checked."""
    if device.type != "cuda":
        raise NotRun("no GPU")
    if nvcc.find_nvcc() is None or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        raise NotRun("no nvcc, or no clusters of blocks: the Triton path was checked in its place")
    library = one_read.library_for(torch.empty(1, 1, device=device))
    return {"not_served": float(library is None)}, {"not_served": 0.0}


def loss_error(cfg: LossConfig, device: torch.device) -> tuple[Numbers, Numbers]:
    """`policy_loss`: value, gradient and every counter."""
    tokens = inputs.tokens(5000, device, share=0.8)
    logprobs = inputs.normal(5000, device=device, dtype=torch.float32, std=0.1) - 8
    logprobs.requires_grad_()
    wide = logprobs.detach().double().requires_grad_()
    loss, counters = policy_loss(logprobs, tokens, cfg, denominator=7.0)
    right, known = written_out_loss(wide, inputs.in_float64(tokens), cfg, denominator=7.0)
    (by_found,), (by_right,) = (
        torch.autograd.grad(each, to) for each, to in ((loss, logprobs), (right, wide))
    )
    off = [relative(counters.quotients[key][0], known.quotients[key][0]) for key in known.quotients]
    off += [relative(counters.maxima[key], known.maxima[key]) for key in known.maxima]
    numbers = {"loss": relative(loss, right), "gradient": relative(by_found, by_right)}
    return numbers | {"counters": max(off)}, {"loss": 1e-5, "gradient": 1e-5, "counters": 1e-4}


def advantages_error(device: torch.device) -> tuple[Numbers, Numbers]:
    """`group_advantage` against its CPU implementation; equal rewards are exactly 0."""
    rewards = inputs.normal(4096, device=device, dtype=torch.float64)
    rewards[8:24] = 0.1
    offsets = torch.tensor([0, 8, 24, 30, *range(4096 % 64 + 64, 4097, 64)], device=device)
    worst, constant = 0.0, 0.0
    for baseline, std in itertools.product(("mean", "leave_one_out"), ("population", "none")):
        found = group_advantage(rewards, offsets, baseline=baseline, std=std)  # type: ignore[arg-type]
        right = group_advantage(rewards.cpu(), offsets.cpu(), baseline=baseline, std=std)  # type: ignore[arg-type]
        worst = max(worst, relative(found.cpu(), right))
        constant = max(constant, found[8:24].abs().max().item())
    return {"error": worst, "constant": constant}, {"error": 1e-6, "constant": 0.0}


def edges(device: torch.device) -> tuple[Numbers, Numbers]:
    """-inf columns and targets, |z| of 1e30, 4e4: values of both operations on logits."""
    inf = torch.inf
    logits = torch.tensor(
        [[-inf, -inf, 1, 2], [1, -inf, 2, 0], [1e30, -1e30, 1e30, 0], [4e4, 4e4 + 1, 0, -4e4]],
        device=device,
    )
    target_ids = torch.tensor([3, 1, 2, 1], device=device)
    temperature = torch.ones(4, device=device)
    right = inputs.exact(logits, target_ids, temperature)
    rows = torch.arange(4, device=device)
    first = logprob_stats(logits, rows, target_ids, temperature=temperature)
    tokens, cfg = inputs.tokens(4, device), LossConfig()
    *_, logprob, entropy = one_read.logits_policy_loss(
        logits, target_ids, tokens, cfg, temperature=temperature, denominator=1.0
    )
    found = zip((*first, logprob, entropy), (*right, *right), strict=True)
    return {"error": max(largest(*pair) for pair in found)}, {"error": LOGPROB_ERROR}


def no_rows(device: torch.device) -> tuple[Numbers, Numbers]:
    """Nothing to do is done, and nothing trained leaves no gradient."""
    size = Size(num_rows=8, vocab=100, hidden=16)
    hidden, weight, target_ids = inputs.head(size, device)
    nothing = linear_logprob(hidden[:0], weight, target_ids[:0], temperature=1.0)
    (by_weight,) = torch.autograd.grad(nothing[0].sum(), weight)
    logits = inputs.normal(8, 100, device=device, dtype=torch.bfloat16).requires_grad_()
    tokens = inputs.tokens(8, device, share=0.0)
    loss, *_ = one_read.logits_policy_loss(
        logits, target_ids, tokens, LossConfig(), temperature=1.0, denominator=1.0
    )
    (by_logits,) = torch.autograd.grad(loss, logits)
    left = by_weight.abs().max() + by_logits.abs().max() + loss.abs()
    return {"left": left.item()}, {"left": 0.0}


def duplicates(device: torch.device) -> tuple[Numbers, Numbers]:
    """A row that is chosen three times has the gradient of all three."""
    logits = inputs.normal(3, 500, device=device, dtype=torch.float32).requires_grad_()
    rows = torch.tensor([2, 0, 2, 2], device=device)
    target_ids = torch.tensor([1, 8, 4, 4], device=device)
    temperature = torch.ones(4, device=device)
    wide = logits.detach().double().requires_grad_()
    found = gradients(logprob_stats(logits, rows, target_ids, temperature=temperature), [logits])
    right = gradients(inputs.exact(wide[rows], target_ids, temperature), [wide])
    return {"gradient": relative(found[0], right[0])}, {"gradient": 1e-5}


def many_rows(device: torch.device) -> tuple[Numbers, Numbers]:
    """More than a grid has in its second dimension."""
    size = Size(num_rows=70_000, vocab=33, hidden=1)
    logits = inputs.normal(70_000, 33, device=device, dtype=torch.float32)
    target_ids, rows = inputs.targets(size, device), torch.arange(70_000, device=device)
    temperature = torch.ones(70_000, device=device)
    found = logprob_stats(logits, rows, target_ids, temperature=temperature)
    right = inputs.exact(logits, target_ids, temperature)
    return {"logprob": largest(found[0], right[0])}, {"logprob": LOGPROB_ERROR}


def long_offsets(device: torch.device) -> tuple[Numbers, Numbers]:
    """More than 2^31 logits: the last rows, values and gradients, of both operations."""
    if device.type != "cuda":
        raise NotRun("no GPU: 4 GiB of logits and as much of gradients")
    num_rows = 2**31 // inputs.VOCAB + 64
    size = Size(num_rows=num_rows, vocab=inputs.VOCAB, hidden=1)
    logits = inputs.normal(num_rows, inputs.VOCAB, device=device, dtype=torch.bfloat16)
    logits.requires_grad_()
    target_ids, tail = inputs.targets(size, device), slice(num_rows - 32, num_rows)
    temperature = torch.ones(num_rows, device=device)
    rows = torch.arange(num_rows, device=device)
    wide = logits.detach()[tail].double().requires_grad_()
    right = inputs.exact(wide, target_ids[tail], temperature[tail])
    found = logprob_stats(logits, rows, target_ids, temperature=temperature)
    (by_logits,) = torch.autograd.grad(found[0].sum(), logits)
    (by_right,) = torch.autograd.grad(right[0].sum(), wide)
    numbers = {
        "logprob": largest(found[0][tail], right[0]),
        "gradient": relative(by_logits[tail], by_right),
    }
    del by_logits, found
    *_, logprob, _ = one_read.logits_policy_loss(
        logits,
        target_ids,
        inputs.tokens(num_rows, device),
        LossConfig(),
        temperature=temperature,
        denominator=1.0,
    )
    numbers["one_read"] = largest(logprob[tail], right[0])
    bounds = {"logprob": LOGPROB_ERROR, "gradient": BF16_ERROR, "one_read": LOGPROB_ERROR}
    return numbers, bounds


def same_bits(device: torch.device) -> tuple[Numbers, Numbers]:
    """Two runs of everything; numbers that differ are counted."""
    size, differing = Size(num_rows=128, vocab=5003, hidden=64), 0
    hidden, weight, target_ids = inputs.head(size, device)
    logits = inputs.normal(128, 5003, device=device, dtype=torch.bfloat16).requires_grad_()
    tokens, cfg = inputs.tokens(128, device), CONFIGS["ppo"]
    how: dict[str, Any] = {"denominator": 7.0, "temperature": inputs.TEMPERATURE}

    def everything() -> list[Tensor]:
        head = linear_logprob(hidden, weight, target_ids, temperature=inputs.TEMPERATURE)
        one_pass, *_ = linear_policy_loss(hidden, weight, target_ids, tokens, cfg, **how)
        read_once, *_ = one_read.logits_policy_loss(logits, target_ids, tokens, cfg, **how)
        by_head = gradients(head, [hidden, weight])
        by_pass = torch.autograd.grad(one_pass, [hidden, weight])
        by_logits = torch.autograd.grad(read_once, [logits])
        return [*head, one_pass, read_once, *by_head, *by_pass, *by_logits]

    for one, other in zip(everything(), everything(), strict=True):
        differing += int((one != other).sum())
    return {"differing": float(differing)}, {"differing": 0.0}
