"""Frozen text encoders: class prompts -> 16 tokens and their mask, once per class (paper, section 3.3).

``hashed`` needs no download and knows only spelling; T5 is what the paper used; open_clip's text towers are the
third family.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from d2c.encoders import (
    UNREADABLE,
    EncoderInfo,
    OpenClip,
    first_line,
    from_hub,
    frozen,
    load_open_clip,
    local_path,
    revision_of,
    weights_digest,
)
from d2c.errors import D2CError

TOKENS = 16
"""Tokens per prompt; longer prompts are cut (paper, section 3.3)."""
T5_REPO = "google/flan-t5-xl"
TEMPLATE = "a photo of a {class}"
Synonyms = Literal["first", "all"]
"""Which of a class's comma-separated names its prompt has."""
HASHED_WIDTH = 256
_BATCH = 64
_OFFLINE = "or need no download: --text hashed"


class TextEncoder(Protocol):
    """A frozen map from prompts to token embeddings."""

    @property
    def info(self) -> EncoderInfo: ...

    def encode(self, prompts: list[str]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """C prompts -> embeddings float16 [C, 16, W] and mask uint8 [C, 16]; masked positions are zero.

        Raises:
            D2CError: a prompt is empty, or an embedding is NaN or does not fit float16.
        """
        ...


def prompts(class_names: Sequence[str], template: str = TEMPLATE, synonyms: Synonyms = "first") -> list[str]:
    """One prompt per class: its comma-separated synonyms, the first or all, underscores as spaces, in ``template``.

    ``"tench, Tinca tinca"`` -> ``"a photo of a tench"``, or ``"a photo of a tench, Tinca tinca"`` with ``all``.
    Encoders cut what exceeds 16 tokens, so of many synonyms the last are lost.

    Raises:
        D2CError: a class has no name, or ``template`` has no ``{class}``.
    """
    if "{class}" not in template:
        raise D2CError("the prompt template has no place for the class", found=template, expected="{class} in it")
    sentences = []
    for index, name in enumerate(class_names):
        words = [" ".join(synonym.replace("_", " ").split()) for synonym in name.split(",")]
        label = words[0] if synonyms == "first" else ", ".join(filter(None, words))
        if not label:
            raise D2CError(
                f"class {index} has no name to make a prompt from",
                found=repr(name),
                hint="rename its folder (or its entry in the label names), or attach no text: --text none",
            )
        sentences.append(template.replace("{class}", label))
    return sentences


def open_text(name: str, device: torch.device) -> TextEncoder:
    """The encoder ``hashed``, ``t5`` (flan-t5-xl), ``t5:REPO_OR_FOLDER`` or ``open_clip:MODEL:TAG_OR_FILE``.

    Raises:
        D2CError: unknown name, or weights that are missing, incomplete or unreachable.
    """
    family, _, rest = name.partition(":")
    if name == "hashed":
        return HashedText()
    if family == "t5":
        return T5Text(rest or T5_REPO, device)
    if family == "open_clip" and rest:
        return OpenClipText(rest, device)
    raise D2CError(
        f"there is no text encoder {name!r}",
        expected="hashed, t5, t5:REPO_OR_FOLDER, open_clip:MODEL:TAG_OR_FILE, FILE.parquet or FILE.npz",
        hint="--text hashed",
    )


class HashedText:
    """Character n-grams hashed into a fixed vector, one token per word: words that look alike lie close.

    A word (NFKC, case folded) is wrapped as ``<word>``; each of its 3-, 4- and 5-grams adds +1 or -1 at one of 256
    places, both taken from the n-gram's xxh3-64 (place = hash mod 256, sign = top bit); the vector is then
    L2-normalised. Fixed for ever: artifacts depend on it.
    """

    def __init__(self) -> None:
        self.info = EncoderInfo(
            name="hashed",
            source="built in",
            revision="1",
            weights_xxh3="",
            dim=HASHED_WIDTH,
            tokens=TOKENS,
            layer="character 3- to 5-grams",
        )

    def encode(self, prompts: list[str]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        embeds = np.zeros((len(prompts), TOKENS, HASHED_WIDTH), np.float32)
        mask = np.zeros((len(prompts), TOKENS), np.uint8)
        for row, prompt in enumerate(prompts):
            words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).casefold())
            if not words:
                raise _empty(row, prompt)
            for position, word in enumerate(words[:TOKENS]):
                embeds[row, position] = hashed_word(word)
                mask[row, position] = 1
        return embeds.astype(np.float16), mask


def hashed_word(word: str) -> NDArray[np.float32]:
    """One word -> its float32 [256] vector of length 1, as `HashedText` says."""
    vector = np.zeros(HASHED_WIDTH, np.float32)
    wrapped = f"<{word}>"
    for length in (3, 4, 5):
        for start in range(len(wrapped) - length + 1):
            value = xxhash.xxh3_64_intdigest(wrapped[start : start + length].encode())
            vector[value % HASHED_WIDTH] += 1.0 if value >> 63 else -1.0
    # Signs can cancel to a zero vector; whole counts make every other norm at least 1.
    return vector / max(1.0, float(np.linalg.norm(vector)))


class T5Text:
    """Last hidden states of a T5 encoder (any size) through transformers; prompts padded or cut to 16 tokens."""

    def __init__(self, name: str, device: torch.device) -> None:
        hint = f"give a folder saved by transformers: --text t5:FOLDER; {_OFFLINE}"
        try:
            import transformers
        except ImportError as error:
            raise D2CError(
                "T5 needs the transformers package",
                hint=f"install it with: pip install 'd2c-toolkit[t5]'; {_OFFLINE}",
            ) from error
        local = local_path(name)
        path = local or from_hub(name, ("*.json", "*.safetensors", "spiece.model"), hint=hint)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            loader: Any = transformers.T5EncoderModel
            model, report = loader.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True
            )
        except UNREADABLE as error:
            raise D2CError(
                "this folder holds no T5 encoder that transformers can load",
                where=path,
                found=first_line(error),
                expected="config.json, tokenizer files and *.safetensors",
                hint=hint,
            ) from error
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])[0]
            raise D2CError("the T5 weights are incomplete", where=path, found=f"no {missing}", hint=hint)
        self.info = EncoderInfo(
            name="t5",
            source=f"file:{path.resolve().name}" if local else f"hf://{name}",
            revision=revision_of(path),
            weights_xxh3=weights_digest(model.state_dict()),
            dim=int(model.config.d_model),
            tokens=TOKENS,
            layer="last hidden state",
        )
        self._model: Any = frozen(model, device)
        self._device = device

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        _check_prompts(prompts)
        embeds, masks = [], []
        for start in range(0, len(prompts), _BATCH):
            batch = self._tokenizer(
                prompts[start : start + _BATCH],
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].to(self._device)
            hidden = self._model(input_ids=batch["input_ids"].to(self._device), attention_mask=mask).last_hidden_state
            embeds.append(hidden.float() * mask[..., None])
            masks.append(mask)
        return _to_half(torch.cat(embeds), self.info), torch.cat(masks).to(torch.uint8).cpu().numpy()


class OpenClipText:
    """Hidden states of an open_clip text tower after its last layer norm, one per token; the end token is kept.

    Towers that read CLIP's own byte-pair tokens only; those with a downloaded tokenizer are refused.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        import open_clip

        hint = f"give a checkpoint file: --text open_clip:MODEL:FILE; {_OFFLINE}"
        name = spec.partition(":")[0]
        config = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        if config.get("hf_tokenizer_name") or config.get("hf_model_name") or "siglip" in name.lower():
            raise D2CError(
                f"{name} reads text through a tokenizer that open_clip would download",
                hint="name a model with CLIP's own tokenizer, e.g. open_clip:ViT-L-14:FILE, or t5",
            )
        loaded: OpenClip = load_open_clip(spec, device, image_size=None, hint=hint)
        self._model: Any = loaded.model
        self._device = device
        self._context = int(config.get("context_length", 77))
        self._tokenizer: Any = open_clip.get_tokenizer(name, context_length=min(TOKENS, self._context))
        self.info = EncoderInfo(
            name=f"open_clip:{loaded.name}",
            source=loaded.source,
            revision=loaded.revision,
            weights_xxh3=loaded.weights_xxh3,
            dim=int(config["width"]),
            tokens=TOKENS,
            layer="last block, final layer norm",
        )

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        _check_prompts(prompts)
        embeds = torch.zeros(len(prompts), TOKENS, self.info.dim)
        mask = torch.zeros(len(prompts), TOKENS, dtype=torch.uint8)
        for start in range(0, len(prompts), _BATCH):
            ids = self._tokenizer(prompts[start : start + _BATCH])  # [n, <= 16]
            count, length = ids.shape
            padded = torch.zeros(count, self._context, dtype=torch.long)
            padded[:, :length] = ids
            hidden = self._model.forward_intermediates(
                text=padded.to(self._device),
                text_indices=1,
                normalize_intermediates=True,
                intermediates_only=True,
            )["text_intermediates"][-1][:, :length]
            # The end token has the largest id; what follows is padding.
            here = torch.arange(length) <= ids.argmax(dim=1, keepdim=True)
            embeds[start : start + count, :length] = hidden.float().cpu() * here[..., None]
            mask[start : start + count, :length] = here.to(torch.uint8)
        return _to_half(embeds, self.info), mask.numpy()


def _check_prompts(prompts: Sequence[str]) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise _empty(row, prompt)


def _empty(row: int, prompt: str) -> D2CError:
    return D2CError(f"prompt {row} has no words", found=repr(prompt), hint="give every class a name")


def _to_half(embeds: torch.Tensor, info: EncoderInfo) -> NDArray[np.float16]:
    half = embeds.to(torch.float16)
    if not torch.isfinite(half).all():
        raise D2CError(
            "the text encoder gave values that are NaN or too large for float16",
            where=f"{info.name} ({info.source})",
            hint="check the weights file; or --text hashed",
        )
    values: NDArray[np.float16] = half.cpu().numpy()
    return values
