"""What is a policy measured on?   `eval.sets` -> problems, judges; no problem of `data.train`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_srpo.config import Config
from megatron_srpo.config_sections import EvalSet
from megatron_srpo.data import PromptFormat, read_prompts
from megatron_srpo.evaluate import HeldOut
from megatron_srpo.protocols import Tokenizer
from megatron_srpo.rewards.code import Case, asked_by
from megatron_srpo.rewards.judge import RewardJudge, judge_named
from megatron_srpo.types import InputError, Prompt, question_key


def judge_of(cfg: Config, reward: str, second: str | None) -> RewardJudge:
    """Of the rewards of these names, as the config has them run."""
    return judge_named(
        reward,
        second=second,
        timeout_s=cfg.reward_timeout_s,
        num_workers=cfg.reward_workers,
        sandbox=cfg.sandbox,
    )


def read_held_out(
    cfg: Config, tokenizer: Tokenizer, judge: RewardJudge
) -> tuple[list[HeldOut], list[str]]:
    """(sets, ids of problems that are too long and were left out); `judge` is the run's own."""
    judges = {(cfg.reward, cfg.second_reward): judge}
    sets: list[HeldOut] = []
    dropped: list[str] = []
    for name, each in cfg.eval.sets.items():
        prompts, too_long = _read_set(each, cfg, tokenizer)
        rewards = rewards_of(each, cfg)
        if rewards not in judges:  # one whose processes are there need not start others
            judges[rewards] = judge_of(cfg, *rewards)
        sets.append(HeldOut(name=name, prompts=prompts, judge=judges[rewards]))
        dropped += too_long
    return sets, dropped


def rewards_of(each: EvalSet, cfg: Config) -> tuple[str, str | None]:
    """The first and the second one's name."""
    if each.reward is None:
        return cfg.reward, cfg.second_reward
    return each.reward, each.second_reward


def _read_set(
    each: EvalSet, cfg: Config, tokenizer: Tokenizer
) -> tuple[Sequence[Prompt], Sequence[str]]:
    prompts, too_long = read_prompts(
        each.data,
        tokenizer,
        format=PromptFormat.of(cfg, answer_format=each.answer_format),
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        long_prompts=cfg.data.long_prompts,
    )
    check_answers(prompts, rewards_of(each, cfg), each.data)
    return prompts[: cfg.eval.num_prompts], too_long


def check_answers(prompts: Sequence[Prompt], rewards: Sequence[str | None], path: Path) -> None:
    """Raises `InputError` for an answer without tests where programs are to be tested."""
    if "code" in rewards:
        for prompt in prompts:
            try:
                asked_by(prompt.answer)
            except InputError as error:
                raise InputError(f"{path}: problem {prompt.id!r}: {error}") from error


def check_disjoint(prompts: Sequence[Prompt], sets: Sequence[HeldOut], cfg: Config) -> None:
    """Raises `InputError` for a held-out problem that is a training problem too, whatever its id:
    the same question but for case and white space, or a program whose tests are all another's."""
    trained = {question_key(prompt.text): prompt.id for prompt in prompts}
    tested = {case: prompt.id for prompt in prompts for case in _cases(prompt, cfg)}
    for held_out in sets:
        for prompt in held_out.prompts:
            owners = {tested.get(case) for case in _cases(prompt, cfg)}
            of_tests = owners.pop() if len(owners) == 1 else None
            other = trained.get(question_key(prompt.text), of_tests)
            if other is not None:
                raise InputError(
                    f"{cfg.eval.sets[held_out.name].data}: problem {prompt.id!r} is also in "
                    f"{cfg.data.train}, as {other!r}: take it out of one of them"
                )


def _cases(prompt: Prompt, cfg: Config) -> Sequence[Case]:
    """The tests of a program that is trained on; of other answers, which many share, none."""
    if cfg.reward != "code":
        return ()
    try:
        return asked_by(prompt.answer).cases
    except InputError:  # a set that has another reward
        return ()
