"""Loads an OpenAI-compatible server with streamed completions and prints how fast it answers.

    python scripts/serve_load.py --url http://127.0.0.1:8080 --model NAME[,NAME…] [--clients 16] [--requests 64]
        [--rate R] [--prompt-words 64] [--max-tokens 64] [--shared-words 0] [--json]

With --clients so many requests are always in work (a closed loop); with --rate they come at random times, R a second on average
(an open loop), however long answers take. Several models are asked in turn. Prints the time to the first token, between tokens
and of whole answers (median, 99th percentile), and tokens a second. Needs nothing but Python. Exit status 1 if a request failed.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.parse

WORDS = "river dog winter king bread ship school garden letter mountain old new small green cold bright went saw made found".split()


def prompt(number, words, shared):
    drawn = random.Random(number)
    common = random.Random("shared")
    return " ".join([common.choice(WORDS) for _ in range(shared)] + [drawn.choice(WORDS) for _ in range(words)])


async def lines(reader):
    """Lines of a chunked or plain body, as they come."""
    pending = b""
    while True:
        piece = await reader.read(65536)
        if not piece:
            return
        pending += piece
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            yield line.strip()


async def ask(where, model, text, max_tokens):
    """One request: when it began, when each piece came, tokens by the server's count, or an error."""
    body = {
        "model": model, "prompt": text, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(body).encode()
    began, pieces, tokens, read, ended, error = time.perf_counter(), [], 0, 0, False, None
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        head = f"POST {where.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            rest = await reader.read()
            return {"error": f"{b' '.join(status[1:]).decode()}: {rest[-300:].decode(errors='replace')}"}
        async for line in lines(reader):
            if line == b"data: [DONE]":
                ended = True
                break
            if line.startswith(b"data: "):
                told = json.loads(line[6:])
                if "error" in told:
                    error = str(told["error"])
                if any(choice.get("text") for choice in told.get("choices", [])):
                    pieces.append(time.perf_counter())
                if told.get("usage"):
                    tokens, read = told["usage"]["completion_tokens"], told["usage"]["prompt_tokens"]
        writer.close()
    except (OSError, ValueError, asyncio.IncompleteReadError) as failure:
        error = repr(failure)
    if error is None and not (ended and pieces):
        error = "the stream did not end"
    return {"began": began, "pieces": pieces, "tokens": tokens, "prompt_tokens": read, "ended": time.perf_counter(), "error": error}


async def load(arguments):
    where = urllib.parse.urlsplit(arguments.url)
    models = arguments.model.split(",")

    def one(number):
        text = prompt(number, arguments.prompt_words, arguments.shared_words)
        return ask(where, models[number % len(models)], text, arguments.max_tokens)

    began = time.perf_counter()
    if arguments.rate:
        drawn, tasks = random.Random(1), []
        for number in range(arguments.requests):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(drawn.expovariate(arguments.rate))
        results = await asyncio.gather(*tasks)
    else:
        numbers, results = iter(range(arguments.requests)), []

        async def client():
            for number in numbers:
                results.append(await one(number))

        await asyncio.gather(*(client() for _ in range(arguments.clients)))
    return results, time.perf_counter() - began


def spread(values):
    values = sorted(values)
    if not values:
        return None
    return {"median": statistics.median(values), "p99": values[min(len(values) - 1, int(len(values) * 0.99))]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--shared-words", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results, seconds = asyncio.run(load(arguments))
    good = [result for result in results if not result["error"]]
    gaps = [b - a for result in good for a, b in zip(result["pieces"], result["pieces"][1:])]
    told = {
        "requests": len(results),
        "failed": len(results) - len(good),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": sum(result["tokens"] for result in good) / seconds,
        "prompt_tokens_per_s": sum(result["prompt_tokens"] for result in good) / seconds,
        "first_token_s": spread([result["pieces"][0] - result["began"] for result in good]),
        "between_tokens_s": spread(gaps),
        "whole_answer_s": spread([result["ended"] - result["began"] for result in good]),
    }
    if arguments.json:
        print(json.dumps(told, indent=1))
    else:
        for name, value in told.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number:.4f}" for key, number in value.items())
            print(f"{name:20} {value if not isinstance(value, float) else round(value, 2)}")
    for error in {result["error"] for result in results if result["error"]}:
        print("error:", error, file=sys.stderr)
    sys.exit(1 if len(good) < len(results) else 0)


if __name__ == "__main__":
    main()
