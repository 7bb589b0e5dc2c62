"""The options' log-likelihoods, `acc` and `acc_norm` of `choices:FILE` beside lm-evaluation-harness's `multiple_choice`.

    python tests/interop/choices_parity.py --hydralora target/release/hydralora --model MODEL_FOLDER --work WORK \
        [--records 120] [--shots 3] [--adapter LORA_FOLDER] [--start-token]

The records are put together at random: prompts that end in spaces, line breaks and inside a word, options of one letter and of
many words, letters beyond ASCII, delimiters of one space and of none. Both programs get the same file, and with `--shots` draw
their examples from it. MODEL_FOLDER is a Hugging Face folder that both read. Needs lm-eval (tried with 0.4.13), torch and
transformers. Exit status 1 where a prompt, a chosen option or, by more than 1e-3 nats, a log-likelihood differs.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

import yaml

WORDS = (
    "Once upon a time there was little girl boy dog cat named Lily Tom and she he ran home to the park with big red ball very happy "
    "été 日本 42 don't so-and-so"
).split()
ENDS = ["", "", "", " ", "  ", "\n", ":", ",", "…"]


def records(count, seed):
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text = lambda longest: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest)))
        prompt = text(draw.choice([3, 12, 60]))
        if draw.random() < 0.2:
            prompt = prompt[: max(1, len(prompt) - 2)]
        options = list(dict.fromkeys([text(draw.choice([1, 2, 12])) for _ in range(draw.randint(2, 5))] + ["x", "and so on."]))
        draw.shuffle(options)
        found.append({"prompt": prompt + draw.choice(ENDS), "choices": options, "answer": draw.randrange(len(options))})
    # A few records twice: a question must not be its own example.
    found[-4:] = found[:4]
    return found


def harness(arguments, file, name, delimiter, shots):
    import torch
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = pathlib.Path(arguments.work) / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        # Named, so that the harness leaves the question itself out of its examples.
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")],
    }
    (folder / f"{name}.yaml").write_text(yaml.dump(definition))
    model = HFLM(
        pretrained=arguments.model,
        dtype=torch.float32,
        device="cpu",
        batch_size=4,
        # As hydralora does it: what the tokenizer puts before a text in training is there in scoring too.
        add_bos_token=arguments.start_token,
        **({"peft": arguments.adapter} if arguments.adapter else {}),
    )
    results = evaluator.simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return results["results"][name], [
        {
            "prompt": sample["arguments"][0][0],
            "sums": [float(answer[0]) for answer in sample["filtered_resps"]],
            "acc": sample["acc"],
            "acc_norm": sample["acc_norm"],
        }
        for sample in samples
    ]


def ours(arguments, file, name, shots):
    log = pathlib.Path(arguments.work) / f"{name}.log.jsonl"
    log.unlink(missing_ok=True)
    command = [arguments.hydralora, "--quiet", "eval", "--model", arguments.model, "--tasks", f"choices:{file}", "--json"]
    command += ["--samples", str(log), "--shots", str(shots)]
    if arguments.adapter:
        command += ["--adapter", f"adapter={arguments.adapter}", "--skip-base"]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    (result,) = json.loads(out.stdout)["models"].values()
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    rows.sort(key=lambda row: row["doc_id"])
    (task,) = result["configs"]
    return result["results"][task], result["configs"][task]["first_prompt"], [
        {
            "sums": [score for score, _ in row["resps"]],
            "acc": row["scores"]["acc,none"]["value"],
            "acc_norm": row["scores"]["acc_norm,none"]["value"],
        }
        for row in rows
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydralora", default="target/release/hydralora")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--work", required=True)
    parser.add_argument("--records", type=int, default=120)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--start-token", action="store_true", help="for tokenizers that begin texts with one")
    arguments = parser.parse_args()
    work = pathlib.Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    failed = False
    for label, delimiter, shots in (("space", " ", 0), ("none", "", 0), ("shots", " ", arguments.shots)):
        name = f"asked_{label}"
        rows = records(arguments.records, seed=len(label))
        file = (work / f"{name}.jsonl").resolve()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        theirs, their_rows = harness(arguments, file, name, delimiter, shots)
        own_file = file
        if delimiter != " ":
            own_file = file.with_name(f"{name}_own.jsonl")
            own_file.write_text("".join(json.dumps({**row, "target_delimiter": delimiter}) + "\n" for row in rows))
        own, first_prompt, own_rows = ours(arguments, own_file, name, shots)
        same_prompt = first_prompt == their_rows[0]["prompt"]
        far = max(abs(a - b) for x, y in zip(their_rows, own_rows, strict=True) for a, b in zip(x["sums"], y["sums"], strict=True))
        agree = [sum(x[metric] == y[metric] for x, y in zip(their_rows, own_rows)) for metric in ("acc", "acc_norm")]
        print(
            f"{name}: acc {agree[0]} and acc_norm {agree[1]} of {len(rows)} records agree ({theirs['acc,none']:.4f} {own['acc,none']:.4f}, "
            f"{theirs['acc_norm,none']:.4f} {own['acc_norm,none']:.4f}), log-likelihoods differ by at most {far:.1e} nats, "
            f"first prompt {'equal' if same_prompt else 'differs'}"
        )
        failed |= not same_prompt or far > 1e-3 or agree != [len(rows)] * 2
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
