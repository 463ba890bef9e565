"""eval.py beside lm-evaluation-harness 0.4.13: the same items, the same weights, the same machine, in turns.

    python tests/tools/bench_eval.py [--n_layer=12 --n_embd=768 --items=20]

needs ../shared/data beside the checkout or the test sets in data/raw/eval, GPT-2's vocabulary, and
tests/requirements.txt. Weights are random: the time does not depend on them. Counted is the processor
time from texts to log-likelihoods, tokenizing included, loading excluded; fp32, batches of 8, one thread.
"""
import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]
import eval as e                                                                # noqa: E402
import model as m                                                               # noqa: E402
import test_harness as t                                                        # noqa: E402
from prepare import get_tokenizer, test_items                                   # noqa: E402


def timed(lm, name, total):
    """lm.name, adding the processor time it takes to total[0]."""
    call = getattr(lm, name)

    def timed_call(*args, **options):
        began = time.process_time()
        result = call(*args, **options)
        total[0] += time.process_time() - began
        return result
    setattr(lm, name, timed_call)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8, help="of the harness, whose default is 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = m.GPT(m.GPTConfig(n_layer=args.n_layer, n_head=args.n_embd // 64, n_embd=args.n_embd)).eval()
    tokenizer = get_tokenizer("gpt2")
    print(f"{model.num_params() / 1e6:.1f}M parameters\n\n"
          "| task | items | harness, s | eval.py, s | ratio | largest difference |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        m.export(model, folder, tokenizer)
        lm, theirs = t.hflm(folder, 1024, logits_cache=True, batch_size=args.batch_size), [0.0]
        timed(lm, "loglikelihood", theirs)
        timed(lm, "loglikelihood_rolling", theirs)
        together = [0.0, 0.0]
        for task in t.THEIRS:
            items = test_items(task, t.DATA if t.DATA.is_dir() else None)
            items = list(islice(items, 1 if task == "wikitext2" else args.items))
            theirs[0] = 0.0
            _, samples = t.harness(lm, {task: items}, Path(folder))[task]
            began = time.process_time()
            function, kind = e.TASKS[task]
            columns = e.run_task(kind, [function(item) for item in items], model, tokenizer, 1024, 8)
            ours = time.process_time() - began
            together = [together[0] + theirs[0], together[1] + ours]
            if kind == "choice":
                gap = f"{sum(s['acc'] != x for s, x in zip(samples, columns['correct']))} decisions"
            else:
                found = [np.ravel(s["filtered_resps"][0])[0] for s in samples]      # (log-likelihood, greedy), or one
                gap = f"{np.abs(found + columns['nats']).max():.1e} nats"
            print(f"| {task} | {len(items)} | {theirs[0]:.1f} | {ours:.1f} | {theirs[0] / ours:.1f} | {gap} |",
                  flush=True)
        print(f"| together | | {together[0]:.1f} | {together[1]:.1f} | {together[0] / together[1]:.1f} | |")


if __name__ == "__main__":
    main()
