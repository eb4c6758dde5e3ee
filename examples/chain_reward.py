"""The reward of `chain_regimes.py`: `reward: examples/chain_reward.py:all_thoughts`."""

from megatron_srpo.types import Prompt, Score


def all_thoughts(prompt: Prompt, response: str) -> Score:
    """Right if every thought is, as it stands in `solution`; white space around it is ignored."""
    thoughts = [thought.strip() for thought in response.split("\n")]
    is_right = thoughts == [thought.strip() for thought in prompt.solution]
    return Score(value=float(is_right), correct=is_right)
