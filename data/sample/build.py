"""Builds the bundled sample: one JSON lines file per domain, in alpaca form.

    python3 build.py SOURCES [--out FOLDER]

SOURCES is a folder with the files that README.md names (gsm8k/, instruction_induction/,
legalbench/, self_instruct/). The same sources give the same bytes: nothing is random.
"""

import argparse
import csv
import json
import pathlib
import re

# Tasks built from word lists, templates or rules, so that no other data set's licence applies.
LANGUAGE_TASKS = {
    "active_to_passive": "Rewrite the sentence in the passive voice.",
    "antonyms": "Write a word that means the opposite.",
    "first_word_letter": "Write the first letter of the word.",
    "letters_list": "Spell the word with a space between letters.",
    "num_to_verbal": "Write the number in words.",
    "rhymes": "Write a word that rhymes.",
    "singular_to_plural": "Write the plural of the word.",
    "synonyms": "Write a word with the same meaning.",
}
TRANSLATION_TASKS = {
    "translation_en-de": "Translate the word into German.",
    "translation_en-es": "Translate the word into Spanish.",
}
# Of the tasks whose licence is CC BY 4.0, those with short questions and short answers.
LAW_TASKS = re.compile(
    r"contract_nli_.*|contract_qa|cuad_.*|diversity_\d|overruling|proa|telemarketing_sales_rule"
    r"|ucc_v_common_law"
)


def evenly(items, count):
    """`count` of the items, at even distances, in order."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def record(instruction, given, output):
    return {"instruction": instruction.strip(), "input": given.strip(), "output": output.strip()}


def length(item):
    return sum(len(text) for text in item.values())


def math(sources):
    items = []
    for line in (sources / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        # The marks are calls of a calculator that the model does not have.
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        items.append(record(row["question"], "", answer))
    return evenly([item for item in items if length(item) <= 400], 500)


def induction(sources, tasks, count):
    items = []
    for task, instruction in tasks.items():
        path = sources / f"instruction_induction/{task}.train.json"
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"].values()
        items += [record(instruction, row["input"], row["output"]) for row in evenly(list(examples), count)]
    return items


def law(sources):
    folder = sources / "legalbench"
    with open(folder / "tasks.csv", encoding="utf-8", newline="") as file:
        licences = {row["task"]: row["licence_as_stated"] for row in csv.DictReader(file)}
    items = []
    for task in sorted(task for task in licences if LAW_TASKS.fullmatch(task)):
        if licences[task].upper() != "CC BY 4.0" or not (folder / "tasks" / task).is_dir():
            continue
        prompt = (folder / "tasks" / task / "base_prompt.txt").read_text(encoding="utf-8")
        blocks = [block.strip() for block in prompt.strip().split("\n\n") if block.strip()]
        # The last block is the question with its placeholders, and on its last line the cue.
        question = blocks[-1].rsplit("\n", 1)[0]
        with open(folder / "tasks" / task / "train.tsv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                given = re.sub(r"\{\{(.+?)\}\}", lambda match: row[match[1]], question)
                item = record(blocks[0], given, row["answer"])
                if length(item) <= 800:
                    items.append(item)
    return items


def general(sources):
    items = []
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        for line in (sources / "self_instruct" / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            first = row["instances"][0]
            item = record(row["instruction"], first["input"], first["output"])
            if length(item) <= 800:
                items.append(item)
    return items


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    domains = {
        "general": general(options.sources),
        "language": induction(options.sources, LANGUAGE_TASKS, 70),
        "law": law(options.sources),
        "math": math(options.sources),
        "translation": induction(options.sources, TRANSLATION_TASKS, 250),
    }
    for domain, items in domains.items():
        seen = set()
        with open(options.out / f"{domain}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for item in items:
                line = json.dumps(item, ensure_ascii=False)
                if item["output"] and line not in seen:
                    seen.add(line)
                    file.write(line + "\n")
        print(f"{domain}: {len(seen)} records")


if __name__ == "__main__":
    main()
