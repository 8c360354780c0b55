"""What a merge of adapters for two tasks keeps of either: python3 two_tasks.py GRAFT MODEL FOLDER

Writes the data of data/two-tasks, trains an adapter on each task (unless FOLDER has it from an earlier run), merges them by every method with several weights,
takes the merge that keeps most of the worse task on validation rows, and scores it beside its parents on the test rows, which had no say.
The score is the share of exact answers. Ends with an error if less than 90 % of a parent's is kept.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

TASKS = ("diary", "basket")
WEIGHTS = [(1.0, 1.0), (1.0, 0.8), (0.8, 1.0), (0.8, 0.8), (0.6, 0.6)]
METHODS = {"linear": [], "slerp": [], **{m: ["--density", "0.5"] for m in ("magnitude_prune", "ties", "dare_linear", "dare_ties")}}
TRAIN = "--iters 200 --batch-size 4 --learning-rate 1e-4 --num-layers -1 --mask-prompt --seed 1".split()


def main(graft, model, folder):
    def run(*args):
        subprocess.run([graft, *map(str, args)], check=True, stdout=subprocess.DEVNULL)

    def score(split, adapters):
        """Exact answers of each adapter to the rows of each task."""
        right = {}
        for task in TASKS:
            data, to = folder / split / task, folder / f"{split}-{task}.json"
            data.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "tasks" / task / f"{split}.jsonl", data / "test.jsonl")
            flags = [flag for a in adapters for flag in ("--adapter-path", a)]
            run("eval", "--model", model, *flags, "--data", data, "--show", 0, "--max-tokens", 40, "--output", to)
            for name, at in zip(["base", *adapters], json.loads(to.read_text())["models"], strict=True):
                right.setdefault(name, []).append(at["right"])
        return right

    subprocess.run([sys.executable, Path(__file__).parents[2] / "data/two-tasks/make.py", folder / "tasks"], check=True)
    parents = [folder / task for task in TASKS]
    for task, parent in zip(TASKS, parents, strict=True):
        if not parent.exists():
            part = parent.with_suffix(".part")
            run("lora", "--train", "--model", model, "--data", folder / "tasks" / task, "--adapter-path", part, *TRAIN)
            part.rename(parent)
    merges = []
    for method, flags in METHODS.items():
        # An arc knows the ratio of weights alone.
        for a, b in WEIGHTS[:3] if method == "slerp" else WEIGHTS:
            to = folder / f"{method}-{a}-{b}"
            shutil.rmtree(to, ignore_errors=True)
            run("merge", "--method", method, *flags, "--model", model, "--adapter", f"{parents[0]}={a}", "--adapter", f"{parents[1]}={b}", "--save-path", to)
            merges.append(to)

    def kept(right, merge):
        return [right[merge][i] / right[parents[i]][i] for i in range(2)]

    valid = score("valid", [*parents, *merges])
    if not all(valid[parent][i] for i, parent in enumerate(parents)):
        sys.exit(f"an adapter answers nothing of its own task: {[valid[parent] for parent in parents]} of both")
    for name, right in valid.items():
        print(f"{Path(name).name:28} {right[0]:4} {right[1]:4}")
    best = max(merges, key=lambda merge: (min(kept(valid, merge)), sum(kept(valid, merge))))
    test = score("test", [*parents, best])
    shares = kept(test, best)
    print(f"test rows: parents {test[parents[0]][0]} and {test[parents[1]][1]}, {best.name} {test[best]}: {shares[0]:.1%} and {shares[1]:.1%} kept")
    if min(shares) < 0.9:
        sys.exit("less than 90 % of a parent's score is kept")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
