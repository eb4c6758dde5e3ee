"""What does a reward say?   a plain `Score`, or what it raised, in one line"""

from __future__ import annotations

import math
import traceback

from megatron_srpo.types import Prompt, Score


class RewardError(RuntimeError):
    """A reward raised, or cannot be asked at all: no item will have a verdict."""

    @classmethod
    def over(cls, prompt: Prompt, error: BaseException, *, role: str) -> RewardError:
        """`role`: reward, or second reward."""
        return cls(f"the {role} of prompt {prompt.id!r} raised {described(error)}")


class RewardRaisedError(RuntimeError):
    """A reward in another process raised; the message is what `described` says of it.

    It has the traceback of that process as its note: the exception itself need not survive the way
    to another process.
    """

    def __init__(self, words: str, trace: str) -> None:
        super().__init__(words, trace)
        self.add_note(f"in the reward's process:\n{trace}")

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def of(cls, error: BaseException) -> RewardRaisedError:
        """Made where the reward runs."""
        return cls(described(error), "".join(traceback.format_exception(error)).rstrip())


def described(error: BaseException) -> str:
    """What was raised, in one line."""
    if isinstance(error, RewardRaisedError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def right_if(correct: bool) -> Score:
    """A verdict without degrees."""
    return Score(value=float(correct), correct=correct)


def no_verdict(why: str) -> Score:
    """The item cannot be judged, whatever the response says."""
    return Score(value=0.0, correct=False, failure=why)


def checked(score: object) -> Score:
    """Plain numbers, whatever numbers came. Raises `TypeError` and `ValueError` for what is no
    verdict."""
    if not isinstance(score, Score):
        raise TypeError(f"it must give a Score, not {score!r}")
    if not math.isfinite(score.value):
        raise ValueError(f"the value of a Score must be finite, not {score.value}")
    failure = None if score.failure is None else str(score.failure)
    return Score(value=float(score.value), correct=bool(score.correct), failure=failure)
