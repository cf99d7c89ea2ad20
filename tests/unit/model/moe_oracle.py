"""A mixture-of-experts layer as loops over tokens in float64: what the layer must agree with.

Written from the papers (GShard algorithm 1, Switch section 2.1), not from the implementation;
the gradients are derived by hand. One call handles one group.
"""

import math
from dataclasses import dataclass

import numpy as np


def relu(a):
    return np.maximum(a, 0.0)


def gelu(a):
    return 0.5 * a * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3)))


ACTIVATIONS = {"relu": relu, "gelu": gelu}


def slope(act, a):
    """Central difference: exact to 1e-9 in float64; relu's kink is not met by random numbers."""
    return (act(a + 1e-6) - act(a - 1e-6)) / 2e-6


@dataclass
class Choice:
    expert: int
    prob: float
    wanted: bool
    kept: bool = False
    slot: int = -1
    weight: float = 0.0


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def choose(
    probs_SE,
    real_S,
    *,
    top,
    slots,
    normalize="before_capacity",
    threshold=None,
    gate="normalized",
    draw_S=None,
    noise_SE=None,
):
    """[S][K] choices. draw_S are the draws of `random`, noise_SE the Gumbel noise of `sampling`."""
    tokens = []
    for s, probs in enumerate(probs_SE):
        first = max(range(len(probs)), key=lambda e: (probs[e], -e))
        choices = [Choice(first, probs[first], bool(real_S[s]))]
        if top == 2:
            score = probs if noise_SE is None else np.log(probs) + noise_SE[s]
            others = [e for e in range(len(probs)) if e != first]
            second = max(others, key=lambda e: (score[e], -e))
            share = probs[second] / (probs[first] + probs[second] + 1e-9)
            compared = share if gate == "normalized" else probs[second]
            lucky = draw_S is None or draw_S[s] < min(1.0, compared / threshold)
            wanted = bool(real_S[s]) and lucky and probs[second] > 0
            choices.append(Choice(second, probs[second], wanted))
        tokens.append(choices)

    num_kept = [0] * probs_SE.shape[1]
    for k in range(top):
        for choices in tokens:
            choice = choices[k]
            if choice.wanted and (slots is None or num_kept[choice.expert] < slots):
                choice.kept, choice.slot = True, num_kept[choice.expert]
                num_kept[choice.expert] += 1

    for choices in tokens:
        total = scale(choices, normalize)
        for choice in choices:
            choice.weight = choice.prob / total if choice.kept else 0.0
    return tokens


def scale(choices, normalize):
    """What a token's probabilities are divided by."""
    if len(choices) == 1:
        return 1.0
    if normalize == "before_capacity":
        return sum(c.prob for c in choices) + 1e-9
    return sum(c.prob for c in choices if c.kept)


def balance(probs_SE, tokens, real_S, padding):
    S, E = probs_SE.shape
    count = S if padding == "legacy" else S * (real_S.mean() + 1e-6)
    total = 0.0
    for e in range(E):
        f = sum(bool(real_S[s]) and tokens[s][0].expert == e for s in range(S)) / count
        total += f * sum(probs_SE[s, e] for s in range(S) if real_S[s]) / count
    return E * total


def forward(x_SM, router_ME, w_in_EMH, w_out_EMH, real_S, activation="relu", **rules):
    """Outputs [S, M], the choices and the probabilities."""
    act = ACTIVATIONS[activation]
    probs_SE = np.stack([softmax(x @ router_ME) for x in x_SM])
    tokens = choose(probs_SE, real_S, **rules)
    y_SM = np.zeros_like(x_SM)
    for s, choices in enumerate(tokens):
        for c in choices:
            if c.kept:
                y_SM[s] += c.weight * (w_out_EMH[c.expert] @ act(x_SM[s] @ w_in_EMH[c.expert]))
    return y_SM, tokens, probs_SE


def gradients(dy_SM, x_SM, router_ME, w_in_EMH, w_out_EMH, real_S, activation="relu", **rules):
    """Gradients of sum(y * dy) for x, router, w_in and w_out; choices and drops are constants."""
    act = ACTIVATIONS[activation]
    normalize = rules.get("normalize", "before_capacity")
    _, tokens, probs_SE = forward(x_SM, router_ME, w_in_EMH, w_out_EMH, real_S, activation, **rules)
    dx_SM, drouter_ME = np.zeros_like(x_SM), np.zeros_like(router_ME)
    dw_in_EMH, dw_out_EMH = np.zeros_like(w_in_EMH), np.zeros_like(w_out_EMH)
    for s, choices in enumerate(tokens):
        x, dprobs = x_SM[s], np.zeros(probs_SE.shape[1])
        total = scale(choices, normalize)
        for c in choices:
            if not c.kept:
                continue
            a = x @ w_in_EMH[c.expert]
            dout = c.weight * dy_SM[s]
            da = (dout @ w_out_EMH[c.expert]) * slope(act, a)
            dw_out_EMH[c.expert] += np.outer(dout, act(a))
            dw_in_EMH[c.expert] += np.outer(x, da)
            dx_SM[s] += w_in_EMH[c.expert] @ da
            dweight = dy_SM[s] @ (w_out_EMH[c.expert] @ act(a))
            dprobs[c.expert] += dweight / total
            if len(choices) == 2:
                for other in choices:
                    if other.kept or normalize == "before_capacity":
                        dprobs[other.expert] -= dweight * c.prob / total**2
        dlogits = probs_SE[s] * (dprobs - dprobs @ probs_SE[s])
        dx_SM[s] += router_ME @ dlogits
        drouter_ME += np.outer(x, dlogits)
    return dx_SM, drouter_ME, dw_in_EMH, dw_out_EMH
