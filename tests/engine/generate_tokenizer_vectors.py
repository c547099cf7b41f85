#!/usr/bin/env python3
"""Writes tests/engine/tokenizer_vectors/: small tokenizer.json files and the ids that Hugging Face's tokenizers gives.

    python3 -m venv V && V/bin/pip install tokenizers
    V/bin/python tests/engine/generate_tokenizer_vectors.py CORPUS.txt [SMOLLM2_TOKENIZER.json]

CORPUS.txt: any English text (the committed files used Project Gutenberg prose, public domain); the small vocabularies are
trained on it and on the texts below. With SMOLLM2_TOKENIZER.json its expected ids are written too, not the file itself.
"""
import json
import pathlib
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = pathlib.Path(__file__).parent / "tokenizer_vectors"

GPT2_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

TEXTS = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n\r\n", " \n \n", "a", " a", "a ", "Hello world", " Hello world",
    "Hello, world!", "I'm sure they'LL say it's DON'T, you've I'd", "'\u017ft odd \u017fs'\u017f caseless",
    "1 12 123 1234 12345 3.14159 \u0661\u0662\u0663 \u2167 \u00bd x\u00b2",
    "tabs\tand  double   triple    spaces \t \n  mixed", "trailing   ", "   leading", "line one\nline two\r\nline three\n\n\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // dot\n", "a_b-c.d/e\\f@g#h$i%j^k&l*m(n)o=p+q[r]s{t}u|v;w:x'y\"z",
    "F\u00fchrer na\u00efve caf\u00e9 cafe\u0301 A\u030angstro\u0308m \u1e9b\u0323", "\u041d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438",
    "\u6211\u4eec\u5728\u5b66\u4e60\uff0c\u4f60\u597d\u3002", "\u304b\u3099\u304c \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f",
    "\U0001f980\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \u2705\ufe0f (emoji) \U0001f999.cpp",
    "nbsp\u00a0here \u2003em \u3000ideographic \u180emongolian \u200bzero \u0085nel \u2028sep", "\ufeffbom \x00 nul \x7f del \x1b esc",
    "<|endoftext|>", "a<|im_start|>user\nhi<|im_end|>\n", "<think> not special </think>", "text <|im_start", "<|im_start|><|im_end|>",
    "x <mask> y", "x<mask>  y", "word tool_word tool word", " <strip>  after", "before  <strip>  after",
    "The quick brown fox jumps over the lazy dog. " * 4, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ab" * 100,
    "\u2581already \u2581 there", "<0x0A> bytes <0xff>", "\u00c5\u212b\ufb01 \u2460 \u1d2c\uff21",
]

ADDED = [
    AddedToken("<|endoftext|>", special=True), AddedToken("<|im_start|>", special=True),
    AddedToken("<|im_end|>", special=True), AddedToken("<think>", special=False, normalized=False),
    AddedToken("<mask>", special=True, lstrip=True), AddedToken("<strip>", special=True, rstrip=True),
    AddedToken("tool", special=False, single_word=True, normalized=True),
]


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(pre, corpus, vocab_size=700, normalizer=None, post=None, added=ADDED, **bpe):
    t = Tokenizer(models.BPE(**bpe))
    t.pre_tokenizer = pre
    if normalizer:
        t.normalizer = normalizer
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=GPT2_ALPHABET,
                                                      special_tokens=[], show_progress=False))
    t.add_tokens(added)
    if post:
        t.post_processor = post(t)
    return t


def last(use_regex=False, prefix=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def bos_and_eos(t):
    ids = [(name, t.token_to_id(name)) for name in ("<|im_start|>", "<|endoftext|>")]
    template = processors.TemplateProcessing(single="<|im_start|> $A <|endoftext|>", special_tokens=ids)
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def llama2(corpus, new_style):
    """SentencePiece's look in tokenizer.json: "▁" for spaces, <0xXX> for bytes."""
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=700, limit_alphabet=60, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]))
    j = json.loads(t.to_str())
    # The trainer lists the byte tokens as added tokens; in real files they are ordinary ones.
    j["added_tokens"] = [a for a in j["added_tokens"] if not a["content"].startswith("<0x")]
    j["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    if new_style:
        j["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    else:
        j["pre_tokenizer"] = None
        j["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    return Tokenizer.from_str(json.dumps(j))


def write_ids(name, tokenizer):
    tokenizer.no_truncation()  # as SmolLM2's file asks for
    cases = []
    for text in TEXTS:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        cases.append({"text": text, "ids": encoded.ids,
                      "with_special": tokenizer.encode(text, add_special_tokens=True).ids,
                      "decoded": tokenizer.decode(encoded.ids, skip_special_tokens=True)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    (OUT / f"{name}.ids.json").write_text(f"[\n{lines}\n]\n")


def write_small(name, tokenizer, old_merges=False):
    j = json.loads(tokenizer.to_str())
    if old_merges:
        j["model"]["merges"] = [" ".join(m) for m in j["model"]["merges"]]
    (OUT / f"{name}.json").write_text(json.dumps(j, ensure_ascii=True, separators=(",", ":")) + "\n")
    write_ids(name, Tokenizer.from_str(json.dumps(j)))


def main():
    OUT.mkdir(exist_ok=True)
    corpus = pathlib.Path(sys.argv[1]).read_text()[:200_000].split("\n") + TEXTS
    seq = pre_tokenizers.Sequence
    write_small("gpt2", byte_level(last(use_regex=True), corpus), old_merges=True)
    write_small("gpt2_prefix_space", byte_level(last(use_regex=True, prefix=True), corpus))
    write_small("llama3", byte_level(seq([split(LLAMA3), last()]), corpus, post=bos_and_eos, ignore_merges=True))
    write_small("qwen2", byte_level(seq([split(QWEN2), last()]), corpus, normalizer=normalizers.NFC()))
    write_small("smollm2", byte_level(seq([pre_tokenizers.Digits(individual_digits=True), last(use_regex=True)]), corpus,
                                      normalizer=normalizers.NFKC()))
    behaviors = [("removed", "merged_with_previous"), ("merged_with_next", "contiguous")]
    for i, (first, second) in enumerate(behaviors):
        pre = seq([split(r"[_|]", first), split(r"[aeiou]", second), pre_tokenizers.Punctuation(),
                   split(r"\S+", "isolated", invert=True), last()])
        write_small(f"behaviors{i + 1}", byte_level(pre, corpus, vocab_size=400, added=[]))
    write_small("metaspace", llama2(corpus, new_style=True))
    write_small("prepend_replace", llama2(corpus, new_style=False))
    if len(sys.argv) > 2:
        write_ids("smollm2_real", Tokenizer.from_file(sys.argv[2]))


if __name__ == "__main__":
    main()
