"""Write the demo task: last-digit arithmetic in chains.

    python examples/chain_arithmetic.py OUT [--seed 0]

`3+4*7-2...` starts at 3 and keeps only the last digit after each of eight operations: 7, 9, 7, ...
The thoughts are these digits and, once more, the last one: the answer. All operations are
one-to-one, so after a wrong digit the answer is wrong too, unless a second mistake repairs it.

OUT/model/          a small Qwen2 policy with random weights, and its tokenizer
OUT/train.jsonl     {"id", "prompt", "answer", "solution"}; solution: the right thoughts
OUT/eval.jsonl      the same, for evaluation
OUT/sft.jsonl       {"prompt", "response"}: demonstrations for the warm start
OUT/localize.jsonl  {"prompt", "response"}: "which thought went wrong first?", answered correctly
OUT/DONE            written last

The warm start is noisy on purpose: most facts (digit, operation) are demonstrated with mistakes, so
a policy that imitates them perfectly solves only 12 to 16 % of the problems. Mistakes in
demonstrations are located correctly, so the policy judges better than it solves. No problem occurs
twice, within a file or in two of them.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

NUM_OPERATIONS = 8
POOL_SIZE = 8
NUM_TRAIN, NUM_EVAL, NUM_SFT, NUM_LOCALIZE = 4096, 512, 40960, 2048
LOCALIZE_SHARE = 0.6  # of the warm-start rows
EASY_ACCURACY = 0.99
DISTRACTOR_SHARE = 0.9  # of a fact's mistakes: always the same wrong digit; the others are uniform


class Operation(NamedTuple):
    sign: str
    operand: int

    def apply(self, digit: int) -> int:
        """The last digit of the result; one-to-one in `digit`."""
        if self.sign == "*":
            return digit * self.operand % 10
        return (digit + self.operand if self.sign == "+" else digit - self.operand) % 10


class Problem(NamedTuple):
    start: int
    operations: tuple[Operation, ...]

    def digits(self) -> list[int]:
        """The right thoughts: a digit after every operation, then the answer (the last again)."""
        digits = [self.start]
        for operation in self.operations:
            digits.append(operation.apply(digits[-1]))
        return [*digits[1:], digits[-1]]


class Difficulty(NamedTuple):
    """Which facts (digit, operation) are demonstrated with mistakes, and where they are met."""

    hard_share: float = 0.8
    """Of the facts."""
    hard_accuracy: tuple[float, float] = (0.4, 0.8)
    """How often a hard fact is demonstrated correctly: uniform in this range."""
    num_easy_operations: int = 0
    """The first so many of the pool have no hard facts."""
    easy_problems: float = 0.0
    """Such a share of the problems has easy operations only, the others none; 0: any mixture."""
    first_mistake: int = 0
    """Operations before this one are demonstrated as easy facts."""


class Task:
    """A pool of operations, and how reliably each fact (digit, operation) is demonstrated."""

    def __init__(self, seed: int, difficulty: Difficulty) -> None:
        self.difficulty = difficulty
        rng = random.Random(f"task/{seed}")
        choices = [Operation(sign, operand) for sign in "+-" for operand in range(1, 10)]
        choices += [Operation("*", operand) for operand in (3, 7, 9)]  # others: not one-to-one
        self.pool = rng.sample(choices, POOL_SIZE)
        self.accuracy: dict[tuple[int, Operation], float] = {}
        self.distractor: dict[tuple[int, Operation], int] = {}
        for index, operation in enumerate(self.pool):
            can_be_hard = index >= difficulty.num_easy_operations
            for digit in range(10):
                fact = (digit, operation)
                hard = rng.random() < difficulty.hard_share and can_be_hard
                accuracy = rng.uniform(*difficulty.hard_accuracy) if hard else EASY_ACCURACY
                self.accuracy[fact] = accuracy
                self.distractor[fact] = another_digit(operation.apply(digit), rng)

    def problems(self, rng: random.Random) -> Iterator[Problem]:
        """Endless, without repetition."""
        seen: set[Problem] = set()
        while True:
            operations = tuple(rng.choices(self._pool_of_one(rng), k=NUM_OPERATIONS))
            problem = Problem(rng.randrange(10), operations)
            if problem not in seen:
                seen.add(problem)
                yield problem

    def _pool_of_one(self, rng: random.Random) -> list[Operation]:
        """What a problem's operations are drawn from."""
        share, num_easy = self.difficulty.easy_problems, self.difficulty.num_easy_operations
        if not share:
            return self.pool
        return self.pool[:num_easy] if rng.random() < share else self.pool[num_easy:]

    def demonstrate(self, problem: Problem, rng: random.Random) -> list[int]:
        """`problem.digits()` with this task's mistakes, each carried on to the next operation."""
        digits = [problem.start]
        for index, operation in enumerate(problem.operations):
            fact = (digits[-1], operation)
            right = operation.apply(digits[-1])
            is_easy = index < self.difficulty.first_mistake
            if rng.random() < (EASY_ACCURACY if is_easy else self.accuracy[fact]):
                digits.append(right)
            elif rng.random() < DISTRACTOR_SHARE:
                digits.append(self.distractor[fact])
            else:
                digits.append(another_digit(right, rng))
        return [*digits[1:], digits[-1]]


def another_digit(digit: int, rng: random.Random) -> int:
    return (digit + rng.randint(1, 9)) % 10


Verdicts = list[tuple[int, int]]
"""(found, expected) of every thought up to and including the first in which they differ."""


def judge(digits: list[int], right: list[int]) -> Verdicts:
    verdicts: Verdicts = []
    for found, expected in zip(digits, right, strict=True):
        verdicts.append((found, expected))
        if found != expected:
            break
    return verdicts


class Style(Protocol):
    """How problems, thoughts and questions are written, and the policy that reads them."""

    delimiter: str  # between thoughts
    closing: str  # after the last one
    num_layers: int
    max_positions: int
    rope_theta: float

    def prompt(self, problem: Problem) -> str: ...
    def thoughts(self, problem: Problem, digits: list[int]) -> list[str]: ...
    def question(self, prompt: str, thoughts: list[str]) -> str: ...
    def verdict(self, verdicts: Verdicts) -> str: ...
    def tokenizer(self, texts: list[str]) -> Qwen2Tokenizer: ...


class CharStyle:
    """A token a character, a line a thought.

    What a position must look up is equally far from it in all thoughts, and in all verdicts:
    a model with rotary positions learns that fastest.
    """

    delimiter = "\n"
    closing = ""
    num_layers = 3
    max_positions = 256
    rope_theta = 30.0  # a thought looks back some 20 tokens, exactly: fast rotations tell

    def prompt(self, problem: Problem) -> str:
        operations = "".join(f"{sign}{operand}" for sign, operand in problem.operations)
        return f"{problem.start}{operations}\n"

    def thoughts(self, problem: Problem, digits: list[int]) -> list[str]:
        return [str(digit) for digit in digits]

    def question(self, prompt: str, thoughts: list[str]) -> str:
        return f"{prompt}{self.delimiter.join(thoughts)}?"

    def verdict(self, verdicts: Verdicts) -> str:
        """The right digit, then whether the thought has it: "7+9+5-" names the third thought."""
        return "".join(
            f"{expected}{'+' if found == expected else '-'}" for found, expected in verdicts
        )

    def tokenizer(self, texts: list[str]) -> Qwen2Tokenizer:
        """Byte pairs without a single merge; "Ċ" is how byte-level vocabularies write a newline."""
        vocabulary = {character: token for token, character in enumerate("_$0123456789+-*?Ċ")}
        return Qwen2Tokenizer(vocabulary, [], unk_token="_", pad_token="_", eos_token="$")


Row = dict[str, str | list[str]]


def problem_row(style: Style, name: str, problem: Problem) -> Row:
    digits = problem.digits()
    return {
        "id": name,
        "prompt": style.prompt(problem),
        "answer": str(digits[-1]),
        "solution": [*style.thoughts(problem, digits)],
    }


def solve_row(style: Style, task: Task, problem: Problem, rng: random.Random) -> Row:
    thoughts = style.thoughts(problem, task.demonstrate(problem, rng))
    response = style.delimiter.join(thoughts) + style.closing
    return {"prompt": style.prompt(problem), "response": response}


def localize_row(style: Style, task: Task, problem: Problem, rng: random.Random) -> Row:
    """A demonstration that fails, and where it went wrong."""
    right = problem.digits()
    digits = right
    while digits[-1] == right[-1]:
        digits = task.demonstrate(problem, rng)
    question = style.question(style.prompt(problem), style.thoughts(problem, digits))
    return {"prompt": question, "response": style.verdict(judge(digits, right))}


def make_rows(style: Style, difficulty: Difficulty, seed: int) -> dict[str, list[Row]]:
    """The rows by file; all files draw their problems from one stream without repetition."""
    task, rng = Task(seed, difficulty), random.Random(f"rows/{seed}")
    problems = task.problems(rng)
    tables: dict[str, list[Row]] = {}
    for name, num_rows in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        numbered = enumerate(islice(problems, num_rows))
        tables[name] = [problem_row(style, f"{name}-{i:05d}", problem) for i, problem in numbered]
    tables["sft"] = [
        (localize_row if rng.random() < LOCALIZE_SHARE else solve_row)(style, task, problem, rng)
        for problem in islice(problems, NUM_SFT)
    ]
    tables["localize"] = [
        localize_row(style, task, problem, rng) for problem in islice(problems, NUM_LOCALIZE)
    ]
    return tables


def make_policy(style: Style, tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(eos, int) and isinstance(pad, int)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=style.num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=style.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": style.rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.05,  # with the usual 0.02 so small a model is slow to start learning
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


def write(out: Path, style: Style, difficulty: Difficulty, seed: int) -> None:
    tables = make_rows(style, difficulty, seed)
    for name, rows in tables.items():
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")
    sample = [f"{row['prompt']}{row['response']}" for row in tables["sft"][:1024]]
    tokenizer = style.tokenizer(sample)
    policy = make_policy(style, tokenizer, seed)
    tokenizer.save_pretrained(out / "model")
    policy.save_pretrained(out / "model")
    print(f"{out / 'model'}: {policy.num_parameters()} parameters, {len(tokenizer)} tokens")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


Variants = dict[str, tuple[Style, Difficulty]]


def main(variants: Variants) -> None:
    """Writes the one variant that there is, or the one that the command line names."""
    parser = Parser(description="Write the demo task: policy, problems and demonstrations.")
    if len(variants) > 1:
        parser.add_argument("variant", choices=variants)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the task, the rows, the weights")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be between 0 and 2**32 - 1, not {args.seed}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"{args.out} is not a folder")

    name = args.variant if len(variants) > 1 else min(variants)
    label, done = f"{name}, seed {args.seed}", args.out / "DONE"
    if done.exists():
        if (written := done.read_text(encoding="utf-8").strip()) != label:
            parser.error(f"{args.out} already holds {written}")
        print(f"{args.out} is already written: {label}")
        return
    ours = {"model", "train.jsonl", "eval.jsonl", "sft.jsonl", "localize.jsonl"}
    if args.out.is_dir() and (others := {path.name for path in args.out.iterdir()} - ours):
        parser.error(f"{args.out} holds other files ({min(others)}): choose another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out, *variants[name], args.seed)
    done.write_text(f"{label}\n", encoding="utf-8")


if __name__ == "__main__":
    main({"CharStyle": (CharStyle(), Difficulty())})
