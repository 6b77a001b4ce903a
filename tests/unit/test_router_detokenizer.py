from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from router.life.detokenizer import MAX_PENDING, CleanUp, Detokenizer
from router.life.output import ChoiceOutput, TokenStep
from tandem.types import FinishReason, Token

EOS = 256
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def byte_tokenizer() -> Tokenizer:
    """One id a byte, so that every character of several bytes is split; and an end of sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    assert tokenizer.token_to_id("<eos>") == EOS
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Leading spaces are part of words, and the first word of a text loses its own (as Llama 2 does)."""
    words = {"<s>": 0, "▁Hello": 1, "▁world": 2, "!": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


BYTES = byte_tokenizer()


def ids_of(text: str) -> list[int]:
    return list(BYTES.encode(text).ids)


def ids_by_byte() -> dict[int, int]:
    """The id of every byte, by GPT-2's table of letters that stand for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    letters = {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}
    return {value: BYTES.token_to_id(letter) for value, letter in letters.items()}


ID_OF_BYTE = ids_by_byte()


@given(st.text(max_size=40), st.text(min_size=1, max_size=5))
def test_pieces_add_up_to_the_text_and_no_piece_has_half_a_character(text: str, prompt: str) -> None:
    if INCOMPLETE in text + prompt:
        return
    detokenizer = Detokenizer(BYTES, ids_of(prompt))
    pieces = [detokenizer.push(token) for token in ids_of(text)]
    assert "".join(pieces) == text
    assert INCOMPLETE not in "".join(pieces)


@given(st.binary(max_size=60), st.text(max_size=3))
def test_with_what_comes_at_the_end_bytes_of_any_kind_are_the_decoder_s_text(data: bytes, prompt: str) -> None:
    detokenizer = Detokenizer(BYTES, ids_of(prompt))
    ids = [ID_OF_BYTE[value] for value in data]
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == BYTES.decode(ids)
    assert detokenizer.flush() == ""


def test_text_before_half_a_character_does_not_wait_for_the_rest() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["x\u00e2"])  # as ByteLevel decodes it: x and the first byte of a character
    (both,) = tokenizer.encode("x\u00e2").ids
    whole = tokenizer.decode([both])
    detokenizer = Detokenizer(tokenizer, ids_of("p"))
    assert detokenizer.push(both) + detokenizer.flush() == whole


@given(st.binary(max_size=40))
def test_bytes_that_are_not_utf8_raise_nothing_and_hold_nothing_back_for_long(data: bytes) -> None:
    detokenizer = Detokenizer(BYTES, ids_of("p"))
    ids = [ID_OF_BYTE[value] for value in data]
    emitted = "".join(detokenizer.push(token) for token in ids)
    whole = BYTES.decode(ids)
    assert len(whole) - len(emitted) <= MAX_PENDING


def test_a_character_of_four_bytes_comes_whole() -> None:
    detokenizer = Detokenizer(BYTES, ids_of("x"))
    assert [detokenizer.push(token) for token in ids_of("a😀b")] == ["a", "", "", "", "😀", "b"]


def test_an_endless_run_of_broken_bytes_costs_the_same_at_every_step() -> None:
    detokenizer = Detokenizer(BYTES, ids_of("x"))
    for _ in range(1000):
        detokenizer.push(ID_OF_BYTE[0x80])
        assert len(detokenizer._ids) <= 2 * MAX_PENDING


def test_the_prompt_decides_about_the_leading_space() -> None:
    tokenizer = sentencepiece_tokenizer()
    assert Detokenizer(tokenizer, [0, 1]).push(2) == " world"
    assert Detokenizer(tokenizer, [0]).push(2) == "world"


def test_special_tokens_are_skipped_without_losing_the_context() -> None:
    tokenizer = sentencepiece_tokenizer()
    detokenizer = Detokenizer(tokenizer, [0, 1])
    assert [detokenizer.push(token) for token in (0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 3)] == [""] * 9 + [" world", "!"]


def test_special_tokens_are_kept_on_demand() -> None:
    detokenizer = Detokenizer(BYTES, ids_of("x"), keep_special_tokens=True)
    assert "".join(detokenizer.push(token) for token in [*ids_of("hi"), EOS]) == "hi<eos>"


def output(stop: tuple[str, ...] = (), min_tokens: int = 0, keep_special: bool = False) -> ChoiceOutput:
    spelled = frozenset({EOS}) if keep_special else frozenset()
    return ChoiceOutput(Detokenizer(BYTES, ids_of("p"), keep_special), stop, min_tokens, spelled)


def step(ids: list[int], reason: FinishReason | None = None) -> TokenStep:
    return TokenStep(tuple(Token(id_) for id_ in ids), reason)


def text_of(choice: ChoiceOutput, *steps: TokenStep) -> str:
    return "".join(choice.push([one])[1] for one in steps)


def test_half_a_character_at_the_end_is_not_lost() -> None:
    choice = output()
    text = text_of(choice, step([*ids_of("oh "), ID_OF_BYTE[0xE2]], FinishReason.LENGTH))
    assert text == "oh " + INCOMPLETE


def test_a_stop_string_counts_when_half_a_character_follows_it() -> None:
    choice = output(stop=("oh",))
    assert text_of(choice, step([*ids_of("x oh"), ID_OF_BYTE[0xE2]])) == "x "
    assert (choice.reason, choice.stop) == (FinishReason.STOP, "oh")


def test_what_completes_at_the_end_may_be_a_stop_string() -> None:
    choice = output(stop=(INCOMPLETE,))
    assert text_of(choice, step([*ids_of("oh"), ID_OF_BYTE[0xE2]], FinishReason.LENGTH)) == "oh"
    assert (choice.reason, choice.stop) == (FinishReason.STOP, INCOMPLETE)


SPECIAL = {"<eos>": EOS}


def stopped(stop: str, ids: list[int], min_tokens: int = 0) -> tuple[str, str | None, int]:
    choice = ChoiceOutput(Detokenizer(BYTES, ids_of("p")), (stop,), min_tokens, unspelled=SPECIAL)
    text = ""
    for each in [*(step([token]) for token in ids), step([], FinishReason.LENGTH)]:
        if choice.reason is None:
            text += choice.push([each])[1]
    return text, choice.stop, choice.tokens


def test_a_stop_string_may_be_a_special_token_that_is_not_spelled() -> None:
    ids = [*ids_of("oh"), EOS, *ids_of("yes")]
    assert stopped("<eos>", ids) == ("oh", "<eos>", 3)
    assert stopped("h<eos>", ids) == ("o", "h<eos>", 3)
    assert stopped("<eos>y", ids) == ("oh", "<eos>y", 4)
    assert stopped("<eos>", [*ids_of("a<"), *ids_of("eos>b")]) == ("a", "<eos>", 6), "and the text that says the same"


def test_a_part_of_a_special_token_is_no_stop_string() -> None:
    ids = [*ids_of("oh"), EOS, EOS, *ids_of("yes")]
    assert stopped("eos", ids) == ("ohyes", None, 7)
    assert stopped("<eos>no", ids) == ("ohyes", None, 7)
    assert stopped("<eos>", ids, min_tokens=4) == ("ohyes", None, 7)


def cleaned(text: str) -> str:
    """What transformers does, in its words."""
    for before, after in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")):
        text = text.replace(before, after)
    for ending in ("'m", "'s", "'ve", "'re"):
        text = text.replace(" " + ending, ending)
    return text


@given(st.text(alphabet=" .?!,'ntmsverxa\n", max_size=40), st.integers(1, 5))
def test_cleaning_up_in_pieces_is_cleaning_up_the_whole(text: str, size: int) -> None:
    clean = CleanUp(cleaned)
    pieces = [clean.push(text[place : place + size]) for place in range(0, len(text), size)]
    assert "".join(pieces) + clean.flush() == cleaned(text)


def test_output_ends_by_length_and_lets_go_of_what_it_held() -> None:
    choice = output(stop=("yes",))
    assert text_of(choice, step(ids_of("oh y")), step(ids_of("e"), FinishReason.LENGTH)) == "oh ye"
    assert (choice.reason, choice.stop, choice.tokens) == (FinishReason.LENGTH, None, 5)


def test_output_ends_at_a_stop_string_and_forgets_later_tokens() -> None:
    choice = output(stop=("yes",))
    tokens, text = choice.push([step(ids_of("oh yes, yes")), step(ids_of("no"), FinishReason.LENGTH)])
    assert (text, len(tokens), choice.tokens) == ("oh ", 6, 6)
    assert (choice.reason, choice.stop) == (FinishReason.STOP, "yes")


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (2, "aa"), (3, "aaa")])
def test_stop_strings_do_not_count_within_min_tokens(min_tokens: int, text: str) -> None:
    choice = output(stop=("a",), min_tokens=min_tokens)
    assert text_of(choice, step(ids_of("aaaa"))) == text
    assert choice.tokens == min_tokens + 1


@pytest.mark.parametrize(("keep", "text"), [(False, "hi"), (True, "hi<eos>")])
def test_the_text_of_the_end_of_sequence_only_on_demand(keep: bool, text: str) -> None:
    assert text_of(output(keep_special=keep), step([*ids_of("hi"), EOS], FinishReason.STOP)) == text


def test_a_stop_token_is_in_the_output_but_its_text_is_not() -> None:
    choice = output(keep_special=True)
    tokens, text = choice.push([step(ids_of("hi!"), FinishReason.STOP)])
    assert (len(tokens), text) == (3, "hi")


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    choice = ChoiceOutput(None, (), 0)
    assert choice.push([step([1, 2], FinishReason.LENGTH)]) == ((Token(1), Token(2)), "")
