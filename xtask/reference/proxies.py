"""What a GPU would run, as far as it shows without one: the graphs that graft and mlx-lm evaluate, counted by one function.

The example `proxies` of crates/train writes narrow models and the graphs of graft's evaluations in the GPU form; mlx-lm decodes and
trains on the same models here, every evaluation seen before it begins. Both sides' graphs are MLX's export to Graphviz's DOT, before
`mx.compile` (which on a CPU fuses what on a GPU is one primitive). See docs/proxies.md.
"""

import json
import re
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

# As in the example.
PROMPT, TOKENS, STEPS, LAYERS = [40, 41, 42, 43, 44], 6, 3, 16


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


def adapted(model, kind, layers):
    """Adapters on all linears of the last blocks."""
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": 8, "scale": 20.0, "dropout": 0.0}, use_dora=kind == "dora")


def decode(model, folder, prompt, tokens):
    """The evaluations of a greedy answer of mlx-lm's."""
    with Recorded(folder) as recorded:
        for _ in generate_step(mx.array(prompt), model, max_tokens=tokens):
            pass
    return recorded.evaluations


def train(model, folder, rows, kind, layers, steps):
    """The evaluations of mlx-lm's training."""
    adapted(model, kind, layers)
    args = trainer.TrainingArgs(batch_size=len(rows), iters=steps, val_batches=0, steps_per_report=100, steps_per_save=1000,
                                max_seq_length=256, adapter_file=folder / "adapters.safetensors")
    with Recorded(folder) as recorded:
        trainer.train(model, optim.Adam(learning_rate=1e-5), Fixed(rows), None, args)
    return recorded.evaluations


def traced(function, *args):
    """How many primitives of each name have outputs of each type, in mlx-lm's graph."""
    found = Counter()

    def see(part):
        if part["type"] == "primitive":
            found[part["name"], tuple(str(output[2]).split(".")[-1] for output in part["outputs"])] += 1

    mx.export_function(see, function, *args)
    return found


def printed(text):
    """The same of a graph as MLX prints it: `Name A [(2,3), float32], ... -> B [(2,3), float32]`."""
    found = Counter()
    for line in text.splitlines():
        inputs, arrow, outputs = line.rpartition("->")
        if arrow:
            found[inputs.split()[0], tuple(re.findall(r"\), (\w+)\]", outputs))] += 1
    return found


def check_types(report, case, name, theirs, names):
    """Equal types of the primitives that multiply, normalise, rotate and store."""
    ours = printed((case / f"{name}-2.txt").read_text())
    kept = [{k: n for k, n in side.items() if k[0] in names} for side in (ours, theirs)]
    shown = ", ".join(f"{n} {k[0]} {'/'.join(k[1])}" for k, n in sorted(kept[0].items()))
    report(f"types, {case.name} {name}", shown, "mlx-lm's", kept[0] == kept[1] and kept[0])


def check(report, root):
    """Primitives, evaluations, types and the host's time, for decoding and training."""
    rows = json.loads((root / "rows.json").read_text())
    # mlx-lm's own compiled functions too: what is counted is the graph that was asked for.
    mx.disable_compile()
    for case in sorted(p for p in root.iterdir() if p.is_dir()):
        building = json.loads((case / "building.json").read_text())
        for name, unit, wanted in (("decode", "token", TOKENS), ("lora", "step", STEPS), ("dora", "step", STEPS)):
            model, _ = utils.load_model(case / "model")
            if name == "decode":
                theirs = decode(model, case, PROMPT, TOKENS)
            else:
                theirs = train(model, case, rows, name, LAYERS, STEPS)
            ours = [primitives((case / f"{name}-{i}.dot").read_text()).total() for i in range(len(building[name]))]
            # The first ones load, allocate and read the prompt.
            (mine, other), times = (ours[2], theirs[2][0].total()), (building[name][2:], [b * 1e6 for _, b in theirs[2:]])
            report(f"primitives a {unit}, {case.name} {name}", f"{mine}, mlx-lm {other}, ratio {mine / other:.3f}", 1.05, mine <= 1.05 * other)
            report(f"evaluations, {case.name} {name}", f"{len(ours)} for {wanted} {unit}s", wanted, len(ours) == wanted)
            mine, other = (sorted(t)[len(t) // 2] / 1e3 for t in times)
            report(f"host builds a {unit}, {case.name} {name}", f"{mine:.1f} ms, mlx-lm {other:.1f} ms", "reported", True)
        model, _ = utils.load_model(case / "model")
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([PROMPT]), cache=cache))
        theirs = traced(lambda y: mx.argmax(model(y[None], cache=cache)[:, -1, :], axis=-1), mx.array([3]))
        check_types(report, case, "decode", theirs, {"QuantizedMatmul", "Matmul", "Softmax", "Cos", "Sin", "SliceUpdate"})
        adapted(model, "lora", LAYERS)
        gradient = nn.value_and_grad(model, trainer.default_loss)
        batch = next(trainer.iterate_batches(Fixed(rows), len(rows), 256))
        theirs = traced(lambda *batch: [a for _, a in tree_flatten(gradient(model, *batch))], *batch)
        # Not the loss's own: it is f32 here, in the model's type there.
        check_types(report, case, "lora", theirs, {"QuantizedMatmul", "Matmul"})
