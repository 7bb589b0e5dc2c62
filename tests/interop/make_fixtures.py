"""Adapters made by PEFT and PyTorch on stories260K, and the logits they give.

    python tests/interop/make_fixtures.py
"""
import json
import shutil
from pathlib import Path

import torch
from peft import (AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig,
                  PromptTuningConfig, get_peft_model)
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "crates/model/tests/fixtures/stories260K"
OUT = ROOT / "crates/cli/tests/fixtures/interop"
# "Once upon a time" with the first token before it.
TOKENS = [1, 403, 407, 261, 378]
IDS = torch.tensor([TOKENS])


def base():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def randomise(model, scale=0.2):
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)


def last(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits[0, -1].tolist()


def save(model, name):
    model.save_pretrained(OUT / name)
    shutil.rmtree(OUT / name / "runs", ignore_errors=True)
    (OUT / name / "README.md").unlink(missing_ok=True)
    path = OUT / name / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "stories260K"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


shutil.rmtree(OUT, ignore_errors=True)
OUT.mkdir(parents=True)
logits = {}
common = {"task_type": "CAUSAL_LM"}
configs = {
    "lora": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], **common),
    "lora_rslora": LoraConfig(r=3, lora_alpha=4, use_rslora=True, target_modules=["k_proj"], **common),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, total_step=10, target_modules=["v_proj", "up_proj"],
                             **common),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **common),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=3, **common),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **common),
    "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=3, **common),
}
for name, config in configs.items():
    torch.manual_seed(1)
    model = get_peft_model(base(), config)
    randomise(model)
    logits[name] = last(model)
    save(model, name)

# Two LoRAs and what PEFT makes of them.
for index, name in enumerate(["compose_a", "compose_b"]):
    torch.manual_seed(20 + index)
    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=4 + 2 * index, target_modules=["q_proj"], **common))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn_like(parameter)
    save(model, name)
weights = [0.7, -0.4]
ways = {"linear": {}, "cat": {}, "svd": {"svd_rank": 3}, "ties": {"density": 0.5}}
for way, options in ways.items():
    model = PeftModel.from_pretrained(base(), OUT / "compose_a", adapter_name="a")
    model.load_adapter(OUT / "compose_b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=way, **options)
    model.set_adapter("both")
    logits[f"compose_{way}"] = last(model)

# The published codes' layers: y += sum_i softmax(route x)_i B_i A_i x * alpha / r.
def published(name, own_a, dtype, torch_format):
    r, n, alpha = 2, 3, 8
    model, tensors = base(), {}
    torch.manual_seed(30)
    targets = ["gate_proj", "down_proj"]
    for path, layer in model.named_modules():
        if not path.endswith(tuple(targets)):
            continue
        wide, out = layer.in_features, layer.out_features
        draw = lambda *shape: (0.3 * torch.randn(*shape)).to(dtype)
        a = [draw(r, wide) for _ in range(n if own_a else 1)]
        b, route = [draw(out, r) for _ in range(n)], draw(n, wide)
        prefix = f"base_model.model.{path}"
        for i, tensor in enumerate(a):
            tensors[f"{prefix}.lora_A{i if own_a else ''}.weight"] = tensor
        for i, tensor in enumerate(b):
            tensors[f"{prefix}.lora_B{i}.weight"] = tensor
        tensors[f"{prefix}.lora_route.weight"] = route

        def add(module, inputs, y, a=a, b=b, route=route):
            x = inputs[0]
            gate = torch.softmax(x @ route.float().T, -1)
            for i in range(n):
                y = y + gate[..., i, None] * (x @ a[i if own_a else 0].float().T @ b[i].float().T) * (alpha / r)
            return y

        layer.register_forward_hook(add)
    logits[name] = last(model)
    folder = OUT / name
    folder.mkdir()
    config = {
        "base_model_name_or_path": "stories260K", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": alpha, "lora_dropout": 0.05, "lora_nums": n, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": r, "target_modules": targets, "task_type": "CAUSAL_LM",
    }
    if own_a:
        config |= {"blc_alpha": 0.1, "blc_weight": 0.01}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.save(tensors, folder / "adapter_model.bin", _use_new_zipfile_serialization=torch_format)


published("official_hydralora", False, torch.float32, True)
published("official_hydralora_bf16", False, torch.bfloat16, True)
published("official_hydralora_legacy", False, torch.float16, False)
published("official_loramoe", True, torch.float16, True)

class Program:
    def __reduce__(self):
        return print, ("a pickle is a program",)


(OUT / "official_evil").mkdir()
shutil.copy(OUT / "official_hydralora/adapter_config.json", OUT / "official_evil")
torch.save({"a": Program()}, OUT / "official_evil/adapter_model.bin")
(OUT / "logits.json").write_text(json.dumps({"tokens": TOKENS, "logits": logits}) + "\n")
