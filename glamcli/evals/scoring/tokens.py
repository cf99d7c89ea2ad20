"""From texts to the tokens that are scored: the rule at the border of context and continuation.

Trailing blanks of the context move to the continuation (they would otherwise be a
token the model never saw before a word); context and continuation are encoded together, and the
scored tokens are those after the encoding of the context alone. Where a piece spans the border
(the context's encoding is no prefix of the joint one), scoring starts at the first token in which
the two differ, so that no character of the continuation is left unscored. BOS is always first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Encoder(Protocol):
    """The part of a tokenizer that scoring needs."""

    bos_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Scorable:
    """A tokenised request: BOS, context, continuation."""

    ids: tuple[int, ...]
    num_scored: int
    """tokens at the end whose likelihood is asked for."""
    num_cut: int = 0
    """context tokens that did not fit into the window; the earliest are cut."""

    @property
    def num_inputs(self) -> int:
        return len(self.ids) - 1


def split_tokens(encoder: Encoder, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Context ids (without BOS) and the ids to score, by the rule at the top of this file."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        continuation = context[-blanks:] + continuation
        context = context[:-blanks]
    joint = encoder.encode(context + continuation)
    alone = encoder.encode(context) if context else []
    split = 0
    while split < min(len(alone), len(joint) - 1) and alone[split] == joint[split]:
        split += 1
    return joint[:split], joint[split:]


def scorable(
    encoder: Encoder, pairs: Sequence[tuple[str, str]], window: int
) -> list[Scorable] | None:
    """Tokenised requests of one item, all cut alike; None when a continuation exceeds the window.

    `window` counts input tokens, BOS included. The context keeps its end, as much of it as fits
    before the longest continuation of the item.
    """
    parts = [split_tokens(encoder, *pair) for pair in pairs]
    longest = max(len(scored) for _, scored in parts)
    room = window - longest  # BOS and all but the last scored token are inputs too
    if room < 0:
        return None
    made = []
    for context, scored in parts:
        cut = max(0, len(context) - room)
        made.append(Scorable((encoder.bos_id, *context[cut:], *scored), len(scored), cut))
    return made
