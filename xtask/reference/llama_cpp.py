"""What `graft export gguf` writes, judged by llama.cpp: it loads every file, splits texts into the same tokens, renders the same chat,
and its greedy continuation is the one of graft's own logits on the very weights of the file.

Imported by conformance.py. llama.cpp runs as its own server on the loopback, with keys and values in f32. Its matrix products round
activations to the type of the weights (to 8 bits for Q8_0 and Q4_1), so logits differ by more than f32's rounding, and a token whose
runner-up is nearer than that may differ: such a token is counted, and the distance must be within the limit. With f32 and f16 whole
texts must be the same.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer

TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees",
    "1, 2, 3, 5, 8,",
]
TEXTS = [
    *PROMPTS,
    "It's 2024, isn't it?  3.14 and 1234567",
    " \u00fcber \U0001f600\n\n\tand\r\n  back ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "I'LL say: ((x+y)) != z; // caf\u00e9 \u4f60\u597d",
    "a",
]
CHAT = [{"role": "user", "content": "Turn on the light."}, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "Thanks"}]
# How far log probabilities may differ, on average and at most. llama.cpp rounds the input of each product to the type of its weights
# (`vec_dot_type` in ggml-cpu), so the difference is a multiple of that type's unit roundoff, and the multiple is the model's: for the demo's base
# 4 and 30 in f16 and in bf16 alike, and 4 and 44 where mlx-lm's own pass is made to round so. In f32 sums weigh more than inputs: n terms
# are off by about the root of n roundings, and the longest row of the demo's base has 1536.
ROUNDED = (10, 60)
EXACT, HALF, BRAIN = ([unit * times for times in ROUNDED] for unit in (1536**0.5 * 2**-24, 2**-11, 2**-8))
# Bytes are rounded by blocks of 32 to 1/254 of the largest value, which the others may be far below.
BYTE = (0.1, 1.0)
SPACE = "\u2581"


class Server:
    """llama.cpp's server with one file."""

    def __init__(self, a, model, lora=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [a.llama / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", str(self.port), "-c", "1024", "-np", "1"]
        command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup", *(["--lora", lora] if lora else [])]
        self.log = a.work / "llama-server.log"
        self.process = subprocess.Popen([str(c) for c in command], stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def __enter__(self):
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"llama.cpp does not load the file:\n{self.log.read_text()[-3000:]}")
            try:
                self.ask("health")
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"llama.cpp did not become ready:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokenize(self, text):
        return self.ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def complete(self, ids, count):
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 5, "return_tokens": True}
        answer = self.ask("completion", body)
        steps = [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in answer.get("completion_probabilities", [])]
        return answer["tokens"], steps, answer["content"]

    def greedy(self, ids):
        """Tokens, what was likely instead of each, and the text."""
        tokens, steps, text = self.complete(ids, TOKENS)
        if len(steps) != len(tokens):
            # A token that leaves a character unfinished comes without probabilities, and the others do not say whose they are.
            each = [self.complete(ids + tokens[:i], 1)[1] for i in range(len(tokens))]
            steps = [step[0] if len(step) == 1 else {} for step in each]
        return tokens, steps, text


def log_probabilities(a, directory, ids):
    """Ours (L, V), in f32."""
    out = a.work / "logits.safetensors"
    subprocess.run([str(a.logits), str(directory), ",".join(map(str, ids)), str(out)], check=True)
    logits = np.array(mx.load(str(out))["logits"]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def differences(ours, theirs):
    """Of our log probabilities (V) from llama.cpp's of a few tokens, each among those few: the server adds up the vocabulary term by term
    in f32, where 49152 small ones lose up to 3e-4 of the sum, and that is no part of the model."""
    ids = list(theirs)
    left, right = (p - np.log(np.exp(p).sum()) for p in (ours[ids], np.array([theirs[i] for i in ids]))) if ids else ([], [])
    # What is rare for both says little.
    return [abs(x - y) for x, y, i in zip(left, right, ids) if theirs[i] > -10]


def follow(a, report, name, limit, file, directory, lora=None, prompts=PROMPTS):
    """llama.cpp's greedy continuation of the file, step by step beside our logits of the directory."""
    equal, total, near, gaps, texts = 0, 0, 0.0, [], []
    with Server(a, file, lora) as server:
        for prompt in prompts:
            ids = server.tokenize(prompt)
            tokens, steps, text = server.greedy(ids)
            texts.append(text)
            ours = log_probabilities(a, directory, ids + tokens[:-1])[len(ids) - 1 :]
            for row, token, step in zip(ours, tokens, steps):
                equal, total = equal + (row.argmax() == token), total + 1
                near = max(near, row.max() - row[token])
                gaps += differences(row, step)
    distance = f", the others nearer than {near:.1e}" if equal < total else ""
    mean, worst = float(np.mean(gaps or [np.inf])), max(gaps, default=np.inf)
    measured = f"{equal}/{total} greedy tokens equal{distance}; log probabilities differ by {mean:.1e} on average, {worst:.1e} at most"
    fine = mean <= limit[0] and worst <= limit[1] and near <= limit[1]
    report(f"llama.cpp, {name}", measured, f"{limit[0]:.1e}, {limit[1]:.1e}", total > 0 and fine)
    return texts


def same_texts(a, report, run, name, texts, *model):
    """The whole texts are those that graft generates."""
    flags = ["--ignore-chat-template", "-m", TOKENS, "--verbose", "false", "--exact"]
    ours = [run(a.graft, "generate", *model, "-p", prompt, *flags).stdout for prompt in PROMPTS]
    same = sum(mine.strip() == theirs.strip() for mine, theirs in zip(ours, texts))
    report(f"llama.cpp's texts, {name}", f"{same}/{len(PROMPTS)} equal, {TOKENS} tokens each", "all", same == len(PROMPTS))


def same_tokens(a, report, name, file, directory, chat=False):
    """Tokens of texts, and the text of a chat, as Hugging Face's libraries have them."""
    theirs = Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Server(a, file) as server:
        wrong = [t for t in TEXTS if server.tokenize(t) != theirs.encode(t, add_special_tokens=True).ids]
        report(f"llama.cpp's tokens, {name}", f"{len(TEXTS) - len(wrong)}/{len(TEXTS)} texts equal {wrong or ''}", "all", not wrong)
        if chat:
            ours = AutoTokenizer.from_pretrained(str(directory)).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
            prompt = server.ask("apply-template", {"messages": CHAT})["prompt"]
            report(f"llama.cpp's chat, {name}", repr(prompt[-30:]), "same text", prompt == ours)


def tensors(directory):
    """Of all files of a model directory."""
    return {k: v for file in sorted(directory.glob("model*.safetensors")) for k, v in mx.load(str(file)).items()}


class Files:
    """What graft exports, and imports again, in a folder of its own."""

    def __init__(self, a, run, work):
        self.a, self.run, self.work = a, run, work
        work.mkdir()

    def export(self, name, model, *flags):
        file = self.work / f"{name}.gguf"
        said = self.run(self.a.graft, "export", "gguf", "--model", model, "--out", file, *flags).stdout
        print(said.strip(), flush=True)
        return file

    def imported(self, file, *flags):
        directory = self.work / f"back-{file.stem}"
        self.run(self.a.graft, "convert", "--hf-path", file, "--mlx-path", directory, *flags)
        return directory


def check_types(a, report, run, fresh):
    """The demo's base in every type."""
    files = Files(a, run, fresh(a.work / "gguf"))
    auto = files.export("auto", a.model)
    back = files.imported(auto)
    left, right = tensors(a.model), tensors(back)
    packed = [k for k in left if k.endswith((".scales", ".biases")) or left[k].dtype == mx.uint32]
    same = sorted(left) == sorted(right) and all(left[k].dtype == right[k].dtype and mx.array_equal(left[k], right[k]).item() for k in left)
    report("export and import of the base", f"{len(left)} tensors, {len(packed)} of packed weights, equal: {same}", "all", same)
    same_tokens(a, report, "the base", auto, a.model, chat=True)
    follow(a, report, "the base as it is packed", BYTE, auto, a.model)
    for kind, limit in (("f32", EXACT), ("f16", HALF), ("bf16", BRAIN), ("q8_0", BYTE)):
        file = files.export(kind, a.model, "--type", kind)
        dtype = {"f32": "float32", "bf16": "bfloat16"}.get(kind, "float16")
        directory = files.imported(file, "--dtype", dtype)
        texts = follow(a, report, f"the base as {kind}", limit, file, directory)
        if kind in ("f32", "f16"):
            same_texts(a, report, run, f"the base as {kind}", texts, "--model", directory)
        shutil.rmtree(directory)
        file.unlink()


def check_adapters(a, report, run, fresh):
    """A LoRA beside the demo's base, and fused into it."""
    files = Files(a, run, fresh(a.work / "gguf-adapters"))
    work, auto, exact = files.work, files.export("auto", a.model), files.export("f32", a.model, "--type", "f32")
    adapter = work / "adapter"
    data = Path(__file__).parents[2] / "data" / "smart-home"
    settings = work / "lora.json"
    settings.write_text(json.dumps({"lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0}}))
    run(a.graft, "lora", "--model", a.model, "--train", "--data", data, "--num-layers", "-1", "--batch-size", 4, "--iters", 20, "--val-batches", 0,
        "--learning-rate", "1e-4", "--max-seq-length", 128, "--adapter-path", adapter, "-c", settings)
    lora = work / "lora.gguf"
    print(run(a.graft, "export", "gguf", "--model", a.model, "--adapter-path", adapter, "--out", lora).stdout.strip(), flush=True)
    fused = work / "fused-dense"
    run(a.graft, "fuse", "--model", a.packed, "--adapter-path", adapter, "--save-path", fused, "--dequantize")
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("Turn on the light in the kitchen.", "It is cold.")]
    texts = follow(a, report, "LoRA on the base as f32", EXACT, exact, fused, lora, PROMPTS + chats)
    # An adapter that came apart says one token for ever, and agrees with anything.
    report("texts with the LoRA", f"{len(set(texts))} of {len(texts)} are different", "more than half", 2 * len(set(texts)) > len(texts))
    same_texts(a, report, run, "LoRA on the base as f32", texts, "--model", a.model, "--adapter-path", adapter)
    follow(a, report, "LoRA on the packed base", BYTE, auto, fused, lora, PROMPTS + chats)
    whole = work / "fused"
    print(run(a.graft, "fuse", "--model", a.model, "--adapter-path", adapter, "--save-path", whole, "--export-gguf").stdout.strip(), flush=True)
    half = whole / "ggml-model-f16.gguf"
    shutil.move(half, work / "fused-f16.gguf")
    half = work / "fused-f16.gguf"
    follow(a, report, "the fused model as f16", HALF, half, files.imported(half), prompts=PROMPTS + chats)
    file = files.export("fused-auto", whole)
    follow(a, report, "the fused model as it is packed", BYTE, file, files.imported(file), prompts=PROMPTS + chats)


def check_families(a, report, run, fresh):
    """Random models of a few hundred kilobytes: every family, tied or not, packed or not, with LoRA, and DoRA fused; tokenizers of every kind."""
    work = fresh(a.work / "gguf-families")
    work.mkdir()
    cases = work / "tiny"
    run(a.tiny, cases)
    for case in sorted(cases.iterdir()):
        facts, model, adapter = json.loads((case / "case.json").read_text()), case / "model", case / "adapter"
        # The types of packed weights are the demo's business: here all is f32, so that every difference counts.
        name, file = case.name, case / "m.gguf"
        run(a.graft, "export", "gguf", "--model", model, "--out", file, "--type", "f32")
        if facts["adapter"] == "none":
            follow(a, report, name, EXACT, file, model, prompts=PROMPTS[:2])
            continue
        fused, lora = case / "fused", case / "lora.gguf"
        base = model
        if facts["bits"]:
            base = case / "dense"
            run(a.graft, "convert", "--hf-path", model, "--mlx-path", base, "--dequantize", "--dtype", "float32")
        run(a.graft, "fuse", "--model", base, "--adapter-path", adapter, "--save-path", fused, "--export-gguf", "--gguf-type", "f32")
        if facts["adapter"] == "lora":
            run(a.graft, "export", "gguf", "--model", model, "--adapter-path", adapter, "--out", lora)
            follow(a, report, name, EXACT, file, fused, lora, PROMPTS[:2])
            continue
        refused = run(a.graft, "export", "gguf", "--model", model, "--adapter-path", adapter, "--out", lora, check=False)
        report(f"{name} alone", repr(refused.stderr[-60:]), "refused", refused.returncode == 1 and "DoRA" in refused.stderr)
        follow(a, report, f"{name} fused", EXACT, fused / "ggml-model-f16.gguf", fused, prompts=PROMPTS[:2])
    tokenizers(a, report, run, work, cases / "llama-0-true-none" / "model")


def tokenizers(a, report, run, work, model):
    """The tiny tokenizer split in every known way, and one of sentencepiece's kind."""
    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    plain = json.loads((model / "tokenizer.json").read_text())
    config = json.loads((model / "tokenizer_config.json").read_text())

    def bytes_of(use_regex):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}

    def split(expression):
        first = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [first, bytes_of(False)]}

    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_of(True)]}
    ways = {"gpt-2": {}, "smollm": {"pre_tokenizer": digits}, "qwen2": {"pre_tokenizer": split(letters % ""), "normalizer": {"type": "NFC"}}}
    ways |= {"llama-bpe": {"pre_tokenizer": split(letters % "{1,3}")}, "tekken": {"pre_tokenizer": split(tekken)}}
    for way, changed in ways.items():
        whole = {**plain["model"], "ignore_merges": way in ("llama-bpe", "tekken")}
        write(a, report, run, work, model, way, {**plain, **changed, "model": whole}, config)
    for scheme in ("always", "never"):
        write(a, report, run, work, model, f"sentencepiece, {scheme}", sentencepiece(scheme), {**config, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None})


def write(a, report, run, work, model, name, tokenizer, config):
    directory = work / f"tokenizer-{name.replace(', ', '-')}"
    shutil.copytree(model, directory)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").unlink()
    file = directory / "m.gguf"
    run(a.graft, "export", "gguf", "--model", directory, "--out", file)
    same_tokens(a, report, name, file, directory)


def sentencepiece(scheme):
    """259 tokens of sentencepiece's kind and 29 pieces, with every merge that gives one of them, the best piece first."""
    letters = [SPACE, "t", "h", "e", "a", "n", "i", "o", "r", "s", "d", "u"]
    pieces = ["th", "the", SPACE + "t", SPACE + "the", "an", "and", SPACE + "a", SPACE + "and", "in", "er", "re", "on", "or", "is", "ou", SPACE + SPACE, "nd"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters])}
    known = set(pieces) | set(letters)
    merges = [[p[:i], p[i:]] for p in pieces for i in range(len(p) - 1, 0, -1) if p[:i] in known and p[i:] in known]
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if scheme == "always":
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    after = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges}
    decoder = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None, "post_processor": after, "decoder": decoder, "model": model}
