"""Writes the mixtures of router-search.yaml and router-final.yaml (`--setting mixtures`): a file of instructions for each
domain, from which the studies part validation and test.

    python recipes/studies/mixtures.py FOLDER [OUT]        (standard library alone; OUT is data/mixtures if left out)

FOLDER holds what the publishers give:

    gsm8k/train.jsonl                 question, answer                  openai/grade-school-math
    codealpaca/code_alpaca_2k.json    instruction, input, output        sahil280114/codealpaca
    dolly/dolly.jsonl                 prompt, answer; or instruction, context, response (databricks-dolly-15k)
    chatdoctor/chatdoctor5k.json      instruction, input, output        Kent0n-Li/ChatDoctor
    superni/TASK/train.json           Super-NaturalInstructions         allenai/natural-instructions
    t0/TEMPLATE.jsonl                 prompt, completion                P3, by prompt template

Records are taken in the order of the files, as many of a domain as MOST says; their licences are the publishers'.
"""

import json
import pathlib
import sys

MOST = 600
SUPERNI = [
    "task002_quoref_answer_generation", "task073_commonsenseqa_answer_generation", "task1290_xsum_summarization",
    "task1572_samsum_summary", "task1590_diplomacy_text_generation", "task1687_sentiment140_classification",
    "task1729_personachat_generate_next", "task181_outcome_extraction", "task363_sst2_polarity_classification",
    "task511_reddit_tifu_long_text_summarization", "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection",
]
# One template of each data set: two of one have the same records behind them.
T0 = [
    "ag_news_classify", "amazon_polarity_Is_this_review_negative", "cnn_dailymail_3_0_0_sum_in_brief",
    "common_gen_topic_to_sentence", "commonsense_qa_question_answering", "cosmos_qa_only_question_answer",
    "dream_generate_last_utterance", "glue_qqp_same_thing", "qasc_is_correct_1", "samsum_Summarize_",
    "social_i_qa_Generate_answer", "wiki_bio_guess_person",
]


def records(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]


def instruction(instruction, output, given=""):
    return {"instruction": instruction.strip(), "input": given.strip(), "output": output.strip()}


def alpaca(record):
    return instruction(record["instruction"], record["output"], record.get("input") or "")


def dolly(record):
    if "prompt" in record:
        return instruction(record["prompt"], record["answer"])
    return instruction(record["instruction"], record["response"], record.get("context") or "")


def natural(path):
    task = json.loads(path.read_text(encoding="utf-8"))
    for record in task["Instances"]:
        output = record["output"]
        output = output[0] if isinstance(output, list) else output
        yield instruction(task["Definition"][0], output, record["input"])


def domains(folder):
    yield "four/math", (instruction(r["question"], r["answer"]) for r in records(folder / "gsm8k/train.jsonl"))
    yield "four/code", map(alpaca, records(folder / "codealpaca/code_alpaca_2k.json"))
    yield "four/general", map(dolly, records(folder / "dolly/dolly.jsonl"))
    yield "four/medical", map(alpaca, records(folder / "chatdoctor/chatdoctor5k.json"))
    for task in SUPERNI:
        yield f"superni/{task.split('_')[0]}", natural(folder / f"superni/{task}/train.json")
    for name in T0:
        found = records(folder / f"t0/{name}.jsonl")
        yield f"t0/{name}", (instruction(r["prompt"], r["completion"].replace("<|endoftext|>", "")) for r in found)


def main(folder, out="data/mixtures"):
    for name, found in domains(pathlib.Path(folder)):
        kept = []
        for record in found:
            if record["instruction"] and record["output"] and record not in kept:
                kept.append(record)
            if len(kept) == MOST:
                break
        path = pathlib.Path(out) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
        print(f"{len(kept):5} {path}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
