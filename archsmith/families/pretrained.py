"""A pre-trained encoder of tokens with a classifier on top: one input, token ids; the padding makes the mask."""

# B batch, T tokens, D width of the encoder, K classes

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from archsmith.core.errors import MissingExtra, Shown, UserError

WEIGHTS = "model.safetensors"


class TokenClassifier(nn.Module):
    """Encoder, mean over the tokens, one linear layer.

    Args:
        encoder: Called with ``input_ids`` and ``attention_mask``; gives states (B, T, D) as ``last_hidden_state``.
        width: D.
        classes: K.
        pad_id: Id of the padding; every other token counts.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int, pad_id: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)
        self.pad_id = pad_id

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits (B, K) of token ids."""
        mask_BT = (ids_BT != self.pad_id).long()
        states_BTD = self.encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT.unsqueeze(-1).to(states_BTD.dtype)
        logits: Tensor = self.head((states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1))
        return logits


def pretrained_classifier(
    folder: str | Path, *, classes: int, pad_id: int = 0, vocabulary: int | None = None
) -> TokenClassifier:
    """Return a classifier on the encoder of a Hugging Face folder; the linear layer on top is new.

    Args:
        folder: With ``config.json`` and weights (``model.safetensors``: nothing is unpickled). No code of the folder is
            executed, and nothing is downloaded.
        classes: Number of classes.
        pad_id: Id of the padding.
        vocabulary: Ids that the task makes; checked against the encoder's.

    Raises:
        UserError: No such folder, weights that do not fit its configuration, or a vocabulary beyond the encoder's.
        MissingExtra: ``transformers`` is not installed.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UserError("model", str(folder), allowed="a Hugging Face folder with config.json and weights")
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise MissingExtra("transformers", "text", "a pre-trained encoder") from error
    try:
        config: Any = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        encoder: Any = _built(AutoModel, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("model", Shown(f"{path}, which makes no encoder: {first}"), allowed="a known model") from error
    size = int(getattr(config, "vocab_size", 0))
    if vocabulary is not None and vocabulary > size:
        raise UserError(
            "tokenizer",
            Shown(f"{vocabulary} ids for an encoder with {size}"),
            allowed="the tokenizer of the pre-trained network",
            hint=f"On the command line: --task-set tokenizer={path}",
        )
    _load(encoder, path)
    return TokenClassifier(encoder, int(config.hidden_size), classes, pad_id)


def _built(factory: Any, config: Any) -> Any:
    try:
        return factory.from_config(config, add_pooling_layer=False)
    except TypeError:  # not every encoder has such a layer to leave out
        return factory.from_config(config)


def _load(encoder: nn.Module, path: Path) -> None:
    """Load the weights of the encoder, called with or without the name that a model with a head gives it."""
    file = path / WEIGHTS
    if not file.is_file():
        raise UserError(
            "model",
            Shown(f"{path} without weights"),
            allowed=f"{WEIGHTS} in it",
            hint="Other forms are unpickled, which executes code: save the network anew by save_pretrained.",
        )
    try:
        read = load_file(file)
    except Exception as error:
        raise UserError("model", str(file), allowed="weights that can be read") from error
    prefix = f"{getattr(encoder, 'base_model_prefix', '')}."
    given = {name.removeprefix(prefix): tensor for name, tensor in read.items()}
    wanted = encoder.state_dict()
    missing = [name for name in wanted if name not in given]
    wrong = [n for n, t in wanted.items() if n in given and given[n].shape != t.shape]
    if missing or wrong:
        what = f"without '{missing[0]}'" if missing else f"with '{wrong[0]}' of shape {tuple(given[wrong[0]].shape)}"
        also = len(missing) + len(wrong) - 1
        expected = "" if missing else f", where config.json says {tuple(wanted[wrong[0]].shape)}"
        raise UserError(
            "model",
            Shown(f"{file.name} {what}{expected}" + (f" (and {also} more)" if also else "")),
            allowed=f"weights that fit {path / 'config.json'}",
        )
    encoder.load_state_dict({name: given[name] for name in wanted})
