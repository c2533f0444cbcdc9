"""Text to token rows."""

import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sluice.lab.corpus import BOS_ID, EOS_ID, Rows, encode, read_text, split_held_out, train_tokenizer

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 300)


def test_plain_and_packed_text_read_the_same(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.xz") == TEXT


def test_text_that_is_not_utf8_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: .* Convert it to UTF-8"):
        read_text(tmp_path / "a.txt")


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_text(tmp_path / "a.txt")


def test_held_out_part_is_the_end_of_the_text():
    assert split_held_out("abcdefghij", 4) == ("abcdef", "ghij")


def test_a_character_cut_in_two_belongs_to_neither_part():
    train, held_out = split_held_out("aaaaaéb", 2)
    assert (train, held_out) == ("aaaaa", "b")


@pytest.mark.parametrize("size", [0, -1, 5, 100])
def test_held_out_size_has_to_leave_more_than_half(size):
    with pytest.raises(ValueError, match=f"held-out size {size} bytes does not fit a corpus of 10 bytes"):
        split_held_out("abcdefghij", size)


def test_encoding_a_text_puts_bos_first_and_corpus_encoding_does_not(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    assert ids[0] == BOS_ID
    assert tokenizer.token_to_id("</s>") == EOS_ID
    assert encode(tokenizer, TEXT).tolist() == ids[1:]
    assert encode(tokenizer, TEXT).dtype == np.uint16


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ünïcode 你好\t\x00 and  blanks"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_rows_of_a_short_text_are_refused():
    with pytest.raises(ValueError, match="the text has 17 tokens, which is too short for rows of 16"):
        Rows(np.arange(17, dtype=np.uint16), 16)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), rows=st.integers(1, 8))
def test_the_data_order_is_a_function_of_seed_and_step(seed, step, rows):
    tokens = np.arange(2, 402, dtype=np.uint16)
    source = Rows(tokens, 16)
    source.batch(seed + 1, step + 1, 3)
    ids, targets = source.batch(seed, step, rows)
    again = Rows(tokens.copy(), 16).batch(seed, step, rows)
    assert torch.equal(ids, again[0])
    assert torch.equal(targets, again[1])
    assert ids.shape == targets.shape == (rows, 16)
    assert torch.all(ids[:, 0] == BOS_ID)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert torch.all(targets.diff(dim=1) == 1)


def test_steps_and_seeds_draw_different_rows():
    source = Rows(np.arange(4000, dtype=np.uint16), 16)
    first, _ = source.batch(0, 0, 4)
    assert not torch.equal(first, source.batch(0, 1, 4)[0])
    assert not torch.equal(first, source.batch(1, 0, 4)[0])
