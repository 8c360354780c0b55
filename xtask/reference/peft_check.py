"""Compares graft with PEFT on a small Llama made here: PEFT loads what graft exports, graft loads what PEFT saves, and the
logits are the same; a directory that went through both forms is the same bytes again. One line per check.

PEFT is asked in f32 and on the CPU. The model is random and small (2 layers), so that what is compared are adapters.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

IDS = [3, 17, 250, 9, 41, 88, 5, 199, 120, 64, 33, 7]
LIMIT = 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12}, "alpha_pattern": {"q_proj": 5, "down_proj": 24}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 6}},
    "dora with patterns": {"use_dora": True, "rank_pattern": {"o_proj": 2}},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
}

results = []


def report(name, measured, limit, ok):
    """One line per check."""
    results.append(bool(ok))
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {measured} (limit {limit})", flush=True)


def run(*command):
    """Runs a command; a failure shows what it printed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def base_model(directory, tied=False):
    """A Llama of PEFT's side, written for both."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=tied, rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(directory)
    # graft reads rope_theta where it has always been.
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    fields.setdefault("rope_theta", 10000.0)
    fields["torch_dtype"] = "float32"
    file.write_text(json.dumps(fields))
    return model


def fresh(directory):
    """The base, loaded anew: PEFT changes the model that it is given."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def randomize(model):
    """B and magnitudes as after some training."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "lora_embedding_A" in name:
                value.normal_(0, 0.05)
            elif "magnitude" in name:
                value.mul_(1 + 0.1 * torch.randn_like(value))


def logits(model):
    """(L, V) of the fixed tokens."""
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


def ours(a, adapter):
    """graft's logits of the base with an adapter beside it, or of the base alone."""
    out = a.work / "logits.safetensors"
    run(a.logits, a.base, ",".join(map(str, IDS)), out, *([adapter] if adapter else []))
    return load_file(out)["logits"]


def compare(name, theirs, mine, away):
    """Logits that agree, of an adapter that does something."""
    gap, moved = (theirs - mine).abs().max().item(), (theirs - away).abs().max().item()
    report(name, f"max difference {gap:.1e}, the adapter moves them by {moved:.1e}", LIMIT, gap <= LIMIT and moved > 100 * LIMIT)


def same_bytes(name, left, right, files):
    """Files of two directories that are equal."""
    same = [f for f in files if (left / f).read_bytes() == (right / f).read_bytes()]
    report(name, f"{len(same)} of {len(files)} files have the same bytes", "all", len(same) == len(files))


def check_case(a, name, extra, plain):
    """PEFT's adapter in graft, and back."""
    folder = a.work / name.replace(" ", "-")
    config = {"r": 8, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **extra}
    model = get_peft_model(fresh(a.base), LoraConfig(**config))
    randomize(model)
    theirs = folder / "peft"
    # An embedding's own weights are the base's, which needs no copy.
    model.save_pretrained(str(theirs), save_embedding_layers=False)
    (theirs / "README.md").unlink(missing_ok=True)
    wanted = logits(model)
    compare(f"{name}: PEFT's adapter in graft", wanted, ours(a, theirs), plain)
    imported, exported = folder / "imported", folder / "exported"
    run(a.graft, "adapter", "import", theirs, "--model", a.base, "--save-path", imported)
    compare(f"{name}: imported", wanted, ours(a, imported), plain)
    run(a.graft, "adapter", "export", imported, "--save-path", exported)
    same_bytes(f"{name}: PEFT to graft to PEFT", theirs, exported, ["adapter_config.json", "adapter_model.safetensors"])
    compare(f"{name}: exported, in PEFT", logits(PeftModel.from_pretrained(fresh(a.base), exported)), wanted, plain)
    # What PEFT never saw: a merge, with ranks by module and without PEFT's own config.
    merged, own = folder / "merged", folder / "own"
    run(a.graft, "merge", "--method", "linear", "--adapter", f"{imported}=0.7", "--adapter", f"{imported}=0.5", "--energy", "1",
        "--model", a.base, "--save-path", merged)
    run(a.graft, "adapter", "export", merged, "--save-path", own)
    compare(f"{name}: graft's own merge, in PEFT", logits(PeftModel.from_pretrained(fresh(a.base), own)), ours(a, merged), plain)
    again = folder / "again"
    run(a.graft, "adapter", "import", own, "--save-path", again)
    same_bytes(f"{name}: graft to PEFT to graft", merged, again, ["adapter_config.json", "adapters.safetensors"])


def check_saved(a):
    """modules_to_save: whole weights go through both forms, and into a fused model."""
    folder = a.work / "modules_to_save"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(fresh(a.base), config)
    randomize(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.add_(0.02 * torch.randn_like(value))
    theirs, imported, exported, fused = (folder / n for n in ("peft", "imported", "exported", "fused"))
    model.save_pretrained(str(theirs))
    run(a.graft, "adapter", "import", theirs, "--save-path", imported)
    run(a.graft, "adapter", "export", imported, "--save-path", exported)
    same_bytes("modules_to_save: PEFT to graft to PEFT", theirs, exported, ["adapter_config.json", "adapter_model.safetensors"])
    run(a.graft, "fuse", "--model", a.base, "--adapter-path", imported, "--save-path", fused)
    out = a.work / "logits.safetensors"
    run(a.logits, fused, ",".join(map(str, IDS)), out)
    compare("modules_to_save: fused", logits(model), load_file(out)["logits"], ours(a, None))


def check_halves(a):
    """An adapter of bf16 keeps its bits."""
    folder = a.work / "bf16"
    model = get_peft_model(fresh(a.base), LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    randomize(model)
    theirs = folder / "peft"
    model.save_pretrained(str(theirs))
    file = theirs / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    run(a.graft, "adapter", "import", theirs, "--save-path", folder / "imported")
    run(a.graft, "adapter", "export", folder / "imported", "--save-path", folder / "exported")
    same_bytes("bf16: PEFT to graft to PEFT", theirs, folder / "exported", ["adapter_config.json", "adapter_model.safetensors"])


def check_tied(a):
    """A head that is the embedding: PEFT changes it only with ensure_weight_tying, and only then are the two the same."""
    folder = a.work / "tied"
    base = folder / "base"
    plain = logits(base_model(base, tied=True))
    targets = ["q_proj", "embed_tokens"]
    out = a.work / "logits.safetensors"

    def save(name, **config):
        model = get_peft_model(fresh(base), LoraConfig(r=8, lora_alpha=12, task_type="CAUSAL_LM", **config))
        randomize(model)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "modules_to_save" in key:
                    value.add_(0.02 * torch.randn_like(value))
        model.save_pretrained(str(folder / name), save_embedding_layers=False)
        return logits(model)

    def ours_of(adapter):
        run(a.logits, base, ",".join(map(str, IDS)), out, adapter)
        return load_file(out)["logits"]

    wanted = save("both", target_modules=targets, ensure_weight_tying=True)
    theirs, imported, exported, own = (folder / n for n in ("both", "imported", "exported", "own"))
    compare("tied head: PEFT's adapter in graft", wanted, ours_of(theirs), plain)
    run(a.graft, "adapter", "import", theirs, "--model", base, "--save-path", imported)
    run(a.graft, "adapter", "export", imported, "--save-path", exported)
    same_bytes("tied head: PEFT to graft to PEFT", theirs, exported, ["adapter_config.json", "adapter_model.safetensors"])
    # Without PEFT's own config, as if graft had trained it.
    merged = folder / "merged"
    run(a.graft, "merge", "--method", "linear", "--adapter", imported, "--model", base, "--save-path", merged)
    run(a.graft, "adapter", "export", merged, "--save-path", own)
    compare("tied head: graft's own, in PEFT", logits(PeftModel.from_pretrained(fresh(base), own)), wanted, plain)
    untied = logits(PeftModel.from_pretrained(fresh(a.base), own))
    compare("a head of its own: graft's own, in PEFT", untied, ours(a, merged), logits(fresh(a.base)))
    # What changes the embedding alone is refused wherever it would be applied.
    for name, config in {"lora": {"target_modules": targets}, "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}}.items():
        save(name, **config)
        commands = [
            [a.graft, "adapter", "import", folder / name, "--model", base, "--save-path", folder / "none"],
            [a.graft, "fuse", "--model", base, "--adapter-path", folder / name, "--save-path", folder / "none", "--verify", "off"],
            [a.logits, base, "1,2", out, folder / name],
        ]
        refused = 0
        for command in commands:
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            refused += done.returncode != 0 and ("leaves the head as it was" in done.stderr or "whole weight" in done.stderr)
        report(f"tied head: {name} without ensure_weight_tying", f"{refused} of {len(commands)} refused", "all", refused == len(commands))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("graft", "logits", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    a = parser.parse_args()
    shutil.rmtree(a.work, ignore_errors=True)
    a.work.mkdir(parents=True)
    a.base = a.work / "base"
    plain = logits(base_model(a.base))
    gap = (plain - ours(a, None)).abs().max().item()
    report("the base alone", f"max difference {gap:.1e}", LIMIT, gap <= LIMIT)
    for name, extra in CASES.items():
        check_case(a, name, extra, plain)
    check_saved(a)
    check_halves(a)
    check_tied(a)
    print(f"{sum(results)} of {len(results)} hold")
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
