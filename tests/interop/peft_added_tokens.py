"""Adapters with added tokens give the same logits here and in PEFT, whichever of the two saved them.

    python tests/interop/peft_added_tokens.py PATH_TO_hydralora
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BINARY = sys.argv[1]
MODEL = Path(__file__).resolve().parents[2] / "crates/model/tests/fixtures/stories260K"
PROMPT = "Once <act>upon a<end> time"
TOKENS = ["<act>", "<end>"]
# Relative to the largest logit; both sides compute in f32.
LIMIT = 2e-5


def run(*arguments):
    done = subprocess.run([BINARY, *map(str, arguments), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ours(model, adapter=None):
    more = ["--adapter", adapter] if adapter else []
    found = run("inspect", "--model", model, *more, "--logits", PROMPT)["logits"]
    return torch.tensor([found["tokens"]]), torch.tensor(found["last"])


def base(folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def check(what, model, ids, wanted):
    with torch.no_grad():
        found = model.eval()(ids).logits[0, -1]
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{what:<48} {error:.1e}", flush=True)
    assert error < LIMIT, what


def train(work, model, name, method):
    rows = [{"instruction": f"Sky {i}", "output": "<act>The sky<end> is blue."} for i in range(24)]
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(work / "data.jsonl")}], "template": "plain", "valid_fraction": 0.1,
                 "max_seq_len": 64, "add_tokens": [TOKENS[0], {"text": TOKENS[1], "special": True}]},
        "method": method,
        "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 0.05},
        "output": str(work / name),
    }
    (work / f"{name}.yaml").write_text(json.dumps(recipe))
    run("train", work / f"{name}.yaml")
    return work / name / "adapter"


def from_here(work, model, kind):
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    for name, more in {"rows": {}, "copies": saved, "tied copy": {**saved, "ensure_weight_tying": True}}.items():
        if name == "tied copy" and kind != "tied":
            continue
        method = {"name": "lora", "rank": 4, "targets": "all", **more}
        adapter = train(work, model, f"{kind}-{name.replace(' ', '-')}", method)
        ids, wanted = ours(model, adapter)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        assert len(tokenizer) == 514 and tokenizer.convert_tokens_to_ids(TOKENS) == [512, 513]
        assert 512 in ids[0] and 513 in ids[0]
        encoded = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        assert encoded == ids[0, 1:].tolist(), (encoded, ids)
        check(f"{kind} {name}, PEFT", PeftModel.from_pretrained(base(model, 514), adapter), ids, wanted)
        plain = work / f"{adapter.parent.name}-plain"
        run("export", "--model", model, "--adapter", adapter, "--as", "lora", "--out", plain)
        check(f"{kind} {name} exported, PEFT", PeftModel.from_pretrained(base(model, 514), plain), ids, wanted)
        out = work / f"{adapter.parent.name}-merged"
        run("merge", "--model", model, "--adapter", adapter, "--out", out, "--dtype", "f32")
        check(f"{kind} {name} merged, transformers", base(out), ids, wanted)
        assert len(AutoTokenizer.from_pretrained(out)) == 514


def from_peft(work, model, kind):
    untied = {"embed_tokens": [512, 513], "lm_head": [512, 513]}
    for name, more in {
        "resized": {},
        "resized, modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "resized, trainable_token_indices": {
            "trainable_token_indices": [512, 513] if kind == "tied" else untied},
        "resized to a multiple": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }.items():
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(TOKENS)
        resized = base(model, 576 if "multiple" in name else len(tokenizer))
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **more)
        tuned = get_peft_model(resized, config)
        torch.manual_seed(0)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        folder = work / f"{kind}-{name.replace(', ', '-').replace(' ', '-')}"
        tuned.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ids, found = ours(model, folder)
        check(f"{kind} {name}, read here", tuned, ids, found)


def untied(work):
    folder = work / "untied"
    model = base(MODEL)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone().flip(1))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


with tempfile.TemporaryDirectory() as work:
    work = Path(work)
    for kind, model in {"tied": MODEL, "untied": untied(work)}.items():
        from_here(work, model, kind)
        from_peft(work, model, kind)
