"""What hydralora trains, merges and exports gives the same logits in PEFT and transformers.

    python tests/interop/peft_roundtrip.py PATH_TO_hydralora

PEFT's adapters in hydralora are the other half: crates/cli/tests/it/interop.rs, on fixtures of make_fixtures.py.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Glm4Config, Phi3Config

BINARY = sys.argv[1]
MODEL = Path(__file__).resolve().parents[2] / "crates/model/tests/fixtures/stories260K"
PROMPT = "Once upon a time"
# Relative to the largest logit; both sides compute in f32.
LIMIT = 2e-5
METHODS = {
    "lora": {"rank": 4, "targets": "all"},
    "rslora": {"name": "lora", "rank": 4, "use_rslora": True},
    "dora": {"name": "lora", "rank": 4, "use_dora": True},
    "pissa": {"name": "lora", "rank": 4, "init_lora_weights": "pissa"},
    "adalora": {"init_r": 4, "target_r": 2},
    "ia3": {},
    "prompt-tuning": {"num_virtual_tokens": 4},
    "p-tuning": {"num_virtual_tokens": 4},
    "prefix-tuning": {"num_virtual_tokens": 4},
    "hydralora": {"rank": 2, "num_experts": 3, "targets": "ffn"},
    "rlora": {"name": "hydralora", "rank": 2, "num_experts": 3, "init_lora_weights": "rlora", "gate": "uniform"},
}
MERGED = ["lora", "rslora", "dora", "pissa", "adalora", "ia3", "rlora"]
# Large steps spoil these two, and then single precision tells one order of sums from another.
RATES = {"pissa": 0.005, "rlora": 0.02}
# What PEFT has no method for is exported as a LoRA.
EXPORTED = ["hydralora", "rlora"]
# Families whose layers are fused get what differs there, on small random models.
FUSED = {"phi3": Phi3Config, "glm4": Glm4Config}
ON_FUSED = ["lora", "dora", "ia3", "hydralora"]


def fused(name, folder):
    """A small random model of a family with the tokenizer of the other one."""
    torch.manual_seed(11)
    config = FUSED[name](
        vocab_size=512, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.15, tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def run(*arguments):
    done = subprocess.run([BINARY, *map(str, arguments), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ours(model, adapter=None):
    more = ["--adapter", adapter] if adapter else []
    found = run("inspect", "--model", model, *more, "--logits", PROMPT)["logits"]
    return torch.tensor([found["tokens"]]), torch.tensor(found["last"])


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check(what, model, ids, wanted):
    model.eval()
    with torch.no_grad():
        found = model(ids).logits[0, -1]
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{what:<40} {error:.1e}", flush=True)
    assert error < LIMIT, what


def roundtrip(model, name, work, data):
    options = METHODS[name]
    plain = ours(model)[1]
    work.mkdir(exist_ok=True)
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(data)}], "template": "plain", "valid_fraction": 0.1, "max_seq_len": 64},
        "method": {"name": name, **options},
        "train": {"batch_size": 4, "max_steps": 6, "learning_rate": RATES.get(name, 0.05)},
        "output": str(work / name),
    }
    (work / f"{name}.yaml").write_text(json.dumps(recipe))
    run("train", work / f"{name}.yaml")
    adapter = work / name / "adapter"
    ids, wanted = ours(model, adapter)
    what = f"{work.name}: {name}"
    assert (wanted - plain).abs().max() > 1e-2, f"{what} learned nothing"
    if name in EXPORTED:
        out = work / f"{name}-exported"
        run("export", "--adapter", adapter, "--as", "lora", "--gate", "uniform", "--out", out)
        exported = ours(model, out)
        check(f"{what} export, PEFT", PeftModel.from_pretrained(base(model), out), *exported)
    else:
        check(f"{what}, PEFT", PeftModel.from_pretrained(base(model), adapter), ids, wanted)
    if name == "hydralora" and model == MODEL:
        run("export", "--adapter", adapter, "--as", "hydralora-official", "--out", work / "official")
        saved = torch.load(work / "official/adapter_model.bin", weights_only=True)
        assert len(saved) == 5 * 3 * (1 + 3 + 1), len(saved)
        _, again = ours(model, work / "official")
        _, own = ours(model, adapter)
        assert (again - own).abs().max() < 1e-5
        print("hydralora official, torch.load   ok", flush=True)
    if name in MERGED:
        out = work / f"{name}-merged"
        run("merge", "--model", model, "--adapter", adapter, "--out", out, "--dtype", "f32")
        check(f"{what} merged, transformers", base(out), ids, wanted)


with tempfile.TemporaryDirectory() as work:
    work = Path(work)
    rows = [{"instruction": f"Sky {i}", "output": "The sky is blue."} for i in range(24)]
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in METHODS:
        roundtrip(MODEL, name, work / "llama", data)
    for family in FUSED:
        model = fused(family, work / f"{family}-model")
        for name in ON_FUSED:
            roundtrip(model, name, work / family, data)
