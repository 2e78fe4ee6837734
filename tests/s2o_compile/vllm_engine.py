"""Runs engines of vLLM in a process of their own: ``python -m tests.s2o_compile.vllm_engine CASES.json RESULTS.json``.

A case has the arguments of ``vllm.LLM``, prompts in rounds, and how many tokens to generate for each.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import s2o_compile

COMMON: dict[str, Any] = {
    "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "block_size": 32,
    "max_num_batched_tokens": 256, "max_num_seqs": 8, "disable_log_stats": False,
}  # fmt: skip


def begin(worker: Any) -> None:
    """Start to count sparse calls, in a process of the engine."""
    worker.s2o_block = s2o_compile.profile(error_rows=0)
    worker.s2o_profile = worker.s2o_block.__enter__()


def end(worker: Any) -> int:
    """Stop, and say how many there were."""
    worker.s2o_block.__exit__(None, None, None)
    return sum(site.calls for site in worker.s2o_profile.sites)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What an engine answers to the prompts of a case, or the error that it refuses to start with."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(case["model"], **COMMON | case["options"])
    except Exception as error:
        return {"error": f"{error}"}
    greedy = SamplingParams(temperature=0, max_tokens=case["new"], detokenize=False, ignore_eos=True, logprobs=0)
    llm.collective_rpc(begin)
    outputs = []
    for prompts in case["rounds"]:
        outputs += llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "first": [next(iter(output.outputs[0].logprobs[0].values())).logprob for output in outputs],
        "logprob": [output.outputs[0].cumulative_logprob for output in outputs],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
        "preemptions": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
        "sparse": llm.collective_rpc(end),
    }
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main(cases: Path, results: Path) -> None:
    """Run the cases of a file, one after the other, and write their results by name."""
    named = json.loads(cases.read_text())
    results.write_text(json.dumps({name: run(case) for name, case in named.items()}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
