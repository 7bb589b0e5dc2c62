"""Per-question agreement of `hydralora eval` with lm-evaluation-harness, and the ratio of their speeds.

The harness's own task definitions are taken from the installed package; only where their data come
from is changed, to local files:

    python tests/interop/eval_parity.py --hydralora target/release/hydralora --model MODEL_FOLDER \
        --data DATA --work WORK [--adapter LORA_FOLDER] [--questions 500] [--generated 100]

MODEL_FOLDER is a Hugging Face folder that both read. DATA holds `mmlu`, `gsm8k` and `bbh` as
docs/evaluation.md describes. WORK keeps what the harness answered to each task, so that an interrupted run
goes on and a second one is quick. Where two written texts part, the gap between the two likeliest tokens is shown.
With `--speed FROM:TO` the two take turns on a range of MMLU's subjects, and only their seconds are compared.
With `--prompts` only the prompts are compared, the first of every task, byte for byte; any model will do.
Needs lm-eval (tried with 0.4.13), torch and transformers. Exit status 1 below 99.5 % agreement.
"""

import argparse
import csv
import json
import math
import pathlib
import subprocess
import sys
import time

import yaml

AGREEMENT = 0.995


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: node.value)


def upstream(folder, name):
    """A task definition of the installed harness with what it includes."""
    path = folder / name
    own = yaml.load(path.read_text(), Loader)
    included = own.pop("include", None)
    base = upstream(path.parent, included) if included else {}
    return {**base, **own}


def localised(definition, files, name):
    for key in ("dataset_name", "tag", "task_alias"):
        definition.pop(key, None)
    definition.update(task=name, dataset_path="json", dataset_kwargs={"data_files": files})
    return definition


def mmlu_rows(path):
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    if rows[0][-1] == "answer":
        rows = rows[1:]
    letters = "ABCD"
    return [
        {"question": r[0], "choices": r[1:5], "answer": letters.index(r[5]) if r[5] in letters else int(r[5])}
        for r in rows
    ]


def prepare(arguments, tasks_folder):
    """Local task files. Gives the names to run with their limits."""
    import lm_eval

    home = pathlib.Path(lm_eval.__file__).parent / "tasks"
    data = pathlib.Path(arguments.data)
    tasks_folder.mkdir(parents=True, exist_ok=True)
    plan = {"mmlu": [], "gsm8k": [], "bbh": []}

    def write(name, definition):
        (tasks_folder / f"{name}.yaml").write_text(yaml.dump(definition, sort_keys=False))

    def lines(name, rows):
        path = tasks_folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    for test in sorted((data / "mmlu/test").glob("*_test.csv")):
        subject = test.name.removesuffix("_test.csv")
        name = f"mmlu_{subject}"
        files = {
            "test": lines(f"{name}_test", mmlu_rows(test)),
            "dev": lines(f"{name}_dev", mmlu_rows(data / f"mmlu/dev/{subject}_dev.csv")),
        }
        write(name, localised(upstream(home / "mmlu/default", f"{name}.yaml"), files, f"local_{name}"))
        plan["mmlu"].append(name)
    files = {split: str(data / f"gsm8k/{split}.jsonl") for split in ("train", "test")}
    write("gsm8k", localised(upstream(home / "gsm8k", "gsm8k.yaml"), files, "local_gsm8k"))
    plan["gsm8k"].append("gsm8k")
    for path in sorted((data / "bbh/tasks").glob("*.json")):
        name = f"bbh_{arguments.bbh}_{path.stem}"
        files = {"test": lines(name, json.loads(path.read_text())["examples"])}
        definition = upstream(home / f"bbh/{arguments.bbh}", f"{path.stem}.yaml")
        write(name, localised(definition, files, f"local_{name}"))
        plan["bbh"].append(name)
    return plan


class Harness:
    """lm-evaluation-harness on the local files. The model is loaded when a task is not in the cache yet."""

    def __init__(self, arguments, tasks_folder):
        self.arguments = arguments
        self.tasks_folder = tasks_folder
        self.model = None

    def load(self):
        import torch
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        if self.model is None:
            torch.set_num_threads(self.arguments.threads)
            self.model = HFLM(
                pretrained=self.arguments.model,
                dtype=torch.float32,
                device="cpu",
                batch_size=self.arguments.batch_size,
                **({"peft": self.arguments.adapter} if self.arguments.adapter else {}),
            )
            self.manager = TaskManager(include_path=str(self.tasks_folder), include_defaults=False)
        return self.model

    def score(self, name, limit, shots):
        """Answers and seconds for one task; seconds are those of the evaluation without loading the model."""
        from lm_eval import evaluator

        model = self.load()
        started = time.time()
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[f"local_{name}"],
            num_fewshot=shots,
            limit=limit,
            task_manager=self.manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        seconds = time.time() - started
        answers = {}
        for sample in results["samples"][f"local_{name}"]:
            row = answers.setdefault(f"{name}/{sample['doc_id']}", {"filtered": {}})
            if name.startswith("mmlu"):
                scores = [float(s[0]) for s in sample["filtered_resps"]]
                row["filtered"]["none"] = "ABCD"[scores.index(max(scores))]
                ordered = sorted(scores)
                row["margin"] = ordered[-1] - ordered[-2]
            else:
                row["filtered"][sample["filter"]] = sample["filtered_resps"][0]
                row["text"] = sample["resps"][0][0]
                row["prompt"] = sample["arguments"][0][0]
        return {"seconds": seconds, "answers": answers}

    def all(self, folder, names, limit, shots):
        """Every task's answers, from `folder` where an earlier run left them."""
        folder.mkdir(parents=True, exist_ok=True)
        total = {"seconds": 0.0, "answers": {}}
        for name in names:
            path = folder / f"{name}.json"
            if not path.exists():
                unfinished = path.with_suffix(".part")
                unfinished.write_text(json.dumps(self.score(name, limit, shots)))
                unfinished.rename(path)
            part = json.loads(path.read_text())
            total["seconds"] += part["seconds"]
            total["answers"].update(part["answers"])
        return total

    def where_texts_part(self, prompt, theirs, own):
        """The first token in which two greedy continuations differ: its place, the gap between the two likeliest
        tokens there in nats, computed without a batch and so without padding, and which of the two texts that
        computation goes on with."""
        import torch

        model = self.load()
        tokens = [model.tok_encode(prompt + text) for text in (theirs, own)]
        place = next(
            (i for i, (a, b) in enumerate(zip(*tokens)) if a != b),
            min(map(len, tokens)),
        )
        with torch.no_grad():
            logits = model.model(torch.tensor([tokens[0][:place]])).logits[0, -1].double()
        best = torch.topk(logits, 2)
        gap = float(best.values[0] - best.values[1])
        likeliest = int(best.indices[0])
        follows = [len(t) > place and t[place] == likeliest for t in tokens]
        who = {(True, False): "the harness's", (False, True): "hydralora's"}.get(tuple(follows), "neither")
        return f"token {place - len(model.tok_encode(prompt))}, gap {gap:.1e} nats, unpadded: {who} text"


def ours(arguments, names, limit, shots, adapter, log):
    command = [arguments.hydralora, "--quiet", "--threads", str(arguments.threads), "eval"]
    command += ["--model", arguments.model, "--data", arguments.data, "--tasks", ",".join(names)]
    command += ["--limit", str(limit), "--samples", str(log)]
    if shots is not None:
        command += ["--shots", str(shots)]
    if adapter:
        command += ["--adapter", f"adapter={adapter}", "--skip-base"]
    log.unlink(missing_ok=True)
    out = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    (result,) = json.loads(out.stdout)["models"].values()
    answers = {}
    for line in log.read_text().splitlines()[1:]:
        row = json.loads(line)
        filtered = {key.split(",")[1]: value["filtered"] for key, value in row["scores"].items()}
        answer = {"filtered": filtered}
        if isinstance(row["resps"][0], str):
            answer["text"] = row["resps"][0]
        else:
            ordered = sorted(score for score, _ in row["resps"])
            answer["margin"] = ordered[-1] - ordered[-2]
        answers[f"{row['task']}/{row['doc_id']}"] = answer
    return {"seconds": float(result["total_evaluation_time_seconds"]), "answers": answers}


def alternate(harness, arguments, names, limit, work):
    """The two programs' speed on the same MMLU questions with five examples: a subject each in turn."""
    harness.score(names[0], 1, 5)
    total = {"harness": 0.0, "hydralora": 0.0}
    questions = 0
    for name in names:
        theirs = harness.score(name, limit, 5)
        own = ours(arguments, [name], limit, 5, arguments.adapter, work / "ours-speed.jsonl")
        questions += len(own["answers"])
        total["harness"] += theirs["seconds"]
        total["hydralora"] += own["seconds"]
        print(f"{name}: harness {theirs['seconds']:.1f} s, hydralora {own['seconds']:.1f} s", flush=True)
    print(
        f"{questions} questions of {len(names)} subjects: harness {total['harness']:.1f} s,"
        f" hydralora {total['hydralora']:.1f} s, ratio {total['harness'] / total['hydralora']:.2f}"
    )


def compare_prompts(arguments, tasks_folder, plan):
    """The number of tasks, and of those whose first prompt differs."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)

    def task_of(found):
        if hasattr(found, "fewshot_context"):
            return found
        parts = map(task_of, found.values()) if isinstance(found, dict) else ()
        return next((part for part in parts if part is not None), None)

    differing = 0
    for names, options in (
        (plan["mmlu"], ["--shots", "5"]),
        (plan["gsm8k"] + plan["bbh"], ["--max-new-tokens", "4"]),
    ):
        command = [arguments.hydralora, "--json", "--quiet", "eval", "--model", arguments.model]
        command += ["--data", arguments.data, "--tasks", ",".join(names), "--limit", "1", *options]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        configs = json.loads(out.stdout)["models"]["base"]["configs"]
        for name in names:
            load = getattr(manager, "load_task_or_group", manager.load)
            task = task_of(load(f"local_{name}"))
            # The seed the harness gives when none is asked for.
            task.set_fewshot_seed(1234)
            theirs = task.fewshot_context(list(task.test_docs())[0], configs[name]["num_fewshot"])
            if theirs != configs[name]["first_prompt"]:
                differing += 1
                print(f"{name}: the prompts differ", repr(theirs), repr(configs[name]["first_prompt"]), sep="\n  ")
    return sum(map(len, plan.values())), differing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydralora", default="target/release/hydralora")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--generated", type=int, default=100)
    parser.add_argument("--prompts", action="store_true")
    parser.add_argument("--speed", metavar="FROM:TO", help="alternate over these of the MMLU subjects, by number")
    parser.add_argument("--only", choices=["mmlu", "gsm8k", "bbh"], action="append")
    parser.add_argument("--bbh", choices=["cot_fewshot", "fewshot"], default="cot_fewshot")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    work = pathlib.Path(arguments.work)
    tasks_folder = work / "tasks"
    plan = prepare(arguments, tasks_folder)
    if arguments.prompts:
        total, differing = compare_prompts(arguments, tasks_folder, plan)
        print(f"prompts: {total - differing} of {total} equal ({arguments.bbh})")
        sys.exit(1 if differing else 0)
    harness = Harness(arguments, tasks_folder)
    if arguments.speed:
        first, last = map(int, arguments.speed.split(":"))
        limit = math.ceil(arguments.questions / len(plan["mmlu"]))
        alternate(harness, arguments, plan["mmlu"][first:last], limit, work)
        return
    worst = 1.0
    for kind in arguments.only or ["mmlu", "gsm8k", "bbh"]:
        names = plan[kind]
        wanted = arguments.questions if kind == "mmlu" else arguments.generated
        # The harness's limit holds for each task.
        limit = math.ceil(wanted / len(names))
        shots = 5 if kind == "mmlu" else None
        label = f"{kind if kind != 'bbh' else 'bbh_' + arguments.bbh}-{limit}-{'adapter' if arguments.adapter else 'base'}"
        theirs = harness.all(work / f"harness-{label}", names, limit, shots)
        own = ours(arguments, names, limit, shots, arguments.adapter, work / f"ours-{label}.jsonl")
        if theirs["answers"].keys() != own["answers"].keys():
            sys.exit(f"{label}: other questions were asked: {len(theirs['answers'])}, {len(own['answers'])}")
        total = len(own["answers"])
        filters = next(iter(theirs["answers"].values()))["filtered"].keys()
        for name in filters:
            differ = [
                (key, answer["filtered"][name], own["answers"][key]["filtered"][name], answer.get("margin"))
                for key, answer in theirs["answers"].items()
                if answer["filtered"][name] != own["answers"][key]["filtered"][name]
            ]
            agreement = 1 - len(differ) / total
            worst = min(worst, agreement)
            print(f"{label}  {name}: {total - len(differ)} of {total} agree ({100 * agreement:.2f} %)")
            for difference in differ:
                print("   ", *difference)
        if kind == "mmlu":
            # How far the best letter is ahead of the second, in nats.
            far = max(abs(a["margin"] - own["answers"][k]["margin"]) for k, a in theirs["answers"].items())
            print(f"{label}  margins differ by at most {far:.1e}")
        else:
            same = sum(a["text"] == own["answers"][k]["text"] for k, a in theirs["answers"].items())
            print(f"{label}  whole text: {same} of {total} equal")
            for key, answer in theirs["answers"].items():
                text = own["answers"][key]["text"]
                if answer["text"] != text:
                    print(f"    {key}: {harness.where_texts_part(answer['prompt'], answer['text'], text)}", flush=True)
        print(
            f"{label}  seconds: harness {theirs['seconds']:.1f}, hydralora {own['seconds']:.1f},"
            f" ratio {theirs['seconds'] / own['seconds']:.2f}",
            flush=True,
        )
    sys.exit(0 if worst >= AGREEMENT else 1)


if __name__ == "__main__":
    main()
