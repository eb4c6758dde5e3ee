"""Where does a response divide into thoughts?   token ids -> thoughts

A thought ends with a delimiter found in the *text*. Byte-pair vocabularies merge a delimiter with
its neighbours ('>' with the newline behind it), so matching token ids would find a single thought
and turn every reset into a restart. The response is never encoded again: the boundary falls after
the token in which the delimiter's last character lies.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate

from megatron_srpo.config_method import ThoughtConfig
from megatron_srpo.protocols import Tokenizer
from megatron_srpo.types import Thought, Tokens


def split_thoughts(
    token_ids: Tokens, tokenizer: Tokenizer, cfg: ThoughtConfig
) -> tuple[Thought, ...]:
    """Thoughts of a response; their tokens and texts, joined, are the response's.

    Pieces 'a', 'b</', 'x>c', 'd' with delimiter '</x>' make thoughts 'ab</x>c' (from token 0) and
    'd' (from token 3). A thought that reaches `cfg.max_tokens` tokens is cut there. Tokens without
    text at the end (a sampled end of sequence) belong to the last thought.
    """
    pieces = tokenizer.pieces(token_ids)
    text = "".join(pieces)
    delimiter_ends = [match.end() for match in re.finditer(re.escape(cfg.delimiter), text)]
    thoughts: list[Thought] = []
    start = num_closed = 0
    for index, char_end in enumerate(accumulate(len(piece) for piece in pieces)):
        if char_end == len(text):
            break  # no text is left to begin another thought with
        was_closed, num_closed = num_closed, bisect_right(delimiter_ends, char_end)
        is_closed = num_closed > was_closed
        if is_closed or index + 1 - start == cfg.max_tokens:
            thought = "".join(pieces[start : index + 1])
            thoughts.append(Thought(text=thought, start=start, was_cut=not is_closed))
            start = index + 1
    if pieces:
        thoughts.append(Thought(text="".join(pieces[start:]), start=start))
    return tuple(thoughts)


def body(thought: Thought, delimiter: str) -> str:
    """A thought's text without its delimiter and the space around it.

    >>> body(Thought(text="so x = 2</thought>\\n", start=0), "</thought>")
    'so x = 2'
    """
    return thought.text.strip().removesuffix(delimiter.strip()).strip()
