"""Runs a job of `cargo xtask bench` with another kit, and prints one JSON line with what it took.

usage: peers.py peft     --model DENSE --data FILE --steps N [--dora] [--nf4]
       peers.py mlx      --model DIR --data FILE --steps N [--dora]
       peers.py generate --model DIR --prompt TEXT --tokens N

The training job is graft's in xtask/src/bench.rs: 4 rows a batch, rank 8, scale 20, all linears of the last 16 blocks, Adam at 1e-5.
Counted are trained targets without padding; the first step warms up and is not counted. `peft` (`--nf4`: on bitsandbytes' 4-bit base) computes
in bfloat16 where the processor multiplies it, else in float32, which is many times faster there; it needs torch, transformers and peft; `mlx` and `generate` need mlx-lm, on float32 values and scales, since
its CPU kernels are some thirty times slower on 16 bits.
"""

import argparse
import json
import time
from pathlib import Path

RANK, SCALE, BLOCKS, ROWS, RATE = 8, 20.0, 16, 4, 1e-5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(tokenizer, path, steps):
    """Token rows with their end mark, of like length in a batch; the batches are spread evenly over the lengths."""
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    rows = sorted((tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts), key=len)
    groups = [rows[i : i + ROWS] for i in range(0, len(rows) - ROWS + 1, ROWS)]
    # A step of 7 visits short and long ones in turn.
    return [groups[7 * i % len(groups)] for i in range(steps)]


def timed(groups, step):
    """Targets a second over all steps but the first."""
    targets = seconds = 0
    for i, rows in enumerate(groups):
        begin = time.perf_counter()
        loss = step(rows)
        if i > 0:
            seconds += time.perf_counter() - begin
            targets += sum(len(row) - 1 for row in rows)
    return {"tokens_per_second": targets / seconds, "loss": loss}


def peft(a):
    """LoRA or DoRA on torch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    flags = set(Path("/proc/cpuinfo").read_text().split())
    dtype = torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16"} else torch.float32
    options = {"dtype": dtype}
    if a.nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    base = AutoModelForCausalLM.from_pretrained(a.model, **options)
    count = base.config.num_hidden_layers
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=RANK * SCALE,
        use_dora=a.dora,
        target_modules=LINEARS,
        layers_to_transform=list(range(count - BLOCKS, count)),
    )
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=RATE)

    def step(rows):
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return timed(batches(AutoTokenizer.from_pretrained(a.model), a.data, a.steps), step)


def load_mlx(directory):
    """Model and tokenizer, with every value that is not packed in float32."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(directory)
    single = lambda value: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
    model.update(tree_map(single, model.parameters()))
    mx.eval(model.parameters())
    return model, tokenizer


def mlx(a):
    """LoRA or DoRA with mlx-lm's modules and loss."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = load_mlx(a.model)
    model.freeze()
    linear_to_lora_layers(model, BLOCKS, {"rank": RANK, "scale": SCALE, "dropout": 0.0}, use_dora=a.dora)
    model.train()
    optimizer = optim.Adam(learning_rate=RATE)
    loss_and_gradient = nn.value_and_grad(model, default_loss)

    def step(rows):
        width = max(map(len, rows))
        ids = mx.array([row + [0] * (width - len(row)) for row in rows])
        lengths = mx.array([[0, len(row)] for row in rows])
        (loss, _), gradient = loss_and_gradient(model, ids, lengths)
        optimizer.update(model, gradient)
        mx.eval(loss, model.parameters(), optimizer.state)
        return loss.item()

    return timed(batches(tokenizer, a.data, a.steps), step)


def generate(a):
    """mlx-lm's own figures of one answer."""
    from mlx_lm import stream_generate

    model, tokenizer = load_mlx(a.model)
    for last in stream_generate(model, tokenizer, tokenizer.encode(a.prompt), max_tokens=a.tokens):
        pass
    return {
        "prompt_tokens": last.prompt_tokens,
        "prompt_tokens_per_second": last.prompt_tps,
        "tokens_per_second": last.generation_tps,
    }


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("kit", choices=["peft", "mlx", "generate"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--prompt")
    parser.add_argument("--tokens", type=int)
    a = parser.parse_args()
    result = {"peft": peft, "mlx": mlx, "generate": generate}[a.kit](a)
    print(json.dumps(result))


main()
