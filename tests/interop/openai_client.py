"""`hydralora serve` as OpenAI's own Python client sees it: chats, completions and responses, whole and streamed, errors, keys.

    python tests/interop/openai_client.py --hydralora target/release/hydralora [--model smollm2-135m] [--adapter NAME=DIR]

Needs the package openai (tried with 3.57.0). Starts a server of its own on a free port, and ends it by SIGTERM. Exit status 1
where something is not as the client expects it.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

import openai

KEY = "a-key-for-this-test"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "Name three rivers."}]


def expect(what, is_so, shown=""):
    print(f"{'ok  ' if is_so else 'FAIL'} {what}" + (f": {shown}" if not is_so else ""))
    expect.failed += not is_so


expect.failed = 0


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    except openai.APIError as error:
        print("  other error:", repr(error))
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydralora", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--dtype", default="f32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = pathlib.Path(folder, "keys")
        keys.write_text(f"# for the test\n{KEY}\n")
        command = [arguments.hydralora, "--json", "serve", "--model", arguments.model, "--port", "0", "--served-model-name", "base"]
        command += ["--dtype", arguments.dtype, "--api-key-file", str(keys)]
        for adapter in arguments.adapter:
            command += ["--adapter", adapter]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # One JSON document, which ends with a line of its own.
        text = ""
        for line in server.stdout:
            text += line
            if line == "}\n":
                break
        url = json.loads(text)["url"]
        try:
            check(url, [adapter.split("=")[0] for adapter in arguments.adapter])
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(120)
    expect("the server ends with status 0 on SIGTERM", code == 0, code)
    sys.exit(1 if expect.failed else 0)


def check(url, adapters):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300)
    names = [model.id for model in client.models.list()]
    expect("models are listed", names == ["base"] + sorted(adapters), names)
    for model in names:
        chats(client, model)
    completions(client)
    responses(client)
    errors(client, url)


def chats(client, model):
    make = client.chat.completions.create
    common = {"model": model, "messages": ASKED, "max_completion_tokens": 24, "temperature": 0, "seed": 1}
    whole = make(**common, logprobs=True, top_logprobs=3)
    text = whole.choices[0].message.content
    expect(f"{model} answers a chat", bool(text) and whole.usage.completion_tokens <= 24, whole)
    told = whole.choices[0].logprobs.content
    expect("every token has three alternatives", all(len(token.top_logprobs) == 3 for token in told))
    expect("tokens are the text", bytes(b for token in told for b in token.bytes).decode().startswith(text[:10]), told[:3])
    pieces = list(make(**common, stream=True, stream_options={"include_usage": True}))
    said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    expect("a stream says the same", said == text, (said, text))
    expect("its last piece counts", pieces[-1].usage.total_tokens == whole.usage.total_tokens and not pieces[-1].choices)
    several = make(**{**common, "temperature": 1.0}, n=3)
    expect("three answers are three", len({choice.message.content for choice in several.choices}) == 3)
    stopped = make(**common, stop=[text[5:9], "never"])
    expect("a stop ends it", stopped.choices[0].message.content == text[: text.index(text[5:9])] and stopped.choices[0].finish_reason == "stop")
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    formed = make(**{**common, "max_completion_tokens": 60}, response_format=form).choices[0]
    value = json.loads(formed.message.content)
    expect("an answer has the schema's form", value["colour"] in ("red", "green", "blue") and isinstance(value["size"], int), formed)
    refusal = refused(openai.BadRequestError, lambda: make(**common, tools=[TOOL]))
    if refusal is None:
        called = make(**{**common, "max_completion_tokens": 80}, tools=[TOOL], tool_choice="required").choices[0]
        arguments = json.loads(called.message.tool_calls[0].function.arguments)
        expect("a tool is called", called.finish_reason == "tool_calls" and "city" in arguments, called)
    else:
        expect("a template without tools is named", refusal.param == "tools", refusal)


def completions(client):
    make = client.completions.create
    whole = make(model="base", prompt=["The river", "The sea"], max_tokens=8, temperature=0)
    expect("two texts are continued", [choice.index for choice in whole.choices] == [0, 1])
    said = "".join(p.choices[0].text for p in make(model="base", prompt="The river", max_tokens=8, temperature=0, stream=True))
    expect("a streamed text is the same", said == whole.choices[0].text, (said, whole.choices[0].text))
    scored = make(model="base", prompt="The river runs", max_tokens=1, temperature=0, echo=True, logprobs=2).choices[0]
    expect("a prompt is scored", scored.logprobs.token_logprobs[0] is None and len(scored.logprobs.tokens) >= 4, scored)
    expect("echo repeats it", scored.text.startswith("The river runs"), scored.text)


def responses(client):
    common = {"model": "base", "input": "Name three rivers.", "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**common)
    expect("a response is made", bool(whole.output_text) and whole.status in ("completed", "incomplete"), whole)
    events = list(client.responses.create(**common, stream=True))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    expect("its events say the same", said == whole.output_text, (said, whole.output_text))
    expect("they end with the whole", events[-1].response.output_text == said)
    again = client.responses.create(
        **{
            **common,
            "input": [
                {"role": "user", "content": "Weather in Bonn?"},
                {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Bonn"}'},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
                {"role": "user", "content": "Thank you."},
            ],
        }
    )
    expect("turns, calls and what they gave are read", bool(again.output_text), again)
    refusal = refused(openai.BadRequestError, lambda: client.responses.create(**common, previous_response_id="resp_1"))
    expect("earlier responses are refused by name", refusal is not None and refusal.param == "previous_response_id")


def errors(client, url):
    make = client.chat.completions.create
    missing = refused(openai.NotFoundError, lambda: make(model="nobody", messages=ASKED))
    expect("an unknown model is not found", missing is not None and missing.code == "model_not_found")
    unknown = refused(openai.BadRequestError, lambda: make(model="base", messages=ASKED, extra_body={"colour": 1}))
    expect("an unknown field is named", unknown is not None and unknown.param == "colour")
    long = refused(openai.BadRequestError, lambda: make(model="base", messages=[{"role": "user", "content": "word " * 100_000}]))
    expect("a prompt beyond the context is refused", long is not None and long.code == "context_length_exceeded")
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="another-key", max_retries=0)
    expect("a wrong key is refused", refused(openai.AuthenticationError, wrong.models.list) is not None)
    harmless = make(model="base", messages=ASKED, max_tokens=1, user="u", metadata={"a": "b"}, store=True, service_tier="auto")
    expect("what changes nothing is taken", harmless.usage.completion_tokens == 1)


if __name__ == "__main__":
    main()
