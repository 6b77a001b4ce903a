"""Model folders with tokenizers of many kinds, as they lie on hubs: what transformers makes of their files differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tandem.config import TINY_MODEL

TEXTS = [
    "Hello world, this is a test.",
    " leading and  double  spaces ",
    "Don't stop !  I 've seen it , you 're right .",
    "naïve café 日本語 🙂 \t\n end",
    "<s>user</s> [INST] x [/INST] <|user|> <|im_end|>  <mask> a<mask>b",
    "",
    "\N{COMBINING ACUTE ACCENT}e\u0301 ﬁ ½",
    "word " * 40,
    "def f(x):\n<FILL_ME>\n    return x",
]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(found)
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def write(folder: Path, model_type: str, settings: dict[str, Any] | None, tokenizer: Tokenizer | None = None) -> None:
    edit(folder / "config.json", lambda found: found.update(model_type=model_type))
    if settings is not None:
        edit(folder / "tokenizer_config.json", lambda found: found.update(settings))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))


def byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: a blank in front, bytes for what it does not know."""
    letters = sorted(set("".join(TEXTS[:3]).replace(" ", "▁")))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "H"), ("e", "l"), ("l", "o"), ("▁", "t"), ("▁t", "h"), ("i", "s")]
    for token in [*letters, "▁", *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [pair for pair in merges if all(part in vocabulary for part in pair)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    letters = sorted(set("".join(TEXTS).replace(" ", "▁")))
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -2.0), ("▁is", -2.5), ("▁.", -3.0)]
    pieces += [(letter, -6.0) for letter in letters if letter not in dict(pieces)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "this", "is", "a", "test", "##s", "don"]
    words += [*"abcdefghijklmnopqrstuvwxyz.,!'?<>|/", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _tiny(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, folder)


def _truncated_and_padded(folder: Path) -> None:
    _tiny(folder)
    padding = {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    edit(
        folder / "tokenizer.json",
        lambda found: found.update(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            padding={**padding, "pad_type_id": 0, "pad_token": "<unk>"},
        ),
    )


def _llama(**settings: Any) -> Callable[[Path], None]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    return lambda folder: write(folder, "llama", {**names, **settings}, sentencepiece_bpe())


def _code_llama(folder: Path) -> None:
    """Its class rewrites a text that has a gap, and the backend while it does so."""
    tokenizer = sentencepiece_bpe()
    tokenizer.add_special_tokens(["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"])
    write(folder, "llama", {"tokenizer_class": "CodeLlamaTokenizer", "bos_token": "<s>"}, tokenizer)


def _codegen(folder: Path) -> None:
    settings = {"tokenizer_class": "CodeGenTokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    write(folder, "codegen", settings, byte_level(["<|endoftext|>"]))


def _llama_3(folder: Path) -> None:
    """Says LlamaTokenizer, is byte-level."""
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    write(folder, "llama", {**settings, "clean_up_tokenization_spaces": True}, byte_level(["<s>", "<|im_end|>"]))


def _gpt2_of_two_files(folder: Path) -> None:
    byte_level(["<|endoftext|>"]).model.save(str(folder))
    write(folder, "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})


def _qwen(folder: Path) -> None:
    added = {"300": {"content": "<think>", "special": False}, "301": {"content": "<|im_end|>", "special": True}}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {token_id: {**flags, **token} for token_id, token in added.items()},
        "additional_special_tokens": ["<|user|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write(folder, "qwen2", settings, byte_level(["<|endoftext|>"]))


def _legacy_files(folder: Path) -> None:
    """Special tokens where transformers 4 kept them, with blanks that they swallow."""
    write(folder, "gpt2", {"tokenizer_class": "PreTrainedTokenizerFast"}, byte_level(["<s>"]))
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    edit(folder / "special_tokens_map.json", lambda found: found.update(mask_token=mask, bos_token="<s>"))
    edit(folder / "added_tokens.json", lambda found: found.update({"<mask>": 400, "[INST]": 401}))


def _named_tokens(folder: Path) -> None:
    tokenizer = byte_level(["<s>", "<img>"])
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{N}|\s+|[^\s\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_tokens([AddedToken("[INST]", rstrip=True), AddedToken("test", single_word=True)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "image_token": "<img>", "bos_token": "<s>"}
    write(folder, "llama", {**settings, "extra_special_tokens": {"boi_token": "<|user|>"}}, tokenizer)


def _post_processed(folder: Path) -> None:
    tokenizer = byte_level(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": False}
    write(folder, "gpt_neox", settings, tokenizer)


def _cleaned_up(tokenizer: Tokenizer, model_type: str) -> Callable[[Path], None]:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    return lambda folder: write(folder, model_type, settings, tokenizer)


def _bert(folder: Path) -> None:
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "cls_token": "[CLS]", "sep_token": "[SEP]"}
    write(folder, "bert", settings, word_piece())


def _bert_of_one_file(folder: Path) -> None:
    vocabulary = sorted(word_piece().get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in vocabulary))
    write(folder, "bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": False})


def _without_settings(folder: Path) -> None:
    write(folder, "gpt_neox", None, byte_level(["<|endoftext|>"]))


def _split_specials(folder: Path) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "split_special_tokens": True}
    write(folder, "llama", settings, byte_level(["</s>"]))


MAKERS: dict[str, Callable[[Path], None]] = {
    "tiny": _tiny,
    "truncated and padded": _truncated_and_padded,
    "llama 2": _llama(),
    "llama 2, legacy": _llama(legacy=True, add_bos_token=False, add_eos_token=True),
    "llama 2, no prefix": _llama(add_prefix_space=False, legacy=False),
    "llama 3": _llama_3,
    "code llama": _code_llama,
    "codegen": _codegen,
    "gpt2, two files": _gpt2_of_two_files,
    "qwen": _qwen,
    "legacy files": _legacy_files,
    "named tokens": _named_tokens,
    "post-processed": _post_processed,
    "unigram, cleaned up": _cleaned_up(unigram(), "xglm"),
    "word pieces, cleaned up": _cleaned_up(word_piece(), "bert"),
    "bert": _bert,
    "bert, one file": _bert_of_one_file,
    "no settings": _without_settings,
    "split specials": _split_specials,
}


def make(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    MAKERS[name](folder)
    return folder
