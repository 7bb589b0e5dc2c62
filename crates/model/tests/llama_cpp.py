"""Compares GGUF files with llama.cpp: the same greedy tokens.

    HYDRALORA_GGUF_OUT=DIR cargo test -p hydralora-model --test files a_gguf_file_is_the_same_model
    python llama_cpp.py DIR

DIR holds NAME.gguf and NAME.json (a prompt and the tokens that follow it here), as `fixtures/llama_cpp` does too. Needs
xllamacpp (MIT), which carries llama.cpp.
"""
import json, pathlib, sys
import xllamacpp

def greedy(path, prompt, follows):
    """What llama.cpp finds likeliest behind the prompt and each beginning of what follows; none for a part of a
    character, which it keeps to itself."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 128
    params.n_batch = 64
    params.cpuparams.n_threads = 2
    params.warmup = False
    server = xllamacpp.Server(params)
    found = []
    for count in range(len(follows)):
        answer = server.handle_completions({
            "prompt": prompt + follows[:count], "n_predict": 1, "temperature": 0.0, "top_k": 1, "logprobs": 1,
            "ignore_eos": True, "cache_prompt": False,
        })
        said = answer["choices"][0]["logprobs"]
        found.append(said["content"][0]["id"] if said and said["content"] else None)
    return found

failed = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.gguf")):
    expected = json.loads(path.with_suffix(".json").read_text())
    follows = expected["greedy"]
    try:
        found = greedy(path, expected["prompt"], follows)
        # The tokenizer's first 256 tokens are bytes.
        same = all(a == b or (a is None and 128 <= b < 256) for a, b in zip(found, follows))
    except Exception as error:
        found, same = f"{type(error).__name__}: {error}", False
    failed += not same
    print(path.stem, "agrees" if same else f"differs:\n  llama.cpp {found}\n  here      {follows}", flush=True)
sys.exit(failed > 0)
