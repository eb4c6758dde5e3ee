"""Write the demo task in prose, for a byte-pair vocabulary.

    python examples/chain_words.py OUT [--seed 0]

The problems and the files are those of `chain_arithmetic.py`. The prompt is a long instruction with
a worked example; thoughts end with "</thought>" and a newline. Tokens share the characters of that
mark with its neighbours ("}</", and ">" with the newline), so looking for the token ids of
"</thought>" in a response finds nothing. This task exercises what real models bring along; it is
not tuned to be learned fast.
"""

from chain_arithmetic import Difficulty, Problem, Verdicts, main
from transformers import Qwen2Tokenizer

NAME_BY_SIGN = {"+": "plus", "-": "minus", "*": "times"}
VERB_BY_SIGN = {"+": "add", "-": "subtract", "*": "multiply by"}
INSTRUCTION = """\
You are a careful assistant that works with the last digit of whole numbers. You are given a start
digit and a list of operations. Apply the operations one after another, from left to right. After
every operation keep only the last digit of the result and forget all the others. When a subtraction
would give a number below zero, add ten to it first, so that what you keep is always a digit from
zero to nine.

Write down one thought for each operation. A thought names the digit that you have, the operation,
and the digit in which the result ends. Do not skip an operation, do not join two of them in one
thought, and do not write anything else between the thoughts. Close every thought with the mark that
the example shows, and begin the next one on a new line. After the last operation write one more
thought that gives the answer in a box.

Here is an example with three operations.

Q: start with 8, then add 5, then multiply by 7, then subtract 4.
A: 8 plus 5 ends in 3</thought>
3 times 7 ends in 1</thought>
1 minus 4 ends in 7</thought>
The answer is \\boxed{7}</thought>

The example has three operations, the problem below has more of them. Check each thought before you
close it, because a wrong digit spoils all that follows.

"""


class WordStyle:
    """`chain_arithmetic.Style` in prose."""

    delimiter = "</thought>\n"
    closing = "</thought>"
    num_layers = 2
    max_positions = 1024
    rope_theta = 10000.0

    def prompt(self, problem: Problem) -> str:
        steps = [f", then {VERB_BY_SIGN[sign]} {operand}" for sign, operand in problem.operations]
        return f"{INSTRUCTION}Q: start with {problem.start}{''.join(steps)}.\nA: "

    def thoughts(self, problem: Problem, digits: list[int]) -> list[str]:
        *results, answer = digits
        before = [problem.start, *results[:-1]]
        steps = [
            f"{digit} {NAME_BY_SIGN[sign]} {operand} ends in {result}"
            for digit, (sign, operand), result in zip(
                before, problem.operations, results, strict=True
            )
        ]
        return [*steps, f"The answer is \\boxed{{{answer}}}"]

    def question(self, prompt: str, thoughts: list[str]) -> str:
        steps = "".join(f"Step {number}: {thought}\n" for number, thought in enumerate(thoughts, 1))
        return (
            f"{prompt}\n\n{steps}The final answer is wrong. Which step went wrong first? "
            "Finish with \\boxed{step number}.\n"
        )

    def verdict(self, verdicts: Verdicts) -> str:
        lines = [
            f"Step {number}: {'right' if found == expected else f'wrong, it ends in {expected}'}\n"
            for number, (found, expected) in enumerate(verdicts, 1)
        ]
        return f"{''.join(lines)}\\boxed{{{len(verdicts)}}}"

    def tokenizer(self, texts: list[str]) -> Qwen2Tokenizer:
        empty = Qwen2Tokenizer(pad_token="<|pad|>")
        return empty.train_new_from_iterator(texts, vocab_size=512, show_progress=False)


if __name__ == "__main__":
    main({"WordStyle": (WordStyle(), Difficulty())})
