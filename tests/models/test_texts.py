"""Texts: embedded ones, files, and how they are cut."""

import gzip
import lzma

import pytest
import torch

from rankwise.models.texts import embedded_texts, read_text, tokens, windows


class Letters:
    """A tokenizer of one token a letter; it would add a special token if asked."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True):
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}


def test_embedded_texts_are_long_and_stable():
    texts = embedded_texts()
    assert set(texts) == {"topics", "python"}
    assert all(len(text) > 200_000 for text in texts.values())
    assert texts == embedded_texts()
    assert "class ArgumentParser" in texts["python"]
    assert '"assert"' in texts["topics"]


@pytest.mark.parametrize(("ending", "opener"), [(".txt", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_files_plain_and_packed(tmp_path, ending, opener):
    path = tmp_path / f"text{ending}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("héllo\nworld")
    assert read_text(path) == "héllo\nworld"


@pytest.mark.parametrize("ending", [".gz", ".xz"])
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"not packed"])
def test_damaged_files_are_named(tmp_path, ending, damage):
    path = tmp_path / f"text{ending}"
    packed = (gzip if ending == ".gz" else lzma).compress(bytes(range(256)).hex().encode())
    path.write_bytes(damage(packed))
    with pytest.raises(ValueError, match=rf"text{ending}\" cannot be read"):
        read_text(path)


def test_missing_files_folders_and_other_encodings_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "latin.txt")


def test_tokens_have_no_special_ones_and_are_cut_at_either_end():
    assert tokens(Letters(), "abcd").tolist() == [97, 98, 99, 100]
    assert tokens(Letters(), "abcd", limit=2).tolist() == [97, 98]
    assert tokens(Letters(), "abcd", limit=2, last=True).tolist() == [99, 100]
    assert tokens(Letters(), "abcd", limit=9).tolist() == [97, 98, 99, 100]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='text "novel" is empty'):
        tokens(Letters(), "", name="novel")
    with pytest.raises(ValueError, match="limit must be >= 1"):
        tokens(Letters(), "a", limit=0)
    with pytest.raises(ValueError, match="window must be >= 2"):
        windows(torch.arange(4), 1)
