from __future__ import annotations

import builtins
import itertools
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2c.errors import D2CError
from d2c.text import HASHED_WIDTH, TOKENS, hashed_word, open_text, prompts

CPU = torch.device("cpu")
SENTENCES = ["a photo of a tench", "a photo of a great white shark", "a " * 40]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    folder = tmp_path_factory.mktemp("t5") / "tiny-t5"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁photo", "▁of", "tench", "shark"]
    tokenizer: Any = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model: Any = T5EncoderModel(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-text.json").write_text(
        '{"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},'
        ' "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}'
    )
    open_clip.add_model_config(folder / "tiny-text.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-text").state_dict(), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def test_prompts_take_the_first_synonym_and_clean_the_name() -> None:
    names = ["tench, Tinca tinca", "great_white_shark", "  two   spaces "]
    assert prompts(names) == ["a photo of a tench", "a photo of a great white shark", "a photo of a two spaces"]
    assert prompts(["cat"], "{class}") == ["cat"]


def test_prompts_take_all_synonyms_where_asked() -> None:
    names = ["tench, Tinca tinca", "cat", "great_white_shark,  white  shark,", ", Tinca tinca"]
    expected = ["a tench, Tinca tinca", "a cat", "a great white shark, white shark", "a Tinca tinca"]
    assert prompts(names, "a {class}", "all") == expected
    with pytest.raises(D2CError, match="class 1 has no name"):
        prompts(["cat", " , "], synonyms="all")


@pytest.mark.parametrize("name", ["", "  ", "___", ", Tinca tinca"])
def test_a_class_without_a_name_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(D2CError, match="class 1 has no name"):
        prompts(["cat", name])


def test_a_template_without_a_place_for_the_class_is_an_error() -> None:
    with pytest.raises(D2CError, match="template"):
        prompts(["cat"], "a photo")


def test_hashed_is_one_unit_vector_per_word_with_a_mask() -> None:
    encoder = open_text("hashed", CPU)
    embeds, mask = encoder.encode(SENTENCES)
    assert embeds.shape == (3, TOKENS, HASHED_WIDTH) == (3, 16, encoder.info.dim)
    assert (embeds.dtype.str, mask.dtype.str) == ("<f2", "|u1")
    np.testing.assert_array_equal(mask.sum(axis=1), [5, 7, 16])
    np.testing.assert_allclose(np.linalg.norm(embeds.astype(np.float32), axis=2), mask, atol=1e-3)
    np.testing.assert_array_equal(embeds[0, 0], embeds[0, 3])  # the word "a" twice
    np.testing.assert_array_equal(embeds, open_text("hashed", CPU).encode(SENTENCES)[0])


def test_hashed_words_that_look_alike_lie_close() -> None:
    near = float(hashed_word("sharks") @ hashed_word("shark"))
    far = float(hashed_word("sharks") @ hashed_word("tench"))
    assert near > 0.5 > abs(far) * 2
    upper, lower = open_text("hashed", CPU).encode(["SHARK \ufb01sh", "shark fish"])[0]
    np.testing.assert_array_equal(upper, lower)


def test_hashed_vectors_never_change() -> None:
    # Artifacts hold them. Six n-grams of <cat>, each at its own place: xxh3-64 of the UTF-8, mod 256, signed.
    vector = hashed_word("cat") * 6**0.5
    expected = {54: 1.0, 101: -1.0, 183: -1.0, 209: -1.0, 214: -1.0, 238: -1.0}
    assert {int(place): pytest.approx(vector[place]) for place in np.flatnonzero(vector)} == expected
    words = ["".join(letters) for letters in itertools.product("abc", repeat=3)]
    assert len({hashed_word(word).tobytes() for word in words}) == len(words)


@pytest.mark.parametrize("prompt", ["", "  ", "!?"])
def test_hashed_refuses_a_prompt_without_words(prompt: str) -> None:
    with pytest.raises(D2CError, match="prompt 1 has no words"):
        open_text("hashed", CPU).encode(["cat", prompt])


def test_t5_tokens_are_the_librarys_own_without_padding(t5_folder: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = open_text(f"t5:{t5_folder}", CPU)
    embeds, mask = encoder.encode(SENTENCES)
    assert embeds.shape == (3, 16, 32)
    assert (embeds.dtype.str, mask.dtype.str) == ("<f2", "|u1")
    tokenizer: Any = AutoTokenizer.from_pretrained(t5_folder)
    reference: Any = T5EncoderModel.from_pretrained(t5_folder)
    for row, sentence in enumerate(SENTENCES):
        ids = tokenizer(sentence, truncation=True, max_length=16, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = reference(input_ids=ids).last_hidden_state[0].numpy()
        assert mask[row].tolist() == [1] * len(expected) + [0] * (16 - len(expected))
        np.testing.assert_allclose(embeds[row, : len(expected)], expected, atol=1e-5, rtol=1e-3)
        assert not embeds[row, len(expected) :].any()
    assert mask[0].sum() < 16 == mask[2].sum()


def test_t5_says_where_it_came_from(t5_folder: Path) -> None:
    value = open_text(f"t5:{t5_folder}", CPU).info.to_dict()
    assert (value["name"], value["source"], value["dim"], value["tokens"]) == ("t5", "file:tiny-t5", 32, 16)
    assert len(value["weights_xxh3"]) == 32
    assert "grid" not in value


def test_t5_with_weights_missing_or_broken_is_an_error(t5_folder: Path, tmp_path: Path) -> None:
    for path in t5_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(D2CError, match=r"incomplete[\s\S]*final_layer_norm"):
        open_text(f"t5:{tmp_path}", CPU)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(D2CError, match="no T5 encoder"):
        open_text(f"t5:{tmp_path}", CPU)
    with pytest.raises(D2CError, match="no such file or folder"):
        open_text(f"t5:{tmp_path}/absent", CPU)


def test_unreachable_t5_names_the_offline_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(D2CError, match=r"google/flan-t5-xl[\s\S]*--text hashed"):
        open_text("t5", CPU)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(D2CError, match=r"d2c-toolkit\[t5\][\s\S]*--text hashed"):
        open_text("t5", CPU)


def test_open_clip_tokens_project_to_the_librarys_own_text_features(clip_file: Path) -> None:
    import open_clip

    encoder = open_text(f"open_clip:tiny-text:{clip_file}", CPU)
    embeds, mask = encoder.encode(SENTENCES)
    assert embeds.shape == (3, 16, 64) == (3, 16, encoder.info.dim)
    reference: Any = open_clip.create_model("tiny-text", pretrained=str(clip_file)).eval()
    ids = open_clip.get_tokenizer("tiny-text")(SENTENCES[:2])
    with torch.inference_mode():
        expected = reference.encode_text(ids)
    for row in range(2):
        length = int(mask[row].sum())
        assert length == int((ids[row] != 0).sum())
        ours = torch.from_numpy(embeds[row, length - 1]).float() @ reference.text_projection
        torch.testing.assert_close(ours, expected[row], atol=2e-3, rtol=2e-3)
        assert not embeds[row, length:].any()
    assert mask[2].tolist() == [1] * 16


def test_open_clip_tokens_are_the_librarys_own_forward(clip_file: Path) -> None:
    import open_clip

    embeds, mask = open_text(f"open_clip:tiny-text:{clip_file}", CPU).encode(SENTENCES)
    model: Any = open_clip.create_model("tiny-text", pretrained=str(clip_file)).eval()
    ids = open_clip.get_tokenizer("tiny-text")(SENTENCES)
    with torch.inference_mode():
        hidden = model.token_embedding(ids) + model.positional_embedding
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask)).numpy()
    for row in range(2):  # the third is cut, so its end token differs
        length = int(mask[row].sum())
        np.testing.assert_allclose(embeds[row, :length], hidden[row, :length], atol=1e-5, rtol=1e-3)
    np.testing.assert_allclose(embeds[2, :15], hidden[2, :15], atol=1e-5, rtol=1e-3)


def test_open_clip_never_runs_with_random_weights(
    clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, message in {
        "ViT-B-32": "weights must be named",
        "ViT-B-32:laion2b_s34b_b79k": "neither in the local cache nor reachable",
        "ViT-B-32:openai": "ViT-B-32-quickgelu:openai",
        f"ViT-B-32:{tmp_path}/absent.pt": "neither a file nor a known tag",
        f"ViT-B-32:{clip_file}": "does not fit open_clip's ViT-B-32",
        "ViT-B-16-SigLIP:webli": "tokenizer that open_clip would download",
        "No-Such-Model:x": "knows no architecture",
    }.items():
        with pytest.raises(D2CError, match=message):
            open_text(f"open_clip:{name}", CPU)


def test_unknown_names_list_the_grammar() -> None:
    with pytest.raises(D2CError, match=r"t5:REPO_OR_FOLDER[\s\S]*--text hashed"):
        open_text("bert", CPU)
