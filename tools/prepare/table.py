"""Which sets are there?   name -> hub id, files, columns, reward, parts   (docs/data.md)"""

from __future__ import annotations

from prepare.code_sets import live_code
from prepare.item import POOL, Problems
from prepare.math_sets import aime, grade_school, level_5, math_500, olympiad, problem_and_answer
from prepare.question_sets import commonsense, sci_know_l3, strategy

NUM_OF_THE_PAPER = 500
"""The paper evaluates on so many problems of a set."""


def _sci_know(domain: str) -> Problems:
    return Problems(
        hub="hicai-zju/SciKnowEval",
        sources={"test": ("sciknoweval_test_v2.jsonl",)},
        columns=("question", "type", "domain", "details"),
        more_columns=("answer", "answerKey", "choices"),
        item=sci_know_l3(domain),
        reward="choice",
        num_test=NUM_OF_THE_PAPER,
    )


def _live_code(*difficulties: str) -> Problems:
    return Problems(
        hub="livecodebench/code_generation_lite",
        sources={POOL: ("test*.jsonl", "release_v6/*.parquet")},
        columns=("question_title", "question_content", "question_id", "starter_code", "difficulty",
                 "public_test_cases", "private_test_cases", "metadata"),
        item=live_code(difficulties),
        reward="code",
        test_share=0.25,
    )  # fmt: skip


def _aime(hub: str, *files: str) -> Problems:
    return Problems(
        hub=hub,
        sources={"test": files},
        columns=("problem", "answer"),
        item=aime,
        reward="math_verify",
    )


SETS = {
    "numina-olympiads": Problems(
        hub="AI-MO/NuminaMath-CoT",
        sources={POOL: ("train-*.parquet",)},
        columns=("source", "problem", "solution"),
        item=olympiad,
        reward="math_verify",
        num_train=400,
        num_test=100,
    ),
    "acereason-math": Problems(
        hub="nvidia/AceReason-Math",
        sources={POOL: ("math.jsonl",)},
        columns=("problem", "answer"),
        item=problem_and_answer,
        reward="math_verify",
        num_test=NUM_OF_THE_PAPER,
    ),
    "math-level5": Problems(
        hub="EleutherAI/hendrycks_math",
        sources={
            "train": ("train-*.parquet", "train/*.parquet"),
            "test": ("test-*.parquet", "test/*.parquet"),
        },
        columns=("problem", "level", "solution"),
        item=level_5,
        reward="math_verify",
        num_test=NUM_OF_THE_PAPER,
    ),
    "hmmt-nov-2025": Problems(
        hub="MathArena/hmmt_nov_2025",
        sources={"test": ("train-*.parquet",)},
        columns=("problem", "answer"),
        item=problem_and_answer,
        reward="math_verify",
    ),
    "sciknoweval-chemistry": _sci_know("Chemistry"),
    "sciknoweval-physics": _sci_know("Physics"),
    "sciknoweval-biology": _sci_know("Biology"),
    "sciknoweval-materials": _sci_know("Material"),
    "strategyqa": Problems(
        hub="ChilleD/StrategyQA",
        sources={
            "train": ("train-*.parquet", "train.json"),
            "test": ("test-*.parquet", "test.json"),
        },
        columns=("qid", "question", "answer"),
        item=strategy,
        reward="yes_no",
        num_test=NUM_OF_THE_PAPER,
    ),
    "commonsenseqa": Problems(
        hub="tau/commonsense_qa",
        sources={"train": ("train-*.parquet",), "test": ("validation-*.parquet",)},
        columns=("id", "question", "choices", "answerKey"),
        item=commonsense,
        reward="choice",
        num_test=NUM_OF_THE_PAPER,
    ),
    "livecodebench": _live_code("easy", "medium", "hard"),
    "livecodebench-easy": _live_code("easy"),
    "livecodebench-medium": _live_code("medium"),
    "livecodebench-hard": _live_code("hard"),
    "gsm8k": Problems(
        hub="openai/gsm8k",
        sources={
            "train": ("main/train-*.parquet", "train-*.parquet"),
            "test": ("main/test-*.parquet", "test-*.parquet"),
        },
        columns=("question", "answer"),
        item=grade_school,
        reward="math_verify",
    ),
    "math-500": Problems(
        hub="HuggingFaceH4/MATH-500",
        sources={"test": ("test.jsonl",)},
        columns=("problem", "answer"),
        more_columns=("unique_id",),
        item=math_500,
        reward="math_verify",
    ),
    "aime24": _aime("HuggingFaceH4/aime_2024", "train-*.parquet"),
    "aime25": _aime("math-ai/aime25", "test.jsonl"),
}
