"""Small tokenizers of each kind, built on the spot.

Only the BPE is trained: the trainers of WordPiece and Unigram give another vocabulary on every run.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

EOT = "<|endoftext|>"
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def position_ids(segment_ids):\n    return segment_ids[0] if segment_ids else None\n",
    "Packing documents into rows wastes nothing; 12 345 tokens, naïve café, 日本語 text.",
] * 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:()[]<>|/_é日"


def byte_level_bpe() -> Tokenizer:
    """As GPT-2: no BOS, every byte has a token, `<|endoftext|>` and a chat marker are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOT, "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe_with_bos() -> Tokenizer:
    """As Llama 3: the post-processor puts BOS first."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True)])
    bos = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", bos)]
    )
    return tokenizer


def metaspace_bpe() -> Tokenizer:
    """As SentencePiece's BPE: spaces become a mark, words begin with one, bytes stand for what has no token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][: len(special)]
    return Tokenizer.from_str(json.dumps(described))


def whole_text_bpe() -> Tokenizer:
    """As Llama 2: marks for spaces come from the normalizer, and nothing cuts a text before BPE."""
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(metaspace_bpe().to_str()) | {"pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: lower case, [UNK] for what it does not know, [CLS] and [SEP] around a text."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_LETTERS, *("##" + letter for letter in _LETTERS), "the", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram() -> Tokenizer:
    """As SentencePiece: spaces become a mark, `</s>` ends a text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *_LETTERS, "▁the", "ing", "▁qu"]
    tokenizer = Tokenizer(models.Unigram([(piece, -0.1 * i) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(pieces[:3])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    """Write a tokenizer's folder; the config becomes tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
