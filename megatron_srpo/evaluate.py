"""How good is the policy on problems that it was not trained on?   held-out prompts -> pass@1"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_srpo.config import Config
from megatron_srpo.metrics import Sums
from megatron_srpo.rollouts import Roles
from megatron_srpo.seeding import counter_seed
from megatron_srpo.types import Prompt, Request


def pass_at_1(
    prompts: Sequence[Prompt],
    *,
    set_name: str,
    roles: Roles,
    cfg: Config,
) -> Sums:
    """One response a prompt. Seeds do not depend on the step, so evaluations are paired."""
    by_id = {prompt.id: prompt for prompt in prompts}
    requests = [
        Request(
            id=prompt.id,
            purpose="eval",
            context=prompt.token_ids,
            max_tokens=cfg.rollout.max_response_tokens,
            temperature=cfg.eval.temperature,
            seed=counter_seed(cfg.seed, "eval", prompt.id),
        )
        for prompt in prompts
    ]
    num_correct = 0
    for completion in roles.generator.generate(requests):
        response = "".join(roles.tokenizer.pieces(completion.token_ids))
        num_correct += roles.reward(by_id[completion.request_id], response).correct
    return {f"eval/{set_name}/pass_at_1": (num_correct, len(prompts))}
