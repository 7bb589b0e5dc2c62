"""`hydralora serve` under lm-evaluation-harness, beside `hydralora eval` on the same questions.

    python tests/interop/lm_eval_server.py --hydralora target/release/hydralora --model MODEL --data DATA --work WORK
        [--tokenizer FOLDER] [--mmlu 200] [--gsm8k 50] [--bbh 50] [--shots 0] [--chat] [--max-tokens 64]

The harness's own task definitions, with local files in place of its downloads (as eval_parity.py has them), are scored through
`local-completions`: MMLU by log-likelihoods with `echo`, GSM8K and BIG-Bench Hard by written answers. With `--chat` the last two go
through `local-chat-completions` with the model's chat template. The harness takes its tokenizer from the server, which leaves out
the token that begins texts for models that have one: `--tokenizer` names a folder that transformers reads instead.
Needs lm-eval with its `api` extra (tried with 0.4.13). Exit status 1 below 99.5 % equal answers, or where a log-likelihood differs
by more than 1e-3 nats.
"""

import argparse
import json
import math
import pathlib
import signal
import subprocess
import sys

from eval_parity import AGREEMENT, prepare


class Server:
    def __init__(self, arguments):
        command = [arguments.hydralora, "--json", "--threads", str(arguments.threads), "serve", "--model", arguments.model]
        command += ["--port", "0", "--served-model-name", "base", "--request-seconds", "36000"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        told = ""
        for line in self.process.stdout:
            told += line
            if line == "}\n":
                break
        self.url = json.loads(told)["url"]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


def through_server(arguments, url, kind, names, limit, shots, tasks_folder):
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    model, where = "local-completions", "completions"
    if arguments.chat:
        model, where = "local-chat-completions", "chat/completions"
    options = {"model": "base", "base_url": f"{url}/v1/{where}", "num_concurrent": 4, "max_retries": 1, "max_length": arguments.context}
    options.update(timeout=36000, add_bos_token=bool(arguments.tokenizer))
    if arguments.tokenizer:
        options.update(tokenizer=arguments.tokenizer, tokenizer_backend="huggingface")
    elif not arguments.chat:
        options["tokenizer_backend"] = "remote"
    results = evaluator.simple_evaluate(
        model=model,
        model_args=options,
        tasks=[f"local_{name}" for name in names],
        num_fewshot=shots,
        limit=limit,
        gen_kwargs={"max_gen_toks": arguments.max_tokens} if kind != "mmlu" else None,
        apply_chat_template=arguments.chat,
        task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    answers = {}
    for name in names:
        for sample in results["samples"][f"local_{name}"]:
            row = answers.setdefault(f"{name}/{sample['doc_id']}", {"filtered": {}, "scores": []})
            if kind == "mmlu":
                row["scores"] = [float(score[0]) for score in sample["filtered_resps"]]
                row["filtered"]["none"] = "ABCD"[max(range(4), key=row["scores"].__getitem__)]
            else:
                row["filtered"][sample["filter"]] = sample["filtered_resps"][0]
                row["text"] = sample["resps"][0][0]
    return answers


def by_eval(arguments, kind, names, limit, shots, work):
    log = work / f"eval-{kind}.jsonl"
    log.unlink(missing_ok=True)
    command = [arguments.hydralora, "--quiet", "--threads", str(arguments.threads), "eval", "--model", arguments.model, "--data", arguments.data]
    command += ["--tasks", ",".join(names), "--limit", str(limit), "--samples", str(log), "--json"]
    if shots is not None:
        command += ["--shots", str(shots)]
    if kind != "mmlu":
        command += ["--max-new-tokens", str(arguments.max_tokens)]
    if arguments.chat:
        command += ["--apply-chat-template"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    answers = {}
    for line in log.read_text().splitlines()[1:]:
        row = json.loads(line)
        answer = {"filtered": {key.split(",")[1]: value["filtered"] for key, value in row["scores"].items()}, "scores": []}
        if isinstance(row["resps"][0], str):
            answer["text"] = row["resps"][0]
        else:
            answer["scores"] = [score for score, _ in row["resps"]]
        answers[f"{row['task']}/{row['doc_id']}"] = answer
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydralora", default="target/release/hydralora")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--mmlu", type=int, default=200)
    parser.add_argument("--gsm8k", type=int, default=50)
    parser.add_argument("--bbh", type=int, default=50)
    parser.add_argument("--shots", type=int, help="examples before a question, rather than each task's own number")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    tasks_folder = arguments.work / "tasks"
    prepared = argparse.Namespace(data=arguments.data, bbh="cot_fewshot")
    plan = prepare(prepared, tasks_folder)
    wanted = {"mmlu": 0 if arguments.chat else arguments.mmlu, "gsm8k": arguments.gsm8k, "bbh": arguments.bbh}
    worst = 1.0
    for kind, count in wanted.items():
        if count == 0:
            continue
        limit = math.ceil(count / len(plan[kind]))
        # As many tasks as it takes.
        names = plan[kind][: math.ceil(count / limit)]
        server = Server(arguments)
        try:
            theirs = through_server(arguments, server.url, kind, names, limit, arguments.shots, tasks_folder)
        finally:
            server.end()
        own = by_eval(arguments, kind, names, limit, arguments.shots, arguments.work)
        if theirs.keys() != own.keys():
            sys.exit(f"{kind}: other questions were asked: {len(theirs)}, {len(own)}")
        for name in next(iter(theirs.values()))["filtered"]:
            differ = [key for key, answer in theirs.items() if answer["filtered"][name] != own[key]["filtered"][name]]
            worst = min(worst, 1 - len(differ) / len(own))
            print(f"{kind}  {name}: {len(own) - len(differ)} of {len(own)} equal", *differ, flush=True)
        if kind == "mmlu":
            pairs = [(a, b) for key, answer in theirs.items() for a, b in zip(answer["scores"], own[key]["scores"], strict=True)]
            far = max(abs(a - b) for a, b in pairs)
            print(f"{kind}  log-likelihoods differ by at most {far:.1e} nats", flush=True)
            worst = min(worst, 0.0 if far > 1e-3 else 1.0)
        else:
            same = sum(answer["text"] == own[key]["text"] for key, answer in theirs.items())
            print(f"{kind}  whole text: {same} of {len(own)} equal", flush=True)
    sys.exit(0 if worst >= AGREEMENT else 1)


if __name__ == "__main__":
    main()
