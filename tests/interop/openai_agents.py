"""An agent of OpenAI's Agents SDK with one tool, through `/v1/responses` of `hydralora serve`: at once and streamed, with a session
that sends what was said before, and with an answer of a given type.

    python tests/interop/openai_agents.py --hydralora target/release/hydralora

Needs the package openai-agents (tried with 0.24.0). The model is the repository's smallest, beside a chat template that knows tools: it
knows nothing, so that the first turn has to call the tool and its schema leaves no choice but two cities. Exit status 1 where something
is not as the client expects it.
"""

import argparse
import asyncio
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Literal

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, SQLiteSession, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel

STORIES = pathlib.Path(__file__).resolve().parents[2] / "crates/model/tests/fixtures/stories260K"
# Names alone: the context is short.
TEMPLATE = """\
{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}\
{% for message in messages %}{{ message.role }}: {{ message.content or '' }}\
{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments }}</tool_call>{% endfor %}
{% endfor %}"""
called = []


@function_tool
def weather(city: Literal["Bonn", "Rome"], days: Literal[1, 2]) -> str:
    """The weather."""
    called.append((city, days))
    return f"rain in {city}"


class Thing(BaseModel):
    colour: Literal["red", "green"]
    big: bool


def expect(what, is_so, shown=""):
    print(f"{'ok  ' if is_so else 'FAIL'} {what}" + (f": {shown}" if not is_so else ""))
    expect.failed += not is_so


expect.failed = 0


def agent(client, **more):
    model = OpenAIResponsesModel(model="base", openai_client=client)
    settings = {"temperature": 0.0, "max_tokens": 200, "store": False, "metadata": {"a": "b"}, "extra_body": {"stop": ["."]}, **more.pop("settings", {})}
    given = {"name": "assistant", "instructions": "Help.", "model": model, "model_settings": ModelSettings(**settings), **more}
    return Agent(**given)


def kinds(result):
    return [item.type for item in result.new_items]


TURNS = ["tool_call_item", "tool_call_output_item", "message_output_item"]


async def check(url):
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    for choice in ("weather", "required"):
        called.clear()
        with_tool = agent(client, tools=[weather], settings={"tool_choice": choice, "parallel_tool_calls": False})
        result = await Runner.run(with_tool, "Rain?")
        expect(f"{choice}: the tool is called once, as its schema says", len(called) == 1 and called[0][0] in ("Bonn", "Rome"), called)
        expect(f"{choice}: a text follows what it gave", kinds(result) == TURNS, kinds(result))
        expect(f"{choice}: the text is the answer", isinstance(result.final_output, str) and bool(result.final_output), result.final_output)
        usage = result.context_wrapper.usage
        expect(f"{choice}: both requests are counted", usage.requests == 2 and usage.input_tokens > 20 and usage.output_tokens > 10, usage)
        whole = result.final_output
        called.clear()
        streamed = Runner.run_streamed(with_tool, "Rain?")
        said, seen = "", []
        async for event in streamed.stream_events():
            if event.type == "raw_response_event":
                seen.append(event.data.type)
                said = said + event.data.delta if event.data.type == "response.output_text.delta" else said
        expect(f"{choice}: streamed, the tool is called once", len(called) == 1, called)
        expect(f"{choice}: streamed, the answer is the same", streamed.final_output == whole == said, (streamed.final_output, whole, said))
        arguments = seen.count("response.function_call_arguments.done")
        expect(f"{choice}: streamed, the arguments come once", arguments == 1 and kinds(streamed) == TURNS, seen)
    session = SQLiteSession("one")
    first = await Runner.run(agent(client, tools=[weather], settings={"tool_choice": "weather"}), "Rain?", session=session)
    second = await Runner.run(agent(client), "And then?", session=session)
    expect("a session sends what was said and called", bool(second.final_output) and len(await session.get_items()) == 6, await session.get_items())
    longer = second.context_wrapper.usage.input_tokens
    expect("the model reads it", longer > first.context_wrapper.usage.input_tokens / 2 + 10, (longer, first.context_wrapper.usage))
    typed = await Runner.run(agent(client, output_type=Thing), "Which?")
    expect("an answer has the type that is asked", isinstance(typed.final_output, Thing), typed.final_output)
    helper = agent(client, name="helper")
    handed = await Runner.run(agent(client, handoffs=[helper], settings={"tool_choice": "transfer_to_helper"}), "Help?")
    expect("an agent hands over to another", handed.last_agent.name == "helper" and isinstance(handed.final_output, str), (handed.last_agent, handed.final_output))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydralora", required=True)
    arguments = parser.parse_args()
    set_tracing_disabled(True)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder, "model")
        shutil.copytree(STORIES, model)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        command = [arguments.hydralora, "--json", "serve", "--model", str(model), "--port", "0", "--served-model-name", "base"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # One JSON document, which ends with a line of its own.
        text = ""
        for line in server.stdout:
            text += line
            if line == "}\n":
                break
        try:
            asyncio.run(check(json.loads(text)["url"]))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)
    sys.exit(1 if expect.failed else 0)


if __name__ == "__main__":
    main()
