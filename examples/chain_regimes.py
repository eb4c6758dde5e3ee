"""Write variants of the demo task, in which resets may or may not pay.

    python examples/chain_regimes.py VARIANT OUT [--seed 0]

The files are those of `chain_arithmetic.py`. What the variants differ in is which facts (digit,
operation) the warm start demonstrates with mistakes, hence how often and where the policy fails:

u8    every fact is hard, alike: a response is right throughout in 1 to 2 % of all cases
m8    two kinds of problems: easy ones, nearly always right, and hard ones, nearly never
k8    few hard facts, some of them very hard
f8    mistakes in the last four operations only, and each digit is followed by filler

`chain_reward.py:all_thoughts` is the reward that goes with them: a right answer that wrong thoughts
have led to does not count.
"""

import random

from chain_arithmetic import CharStyle, Difficulty, Problem, Variants, Verdicts, main
from transformers import Qwen2Tokenizer

FILLER = {" ": "Ġ", "\t": "ĉ", "\v": "ċ", "\f": "Č"}  # as byte-level vocabularies write it
NUM_FILLERS = 3


class FilledStyle(CharStyle):
    """White space of random kinds after each digit: tokens that are sampled and decide nothing.

    Operations and verdicts are spaced alike, for the reason that `CharStyle` gives.
    """

    def prompt(self, problem: Problem) -> str:
        spaces = " " * NUM_FILLERS
        operations = "".join(f"{sign}{operand}{spaces}" for sign, operand in problem.operations)
        return f"{problem.start}{operations}\n"

    def thoughts(self, problem: Problem, digits: list[int]) -> list[str]:
        rng = random.Random(f"{problem} {digits}")
        return [f"{digit}{''.join(rng.choices([*FILLER], k=NUM_FILLERS))}" for digit in digits]

    def verdict(self, verdicts: Verdicts) -> str:
        spaces = " " * NUM_FILLERS
        return "".join(
            f"{expected}{spaces}{'+' if found == expected else '-'}" for found, expected in verdicts
        )

    def tokenizer(self, texts: list[str]) -> Qwen2Tokenizer:
        characters = [*"_$0123456789+-*?Ċ", *FILLER.values()]
        vocabulary = {character: token for token, character in enumerate(characters)}
        return Qwen2Tokenizer(vocabulary, [], unk_token="_", pad_token="_", eos_token="$")


VARIANTS: Variants = {
    "u8": (CharStyle(), Difficulty(hard_share=1.0, hard_accuracy=(0.5, 0.7))),
    "m8": (CharStyle(), Difficulty(hard_share=1.0, num_easy_operations=3, easy_problems=0.2)),
    "k8": (CharStyle(), Difficulty(hard_share=0.4, hard_accuracy=(0.2, 0.7))),
    "f8": (FilledStyle(), Difficulty(hard_share=1.0, first_mistake=4)),
}

if __name__ == "__main__":
    main(VARIANTS)
