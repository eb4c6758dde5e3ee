"""Questions with choices, with yes or no, or with a short text as the answer."""

from __future__ import annotations

from collections.abc import Callable

from prepare.item import Item, LeftOut, Row, fields_of, text_of

YES_NO = {"true": "yes", "yes": "yes", "false": "no", "no": "no"}
MAX_SHORT = 200
"""Characters of an answer that is compared as text: longer ones are derivations and procedures."""


def commonsense(row: Row) -> Item:
    """CommonsenseQA: five choices. Its test part has no answers."""
    return _choice(row, id=text_of(row, "id"))


def strategy(row: Row) -> Item:
    """StrategyQA."""
    return Item(prompt=text_of(row, "question"), answer=_yes_no(row), id=text_of(row, "qid"))


def sci_know_l3(domain: str) -> Callable[[Row], Item]:
    """SciKnowEval, third level (reasoning) of one domain: most rows have choices, some are yes or
    no, the others are open."""

    def item(row: Row) -> Item:
        if text_of(row, "domain") != domain:
            raise LeftOut("other domain")
        if fields_of(row, "details").get("level") != "L3":
            raise LeftOut("other level")
        kinds = row["type"]
        kind = str(kinds[0] if isinstance(kinds, list) and kinds else kinds)
        if kind.startswith("mcq"):
            return _choice(row)
        if kind == "true_or_false":
            answer = _yes_no(row)
            return Item(prompt=text_of(row, "question"), answer=answer, reward="yes_no")
        return _open(row)

    return item


def _choice(row: Row, id: str = "") -> Item:
    choices = fields_of(row, "choices")
    labels, texts = choices.get("label"), choices.get("text")
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise ValueError("'choices' must have lists 'label' and 'text', of one length")
    answer = text_of(row, "answerKey").upper()
    if answer not in labels:
        raise LeftOut("answer is none of the choices")
    question = text_of(row, "question")
    # A text that breaks the line would look like the next choice.
    lines = [
        f"{label}. {' '.join(str(text).split())}" for label, text in zip(labels, texts, strict=True)
    ]
    return Item(prompt="\n".join([question, "", *lines]), answer=answer, id=id)


def _yes_no(row: Row) -> str:
    said = text_of(row, "answer")
    if said.lower() not in YES_NO:
        raise ValueError(f"'answer' must be yes or no, true or false, not {said!r}")
    return YES_NO[said.lower()]


def _open(row: Row) -> Item:
    answer = text_of(row, "answer")
    if len(answer) > MAX_SHORT:
        raise LeftOut("open answer too long")
    return Item(prompt=text_of(row, "question"), answer=answer, reward="short")
