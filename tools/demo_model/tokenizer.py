"""The tokenizer of the demo model: byte-level BPE trained on the corpus, in the published file formats."""

import json
from pathlib import Path

from corpus import Corpus
from documents import segments
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tokens that are not skipped in decoded text, because programs read them."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern by which Qwen3.5's tokenizer divides a text before merging; each digit is a separate token."""


def train_tokenizer(corpus: Corpus, documents: int = 40_000) -> Tokenizer:
    """Train a tokenizer on the first ``documents`` documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKUP),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = (*SPECIAL, *MARKUP)

    def texts() -> "list[str]":
        pieces = []
        for document in corpus.training(-1, documents):
            text = "".join(text for text, _ in segments(document))
            for mark in marks:
                text = text.replace(mark, "\n")
            pieces.append(text)
        return pieces

    tokenizer.train_from_iterator(texts(), trainer)
    # These ids follow those of the words, as in the published vocabulary.
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and the other tokenizer files that transformers and this project read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text, end_of_turn = (tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    for name, value in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
