"""The parent of a block-by-block search: from a folder or a factory, here and in worker processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save
from torch import nn

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.core.files import storage_errors, write_atomic
from archsmith.cost.targets import load_target
from archsmith.families.bert import HFEncoderFamily
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.residual_slots import SlotFamily


@dataclass(frozen=True)
class ModelSource:
    """A call without arguments that gives the family of a model; it pickles.

    Attributes:
        model: Folder of a model of transformers (config.json and safetensors), or "module:factory", whose code is
            executed.
        alternatives: JSON of the alternatives by part or slot, or empty for the default.
        ranking: As in ``SlotFamily``.
        kv_initialiser: As in ``SlotFamily``.
        statistics: Safetensors file of the calibration pass, or empty.
    """

    model: str
    alternatives: str = ""
    ranking: str = "contribution"
    kv_initialiser: str = "mean"
    statistics: str = ""

    def __call__(self) -> SlotFamily:
        """Return the family, with its statistics where they were collected.

        Raises:
            UserError: No such model, or one whose blocks cannot be found.
        """
        parent = load_parent(self.model)
        options = {
            "alternatives": json.loads(self.alternatives) if self.alternatives else None,
            "ranking": self.ranking,
            "kv_initialiser": self.kv_initialiser,
        }
        kind: type[SlotFamily] = SlotFamily
        if hasattr(parent, "config") and hasattr(parent, "save_pretrained"):
            kind = HFDecoderFamily if is_causal(parent) else HFEncoderFamily
        family = kind(parent, **options)  # type: ignore[arg-type]
        if self.statistics and Path(self.statistics).is_file():
            for key, value in load_file(self.statistics).items():
                slot, _, name = key.partition("/")
                family.statistics.setdefault(slot, {})[name] = value
        return family


def write_statistics(family: SlotFamily, path: Path) -> None:
    """Keep what ``collect_statistics`` found."""
    rows = {f"{slot}/{name}": value for slot, found in family.statistics.items() for name, value in found.items()}
    with storage_errors("out", path):
        write_atomic(path, save(rows))


def is_causal(parent: nn.Module) -> bool:
    """Return whether a model of transformers predicts the next token."""
    return type(parent).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def load_parent(model: str) -> nn.Module:
    """Return the model of a folder or of "module:factory", in evaluation mode.

    Raises:
        UserError: Neither.
        MissingExtra: The folder needs transformers, which is not installed.
    """
    folder = Path(model)
    if not folder.is_dir():
        found = load_target(model)
        if not isinstance(found, nn.Module):
            raise UserError("model", model, allowed="a folder of a model of transformers, or module:factory")
        return found.eval()
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "text", "Reading a model's folder") from error
    if not (folder / "config.json").is_file():
        raise UserError(
            "model",
            Shown(f"{folder}, which has no config.json"),
            allowed="a folder that save_pretrained wrote, or module:factory",
        )
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise UserError("model", names[0], allowed=f"a class of transformers {transformers.__version__}")
    try:
        loaded: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError("model", Shown(f"{folder} ({error})"), allowed="a folder that save_pretrained wrote") from error
    return loaded.eval()
