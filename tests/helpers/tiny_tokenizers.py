"""Tokenizers small enough to be trained in a test."""

from __future__ import annotations

TEXTS = [
    "plain words, and more",
    "größe: 猫 and 😀 together 👩‍👩‍👧 end",
    "日本語のテキスト",
    " leading and  double  spaces ",
    "broken \ufffd sign",
    "",
]


def bytes_tokenizer():
    """A token for each byte (byte-level, as GPT-2 and Llama 3 have it) and a few longer ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def pieces_tokenizer():
    """Pieces that begin with a space, and bytes for what has no piece (as Llama 2 has it)."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghilmnoprstuw,:"]
    words += ["▁a", "or", "▁w", "▁wor", "nd", "▁and"]
    merges = [("▁", "a"), ("o", "r"), ("▁", "w"), ("▁w", "or"), ("n", "d"), ("▁a", "nd")]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
