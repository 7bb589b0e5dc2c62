"""Makes a corpus of seeds for every fuzz target under fuzz/corpus, from files of the repository and
small made ones. Needs nothing but Python 3; run it again at any time, it only adds and replaces.

    python3 fuzz/seeds.py
"""

import gzip
import json
import struct
import zipfile
from io import BytesIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STORIES = ROOT / "crates/model/tests/fixtures/stories260K"
CONVERTED = ROOT / "crates/model/tests/fixtures/llama_cpp"
INTEROP = ROOT / "crates/cli/tests/fixtures/interop"
SAMPLE = ROOT / "data/eval-sample"
# As in src/lib.rs.
SEPARATOR = b"\0--\0"


def seed(target, name, *parts):
    """Writes one seed out of files; a path stands for its content."""
    parts = [p.read_bytes() if isinstance(p, Path) else p for p in parts]
    parts = [p.encode() if isinstance(p, str) else p for p in parts]
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(SEPARATOR.join(parts))


def kind(number, content):
    """A file behind the byte that chooses what it is."""
    return bytes([number]) + (content.read_bytes() if isinstance(content, Path) else content)


# A model of two blocks, as narrow as `sites` in src/lib.rs has it.

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 512,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROJECTIONS = {
    "self_attn.q_proj": ("attn_q", 4, 4),
    "self_attn.k_proj": ("attn_k", 2, 4),
    "self_attn.v_proj": ("attn_v", 2, 4),
    "self_attn.o_proj": ("attn_output", 4, 4),
    "mlp.gate_proj": ("ffn_gate", 6, 4),
    "mlp.up_proj": ("ffn_up", 6, 4),
    "mlp.down_proj": ("ffn_down", 4, 6),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def model_tensors(vocabulary, gguf=False):
    """Names and shapes of the model's tensors."""
    named = lambda own, other: other if gguf else own
    tensors = {
        named("model.embed_tokens.weight", "token_embd.weight"): [vocabulary, 4],
        named("model.norm.weight", "output_norm.weight"): [4],
    }
    for layer in range(2):
        prefix = named(f"model.layers.{layer}.", f"blk.{layer}.")
        for own, (other, out, inputs) in PROJECTIONS.items():
            tensors[f"{prefix}{named(own, other)}.weight"] = [out, inputs]
        for own, other in NORMS.items():
            tensors[f"{prefix}{named(own, other)}.weight"] = [4]
    return tensors


def size(shape):
    product = 1
    for extent in shape:
        product *= extent
    return product


def numbers(count):
    return [0.125 * (i % 7 - 3) for i in range(count)]


WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def safetensors(tensors, dtype="F32"):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, shape in tensors.items():
        count = size(shape)
        if dtype in ("F64", "F32", "F16"):
            letter = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
            content = struct.pack(f"<{count}{letter}", *numbers(count))
        else:
            content = bytes(count * WIDTHS[dtype])
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def gguf(metadata, tensors, version=3, fmt=0, data=None):
    """`metadata`: key to (type number, packed value); `fmt` is GGML's number of a format."""
    text = lambda t: struct.pack("<Q", len(t.encode())) + t.encode()
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (number, value) in metadata.items():
        out += text(key) + struct.pack("<I", number) + value
    at, content = 0, b""
    for name, shape in tensors.items():
        count = size(shape)
        bytes_ = data(count) if data else struct.pack(f"<{count}f", *numbers(count))
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", fmt, at)
        bytes_ += bytes(-len(bytes_) % 32)
        content += bytes_
        at += len(bytes_)
    return out + bytes(-len(out) % 32) + content


def gguf_string(text):
    return (8, struct.pack("<Q", len(text.encode())) + text.encode())


def gguf_u32(value):
    return (4, struct.pack("<I", value))


def gguf_f32(value):
    return (6, struct.pack("<f", value))


def gguf_array(number, items):
    pack = {
        8: lambda v: struct.pack("<Q", len(v.encode())) + v.encode(),
        5: lambda v: struct.pack("<i", v),
        6: lambda v: struct.pack("<f", v),
    }[number]
    return (9, struct.pack("<IQ", number, len(items)) + b"".join(map(pack, items)))


def gguf_config(vocabulary):
    return {
        "general.architecture": gguf_string("llama"),
        "llama.context_length": gguf_u32(32),
        "llama.embedding_length": gguf_u32(4),
        "llama.block_count": gguf_u32(2),
        "llama.feed_forward_length": gguf_u32(6),
        "llama.attention.head_count": gguf_u32(2),
        "llama.attention.head_count_kv": gguf_u32(1),
        "llama.attention.layer_norm_rms_epsilon": gguf_f32(1e-5),
        "llama.vocab_size": gguf_u32(vocabulary),
    }


def gguf_tokenizer(model):
    plain = {
        "tokenizer.ggml.model": gguf_string(model),
        "tokenizer.ggml.bos_token_id": gguf_u32(1),
        "tokenizer.ggml.eos_token_id": gguf_u32(2),
        "tokenizer.chat_template": gguf_string("{{ messages[0].content }}"),
    }
    if model == "llama":
        tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "o", "n", "on", "\u2581on"]
        plain["tokenizer.ggml.scores"] = gguf_array(6, [0.0] * 7 + [-1.0, -2.0])
        plain["tokenizer.ggml.token_type"] = gguf_array(5, [2, 3, 3, 6, 1, 1, 1, 1, 1])
    else:
        tokens = ["<unk>", "<s>", "</s>", "\u0120", "o", "n", "on", "\u0120on", "1"]
        plain["tokenizer.ggml.merges"] = gguf_array(8, ["o n", "\u0120 on"])
        plain["tokenizer.ggml.pre"] = gguf_string("llama-bpe")
        plain["tokenizer.ggml.token_type"] = gguf_array(5, [2, 3, 3, 1, 1, 1, 1, 1, 1])
    plain["tokenizer.ggml.tokens"] = gguf_array(8, tokens)
    return plain, len(tokens)


def gguf_seeds():
    for model in ["llama", "gpt2"]:
        tokenizer, vocabulary = gguf_tokenizer(model)
        tensors = model_tensors(vocabulary, gguf=True)
        seed("gguf", model, gguf({**gguf_config(vocabulary), **tokenizer}, tensors))
    for converted in sorted(CONVERTED.glob("*.gguf")):
        seed("gguf", converted.stem, converted)
    odd = {"a": (10, bytes(8)), "b": (7, b"\1"), "c": (12, bytes(8)), "d": (0, b"\1")}
    odd["nested"] = (9, struct.pack("<IQIQ", 9, 1, 0, 2) + b"ab")
    odd["general.alignment"] = gguf_u32(64)
    seed("gguf", "odd", gguf(odd, {}))
    # Q8_0: blocks of 32 numbers in 34 bytes; Q4_0: in 18; MXFP4: in 17; the K formats: 256 in 84 to
    # 210; IQ4_XS: in 136.
    formats = [(8, 32, 34), (2, 32, 18), (39, 32, 17), (10, 256, 84), (11, 256, 110)]
    formats += [(12, 256, 144), (14, 256, 210), (23, 256, 136)]
    for fmt, block, width in formats:
        blocks = lambda count: bytes(count // block * width)
        seed("gguf", f"format{fmt}", gguf({}, {"t": [2, block]}, fmt=fmt, data=blocks))
    tokenizer, vocabulary = gguf_tokenizer("llama")
    tensors = list(model_tensors(vocabulary, gguf=True).items())
    marks = lambda part: {
        "split.no": gguf_u32(part),
        "split.count": gguf_u32(2),
        "split.tensors.count": gguf_u32(len(tensors)),
    }
    first = {**gguf_config(vocabulary), **tokenizer, **marks(0)}
    seed("gguf_split", "two", gguf(first, dict(tensors[:5])), gguf(marks(1), dict(tensors[5:])))


def model_seeds():
    tensors = model_tensors(512)
    config = json.dumps(CONFIG)
    weights = safetensors(tensors, "F16")
    seed("safetensors", "model", safetensors(model_tensors(8)))
    for dtype in WIDTHS:
        seed("safetensors", dtype, safetensors({"a": [2, 3], "b": [1]}, dtype))
    seed("safetensors", "empty", safetensors({"a": [0, 3], "b": []}))
    seed("model_config", "config", config)
    seed("model_config", "stories", STORIES / "config.json")
    llama3 = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    seed("model_config", "llama3", json.dumps({**CONFIG, "rope_scaling": llama3}))
    mistral = {**CONFIG, "model_type": "mistral", "sliding_window": 8}
    seed("model_config", "mistral", json.dumps(mistral))
    stops = json.dumps({"eos_token_id": [2, 3]})
    deep = json.dumps({**CONFIG, "num_hidden_layers": 1 << 31})
    seed("model_config", "deep", deep)
    lora = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
                       "task_type": "CAUSAL_LM", "base_model_name_or_path": "m"})
    metadata = json.dumps({"version": "0.1.0", "base_model": "m", "base_fingerprint": "00",
                           "chat_template": None, "end_tokens": ["</s>"]})
    pairs = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        pairs |= {f"{prefix}.lora_A.weight": [2, 4], f"{prefix}.lora_B.weight": [4, 2]}
    for name, text in [("lora", config), ("deep", deep)]:
        seed("merge", name, text, lora, metadata, safetensors(pairs, "F16"))
    seed("model_config", "whole", config, stops, "{}", weights)
    index = json.dumps({"weight_map": {name: "model.safetensors" for name in tensors}})
    seed("model_config", "sharded", config, stops, index, weights)


TINY_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(["<unk>", "<s>", "</s>"])
    ],
}
TINY_VOCABULARY = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "o", "n", "on", "\u0120"])}


def tokenizer_seeds():
    special = json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    seed("tokenizer", "stories", STORIES / "tokenizer.json", STORIES / "tokenizer_config.json")
    bpe = {"type": "BPE", "unk_token": "<unk>", "vocab": TINY_VOCABULARY, "merges": ["o n"]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+"}, "behavior": "Isolated",
        "invert": False,
    }
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
        "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}, "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    whole = {
        **TINY_TOKENIZER, "normalizer": {"type": "NFC"}, "model": bpe, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": template,
    }
    rest = [special, special, json.dumps({"eos_token_id": 2}), "{{ messages }}"]
    seed("tokenizer", "bpe", json.dumps(whole), *rest)
    models = {
        "wordpiece": {"type": "WordPiece", "unk_token": "<unk>", "max_input_chars_per_word": 100,
                      "continuing_subword_prefix": "##", "vocab": TINY_VOCABULARY},
        "wordlevel": {"type": "WordLevel", "unk_token": "<unk>", "vocab": TINY_VOCABULARY},
        "unigram": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                    "vocab": [[t, -float(i)] for t, i in TINY_VOCABULARY.items()]},
    }
    for name, model in models.items():
        seed("tokenizer", name, json.dumps({**TINY_TOKENIZER, "model": model}), *rest[:1])
    parts = {
        "normalizers": {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "_"}, {"type": "Lowercase"}, {"type": "StripAccents"},
            {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"},
            {"type": "Strip", "strip_left": True, "strip_right": False}]}},
        "cutters": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, {"type": "WhitespaceSplit"},
            {"type": "Punctuation", "behavior": "Isolated"},
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}]}},
        "decoders": {"decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "WordPiece", "prefix": "##",
             "cleanup": True}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}},
    }
    double = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
    for count in (2, 40):
        kinds = {"normalizer": "normalizers", "decoder": "decoders"}
        parts |= {f"{kind}{count}": {kind: {"type": "Sequence", names: [double] * count}}
                  for kind, names in kinds.items()}
    for name, part in parts.items():
        seed("tokenizer", name, json.dumps({**TINY_TOKENIZER, "model": bpe, **part}), *rest[:1])


def foreign_tokenizer_seeds():
    for folder in sorted((ROOT / "crates/model/tests/fixtures/tokenizers").iterdir()):
        for number, name in enumerate(("tokenizer.model", "tekken.json")):
            if (folder / name).is_file():
                seed("foreign_tokenizer", folder.name, kind(number, folder / name))


def adapter_seeds():
    metadata = json.dumps({
        "version": "0.1.0", "base_model": "m", "base_fingerprint": "00", "chat_template": None,
        "end_tokens": ["</s>"],
    })
    for folder in sorted(INTEROP.iterdir()):
        tensors = folder / "adapter_model.safetensors"
        if not tensors.exists():
            continue
        small = [tensors] if tensors.stat().st_size < 1024 else []
        seed("adapter", folder.name, folder / "adapter_config.json", metadata, *small)
    common = {"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": "m"}
    lora = {**common, "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
            "bias": "none", "task_type": "CAUSAL_LM"}
    layers = [(layer, name) for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
    prefix = lambda layer, name: f"base_model.model.model.layers.{layer}.{name}"
    pairs, heads, scales = {}, {}, {}
    for layer, name in layers:
        _, out, inputs = PROJECTIONS[name]
        pairs[f"{prefix(layer, name)}.lora_A.weight"] = [2, inputs]
        pairs[f"{prefix(layer, name)}.lora_B.weight"] = [out, 2]
        heads[f"{prefix(layer, name)}.lora_A.weight"] = [2, inputs]
        heads[f"{prefix(layer, name)}.lora_route.weight"] = [2, inputs]
        for head in range(2):
            heads[f"{prefix(layer, name)}.lora_B{head}.weight"] = [out, 2]
        feed = name.startswith("mlp")
        scales[f"{prefix(layer, name)}.ia3_l"] = [1, inputs] if feed else [out, 1]
    pack = lambda tensors: safetensors(tensors, "F16")
    seed("adapter", "small_lora", json.dumps(lora), metadata, pack(pairs))
    dora = {**pairs, **{f"{prefix(*layer)}.lora_magnitude_vector": [4] for layer in layers}}
    seed("adapter", "small_dora", json.dumps({**lora, "use_dora": True}), metadata, pack(dora))
    official = {**lora, "lora_nums": 2}
    seed("adapter", "small_hydralora", json.dumps(official), metadata, pack(heads))
    ia3 = {**common, "peft_type": "IA3", "feedforward_modules": ["down_proj"]}
    seed("adapter", "small_ia3", json.dumps(ia3), metadata, pack(scales))
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 4,
              "task_type": "CAUSAL_LM", "num_layers": 2, "num_attention_heads": 2}
    prompts = pack({"prompt_embeddings": [3, 4]})
    seed("adapter", "small_prompt", json.dumps(prompt), metadata, prompts)
    seed("safetensors", "adapter", safetensors(pairs))


def pickle_program(entries):
    """The program that torch.save writes for named tensors `[count]` in storages of their own."""
    text = lambda t: b"X" + struct.pack("<I", len(t.encode())) + t.encode()
    out = b"\x80\x02}q\x00("
    for key, (name, storage, count) in enumerate(entries):
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(str(key))
        out += text("cpu") + b"K" + bytes([count]) + b"tQK\x00K" + bytes([count])
        out += b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    return out + b"u."


def pickle_seeds():
    one = pickle_program([("a.lora_A.weight", "FloatStorage", 4)])
    seed("pickle", "one", one, struct.pack("<4f", *numbers(4)))
    two = pickle_program([("a", "HalfStorage", 2), ("b", "DoubleStorage", 1)])
    seed("pickle", "two", two, struct.pack("<2e", 1, 2), struct.pack("<d", 3))
    seed("pickle", "memo", b"\x80\x02}(X\x01\x00\x00\x00aK\x01q\x01h\x01\x86\x87u.")
    for folder in sorted(INTEROP.glob("official_*")):
        if not zipfile.is_zipfile(folder / "adapter_model.bin"):
            continue
        with zipfile.ZipFile(folder / "adapter_model.bin") as file:
            name = next(n for n in file.namelist() if n.endswith("data.pkl"))
            seed("pickle", folder.name, file.read(name))
    seed("pickle", "evil", INTEROP / "official_evil/adapter_model.bin")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        out = BytesIO()
        with zipfile.ZipFile(out, "w", method) as file:
            file.writestr("m/data.pkl", one)
            file.writestr("m/data/0", struct.pack("<4f", *numbers(4)))
        seed("pickle", f"zip{method}", out.getvalue())


def text_seeds():
    for path in sorted((ROOT / "crates/data/templates").glob("*.jinja")):
        seed("chat_template", path.stem, path)
    cases = json.loads((ROOT / "crates/data/tests/fixtures/templates.json").read_text())
    queue, count = [cases], 0
    while queue:
        value = queue.pop()
        queue += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        if isinstance(value, str) and "{%" in value:
            seed("chat_template", f"case{count}", value)
            count += 1
    # Lists that hold others twice, namespaces, trees without a bracket: what ordinary templates lack.
    start = "{% set ns = namespace(l=[0], m=[1]) %}"
    twice = "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = (ns.m, ns.m) %}{% endfor %}"
    walks = ["ns.l ~ ''", "ns.l | upper", "ns.l == ns.m", "{ns.l: 1}", "[ns.l] | unique", "ns.l | pprint",
             "ns.l in [ns.m]", "'%s' % ns.l", "'{}'.format(ns.l)", "[ns.l, ns.m] | sort"]
    for number, walk in enumerate(walks):
        seed("chat_template", f"walk{number}", start + twice + "{{ " + walk + " }}")
    seed("chat_template", "own", "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}")
    for name, part in [("minus", "-"), ("not", "not "), ("plus", "1 + "), ("tilde", "1 ~ "), ("power", "1 ** ")]:
        seed("chat_template", f"deep_{name}", "{{ " + part * 1500 + "1 }}")
    seed("chat_template", "deep_elif", "{% if 0 %}" + "{% elif 0 %}" * 500 + "{% endif %}")
    seed("chat_template", "wide", "{{ '{:1000000000}'.format(1) }}{{ '%1000000000d' % 1 }}")
    seed("chat_template", "blocks", "{% macro f(a, b=[1]) %}{{ caller(a) }}{% endmacro %}{% call(x) f(1) %}"
         "{{ x }}{% endcall %}{% filter upper | trim %}a{% endfilter %}{% set y | upper %}b{% endset %}"
         "{% with (a, b) = (1, 2), c = 3 %}{{ a ~ b ~ c }}{% endwith %}{% do ns.f() %}"
         "{% for k, (v, w) in [(1, (2, 3))] if k recursive %}{{ loop.index }}{% else %}{% endfor %}")
    seed("chat_template", "filters", "{{ messages | map(attribute='content') | join('\\n') | trim | "
         "upper | replace('A', 'b') }}{{ '%05.2f' | format(1.5) }}{% macro f(x) %}{{ x * 3 }}"
         "{% endmacro %}{{ f('ab') }}{{ messages[0].content.split(' ')[:2] | tojson(indent=2) }}"
         "{{ strftime_now('%d %b %Y') }}{% for i in range(3) %}{{ loop.index }}{% endfor %}")
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        seed("recipe", path.stem, path)


def data_seeds():
    lines = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"prompt": "a", "completion": "b"},
        {"text": "a text"},
        {"question": "q", "answer": "a", "domain": "d"},
    ]
    for number, line in enumerate(lines):
        text = json.dumps(line).encode()
        seed("data", f"array{number}", kind(0, b"[" + text + b"," + text + b"]"))
        seed("data", f"lines{number}", kind(1, text + b"\n" + text + b"\n"))
        header = ",".join(line).encode()
        row = ",".join(f'"{v}"' for v in line.values() if isinstance(v, str)).encode()
        seed("data", f"csv{number}", kind(2, header + b"\n" + row + b"\n"))
        seed("data", f"tsv{number}", kind(3, (header + b"\n" + row).replace(b",", b"\t")))
        seed("data", f"gz{number}", kind(6, gzip.compress(text + b"\n", mtime=0)))
    task = {"Definition": ["Add."], "Positive Examples": [], "Negative Examples": [],
            "Instances": [{"id": "1", "input": "1 2", "output": ["3"]}]}
    seed("data", "instructions", kind(0, json.dumps(task).encode()))
    seed("data", "columns", kind(0, json.dumps({"data": lines[:1]}).encode()))
    seed("data", "text", kind(5, b"A text.\n\nAnother one.\n"))
    # A zstd frame of one raw block, which needs no compressor.
    raw = json.dumps(lines[3]).encode() + b"\n"
    header = (len(raw) << 3 | 1).to_bytes(3, "little")
    frame = b"\x28\xb5\x2f\xfd\x20" + bytes([len(raw)]) + header + raw
    seed("data", "zst", kind(7, frame))
    for path in sorted((ROOT / "crates/data/tests/fixtures").glob("*.parquet")):
        seed("data", path.stem, kind(4, path))
    for path in sorted((ROOT / "data/sample").glob("*.jsonl")):
        seed("data", path.stem, kind(1, b"".join(path.read_bytes().splitlines(True)[:2])))


def benchmark_seeds():
    join = lambda *paths: SEPARATOR.join(p.read_bytes() for p in paths)
    for subject in ["astronomy", "international_law"]:
        dev = SAMPLE / f"mmlu/dev/{subject}_dev.csv"
        test = SAMPLE / f"mmlu/test/{subject}_test.csv"
        for number in (0, 1):
            seed("benchmark", f"mmlu{number}_{subject}", kind(number, join(dev, test)))
    train, test = SAMPLE / "gsm8k/train.jsonl", SAMPLE / "gsm8k/test.jsonl"
    seed("benchmark", "gsm8k", kind(2, join(train, test)))
    for task in ["navigate", "object_counting"]:
        files = join(SAMPLE / f"bbh/cot-prompts/{task}.txt", SAMPLE / f"bbh/tasks/{task}.json")
        seed("benchmark", f"bbh_{task}", kind(3, files))
    problems = (SAMPLE / "humaneval/HumanEval.jsonl").read_bytes()
    seed("benchmark", "humaneval", kind(4, b"".join(problems.splitlines(True)[:1])))
    seed("benchmark", "humaneval_gz", kind(7, gzip.compress(problems, mtime=0)))
    for name, line in [("prompt", {"prompt": "a", "completion": "b"}),
                       ("chat", {"instruction": "Add.", "input": "1", "output": "3"})]:
        text = json.dumps(line).encode() + b"\n"
        seed("benchmark", f"exact_{name}", kind(5, text * 2))
        seed("benchmark", f"loss_{name}", kind(6, text * 2))
    for number, file in [(9, "choices/everyday.jsonl"), (10, "rouge/summaries.jsonl")]:
        for index, line in enumerate((SAMPLE / file).read_bytes().splitlines(True)[::3]):
            seed("benchmark", f"{Path(file).stem}_{index}", kind(number, line * 2))
    seed("benchmark", "humaneval_instruct", kind(11, b"".join(problems.splitlines(True)[:1])))
    hub = ROOT / "crates/run/tests/fixtures/hub/openai--gsm8k/main"
    shards = join(hub / "train-00000-of-00001.parquet", hub / "test-00000-of-00002.parquet")
    seed("benchmark", "gsm8k_parquet", kind(8, shards))


def results_seeds():
    results = {
        "config": {"model": "m"}, "results": {}, "group_subtasks": {"g": ["t", "u"]},
        "configs": {"t": {"num_fewshot": 5, "data_sha256": {"f": "0"}}},
        "scores": {
            "t": {"doc_id": [0, 1, 2], "acc,none": [1.0, 0.0, 1.0]},
            "u": {"doc_id": [0, 3], "acc,none": [0.0, 1.0], "weight": [2.0, 1.0]},
        },
    }
    other = json.loads(json.dumps(results).replace("1.0, 0.0, 1.0", "1.0, 1.0, 0.0"))
    log = [
        {"run": {"model": "m"}},
        {"model": "m", "task": "t", "doc_id": 0, "prompt_hash": "00",
         "scores": {"acc,none": {"value": 1.0, "weight": 1.0, "filtered": "A"}}},
    ]
    lines = "".join(json.dumps(line) + "\n" for line in log)
    seed("results", "pair", json.dumps(results), json.dumps(other))
    seed("results", "log", json.dumps(results), json.dumps(other), lines)
    metrics = {"step": 1, "loss": 2.5, "learning_rate": 1e-4}
    seed("results", "metrics", json.dumps(metrics) + "\n" + json.dumps(metrics) + "\n")


def http_seeds():
    bodies = json.loads((ROOT / "crates/serve/tests/fixtures/bodies.json").read_text())
    # As ADDRESSES in crates/serve/tests/it/client.rs.
    addresses = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize",
                 "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    for number, (address, body) in enumerate(bodies):
        body = json.dumps(body).encode()
        seed("http", f"body{number}", bytes([addresses.index(address)]) + body)
        head = f"POST {address} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        seed("http", f"raw{number}", b"\xff" + f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    chunks = b"transfer-encoding: chunked\r\n\r\n5\r\n{\"tok\r\n9\r\nens\": [1]}\r\n0\r\n\r\n"
    seed("http", "chunks", b"\xffPOST /detokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" + chunks)
    for path in ("/", "/health", "/metrics", "/version", "/v1/models", "/v1/models/a%20b", "/v1/lora_adapters"):
        seed("http", f"get{path.replace('/', '_')}", f"\u00ffGET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode("latin-1"))


for make in (gguf_seeds, model_seeds, tokenizer_seeds, foreign_tokenizer_seeds, adapter_seeds,
             pickle_seeds, text_seeds, data_seeds, benchmark_seeds, results_seeds,
             http_seeds):
    make()
for folder in sorted((HERE / "corpus").iterdir()):
    print(f"{folder.name}: {len(list(folder.iterdir()))} files")
