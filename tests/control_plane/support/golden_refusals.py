"""More requests for golden_requests: fields of wrong types or out of range, nulls, and what only the engine behind the server finds."""

from __future__ import annotations

from typing import Any

from golden_requests import _FLAT_TOOL as FLAT_TOOL
from golden_requests import _HELLO as HELLO
from golden_requests import _TOOL as TOOL
from golden_requests import MODEL, Case
from golden_requests import _chat as chat
from golden_requests import _message as message
from golden_requests import _post as post
from golden_requests import _raw as raw
from golden_requests import _response as response
from golden_requests import _text as text

Changes = dict[str, dict[str, Any]]

#: refused by chat and completions alike
_BOTH: Changes = {
    "n_float": {"n": 1.5},
    "n_too_large": {"n": 100_000, "temperature": 1},
    "top_k_negative": {"top_k": -2},
    "min_p_over_one": {"min_p": 2},
    "repetition_penalty_zero": {"repetition_penalty": 0},
    "presence_penalty_over_two": {"presence_penalty": 3},
    "seed_too_large": {"seed": 2**70},
    "stop_number": {"stop": 5},
    "stop_of_numbers": {"stop": [5]},
    "stop_empty": {"stop": ""},
    "stop_too_many": {"stop": list("abcdefgh")},
    "stop_token_ids_text": {"stop_token_ids": ["a"]},
    "min_tokens_below_zero": {"min_tokens": -1},
    "min_tokens_null": {"min_tokens": None},
    "ignore_eos_null": {"ignore_eos": None},
    "logit_bias_key": {"logit_bias": {"abc": 1}},
    "logit_bias_value": {"logit_bias": {"300": "x"}},
    "prompt_logprobs_text": {"prompt_logprobs": "a"},
    "prompt_logprobs_too_many": {"prompt_logprobs": 21},
    "prompt_logprobs_in_stream": {"prompt_logprobs": 1, "stream": True},
    "stream_options_text": {"stream": True, "stream_options": "x"},
    "include_usage_text": {"stream": True, "stream_options": {"include_usage": "maybe"}},
    "priority_null": {"priority": None},
    "cache_salt_empty": {"cache_salt": ""},
    "cache_salt_long": {"cache_salt": "x" * 200},
    "truncate_below": {"truncate_prompt_tokens": -2},
    "truncate_beyond": {"truncate_prompt_tokens": 100_000},
    "truncate_to_nothing": {"truncate_prompt_tokens": 0},
    "bad_words_text": {"bad_words": "x"},
    "bad_words_empty": {"bad_words": [""]},
    "structured_nothing": {"structured_outputs": {}},
    "structured_and_format": {"structured_outputs": {"choice": ["yes"]}, "response_format": {"type": "json_object"}},
    "structured_choice_text": {"structured_outputs": {"choice": "yes"}},
    "format_without_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    "two_errors": {"temperature": "x", "n": "y"},
}
#: found by the engine: of a stream the first event
_LATE: Changes = {
    "allowed_token_ids_empty": {"allowed_token_ids": []},
    "allowed_token_ids_outside": {"allowed_token_ids": [99_999_999]},
    "choice_empty": {"structured_outputs": {"choice": []}},
    "schema_type_unknown": {"structured_outputs": {"json": {"type": "wizard"}}},
    "schema_text_broken": {"structured_outputs": {"json": "nope"}},
}

_CHAT: Changes = {
    "stream_logprobs_too_many": {"logprobs": True, "top_logprobs": 21, "stream": True},
    "top_logprobs_text": {"logprobs": True, "top_logprobs": "x"},
    "add_generation_prompt_null": {"add_generation_prompt": None},
    "continue_with_generation_prompt": {"continue_final_message": True, "messages": [*HELLO, {"role": "assistant", "content": "I"}]},
    "continue_user": {"continue_final_message": True, "add_generation_prompt": False},
    "content_missing": {"messages": [{"role": "user"}]},
    "half_a_character": {"messages": [{"role": "user", "content": "\ud83d"}]},
    "tools_of_nonsense": {"tools": [{"type": "nonsense"}]},
    "tools_of_texts": {"tools": ["x"]},
    "tool_without_name": {"tools": [{"type": "function", "function": {}}]},
    "tool_choice_without_function": {"tools": [TOOL], "tool_choice": {}},
    "reasoning_effort_unknown": {"reasoning_effort": "wild"},
    "chat_template": {"chat_template": "{{ messages[0].content }}"},
    "chat_template_kwargs_number": {"chat_template_kwargs": 5},
    "beams": {"use_beam_search": True, "n": 2},
    "stream_beams": {"use_beam_search": True, "n": 2, "stream": True},
}
_TEXT: Changes = {
    "stream_logprobs_too_many": {"logprobs": 21, "stream": True},
    "logprobs_text": {"logprobs": "2"},
    "n_null": {"n": None},
    "echo_logprobs": {"echo": True, "logprobs": 1},
    "echo_logprobs_no_new_tokens": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "stream_echo_logprobs": {"stream": True, "echo": True, "logprobs": 1},
    "suffix_empty": {"suffix": ""},
    "suffix_number": {"suffix": 5},
    "prompt_of_both": {"prompt": ["a", [300]]},
    "prompt_of_empty": {"prompt": ["a", ""]},
    "stream_prompt_of_empty": {"prompt": [""], "stream": True},
    "stream_prompt_id_outside": {"prompt": [99_999_999], "stream": True},
    "prompt_of_nulls": {"prompt": [None]},
    "prompt_of_floats": {"prompt": [1.5]},
    "prompt_of_objects": {"prompt": [{"prompt": "x"}]},
    "prompt_of_truths": {"prompt": [True, False]},
    "prompt_object": {"prompt": {"a": 1}},
    "truncate_to_fit": {"prompt": "a b c d e f g h" * 1000, "truncate_prompt_tokens": -1},
    "stream_beams": {"use_beam_search": True, "n": 2, "stream": True},
    "beams_echo_logprobs": {"use_beam_search": True, "echo": True, "logprobs": 1},
}
_RESPONSES: Changes = {
    "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "stream_logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": True},
    "include_unknown": {"include": ["foo"]},
    "metadata_number": {"metadata": {"a": 1}},
    "max_output_tokens_huge": {"max_output_tokens": 100_000},
    "input_number": {"input": 5},
    "tools_null": {"tools": None},
    "tool_choice_without_tools": {"tool_choice": "required"},
    "tool_choice_unknown": {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "nobody"}},
    "text_plain": {"text": {"format": {"type": "text"}}},
    "verbosity": {"text": {"verbosity": "low"}},
    "reasoning": {"reasoning": {"effort": "low"}},
    "reasoning_unknown": {"reasoning": {"effort": "wild"}},
    "truncation_unknown": {"truncation": "x"},
    "service_tier_unknown": {"service_tier": "x"},
    "prompt_template": {"prompt": {"id": "x"}},
    "presence_penalty_over_two": {"presence_penalty": 5},
}
_MESSAGES: Changes = {
    "tool_choice_unknown": {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "maybe"}},
    "tool_choice_unnamed": {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool"}},
    "tool_choice_of_none": {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool", "name": "nobody"}},
    "tool_without_schema": {"tools": [{"name": "f"}]},
    "max_tokens_huge": {"max_tokens": 100_000},
    "top_k_negative": {"top_k": -2},
    "stop_sequences_number": {"stop_sequences": [5]},
    "stop_sequences_too_many": {"stop_sequences": list("abcdef")},
    "system_number": {"system": 5},
    "model_empty": {"model": ""},
    "content_number": {"messages": [{"role": "user", "content": 7}]},
    "content_empty": {"messages": [{"role": "user", "content": []}]},
    "role_unknown": {"messages": [{"role": "wizard", "content": "x"}]},
    "role_missing": {"messages": [{"content": "x"}]},
    "block_unknown": {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
    "thinking_beyond": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "cache_salt_empty": {"cache_salt": ""},
}

REFUSALS: tuple[Case, ...] = (
    *(chat(name, **changes) for name, changes in (_BOTH | _LATE | _CHAT).items()),
    *(chat(f"stream_{name}", stream=True, **changes) for name, changes in _LATE.items()),
    *(text(name, **changes) for name, changes in (_BOTH | _LATE | _TEXT).items()),
    *(text(f"stream_{name}", stream=True, **changes) for name, changes in _LATE.items()),
    *(response(name, **changes) for name, changes in _RESPONSES.items()),
    *(message(name, **changes) for name, changes in _MESSAGES.items()),
    raw("chat_null", "/v1/chat/completions", b"null"),
    raw("chat_too_deep", "/v1/chat/completions", b"[" * 5000),
    post("tokenize_number", "/tokenize", {"model": MODEL, "prompt": 5}),
    post("detokenize_negative", "/detokenize", {"model": MODEL, "tokens": [-1]}),
    post("detokenize_texts", "/detokenize", {"model": MODEL, "tokens": ["300"]}),
    post("slash_too_many", "/v1/completions/", {}),
)
