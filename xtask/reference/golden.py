"""Golden values of tiny models, computed by mlx-lm.

usage: golden.py CASES LOGITS_JSON LOSSES_JSON

CASES holds what `cargo run -p graft-testkit --example tiny CASES` wrote. LOGITS_JSON gets the logits of the last of
some tokens; LOSSES_JSON the losses of some Adam steps that begin at the case's adapter.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
IDS = [(i * 37 + 11 + i * i * 7) % 250 for i in range(24)]
ROWS = [[(i * 13 + 5 * row + i * i) % 250 for i in range(17)] for row in range(2)]
STEPS, LEARNING_RATE = 4, 1e-3


def numbers(array):
    return [float(f"{x:.7g}") for x in array.tolist()]


def losses(model):
    model.train()
    optimizer = optim.Adam(learning_rate=LEARNING_RATE)
    value_and_grad = nn.value_and_grad(model, default_loss)
    batch = mx.array(ROWS)
    lengths = mx.array([[0, len(row)] for row in ROWS])
    values = []
    for _ in range(STEPS):
        (value, _), gradient = value_and_grad(model, batch, lengths)
        optimizer.update(model, gradient)
        mx.eval(model.state, optimizer.state, value)
        values.append(value)
    return numbers(mx.stack(values))


def main(cases, logits_file, losses_file):
    made_by = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}"
    logit_cases, loss_cases = [], []
    for case in sorted(Path(cases).iterdir()):
        facts = json.loads((case / "case.json").read_text())
        model, _ = load_model(case / "model")
        if facts["adapter"] != "none":
            model.freeze()
            load_adapters(model, str(case / "adapter"))
        last = model(mx.array([IDS]))[0, -1, :48]
        logit_cases.append({**facts, "ids": IDS, "last": numbers(last)})
        if facts["adapter"] != "none":
            loss_cases.append({**facts, "rows": ROWS, "learning_rate": LEARNING_RATE, "losses": losses(model)})
    for file, values in ((logits_file, logit_cases), (losses_file, loss_cases)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(value) for value in values)
        Path(file).write_text('{"made_by": "' + made_by + '", "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
