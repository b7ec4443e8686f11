"""An agent of LlamaIndex that must call a tool.  It runs in an environment of its own: it wants an older openai.

    python llama_index_agent.py URL

Prints JSON: the places that the tool was asked for, what the agent got from it, and the answer.
"""

# No annotations as text: LlamaIndex reads those of the tool.
import asyncio
import json
import sys
from typing import Any, Literal

from llama_index.core.agent.workflow import FunctionAgent  # type: ignore[import-not-found]
from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-not-found]

asked: list[str] = []


def tide(place: Literal["AB", "CD"]) -> str:
    """When the tide turns."""
    asked.append(place)
    return "six"


async def answer(url: str) -> Any:
    """Run the agent."""
    model = OpenAILike(
        model="any", api_base=url, api_key="none", is_chat_model=True, is_function_calling_model=True, temperature=0,
        max_retries=0,
    )  # fmt: skip
    agent = FunctionAgent(tools=[tide], llm=model, initial_tool_choice="tide", allow_parallel_tool_calls=False)
    return await agent.run("A")


if __name__ == "__main__":
    found = asyncio.run(answer(sys.argv[1]))
    outputs = [call.tool_output.content for call in found.tool_calls]
    print(json.dumps({"asked": asked, "outputs": outputs, "answer": str(found)}))
