r"""Problems of mathematics: the answer is a number or an expression, as LaTeX."""

from __future__ import annotations

import re

from megatron_srpo.rewards.exact import last_boxed
from prepare.item import Item, LeftOut, Row, text_of

MAX_ANSWER = 60
"""Characters of an answer that a grader can still be trusted with (the paper's release)."""
UNVERIFIABLE = re.compile(
    r"\\(text|mathrm|mbox)"  # words, and units
    r"|[%~]|\*\*"  # left over from a sentence, or from markdown
    r"|^[^\w\s\\({\[|.+-]"  # cut out of the middle of something
)
COMMAND = re.compile(r"\\[a-zA-Z]+")
WORD = re.compile(r"[a-zA-Z]{3,}|\b(or|is|sq|mm|cm|dm|km|yd|mi|ft|kg|mg|lb|oz)\b")


def olympiad(row: Row) -> Item:
    """NuminaMath-CoT, source olympiads: the answer is in the solution's last box."""
    if text_of(row, "source") != "olympiads":
        raise LeftOut("other source")
    problem = text_of(row, "problem")
    answer = boxed_answer(row)
    if not is_verifiable(answer):
        raise LeftOut("answer not verifiable")
    return Item(prompt=problem, answer=answer)


def level_5(row: Row) -> Item:
    """MATH: the hardest fifth of its levels."""
    if text_of(row, "level") not in ("Level 5", "5"):
        raise LeftOut("other level")
    return Item(prompt=text_of(row, "problem"), answer=boxed_answer(row))


def problem_and_answer(row: Row) -> Item:
    """Sets that have both as they are."""
    return Item(prompt=text_of(row, "problem"), answer=text_of(row, "answer"))


def math_500(row: Row) -> Item:
    """Each problem has a name, that of its file in MATH."""
    item = problem_and_answer(row)
    name = text_of(row, "unique_id") if "unique_id" in row else ""
    return Item(prompt=item.prompt, answer=item.answer, id=name.removesuffix(".json"))


def aime(row: Row) -> Item:
    """Answers are whole numbers, in some copies with the zeros in front that the contest's form
    asks for."""
    item = problem_and_answer(row)
    if not re.fullmatch(r"[0-9]{1,3}", item.answer):
        raise ValueError(f"'answer' must be a number from 0 to 999, not {item.answer!r}")
    return Item(prompt=item.prompt, answer=str(int(item.answer)))


def grade_school(row: Row) -> Item:
    """GSM8K: what follows the last "####" of the answer, without commas between thousands."""
    _, mark, number = text_of(row, "answer").rpartition("####")
    if not mark or not number.strip():
        raise LeftOut("no number behind ####")
    return Item(prompt=text_of(row, "question"), answer=number.strip().replace(",", ""))


def boxed_answer(row: Row) -> str:
    """`LeftOut` where the solution boxes nothing."""
    answer = (last_boxed(text_of(row, "solution")) or "").strip()
    if not answer:
        raise LeftOut("no boxed answer")
    return answer


def is_verifiable(answer: str) -> bool:
    r"""Short, whole, and mathematics only: it has a digit, or is a choice from A to E.

    The rule of the paper's release (`prepare_datasets.py`), but for negative numbers, which that
    one leaves out.

    >>> [is_verifiable(text) for text in (r"\frac{1}{2}", "-3", "C", r"\pi", "12 cm", "x^2)")]
    [True, True, True, False, False, False]
    """
    if re.fullmatch("[A-E]", answer):
        return True
    is_whole = all(answer.count(one) == answer.count(other) for one, other in ("{}", "()"))
    is_short = 0 < len(answer) <= MAX_ANSWER and re.search(r"\d", answer) is not None
    is_prose = UNVERIFIABLE.search(answer) or WORD.search(COMMAND.sub("", answer))
    return is_whole and is_short and not is_prose
