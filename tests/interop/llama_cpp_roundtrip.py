"""What hydralora merges and exports, read by llama.cpp: logits after a prompt, and greedy text.

    python tests/interop/llama_cpp_roundtrip.py PATH_TO_hydralora [--model smollm2-135m] [--methods lora,hydralora]
        [--work FOLDER]

Needs llama-cpp-python (tried with the version that tests/interop/README.md names), numpy and safetensors. Every file is
read by both programs, which are given the same token ids, so that what differs is the arithmetic: llama.cpp rounds
activations to the weights' precision, half precision for F16 and blocks of 8 bits for Q8_0, and hydralora does not.
Exit status 1 if a difference is above its limit.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import llama_cpp
import numpy
import safetensors.numpy

TINY = pathlib.Path(__file__).resolve().parents[2] / "crates/model/tests/fixtures/stories260K"
PROMPT = "Once upon a time there was a"
NEW_TOKENS = 32
# Of the largest logit.
LIMITS = {"f32": 1e-4, "f16": 1e-2, "q8_0": 8e-2}
METHODS = {
    "lora": {"name": "lora", "rank": 8, "targets": "all"},
    "dora": {"name": "lora", "rank": 8, "targets": "all", "use_dora": True},
    "pissa": {"name": "lora", "rank": 8, "targets": "all", "init_lora_weights": "pissa"},
    "adalora": {"name": "adalora", "init_r": 6, "target_r": 4},
    "ia3": {"name": "ia3"},
    "hydralora": {"name": "hydralora", "rank": 4, "num_experts": 3, "targets": "all"},
    "rlora": {"name": "hydralora", "rank": 4, "num_experts": 3, "targets": "all", "init_lora_weights": "rlora"},
}
RATES = {"adalora": 0.05, "ia3": 0.05, "pissa": 0.0005}
ROUTED = ["hydralora", "rlora"]
# What is no product of thin matrices is no LoRA.
NO_LORA = ["dora", "ia3"]


class Programs:
    def __init__(self, binary):
        self.binary = binary
        self.failed = []

    def run(self, *arguments):
        command = [self.binary, *map(str, arguments), "--json", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return json.loads(done.stdout)

    def logits(self, model, adapter=None):
        more = ["--adapter", adapter] if adapter else []
        found = self.run("inspect", "--model", model, *more, "--logits", PROMPT)["logits"]
        return found["tokens"], numpy.array(found["last"])

    def text(self, model, adapter=None):
        more = ["--adapter", adapter] if adapter else []
        more += ["--raw", "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS]
        return self.run("generate", "--model", model, *more)["text"]

    def compare(self, what, kind, own, theirs):
        """`own` is a model with, perhaps, an adapter here; `theirs` the same for llama.cpp."""
        tokens, wanted = self.logits(*own)
        model = llama_cpp.Llama(
            str(theirs[0]),
            lora_path=str(theirs[1]) if len(theirs) > 1 else None,
            n_ctx=256,
            logits_all=True,
            verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
        )
        ids = model.tokenize(PROMPT.encode())
        model.eval(tokens)
        found = numpy.array(model.scores[len(tokens) - 1], dtype=numpy.float64)
        off = float(numpy.abs(found - wanted).max() / numpy.abs(wanted).max())
        model.reset()
        text = model.create_completion(tokens, max_tokens=NEW_TOKENS, temperature=0.0)["choices"][0]["text"]
        # A word's leading space is written by one of them only.
        mine, text = self.text(*own).strip(), text.strip()
        same = next((i for i, (a, b) in enumerate(zip(mine, text)) if a != b), min(len(mine), len(text)))
        texts = "the same text" if text == mine else f"texts part after {same} characters"
        print(f"{what:<34} {kind:<5} {off:.1e}  {texts}", flush=True)
        if ids != tokens:
            self.failed.append(f"{what}: llama.cpp reads the prompt as {ids}, hydralora as {tokens}")
        if off > LIMITS[kind]:
            self.failed.append(f"{what}, {kind}: logits off by {off:.1e}")
        if kind == "f32" and text != mine:
            self.failed.append(f"{what}, {kind}: {texts}: {mine!r} {text!r}")
        model.close()
        return wanted


def train(programs, name, model, work):
    rows = [{"text": f"Once upon a time there was a blue sky. It was day {i}."} for i in range(24)]
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(data)}], "template": "plain", "valid_fraction": 0.1, "max_seq_len": 64},
        "method": METHODS[name],
        "train": {"batch_size": 4, "max_steps": 5, "learning_rate": RATES.get(name, 0.005), "eval_every": 0},
        "output": str(work / name),
    }
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    programs.run("train", path)
    return work / name / "adapter"


def unchanged(programs, adapter, model, work):
    """The base as a GGUF file of F32: a merged LoRA that does nothing."""
    folder = work / "nothing"
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: 0 * tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    out = work / "base.gguf"
    programs.run("merge", "--model", model, "--adapter", folder, "--out", out, "--dtype", "f32")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hydralora")
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=pathlib.Path)
    arguments = parser.parse_args()
    programs = Programs(arguments.hydralora)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = pathlib.Path(folder)
        base = None
        for name in arguments.methods.split(","):
            adapter = train(programs, name, arguments.model, work)
            gate = ["--gate", "uniform"] if name in ROUTED else []
            if base is None:
                base = unchanged(programs, adapter, arguments.model, work)
                plain = programs.compare("base", "f32", [base], [base])
            for kind in LIMITS:
                out = work / f"{name}-{kind}.gguf"
                programs.run(
                    "merge", "--model", arguments.model, "--adapter", adapter, "--out", out, "--dtype", kind, *gate
                )
                found = programs.compare(f"{name} merged", kind, [out], [out])
                assert numpy.abs(found - plain).max() > 0.05, f"{name} learned nothing"
                out.unlink()
            if name in NO_LORA:
                continue
            exported, lora = work / f"{name}-lora.gguf", work / f"{name}-lora"
            export = ["export", "--model", arguments.model, "--adapter", adapter, *gate]
            programs.run(*export, "--as", "lora-gguf", "--out", exported)
            programs.run(*export, "--as", "lora", "--out", lora)
            # Here the folder goes on the model it was trained on, which has the same numbers as the file.
            programs.compare(f"{name} as LoRA on the base", "f32", [arguments.model, lora], [base, exported])
    for failure in programs.failed:
        print(failure, file=sys.stderr)
    sys.exit(1 if programs.failed else 0)


if __name__ == "__main__":
    main()
