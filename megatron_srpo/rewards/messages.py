"""What goes between the trainer and a reward's process?   items one way, verdicts the other

Both are the same Python. `marshal` takes plain values only; pickling dataclasses and arrays was
more than half of what an item cost a trainer whose caches are full of other things.
"""

from __future__ import annotations

import marshal

import numpy as np

from megatron_srpo.rewards.verdict import RewardRaisedError
from megatron_srpo.types import Prompt, Score

STARTED = marshal.dumps(())


def packed_item(prompt: Prompt, response: str) -> bytes:
    """Everything of both."""
    tokens = prompt.token_ids.astype(np.int32, copy=False).tobytes()
    fields = (prompt.id, prompt.text, tokens, prompt.answer, prompt.solution, response)
    return marshal.dumps(fields)


def item_in(message: bytes) -> tuple[Prompt, str]:
    """What `packed_item` packed."""
    id, text, tokens, answer, solution, response = marshal.loads(message)
    token_ids = np.frombuffer(tokens, np.int32)
    prompt = Prompt(id=id, text=text, token_ids=token_ids, answer=answer, solution=solution)
    return prompt, response


def packed_verdict(verdict: Score | RewardRaisedError) -> bytes:
    """A score that `verdict.checked` has let through, or why there is none."""
    if isinstance(verdict, RewardRaisedError):
        return marshal.dumps(verdict.args)
    return marshal.dumps((verdict.value, verdict.correct, verdict.failure))


def verdict_in(message: bytes) -> Score | RewardRaisedError | None:
    """What `packed_verdict` packed; None for `STARTED`."""
    said = marshal.loads(message)
    if len(said) == 3:
        value, correct, failure = said
        return Score(value=value, correct=correct, failure=failure)
    return RewardRaisedError(*said) if said else None
