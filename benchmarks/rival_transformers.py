"""Times the common workload in Hugging Face transformers (PyTorch), the fastest rival measured.

    pip install torch transformers      # in an environment of its own
    python benchmarks/rival_transformers.py --experts 8 64

Qwen3-MoE with every second layer sparse is the nearest architecture it ships: gated experts
(three matrices), rotary positions, dropless grouped matrix products. Prints one row per setting;
`train_step.py --rival transformers=PYTHON` times it in turns with glam, which is the comparison to
trust.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Adafactor, Qwen3MoeConfig, Qwen3MoeForCausalLM
from turns import peak_bytes, take_turns

SHAPES = {
    "common": {"M": 256, "H": 1024, "layers": 4, "N": 8, "D": 32, "vocab": 8192},
    "0.1b": {"M": 768, "H": 3072, "layers": 12, "N": 12, "D": 64, "vocab": 256_000},
}
"""The workload of `train_step.py`, and GLaM 0.1B."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(num_experts: int, dtype: torch.dtype, options: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    config = Qwen3MoeConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["M"],
        intermediate_size=shape["H"],
        moe_intermediate_size=shape["H"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["N"],
        num_key_value_heads=shape["N"],
        head_dim=shape["D"],
        num_experts=num_experts,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        output_router_logits=True,
        tie_word_embeddings=True,
        max_position_embeddings=options.row_tokens,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config).to(dtype).to(DEVICE)


def make_step(
    num_experts: int, dtype: torch.dtype, optimizer_name: str, options: argparse.Namespace
) -> Callable[[], float]:
    model = build(num_experts, dtype, options)
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=True),
    }
    optimizer = kinds[optimizer_name](model.parameters())
    vocab = SHAPES[options.shape]["vocab"]
    tokens = torch.randint(0, vocab, (options.rows, options.row_tokens), device=DEVICE)

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "adafactor"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--shape", choices=list(SHAPES), default="common")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for num_experts, dtype, optimizer in itertools.product(
        options.experts, options.dtypes, options.optimizers
    ):
        step = make_step(num_experts, getattr(torch, dtype), optimizer, options)
        first = step()
        if options.turns:
            # The workload's own useful work: the third matrix of these experts is their choice.
            summary = {"useful_flops": 90.2e9, "compile_seconds": first}
            take_turns(step, options.steps, lambda summary=summary: summary)
            continue
        seconds = [step() for _ in range(options.steps + 1)][1:]
        print(
            f"transformers E={num_experts:<4d} {dtype:9s} {optimizer:10s} "
            f"{statistics.median(seconds):7.3f} s/step  first {first:5.1f} s  "
            f"peak {peak_bytes() / 2**30:4.1f} GB",
            flush=True,
        )


main()
