"""What a GPU would run, as far as it shows without one: the graphs that graft and mlx-lm evaluate, counted by one function.

usage: proxies.py DIR

`DIR` is what the example `proxies` of crates/train wrote: models, and the graphs of graft's evaluations. mlx-lm decodes and trains
on the same models here, with every evaluation seen before it begins; both sides' graphs are MLX's own export to Graphviz's DOT.
"""

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.generate import generate_step
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers


def primitives(dot):
    """How many primitives of each name a graph has: MLX draws each as a box."""
    return Counter(re.findall(r'label ="([^"]*)", shape=rectangle', dot))


class Recorded:
    """Sees every evaluation inside `with`: its graph, and the seconds since the one before."""

    def __init__(self, folder):
        self.file, self.evaluations = str(folder / "graph.dot"), []

    def __enter__(self):
        self.saved = mx.eval, mx.async_eval
        mx.eval, mx.async_eval = self.see(mx.eval), self.see(mx.async_eval)
        self.since = time.perf_counter()
        return self

    def __exit__(self, *_):
        mx.eval, mx.async_eval = self.saved

    def see(self, evaluate):
        def seen(*trees):
            building = time.perf_counter() - self.since
            arrays = [a for _, a in tree_flatten(trees) if isinstance(a, mx.array)]
            mx.export_to_dot(self.file, *arrays)
            counted = primitives(Path(self.file).read_text())
            if counted:
                self.evaluations.append((counted, building))
            evaluate(*trees)
            self.since = time.perf_counter()

        return seen


class Fixed:
    """Rows that are tokenized already."""

    def __init__(self, rows):
        self.rows = [(row, 0) for row in rows]

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self):
        return len(self.rows)


def decode(model, folder, prompt, tokens):
    with Recorded(folder) as recorded:
        for _ in generate_step(mx.array(prompt), model, max_tokens=tokens):
            pass
    return recorded.evaluations


def train(model, folder, rows, kind, layers, steps):
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": 8, "scale": 20.0, "dropout": 0.0}, use_dora=kind == "dora")
    args = trainer.TrainingArgs(batch_size=len(rows), iters=steps, val_batches=0, steps_per_report=100, steps_per_save=1000,
                                max_seq_length=256, adapter_file=folder / "adapters.safetensors")
    with Recorded(folder) as recorded:
        trainer.train(model, optim.Adam(learning_rate=1e-5), Fixed(rows), None, args)
    return recorded.evaluations


def main():
    root = Path(sys.argv[1])
    mx.set_default_device(mx.cpu)
    rows = json.loads((root / "rows.json").read_text())
    for case in sorted(p for p in root.iterdir() if p.is_dir()):
        building = json.loads((case / "building.json").read_text())
        for compiled in (False, True):
            (mx.enable_compile if compiled else mx.disable_compile)()
            for name in ("decode", "lora", "dora"):
                model, _ = utils.load_model(case / "model")
                if name == "decode":
                    theirs = decode(model, case, [40, 41, 42, 43, 44], 6)
                else:
                    theirs = train(model, case, rows, name, 16, 3)
                ours = [primitives(f.read_text()) for f in sorted(case.glob(f"{name}-*.dot"))]
                print(case.name, name, "compiled" if compiled else "plain", "ours", [c.total() for c in ours], "theirs", [c.total() for c, _ in theirs],
                      "host ms", [round(b * 1e3, 1) for _, b in theirs], [b / 1e3 for b in building[name]], flush=True)
                if "-v" in sys.argv:
                    o, t = ours[-1], theirs[min(3, len(theirs) - 1)][0]
                    for k in sorted(set(o) | set(t)):
                        if o[k] != t[k]:
                            print("      ", k, o[k], t[k])


if __name__ == "__main__":
    main()
