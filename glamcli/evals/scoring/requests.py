"""Requests to a model (BOS, context, continuation), from texts, and what comes of them.

Trailing blanks of the context move to the continuation (they would otherwise be a token the model
never saw before a word); context and continuation are encoded together, and the scored tokens are
those after the encoding of the context alone. Where a piece spans the border (the context's
encoding is not a prefix of the joint one), scoring starts at the first token in which the two
differ, so that no character of the continuation is left unscored. BOS is always first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from glamcli.data.tokenizer import Tokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Tokens, and how many of them at the end are scored; the first one is never scored."""

    ids: Ids
    num_scored: int
    num_cut: int = 0
    """context tokens that did not fit into the window; the earliest are cut."""

    @property
    def num_inputs(self) -> int:
        return len(self.ids) - 1


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of one request."""

    token_nats: tuple[float, ...]
    """log-probability of each scored token, in nats."""
    greedy: bool
    """whether greedy decoding would have produced exactly these tokens."""

    @property
    def total(self) -> float:
        return float(sum(self.token_nats))


def make_requests(
    encoder: Tokenizer, pairs: Sequence[tuple[str, str]], window: int
) -> list[Request] | None:
    """Requests for the (context, continuation) pairs of one item, all cut alike.

    `window` counts input tokens, BOS included. The context keeps its end, as much of it as fits
    before the longest continuation of the item. None when a continuation exceeds the window.
    """
    parts = [_split(encoder, *pair) for pair in pairs]
    longest = max(len(scored) for _, scored in parts)
    room = window - longest  # BOS and all but the last scored token are inputs too
    if room < 0:
        return None
    made = []
    for context, scored in parts:
        cut = max(0, len(context) - room)
        made.append(Request((encoder.bos_id, *context[cut:], *scored), len(scored), cut))
    return made


def _split(encoder: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
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
