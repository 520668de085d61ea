"""Token counts of an answer, and the ends of completions in OpenAI's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sateen.engine.request import RequestOutput
from sateen.engine.server.problem import Problem, bad_request


def usage(
    outputs: Sequence[RequestOutput], *, num_reasoning: int = 0, is_prompt_only: bool = False
) -> dict[str, Any]:
    """The `usage` object over all prompts and completions.

    Args:
        outputs: one per prompt.
        num_reasoning: tokens of reasoning among the generated ones.
        is_prompt_only: the one token that the engine generated is not part of the answer.
    """
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    completion = 0 if is_prompt_only else generated
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
    }


def aborted(stop_reason: str | int | None) -> Problem:
    """What a client is told of a completion that the engine gave up."""
    if stop_reason == "deadline":
        return Problem(504, "the request took longer than this server allows", code="deadline_exceeded")
    return bad_request(f"the completion could not go on: {stop_reason}", code="aborted")
