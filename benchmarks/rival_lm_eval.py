"""lm-eval driving a Hugging Face model of the common workload's active size, for `eval_speed.py`.

    pip install torch transformers 'lm-eval[hf]==0.4.13'      # in an environment of its own

Qwen3-MoE with every second layer sparse; its experts have three matrices, so they are 688 wide
where glam's two are 1,024. Random weights and a tokenizer of whole words: nothing is downloaded.
Started by `eval_speed.py`, which writes one workload per line to stdin and reads one line back.
"""

import json
import logging
import os
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM


def build(setting: dict) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=setting["vocab_size"],
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        num_experts=setting["num_experts"],
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=setting["window"],
        eos_token_id=0,
        pad_token_id=0,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config).to(torch.float32).eval()


def words(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word, by the same numbers as in `eval_speed.py`."""
    known = {"<eos>": 0} | {f"w{number}": number for number in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>"
    )


def task(work: dict) -> dict:
    """The workload as a task of lm-eval."""
    config = {
        "task": work["name"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": work["path"]}},
        "validation_split": "validation",
        "doc_to_text": "{{context}}",
        "doc_to_target": "label",
    }
    if work["new_tokens"]:
        until = {"until": ["<never>"], "max_gen_toks": work["new_tokens"], "do_sample": False}
        metrics = [{"metric": "exact_match"}]
        return config | {
            "output_type": "generate_until",
            "generation_kwargs": until,
            "metric_list": metrics,
        }
    return config | {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "metric_list": [{"metric": "acc"}],
    }


def main() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever the libraries print
    setting = json.loads(sys.stdin.readline())
    torch.set_num_threads(setting["threads"])
    model, tokenizer = build(setting), words(setting["vocab_size"])
    lms = {
        size: HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=size,
            max_length=setting["window"],
            device="cpu",
        )
        for size in setting["batch_sizes"]
    }
    manager = TaskManager(include_defaults=False)
    versions = (lm_eval.__version__, torch.__version__, transformers.__version__)
    told = {"versions": dict(zip(("lm-eval", "torch", "transformers"), versions, strict=True))}
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        start, cpu = time.perf_counter(), time.process_time()
        lm_eval.simple_evaluate(
            model=lms[work["batch_size"]],
            tasks=[task(work)],
            num_fewshot=0,
            bootstrap_iters=0,
            task_manager=manager,
        )
        took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(took), file=answers, flush=True)


main()
