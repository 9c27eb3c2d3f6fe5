"""The tokenizer of synthetic models: a token for each byte, and Qwen's special tokens, in published formats."""

import json
from pathlib import Path
from typing import Any

_END_OF_TEXT = "<|endoftext|>"
_END_OF_TURN = "<|im_end|>"
_SPECIAL = (_END_OF_TEXT, "<|im_start|>", _END_OF_TURN)
_MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens that stay in the decoded text for programs to read."""

BYTE_TOKENS = 256 + len(_SPECIAL + _MARKUP)
"""The size of the vocabulary."""

CHAT_TEMPLATE = """\
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content or [] %}
            {{- part.text if part.text is string else raise_exception('this model takes text only') }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set system = text(messages[0].content) if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\nYou may call these functions:\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nTo call one, write:\\n\\n<tool_call>\\n<function=NAME>\\n<parameter=NAME>\\nVALUE' }}
    {{- '\\n</parameter>\\n</function>\\n</tool_call>' }}
    {{- '\\n\\n' + system if system }}
    {{- '<|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('the system message must be the first') }}
        {%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + text(message.content) + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content | trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text(message.content) }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n' if not loop.first or text(message.content) }}
            {{- '<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for name, value in call.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {{- value if value is string else value | tojson }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\\n<tool_response>\\n' + text(message.content) + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- else %}
        {{- raise_exception('unknown role: ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {{- '\\n</think>\\n\\n' if enable_thinking is not true }}
{%- endif %}
"""


def write_byte_tokenizer(folder: Path) -> int:
    """Write the tokenizer files, always the same bytes, into ``folder`` and return the number of tokens.

    The ids 0 to 255 are the byte values.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    added = [
        {
            "id": len(vocabulary) + index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in _SPECIAL,
        }
        for index, token in enumerate(_SPECIAL + _MARKUP)
    ]
    ids = {token["content"]: token["id"] for token in added}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": _END_OF_TURN,
        "pad_token": _END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    generation_config = {
        "eos_token_id": [ids[_END_OF_TURN], ids[_END_OF_TEXT]],
        "pad_token_id": ids[_END_OF_TEXT],
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "generation_config.json", generation_config)
    (folder / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.encode())
    return len(vocabulary) + len(added)


def _byte_symbols() -> list[str]:
    """Return the character of each byte in byte-level BPE: itself if printable, else the next free one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
