"""The decoder again: NumPy, float64, plain loops over rows, tokens, heads and experts."""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x) + epsilon) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bucket(distance, num_buckets=32, max_distance=128):
    exact = num_buckets // 2
    if distance < exact:
        return distance
    wide = math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return min(exact + int(wide), num_buckets - 1)


def attention(x_SM, segments, p, model):
    """One row: for every query and head, a softmax over the keys it may see."""
    S = len(x_SM)
    out_SM = np.zeros_like(x_SM)
    for n in range(model.num_heads):
        query, key, value = (x_SM @ p[name][:, n] for name in ("query", "key", "value"))
        if model.attention_scale == "sqrt":
            query = query / math.sqrt(model.head_dim)
        for s in range(S):
            seen = [t for t in range(s + 1) if segments[t] == segments[s]]
            logits = [query[s] @ key[t] + p["bias"]["table"][n, bucket(s - t)] for t in seen]
            weights = np.exp(np.array(logits))
            total = weights.sum() + (1.0 if model.zero_logit else 0.0)
            mixed = sum(w * value[t] for w, t in zip(weights / total, seen, strict=True))
            out_SM[s] += mixed @ p["out"][n]
    return out_SM


def dense_ffn(x_M, p):
    return (gelu(x_M @ p["gate"]) * (x_M @ p["w_in"])) @ p["w_out"]


def experts(x_M, p, num_choices):
    """The best experts by gate, weighted by gates that sum to one; nothing is dropped."""
    logits = x_M @ p["router"]
    gates = np.exp(logits - logits.max())
    gates /= gates.sum()
    chosen = np.argsort(-gates)[:num_choices]
    scale = gates[chosen].sum() if num_choices > 1 else 1.0
    return sum(
        gates[e] / scale * (p["w_out"][e] @ np.maximum(x_M @ p["w_in"][e], 0)) for e in chosen
    )


def layer(x_SM, segments, p, model, moe):
    eps = model.norm_epsilon
    normed = np.stack([rms_norm(x, p["attention_norm"]["scale"], eps) for x in x_SM])
    x_SM = x_SM + attention(normed, segments, p["attention"], model)
    out_SM = []
    for x in x_SM:
        normed = rms_norm(x, p["ffn_norm"]["scale"], eps)
        if moe is None:
            out_SM.append(x + dense_ffn(normed, p["ffn"]))
        else:
            out_SM.append(x + experts(normed, p["ffn"], moe.experts_per_token))
    return np.stack(out_SM)


def hidden(params, tokens, segments, model, moe):
    """Hidden states of one row, after the final norm and the output scale."""
    x_SM = params["embedding"]["table"][tokens]
    for i in range(model.num_layers // (1 if moe is None else 2)):
        block = slice_of(params["blocks"], i)
        if moe is not None:
            x_SM = layer(x_SM, segments, block["expert_layer"], model, moe)
        x_SM = layer(x_SM, segments, block["dense_layer"], model, None)
    scale = params["final_norm"]["scale"]
    normed = np.stack([rms_norm(x, scale, model.norm_epsilon) for x in x_SM])
    return normed / math.sqrt(model.model_dim)


def slice_of(tree, index):
    if isinstance(tree, dict):
        return {name: slice_of(leaf, index) for name, leaf in tree.items()}
    return tree[index]


def float64(tree):
    if isinstance(tree, dict):
        return {name: float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)
