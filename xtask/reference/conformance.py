"""Compares graft with mlx-lm on a real model: flags, converted words, logits, greedy text, losses, files both ways; and with llama.cpp,
which must run what graft exports.

usage: conformance.py --graft BIN --logits BIN --proxies BIN --tiny BIN --model DIR --work DIR [--llama DIR] [--only NAME ...]

`--graft` is the graft binary, `--logits`, `--proxies` and `--tiny` the examples of those names in crates/model, crates/train and crates/testkit, `--model`
a packed base (the demo's), `--work` a scratch folder, `--llama` where llama-server is; what begins with `gguf` needs it, and `gguf` is all of that. Needs mlx-lm at the pinned version. Each check prints one line with what was measured and its limit; the exit status is
1 when one of them fails. Everything runs on the CPU in float32, where both sides compute the same sums.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import proxies
from mlx_lm import load, stream_generate
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
from mlx_lm.tuner.utils import linear_to_lora_layers

COMMANDS = ["lora", "fuse", "generate", "chat", "server", "convert", "perplexity"]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees",
    "1, 2, 3, 5, 8,",
]
ROWS = [
    "The harbour lamp is green when the tide is rising and red when it is falling, and the keeper writes it down.",
    "Seven grey geese flew over the mill at noon, and the miller counted them twice before he went back to work.",
    "A copper kettle hangs above the hearth; its lid is dented, and nobody remembers who dropped it or when.",
    "When the bridge was closed the children crossed the river on the old ferry, which left every half an hour.",
]

results = []


def report(name, measured, limit, ok):
    """One line per check."""
    results.append(bool(ok))
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {measured} (limit {limit})", flush=True)


def run(*command, check=True):
    """Runs a command; a failure shows what it printed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def fresh(path):
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


class Captured(Exception):
    """Carries a parser out of a main function."""


def parser_of(command):
    """The argparse parser of an mlx_lm command, taken when its main function would parse."""
    module = importlib.import_module(f"mlx_lm.{command}")
    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, *a, **k: (_ for _ in ()).throw(Captured(self))
    try:
        module.main()
    except Captured as captured:
        return captured.args[0]
    finally:
        argparse.ArgumentParser.parse_args = original
    raise RuntimeError(f"mlx_lm.{command} parsed nothing")


def check_flags(a):
    """Every flag of every mlx_lm command is either taken or refused by its name."""
    for command in COMMANDS:
        unknown, total = [], 0
        for action in parser_of(command)._actions:
            for option in action.option_strings:
                if option in ("-h", "--help"):
                    continue
                total += 1
                value = [] if action.nargs == 0 else [str((action.choices or ["1"])[0])]
                done = run(a.graft, command, option, *value, check=False)
                if "unexpected argument" in done.stderr or "panicked" in done.stderr:
                    unknown.append(option)
        report(f"flags of {command}", f"{total - len(unknown)}/{total} known {unknown or ''}", "all", not unknown)


def check_convert(a):
    """The packed words are mlx_lm convert's, for every width and recipe."""
    cases = [["--q-bits", b, "--q-group-size", "64"] for b in ("2", "3", "4", "5", "6", "8")]
    cases += [["--quant-predicate", r] for r in ("mixed_2_6", "mixed_3_4")]
    cases += [["--q-mode", m] for m in ("mxfp4", "nvfp4", "mxfp8")]
    for case in cases:
        name = case[1]
        ours, theirs = fresh(a.work / f"ours-{name}"), fresh(a.work / f"theirs-{name}")
        run(a.graft, "convert", "--hf-path", a.dense, "--mlx-path", ours, "-q", *case)
        run(sys.executable, "-m", "mlx_lm", "convert", "--hf-path", a.dense, "--mlx-path", theirs, "-q", *case)
        left, right = mx.load(str(ours / "model.safetensors")), mx.load(str(theirs / "model.safetensors"))
        same = sorted(left) == sorted(right) and all(
            left[k].dtype == right[k].dtype and mx.array_equal(left[k], right[k]).item() for k in left
        )
        block = [quantization(d) for d in (ours, theirs)]
        report(f"convert {name}", f"{len(left)} tensors equal: {same}, blocks equal: {block[0] == block[1]}", "all", same and block[0] == block[1])
        shutil.rmtree(theirs)


def quantization(directory):
    """The quantization block. A recipe leaves the group size of mlx-lm's overrides null, which means the general one."""
    block = json.loads((directory / "config.json").read_text())["quantization"]
    for value in block.values():
        if isinstance(value, dict) and value.get("group_size", 0) is None:
            value["group_size"] = block["group_size"]
    return block


def logits_of(a, directory, ids, *adapter):
    """Our logits (L, V) of a list of ids."""
    out = a.work / "logits.safetensors"
    run(a.logits, directory, ",".join(map(str, ids)), out, *adapter)
    return mx.load(str(out))["logits"]


def check_logits(a):
    """Logits agree, and the greedy continuation is the same for 64 tokens."""
    model, tokenizer = load(str(a.packed))
    worst = 0.0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        theirs = model(mx.array([ids]))[0].astype(mx.float32)
        worst = max(worst, mx.abs(theirs - logits_of(a, a.packed, ids)).max().item())
    report("logits on 5 prompts, float32", f"max difference {worst:.1e}", "2e-3", worst <= 2e-3)
    same = 0
    # mlx-lm drops the space that a continuation begins with.
    for prompt in PROMPTS:
        theirs = "".join(r.text for r in stream_generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=64))
        ours = run(a.graft, "generate", "--model", a.packed, "-p", prompt, "--ignore-chat-template", "-m", "64", "--verbose", "false").stdout
        same += ours.strip() == theirs.strip()
    report("greedy continuation, 64 tokens", f"{same}/5 equal", "5", same == 5)


def check_modes(a):
    """A base in each mode of floats, written by us, computes the same in both."""
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        base = fresh(a.work / f"mode-{mode}")
        run(a.graft, "convert", "--hf-path", a.dense, "--mlx-path", base, "-q", "--q-mode", mode, "--dtype", "float32")
        model, tokenizer = load(str(base))
        worst = 0.0
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt)
            theirs = model(mx.array([ids]))[0].astype(mx.float32)
            worst = max(worst, mx.abs(theirs - logits_of(a, base, ids)).max().item())
        report(f"logits on 5 prompts, {mode}, float32", f"max difference {worst:.1e}", "2e-3", worst <= 2e-3)
        shutil.rmtree(base)


class Losses(TrainingCallback):
    """Collects the loss of each step."""

    def __init__(self):
        self.values = []

    def on_train_loss_report(self, info):
        self.values.append(info["train_loss"])


def initial_adapter(model, path, kind, layers, parameters):
    """An adapter with a random B, so that every part of the gradient is at work from the first step on."""
    mx.random.seed(7)
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(7)
    weights = {}
    from mlx.utils import tree_flatten

    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            value = mx.array(rng.normal(0, 1e-3, value.shape).astype(np.float32))
        weights[name] = value.astype(mx.float32)
    mx.save_safetensors(str(path), weights)


def rows(a):
    """A directory of data to train on."""
    data = a.work / "rows"
    data.mkdir(exist_ok=True)
    text = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(text)
    return data


def check_training(a):
    """Ten steps on one batch, no padding: the losses and the adapters agree, and the files load both ways."""
    data = rows(a)
    length, layers, parameters = 16, 4, {"rank": 8, "scale": 20.0, "dropout": 0.0}
    cases = [(b, k, o) for b in ("packed", "dense") for k in ("lora", "dora") for o in ("adam", "adamw")]
    for base, kind, optimizer in cases:
        directory = a.packed if base == "packed" else a.dense
        model, tokenizer = load(str(directory))
        model.freeze()
        start = a.work / f"start-{base}-{kind}.safetensors"
        initial_adapter(model, start, kind, layers, parameters)
        model.load_weights(str(start), strict=False)
        encoded = [(tokenizer.encode(r)[:length], 0) for r in ROWS]
        losses, theirs_dir = Losses(), fresh(a.work / f"theirs-{base}-{kind}-{optimizer}")
        theirs_dir.mkdir()
        opt = {"adam": optim.Adam, "adamw": optim.AdamW}[optimizer](learning_rate=1e-4)
        args = TrainingArgs(batch_size=4, iters=10, val_batches=0, steps_per_report=1, steps_per_save=100,
                            max_seq_length=length, adapter_file=theirs_dir / "adapters.safetensors")
        train(model, opt, Fixed(encoded), None, args, training_callback=losses)
        ours_dir = fresh(a.work / f"ours-{base}-{kind}-{optimizer}")
        config = a.work / "config.yaml"
        config.write_text(f"lora_parameters: {json.dumps(parameters)}\n")
        run(a.graft, "lora", "--model", directory, "--train", "--data", data, "--fine-tune-type", kind, "--optimizer", optimizer,
            "--num-layers", layers, "--batch-size", 4, "--iters", 10, "--val-batches", 0, "--steps-per-report", 1,
            "--learning-rate", "1e-4", "--max-seq-length", length, "--resume-adapter-file", start, "--adapter-path", ours_dir,
            "-c", config, "--exact")
        lines = [json.loads(line) for line in (ours_dir / "metrics.jsonl").read_text().splitlines()]
        ours = [line["loss"] for line in lines if line["kind"] == "train"]
        gap = max(abs(x - y) for x, y in zip(ours, losses.values, strict=True))
        report(f"10 losses, {base} {kind} {optimizer}", f"max difference {gap:.1e}, from {ours[0]:.4f} to {ours[-1]:.4f}", "1e-3", gap <= 1e-3 and ours[-1] < ours[0])
        left, right = (mx.load(str(d / "adapters.safetensors")) for d in (ours_dir, theirs_dir))
        moved = mx.load(str(start))
        # Adam moves an element whose gradient is nearly zero by the learning rate either way, so a single tensor says less than
        # all together.
        gaps = {k: (mx.linalg.norm(left[k] - right[k]).item(), mx.linalg.norm(right[k] - moved[k]).item()) for k in right}
        worst = max(gap / max(update, 1e-12) for gap, update in gaps.values())
        whole = (sum(gap**2 for gap, _ in gaps.values()) / sum(update**2 for _, update in gaps.values())) ** 0.5
        same = sorted(left) == sorted(right)
        report(f"adapters, {base} {kind} {optimizer}", f"same names {same}, difference / update {whole:.1e}, of one tensor at most {worst:.1e}", "1e-2, 5e-2", same and whole <= 1e-2 and worst <= 5e-2)
        if base == "packed" and optimizer == "adam":
            check_files(a, directory, ours_dir, theirs_dir, kind, layers, parameters)


class Fixed:
    """Rows that are tokenized already."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self):
        return len(self.rows)


def greedy(model, tokenizer, prompt, n=24):
    """mlx-lm's greedy text."""
    return "".join(r.text for r in stream_generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=n)).strip()


def check_files(a, base, ours_dir, theirs_dir, kind, layers, parameters):
    """mlx-lm loads our adapter and fused directories, we load its; each pair generates the same text."""
    (theirs_dir / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters})
    )

    def graft(model, *extra):
        return run(a.graft, "generate", "--model", model, *extra, "-p", PROMPTS[2], "--ignore-chat-template", "-m", 24, "--verbose", "false").stdout.strip()

    for name, adapter in (("ours", ours_dir), ("theirs", theirs_dir)):
        text = greedy(*load(str(base), adapter_path=str(adapter)), PROMPTS[2])
        mine = graft(base, "--adapter-path", adapter)
        report(f"{name} {kind} adapter in both", repr(mine[:40]), "same text", text == mine)
    ours = fresh(a.work / f"fused-ours-{kind}")
    run(a.graft, "fuse", "--model", base, "--adapter-path", ours_dir, "--save-path", ours)
    theirs = fresh(a.work / f"fused-theirs-{kind}")
    run(sys.executable, "-m", "mlx_lm", "fuse", "--model", base, "--adapter-path", theirs_dir, "--save-path", theirs, "--dequantize")
    for name, fused in (("ours", ours), ("theirs", theirs)):
        text, mine = greedy(*load(str(fused)), PROMPTS[2]), graft(fused)
        report(f"{name} fused {kind} in both", repr(mine[:40]), "same text", text == mine)
        shutil.rmtree(fused)


def check_fused(a):
    """mlx-lm computes with every directory that we fuse what we do: each policy, bases of each mode, another precision."""
    data = rows(a)

    def trained(base, kind, rate="1e-3"):
        out = fresh(a.work / "fused-adapter")
        run(a.graft, "lora", "--model", base, "--train", "--data", data, "--fine-tune-type", kind, "--num-layers", 4, "--batch-size", 4,
            "--iters", 10, "--val-batches", 0, "--learning-rate", rate, "--max-seq-length", 16, "--adapter-path", out)
        return out

    def compare(name, base, adapter, *flags):
        fused = fresh(a.work / "fused")
        run(a.graft, "fuse", "--model", base, "--adapter-path", adapter, "--save-path", fused, "--data", data, "--verify", "layers", "--force", *flags)
        beside = fused if (fused / "adapters.safetensors").exists() else None
        model, tokenizer = load(str(fused), adapter_path=beside and str(beside))
        worst = 0.0
        for prompt in PROMPTS[:2]:
            ids = tokenizer.encode(prompt)
            ours = logits_of(a, fused, ids, *([beside] if beside else []))
            worst = max(worst, mx.abs(model(mx.array([ids]))[0].astype(mx.float32) - ours).max().item())
        forms = sorted({layer["to"] for layer in json.loads((fused / "fuse_report.json").read_text())["layers"]})
        report(f"fused {name}: {', '.join(forms)}", f"max difference {worst:.1e}", "2e-3", worst <= 2e-3)
        shutil.rmtree(fused)

    for kind in ("lora", "dora"):
        adapter = trained(a.packed, kind)
        for policy in ("raise", "same", "dense", *(["fold"] if kind == "dora" else [])):
            compare(f"{kind}, {policy}", a.packed, adapter, "--policy", policy)
        compare(f"{kind}, --base", a.packed, adapter, "--base", a.dense)
        # So little that eight bits hold some of its weights and some only floats.
        compare(f"{kind}, a little", a.packed, trained(a.packed, kind, "4e-5"), "--policy", "raise")
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        base = fresh(a.work / f"mode-{mode}")
        run(a.graft, "convert", "--hf-path", a.dense, "--mlx-path", base, "-q", "--q-mode", mode, "--dtype", "float32")
        adapter = trained(base, "dora")
        for policy in ("raise", "same"):
            compare(f"dora on {mode}, {policy}", base, adapter, "--policy", policy)
        shutil.rmtree(base)


def check_bits(a):
    """QLoRA and QDoRA on other widths agree with a run on the dequantized weights."""
    data = rows(a)
    for name in ("3", "5", "6", "8", "mixed_2_6", "mixed_3_4"):
        packed, dense = a.work / f"ours-{name}", fresh(a.work / f"dense-{name}")
        if not packed.exists():
            form = ["--q-bits", name, "--q-group-size", "64"] if name.isdigit() else ["--quant-predicate", name]
            run(a.graft, "convert", "--hf-path", a.dense, "--mlx-path", packed, "-q", *form)
        run(a.graft, "convert", "--hf-path", packed, "--mlx-path", dense, "--dequantize", "--dtype", "float32")
        for kind in ("lora", "dora"):
            curves = []
            for directory in (packed, dense):
                out = fresh(a.work / "bits")
                run(a.graft, "lora", "--model", directory, "--train", "--data", data, "--fine-tune-type", kind, "--num-layers", 4,
                    "--batch-size", 4, "--iters", 5, "--val-batches", 0, "--steps-per-report", 1, "--learning-rate", "1e-4",
                    "--max-seq-length", 16, "--adapter-path", out, "--exact")
                lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
                curves.append([line["loss"] for line in lines if line["kind"] == "train"])
            gap = max(abs(x - y) for x, y in zip(*curves, strict=True))
            report(f"{kind} on {name} bits against dequantized", f"max difference {gap:.1e}", "1e-3", gap <= 1e-3)
        shutil.rmtree(dense)


def check_proxies(a):
    """The graphs of decoding and training in the GPU form against mlx-lm's."""
    root = fresh(a.work / "proxies")
    run(a.proxies, root)
    proxies.check(report, root)


def check_gguf(check):
    """llama.cpp runs the files that graft exports: a part of it."""
    return lambda a: check(a, report, run, fresh)


GGUF = {"gguf-types": llama_cpp.check_types, "gguf-adapters": llama_cpp.check_adapters, "gguf-families": llama_cpp.check_families}
# The last one switches mx.compile off for good.
CHECKS = {"flags": check_flags, "convert": check_convert, "logits": check_logits, "modes": check_modes, "fused": check_fused, "training": check_training, "bits": check_bits,
          **{name: check_gguf(check) for name, check in GGUF.items()}, "proxies": check_proxies}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("graft", "logits", "proxies", "tiny", "model", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--only", nargs="*", choices=[*CHECKS, "gguf"], default=list(CHECKS))
    a = parser.parse_args()
    mx.set_default_device(mx.cpu)
    a.work.mkdir(parents=True, exist_ok=True)
    a.packed, a.dense = fresh(a.work / "packed-f32"), fresh(a.work / "dense-f32")
    run(a.graft, "convert", "--hf-path", a.model, "--mlx-path", a.packed, "--dtype", "float32")
    run(a.graft, "convert", "--hf-path", a.model, "--mlx-path", a.dense, "--dequantize", "--dtype", "float32")
    for name in a.only:
        for part in GGUF if name == "gguf" else [name]:
            CHECKS[part](a)
    print(f"{sum(results)} of {len(results)} hold")
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
