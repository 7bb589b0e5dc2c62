"""Log-likelihoods through `hydralora serve` and lm-evaluation-harness's `local-completions`, beside `hydralora eval`'s.

    python tests/interop/lm_eval_completions.py --hydralora target/release/hydralora --work WORK [--model smollm2-135m] [--records 40]

The harness asks the server for `echo` with `logprobs` and takes its tokenizer from it; `eval` scores the same records in one
process. Needs lm-eval with its `api` extra (tried with 0.4.13). Exit status 1 where a chosen option differs or, by more than 1e-3
nats, a log-likelihood.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

TOPICS = ["river", "dog", "winter", "king", "bread", "ship", "school", "garden", "letter", "mountain"]
ENDS = [" is cold.", " was sold to a man.", "s are green.", " ran away."]


def records(count):
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        prompt = f"{number}. Once there was a {topic}. It was {'old' if number % 3 else 'new'}. The {topic}"
        yield {"prompt": prompt, "choices": ENDS[: 2 + number % 3], "answer": number % 2, "target_delimiter": ""}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydralora", required=True)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=40)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    data = work / "records.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records(arguments.records)))
    task = {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    tasks = work / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "own_choices.yaml").write_text(yaml.safe_dump(task))
    command = [arguments.hydralora, "--json", "serve", "--model", arguments.model, "--port", "0", "--served-model-name", "base"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    text = ""
    for line in server.stdout:
        text += line
        if line == "}\n":
            break
    url = json.loads(text)["url"]
    try:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={"model": "base", "base_url": f"{url}/v1/completions", "num_concurrent": 4, "max_retries": 1, "max_length": 2048},
            tasks=["own_choices"],
            task_manager=TaskManager(include_path=str(tasks)),
            log_samples=True,
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    theirs = {sample["doc_id"]: [float(pair[0]) for pair in sample["filtered_resps"]] for sample in results["samples"]["own_choices"]}
    log = work / "log.jsonl"
    log.unlink(missing_ok=True)
    ours = [arguments.hydralora, "--quiet", "--json", "eval", "--model", arguments.model, "--tasks", f"choices:{data}"]
    subprocess.run([*ours, "--samples", str(log), "--shots", "0"], check=True, capture_output=True, text=True)
    worst, other = 0.0, 0
    for row in (json.loads(line) for line in log.read_text().splitlines()[1:]):
        own, their = [score for score, _ in row["resps"]], theirs[row["doc_id"]]
        worst = max([worst] + [abs(a - b) for a, b in zip(own, their, strict=True)])
        other += max(range(len(own)), key=own.__getitem__) != max(range(len(own)), key=their.__getitem__)
    print(f"{len(theirs)} records: largest difference {worst:.2e} nats, {other} other choices")
    sys.exit(1 if worst > 1e-3 or other else 0)


if __name__ == "__main__":
    main()
