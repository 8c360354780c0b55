"""Peak memory and time of merging and fusing on a model of 3B shapes: python3 large_merge.py [--packed] [--kind lora|dora|mixed] GRAFT FOLDER [METHOD|fuse ...]

Writes a sharded model of Qwen2.5-3B's shapes (36 blocks, 2048 wide, 11008 inside, 151936 tokens) with random weights in bf16,
or packed in 4 bits, and two adapters of rank 8 on all of its linears; then merges them, or fuses the first (by its weights alone),
and prints what that took: seconds, seconds of processors, peak memory. The bound is three times the largest tensor on disk and 200 MB. Needs numpy and 10 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

E, F, V, KV, LAYERS = 2048, 11008, 151936, 256, 36
LINEARS = {
    "self_attn.q_proj": (E, E), "self_attn.k_proj": (KV, E), "self_attn.v_proj": (KV, E), "self_attn.o_proj": (E, E),
    "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
}
CONFIG = {
    "model_type": "qwen2", "hidden_size": E, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": V, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}


def bf16(values):
    """The upper halves of f32."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(path, tensors, metadata=None):
    """One safetensors file of (name, type, shape, function that gives the array); one array in memory at a time."""
    size = {"F32": 4, "BF16": 2, "U32": 4}
    header, at = {"__metadata__": metadata or {"format": "mlx"}}, 0
    for name, kind, shape, _ in tensors:
        end = at + size[kind] * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, make in tensors:
            make().tofile(file)


def matrix(path, out, inputs, packed, rng):
    """The tensors of one weight: a block of random numbers, over and over, each row with a scale of its own."""
    if not packed:
        block = rng.standard_normal((64, inputs), dtype=np.float32) / np.sqrt(inputs)
        scale = 1 + 0.2 * rng.random((out, 1), dtype=np.float32)
        yield f"{path}.weight", "BF16", (out, inputs), lambda: bf16(np.resize(block, (out, inputs)) * scale)
        return
    yield f"{path}.weight", "U32", (out, inputs // 8), lambda: rng.integers(0, 2**32, (out, inputs // 8), dtype=np.uint32)
    groups = (out, inputs // 64)
    yield f"{path}.scales", "BF16", groups, lambda: bf16(np.full(groups, 0.004) * (1 + rng.random(groups)))
    yield f"{path}.biases", "BF16", groups, lambda: bf16(np.full(groups, -0.04))


def model(folder, packed):
    """config.json and shards of twelve blocks."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    config = {**CONFIG, **({"quantization": {"group_size": 64, "bits": 4}} if packed else {})}
    (folder / "config.json").write_text(json.dumps(config))
    ones = lambda n: (lambda: bf16(np.ones(n)))  # noqa: E731
    shards = [[*matrix("model.embed_tokens", V, E, packed, rng), ("model.norm.weight", "BF16", (E,), ones(E))]]
    for first in range(0, LAYERS, 12):
        shard = []
        for layer in range(first, first + 12):
            for name, (out, inputs) in LINEARS.items():
                shard += matrix(f"model.layers.{layer}.{name}", out, inputs, packed, rng)
            shard += [(f"model.layers.{layer}.{n}.weight", "BF16", (E,), ones(E)) for n in ("input_layernorm", "post_attention_layernorm")]
        shards.append(shard)
    for i, shard in enumerate(shards):
        write(folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors", shard)
    return 3 * max(np.prod(shape) * {"BF16": 2, "U32": 4}[kind] for shard in shards for _, kind, shape, _ in shard) + 200e6


def adapter(folder, dora, seed, rank=8):
    """A and B as after some training; magnitudes near 1."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = []
    for layer in range(LAYERS):
        for name, (out, inputs) in LINEARS.items():
            path = f"model.layers.{layer}.{name}"
            part = lambda shape, std: (lambda: rng.standard_normal(shape, dtype=np.float32) * np.float32(std))  # noqa: E731
            tensors += [(f"{path}.lora_a", "F32", (inputs, rank), part((inputs, rank), inputs**-0.5)), (f"{path}.lora_b", "F32", (rank, out), part((rank, out), 0.01))]
            if dora:
                tensors.append((f"{path}.m", "F32", (out,), lambda n=out: np.ones(n, dtype=np.float32)))
    write(folder / "adapters.safetensors", tensors)
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": list(LINEARS)}
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "dora" if dora else "lora", "num_layers": -1, "lora_parameters": parameters}))


def measured(command):
    """Seconds, those of processors, and peak bytes of a process."""
    start = time.time()
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))}: status {status}")
    return time.time() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graft", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", default=["linear", "cat", "svd", "slerp", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--kind", choices=["lora", "dora", "mixed"], default="lora", help="of the two adapters")
    a = parser.parse_args()
    base = a.folder / ("packed" if a.packed else "bf16")
    limit = a.folder / f"{base.name}.limit"
    if not limit.exists():
        limit.write_text(str(model(base, a.packed)))
    kind = a.kind
    kinds = ["lora", "dora"] if kind == "mixed" else [kind, kind]
    pair = [a.folder / f"{kind}-{i + 1}" for i, kind in enumerate(kinds)]
    for i, folder in enumerate(pair):
        if not folder.exists():
            adapter(folder, kinds[i] == "dora", i + 1)
    for method in a.methods:
        out = a.folder / "merged"
        subprocess.run(["rm", "-rf", str(out)], check=True)
        bound = float(limit.read_text())
        if method == "fuse":
            command = [a.graft, "fuse", "--model", base, "--save-path", out, "--adapter-path", pair[0], "--verify", "layers"]
            tell(base, kind, method, measured(command), bound)
            continue
        extra = {"svd": ["--rank", "8"]}.get(method, ["--rank", "16"] if "_" in method or method == "ties" else [])
        extra = [*extra, *(["--density", "0.5"] if method not in ("linear", "cat", "svd", "slerp") else [])]
        command = [a.graft, "merge", "--method", method, *extra, "--model", base, "--save-path", out]
        tell(base, kind, method, measured([*command, "--adapter", f"{pair[0]}=0.6", "--adapter", f"{pair[1]}=0.4"]), bound)


def tell(base, kind, method, took, bound):
    """One line."""
    seconds, busy, peak = took
    verdict = "ok  " if peak <= bound and seconds <= 60 else "FAIL"
    print(f"{verdict} {base.name} {kind} {method}: {seconds:.1f} s ({busy:.1f} s of processors), peak {peak / 1e6:.0f} MB (limits 60 s, {bound / 1e6:.0f} MB)", flush=True)


if __name__ == "__main__":
    main()
