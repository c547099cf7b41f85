#!/usr/bin/env python3
"""Trains the default model from scratch, on one GPU or on the CPU, and writes it in Hugging Face layout.

  train.py --data DIR --out DIR [--size gpu|cpu|tiny] [--init MODEL] (--minutes M | --steps N)

Stops and resumes at will: OUT/checkpoint.pt is written every two minutes and at the end, and a second run with the
same arguments goes on from it. OUT/log.jsonl has a line for each measurement; OUT/model/ is the model.

What it learns from (each sequence of `context` tokens is drawn by the step's own seed, so a resumed run sees what an
unbroken one would; every sequence weighs as much, however many of its tokens are scored):
  text      a window of the books
  span      a window in which spans of 16..96 tokens come again, one to 32 of them, at any distance up to the context
  echo      a window, or random tokens, and then nothing but spans of what stands before: most of the row is recall
  circle    phrases said again at once, once to three times, and how the text goes on; only that is scored
  list      key = value lines of random tokens, then a window, then some of the keys asked; only answers are scored
  dialogue  conversations in the chat form, in the last part of training

Optimiser: Muon for the matrices, AdamW for the rest; warm-up, constant, then linear to zero over the last DECAY of the run.
Needs: torch >= 2.9, numpy, safetensors, sentencepiece.
"""
import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import time

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

BOS = 1
NEAR = 60  # tokens: nearer spans do not come again, or text would run in circles
# Share of the run until: shares of rows that are echoes, and that have spans.
MIX = ((0.06, 0.5, 0.1), (0.5, 0.2, 0.1), (0.85, 0.1, 0.55), (1, 0.05, 0.5))
DECAY = 0.6       # last share of the run in which the learning rate falls
DIALOGUE = 0.20   # last share of the run with conversations in it
# Only pairs of dimensions that turn by less than a radian in the whole context can match a key wherever it stands: 19 of
# the 32 of a head, where the base alone leaves 6. The 9 fastest, by which heads tell neighbours apart, are as they were.
ROPE_SCALING = {"rope_type": "llama3", "factor": 64.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256}
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def stage(stages, progress):
    """Of (until, values…) the values of the first that has not passed, or the last."""
    return next((values for until, *values in stages if progress < until), stages[-1][1:])


@dataclasses.dataclass
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    batch: int
    dropout: float
    head_dim: int = 64
    vocabulary: int = 0
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # as in config.json; llama3 is the one type known here
    # Rows may be shorter, and as many more, in earlier parts of the run, as attention is dear and recall is learnt
    # sooner where there is less to look through: (share of the run until, divisor of the context).
    folds: tuple = ((1, 1),)


SIZES = {
    # With 6,144 pieces 15.3M parameters,
    "gpu": Shape(384, 8, 6, 3, 1024, context=2048, batch=48, dropout=0.05, rope_scaling=ROPE_SCALING),
    # and 12.7M.
    "cpu": Shape(384, 7, 4, 2, 1024, context=2048, batch=4, dropout=0.0, rope_scaling=ROPE_SCALING,
                 folds=((0.06, 8), (0.5, 4), (1, 1))),
    "tiny": Shape(64, 2, 2, 1, 128, context=256, batch=4, dropout=0.0, head_dim=32),  # for trying this script
}


def inverse_frequency(s):
    """Angle per position of each pair of a head's dimensions (Llama 3.1's scaling)."""
    frequency = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).double() / s.head_dim)
    r = s.rope_scaling
    if r is None:
        return frequency
    turns = r["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
    return frequency * (kept + (1 - kept) / r["factor"])


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        linear = lambda n, m: nn.Linear(n, m, bias=False)
        self.input_layernorm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.q_proj = linear(s.hidden, s.heads * s.head_dim)
        self.k_proj = linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = linear(s.heads * s.head_dim, s.hidden)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.gate_proj = linear(s.hidden, s.intermediate)
        self.up_proj = linear(s.hidden, s.intermediate)
        self.down_proj = linear(s.intermediate, s.hidden)
        self.drop = nn.Dropout(s.dropout)

    def forward(self, x, cos, sin):
        s, (b, t, _) = self.s, x.shape
        h = self.input_layernorm(x)
        heads = lambda y, n: y.view(b, t, n, s.head_dim).transpose(1, 2)
        q = rotate(heads(self.q_proj(h), s.heads), cos, sin)
        k = rotate(heads(self.k_proj(h), s.kv_heads), cos, sin)
        v = heads(self.v_proj(h), s.kv_heads)
        a = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, is_causal=True, enable_gqa=True)
        x = x + self.drop(self.o_proj(a.transpose(1, 2).reshape(b, t, -1)))
        h = self.post_attention_layernorm(x)
        return x + self.drop(self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)))


class Llama(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        angle = torch.arange(s.context).double()[:, None] * inverse_frequency(s)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, p in self.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * s.layers) if "o_proj" in name or "down" in name else 1))

    def forward(self, ids):
        t = ids.shape[1]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.norm(x), self.embed_tokens.weight)  # tied


class Data:
    def __init__(self, directory):
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        self.vocabulary = self.tokenizer.get_piece_size()
        self.newline = self.tokenizer.piece_to_id("\n")
        load = lambda name: np.load(directory / name, mmap_mode="r")
        self.train, self.valid = load("train.npy"), load("valid.npy")
        self.dialogue, self.starts = load("dialogue.npy"), load("dialogue_starts.npy")
        self.sizes = json.loads((directory / "sizes.json").read_text())

    def window(self, rng, length):
        at = int(rng.integers(0, len(self.train) - length))
        return self.train[at:at + length].astype(np.int64)

    def span(self, rng, ids, scored):
        """Spans come again, one to many of them: predictable only by who remembers them. Two fifths of them at all
        distances alike, two fifths at all places alike, of which some are early in the row, and a fifth from its very
        beginning. From front to back, so that no source is overwritten by a later span. Where a span begins, and behind
        its end, little can be known; of the other tokens few are scored, so that most of what is learnt is recall."""
        pairs = []  # where to, from how far
        # In most rows few: who sees that much is repeated trusts the next match, and must not need to.
        count = int(math.exp(rng.uniform(0, math.log(len(ids) / 64))))
        scored[:] = rng.random(len(ids)) < count / 64
        for kind in rng.random(count):
            if kind > 0.8:  # the sink is near there, and takes more of what such sources should have
                at = int(rng.integers(NEAR + 49, len(ids) - 16))
                pairs.append((at, at - int(rng.integers(1, 48))))
            elif kind < 0.4:
                distance = int(rng.integers(NEAR, len(ids) - 17))
                pairs.append((int(rng.integers(distance + 1, len(ids) - 16)), distance))
            else:
                at = int(rng.integers(NEAR + 17, min(256, len(ids)) if kind < 0.5 else len(ids)) - 16)
                pairs.append((at, int(rng.integers(NEAR, at))))
        for at, distance in sorted(pairs):
            length = min(int(rng.integers(16, 97)), len(ids) - at, distance)
            ids[at:at + length] = ids[at - distance:at - distance + length]
            scored[at:at + length] = True
            scored[at:at + 3] = scored[min(at + length, len(ids) - 1)] = False

    def echo(self, rng, ids, scored):
        """Spans of what stands before, after a head of text or of random pieces; what cannot be known is not scored."""
        at = int(rng.integers(len(ids) // 8, len(ids) // 2))
        if rng.random() < 0.33:
            ids[1:at] = rng.integers(300, self.vocabulary, size=at - 1)
            scored[1:at] = False
        while at < len(ids):
            length = min(int(rng.integers(12, 65)), len(ids) - at, at - 1)
            start = int(rng.integers(1, max(1, at - max(length, NEAR)) + 1))
            ids[at:at + length] = ids[start:start + length]
            scored[at] = False
            at += length

    def circle(self, rng, ids, scored):
        """Phrases said again at once, up to three times, and then the text goes on, which is scored: who runs in circles
        must find out of them."""
        text, at, taken = self.window(rng, len(ids)), 1, 1
        while at < len(ids):
            length = min(int(rng.integers(40, 160)), len(ids) - at)
            ids[at:at + length] = text[taken:taken + length]
            at, taken = at + length, taken + length
            phrase = ids[at - int(rng.integers(5, 41)):at].copy()
            for _ in range(int(rng.integers(1, 4))):
                length = min(len(phrase), len(ids) - at)
                ids[at:at + length] = phrase[:length]
                scored[at:at + length] = False
                at += length

    def key_values(self, rng, ids, scored):
        """Lines `key = value` of random pieces at the start, questions at the end, text between."""
        pairs = int(rng.integers(4, 33))
        pieces = rng.integers(300, self.vocabulary, size=(pairs, 4))  # 300: past the bytes and the marks
        lines = np.concatenate([pieces, np.full((pairs, 1), self.newline)], axis=1)
        asked = lines[rng.permutation(pairs)[:min(pairs, 8)]]
        start = int(rng.integers(1, max(2, len(ids) - lines.size - asked.size)))
        ids[start:start + lines.size] = lines.ravel()
        scored[start:start + lines.size] = False
        ids[-asked.size:] = asked.ravel()
        ask = np.tile(np.array([False, False, True, True, True]), len(asked))
        scored[-asked.size:] = ask

    def conversation(self, rng, ids):
        at = int(self.starts[int(rng.integers(0, len(self.starts)))])
        at = min(at, len(self.dialogue) - len(ids))
        ids[:] = self.dialogue[at:at + len(ids)]

    def draw(self, step, count, length, progress):
        """`count` rows of `length` tokens, what follows each token, and how much that weighs: in each row as much."""
        rng = np.random.default_rng((20261120, step))
        rows = np.empty((count, length + 1), dtype=np.int64)
        scored = np.ones_like(rows, dtype=bool)
        echoes, spans = stage(MIX, progress)
        for ids, score in zip(rows, scored):
            ids[:] = self.window(rng, len(ids))
            ids[0] = BOS
            kind = rng.random()
            if progress > 1 - DIALOGUE and kind < 0.15:
                self.conversation(rng, ids)
            elif kind > 0.90:
                self.key_values(rng, ids, score)
            elif kind > 0.85:
                self.circle(rng, ids, score)
            elif kind > 0.85 - spans:
                self.span(rng, ids, score)
            elif kind > 0.85 - spans - echoes:
                self.echo(rng, ids, score)
        scored = scored[:, 1:]
        weights = (scored / np.maximum(scored.sum(1, keepdims=True), 1) / count).astype(np.float32)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()), torch.from_numpy(weights)

    def validation(self, count, length):
        at = np.linspace(0, len(self.valid) - length - 2, count).astype(int)
        rows = np.stack([self.valid[a:a + length + 1].astype(np.int64) for a in at])
        rows[:, 0] = BOS
        return torch.from_numpy(rows)

    def validation_echo(self, count, length):
        """Rows of held-out text whose second half says spans of the first again, and which tokens those are."""
        rng = np.random.default_rng(1)
        rows = self.validation(count, length).numpy()
        scored = np.zeros_like(rows, dtype=bool)
        for ids, score in zip(rows, scored):
            for at in range(length // 2, length - 23, 24):
                start = int(rng.integers(1, length // 2 - 24))
                ids[at:at + 24] = ids[start:start + 24]
                score[at + 8:at + 24] = True
        return torch.from_numpy(rows), torch.from_numpy(np.where(scored, rows, -100))


def optimizers(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    return [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.02),
            torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def rate(progress, step):
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.0, (1 - progress) / DECAY))


@torch.no_grad()
def validate(model, rows, targets, device, autocast):
    """Cross-entropy per token that is scored, and the share of them that are the likeliest."""
    model.eval()
    total, right = 0.0, 0
    for ids, wanted in zip(rows.split(4), targets.split(4)):
        wanted = wanted[:, 1:].to(device)
        with autocast:
            logits = model(ids[:, :-1].to(device)).float()
        total += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum").item()
        right += (logits.argmax(-1) == wanted).sum().item()
    model.train()
    count = (targets[:, 1:] != -100).sum().item()
    return total / count, right / count


def save_checkpoint(path, model, optimizers_, state):
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers_], "state": state},
               path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def read_weights(directory):
    """A state dict of Llama from Hugging Face layout: the inverse of export's names."""
    return {name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", ""): tensor.float()
            for name, tensor in load_file(str(directory / "model.safetensors")).items()}


def begin_from(model, weights):
    """Layers that the weights do not have begin by adding nothing."""
    loaded = model.load_state_dict(weights, strict=False)
    if loaded.unexpected_keys:
        raise SystemExit(f"--init: no place for {', '.join(loaded.unexpected_keys[:3])}: another size?")
    for name in loaded.missing_keys:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(model.get_parameter(name))


def export(model, data_dir, out, data):
    """Hugging Face layout, bf16; with the tokenizer, the chat template and held-out ids."""
    s = model.s
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, p in model.state_dict().items():
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = name.replace(f".{part}", f".self_attn.{part}")
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f".{part}", f".mlp.{part}")
        tensors["model." + name] = p.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": s.hidden,
              "intermediate_size": s.intermediate, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
              "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "vocab_size": s.vocabulary,
              "max_position_embeddings": s.context, "rms_norm_eps": 1e-5, "rope_theta": s.rope_theta,
              "rope_scaling": s.rope_scaling,
              "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
              "torch_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True, "chat_template": CHATML}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    # Without the penalty a third of a text's word 6-grams are repeated ones, with it a twelfth (README.md here).
    generation_config = {"bos_token_id": 1, "eos_token_id": [2, data.tokenizer.piece_to_id("<|im_end|>")],
                         "do_sample": True, "temperature": 0.8, "repetition_penalty": 1.15}
    (out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    shutil.copy(data_dir / "tokenizer.model", out / "tokenizer.model")
    np.save(out / "eval_ids.npy", data.validation(4, s.context).numpy()[:, :512].astype(np.int64))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=pathlib.Path, help="what prepare.py wrote")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=pathlib.Path,
                        help="a model of the same size, or of fewer layers, to start from, instead of noise")
    parser.add_argument("--begin", type=float, default=0.0, help="where in the schedule to begin, with --init; 0 to 1")
    parser.add_argument("--minutes", type=float, help="length of the whole run, all stretches together")
    parser.add_argument("--steps", type=int, help="the same, counted in steps (repeatable to the bit on one device)")
    parser.add_argument("--stretch-minutes", type=float, default=1e9, help="stop this stretch after so long")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if (args.minutes is None) == (args.steps is None):
        parser.error("give --minutes or --steps")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)

    shape = SIZES[args.size]
    data = Data(args.data)
    shape.vocabulary = data.vocabulary
    model = Llama(shape).to(device)
    if args.init:
        begin_from(model, read_weights(args.init))
    optimizers_ = optimizers(model)
    # The loss is compiled with the model: the logits of a step are far larger than its weights.
    loss_of = torch.compile(lambda ids, targets, weights: (F.cross_entropy(
        model(ids).float().flatten(0, 1), targets.flatten(), reduction="none") * weights.flatten()).sum(), dynamic=False)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, state = args.out / "checkpoint.pt", {"step": 0, "seconds": 0.0}
    if checkpoint.exists():
        loaded = torch.load(checkpoint, map_location=device)
        model.load_state_dict(loaded["model"])
        for optimizer, saved in zip(optimizers_, loaded["optimizers"]):
            optimizer.load_state_dict(saved)
        state = loaded["state"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, from step {state['step']}",
          flush=True)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers(model)]
    begin = saved = time.time()
    before, losses = state["seconds"], []
    while True:
        state["seconds"] = before + time.time() - begin
        progress = state["step"] / args.steps if args.steps else state["seconds"] / (60 * args.minutes)
        progress = args.begin + (1 - args.begin) * progress
        over = progress >= 1 or time.time() - begin > 60 * args.stretch_minutes
        if over or time.time() - saved > 120:
            save_checkpoint(checkpoint, model, optimizers_, state)
            saved = time.time()
        fold, = stage(shape.folds, progress)
        rows, length = shape.batch * fold, shape.context // fold
        if over or state["step"] % 250 == 0:
            valid = data.validation(8 * fold, length)
            echo, echoed = data.validation_echo(4 * fold, length)
            line = {"step": state["step"], "seconds": round(state["seconds"]), "progress": round(progress, 4),
                    "tokens": state["step"] * shape.batch * shape.context,
                    "train": float(np.mean(losses)) if losses else None,
                    "valid": validate(model, valid, valid, device, autocast)[0],
                    "recall": validate(model, echo, echoed, device, autocast)[1]}
            losses = []
            print(json.dumps(line), flush=True)
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        if over:
            break
        for optimizer, rates in zip(optimizers_, base):
            for group, lr in zip(optimizer.param_groups, rates):
                group["lr"] = lr * rate(progress, state["step"])
        batch = data.draw(state["step"], rows, length, progress)
        with autocast:
            loss = loss_of(*(part.to(device) for part in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers_:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if state["step"] % 10 == 0:
            losses.append(loss.item())
        state["step"] += 1
    export(model, args.data, args.out / "model", data)
    print(f"wrote {args.out / 'model'}" + ("" if progress >= 1 else f"; {progress:.0%} of the run, run again to go on"))


if __name__ == "__main__":
    main()
