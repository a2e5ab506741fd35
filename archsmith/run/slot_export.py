"""A child of slots as a result that stands alone: ``model.py``, which imports torch only, with its weights.

Written for decoders of the Llama, Qwen2, Qwen3, Mistral and GPT-2 kinds and for BERT, with or without its masked
language model head. A child of another class, or one with an alternative of the user's own, has no such mapping: the
export says so, and writes the record with safetensors and a ``torch.export`` program instead.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import sha256_file, storage_errors, to_json, write_atomic
from archsmith.families.residual_slots import plan_of
from archsmith.families.slot_files import save as save_child
from archsmith.families.slot_layout import SubBlock, bias_of, locate, module_at, weight_of
from archsmith.families.slot_modules import GroupedAttention, RepeatedHeads
from archsmith.run.constructor import Call, parse_call
from archsmith.run.export import largest_gap, network_digest, replace_folder
from archsmith.run.own_export import compare_program, program_bytes
from archsmith.run.rebuild import SOURCE_TOLERANCE, run_fresh
from archsmith.run.source import source_of_call

_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel",
            "BertModel", "BertForMaskedLM")  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh"}  # fmt: skip

_HEADER = '''\
"""{name}: a child of {parent}, made by archsmith, as plain PyTorch.

This file needs torch only. Its weights are in weights.safetensors beside it:

    from safetensors.torch import load_file

    network = build()
    network.load_state_dict(load_file("weights.safetensors"))
    network.eval()

The network maps token numbers (batch, tokens) to {output}; see its forward.
It computes whole sequences and holds no key-value cache.
"""
'''


def export_child(child: nn.Module, folder: str | Path, *, examples: Tensor) -> tuple[dict[str, str], list[str]]:
    """Write a child as files that stand alone, run each, compare, and return digests and notes.

    Where the class and all its alternatives have plain layers: ``architecture.json``, ``model.py`` and
    ``weights.safetensors``; the source runs in a fresh process. Elsewhere: what ``SlotFamily.save`` writes, and
    ``program.pt2`` (``torch.export``), where torch can export the model; a note says so. In both cases the weights are
    float32, and ``check.safetensors`` holds the examples and the child's outputs.

    Args:
        child: What ``SlotFamily.build`` or ``load`` returned; only read.
        folder: Where the files go; an older result there is replaced, and a failure leaves nothing.
        examples: At least two inputs: token numbers (B, T), or what the model's first argument is.

    Returns:
        SHA-256 by file name, and notes on what was not written and why.

    Raises:
        UserError: The child has no plan, the examples do not fit, or the folder cannot be written.
        ExportError: A written network differs from the child by more than 1e-5 of its largest output.
    """
    folder = Path(folder)
    plan = plan_of(child)
    if examples.dim() < 2 or len(examples) < 2:
        raise UserError("examples", Shown(f"shape {tuple(examples.shape)}"), allowed="at least two inputs (B, ...)")
    child = copy.deepcopy(child).to("cpu", torch.float32).eval()
    outputs_of = Outputs(child)
    with torch.no_grad():
        outputs = outputs_of(examples).float().contiguous()
    metadata = {"format_version": "1"}
    checks = save({"inputs": examples.contiguous(), "outputs": outputs}, metadata)
    notes: list[str] = []
    try:
        call, weights = plain_form(child)
    except UserError as error:
        notes.append(f"There is no model.py. {error}")
        files = {"check.safetensors": checks}
        program, note = program_bytes(outputs_of, examples)
        notes += [note] if note else []
        files |= {} if program is None else {"program.pt2": program}
        text = ""
    else:
        text = child_source(child, call)
        facts = {
            "format_version": 1,
            "family": "slots",
            **call.to_json(),
            "parent": type(child).__name__,
            "slots": plan,
            "network_digest": network_digest(call),
        }
        files = {
            "architecture.json": to_json(facts).encode(),
            "model.py": text.encode(),
            "weights.safetensors": save(weights, metadata),
            "check.safetensors": checks,
        }
    part = folder.with_name(f".{folder.name}.unfinished")
    try:
        with storage_errors("out", folder):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name, data in files.items():
                write_atomic(part / name, data)
        if text:
            found = run_fresh(text, part / "weights.safetensors", {"inputs": examples})
            largest_gap("model.py with weights.safetensors", found, outputs, SOURCE_TOLERANCE)
        else:
            save_child(child, part)
            if "program.pt2" in files:
                compare_program(part / "program.pt2", {"inputs": examples}, outputs)
        digests = {path.name: sha256_file(path) for path in sorted(part.iterdir())}
        with storage_errors("out", folder):
            replace_folder(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return digests, notes


class Outputs(nn.Module):
    """A model of transformers as a function of one tensor: its logits, or its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.uncached = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of a batch."""
        found = self.model(inputs, **self.uncached)
        for name in ("logits", "last_hidden_state"):
            if isinstance(getattr(found, name, None), Tensor):
                tensor: Tensor = getattr(found, name)
                return tensor
        if isinstance(found, Tensor):
            return found
        raise UserError("model", Shown(type(found).__name__), allowed="outputs with logits or last_hidden_state")


def child_source(child: nn.Module, call: Call) -> str:
    """Return the text of ``model.py``."""
    output = "hidden states (batch, tokens, width)" if type(child).__name__ == "BertModel" else "logits"
    return source_of_call(call, _HEADER.format(name=call.name, parent=type(child).__name__, output=output))


def plain_form(child: nn.Module) -> tuple[Call, dict[str, Tensor]]:
    """Return the constructor tree of the same network in plain layers, and its weights by their names there.

    Raises:
        UserError: There is no such mapping.
    """
    config: Any = getattr(child, "config", None)
    if type(child).__name__ not in _CLASSES:
        raise UserError(
            "model",
            Shown(type(child).__name__),
            allowed=f"for model.py: {', '.join(_CLASSES)}",
            hint="archsmith.families.slot_files.load rebuilds this child from config.json and safetensors.",
        )
    paths, blocks = _located(child, config)
    bert = config.model_type == "bert"
    rows: list[tuple[str, dict[str, Any]]] = []
    weights: dict[str, Tensor] = {}
    for index, (path, row) in enumerate(zip(paths, blocks, strict=True)):
        layer = module_at(child, path)
        for block in row:
            name = str(plan_of(child)["plan"][index].get(block.part, {"name": "parent"})["name"])
            kind, settings, tensors = _sub_block(layer, block, name, config, index)
            weights |= {f"blocks.{len(rows)}.{key}": value for key, value in tensors.items()}
            rows.append((kind, settings))
    arguments, outer = (_bert if bert else _decoder)(child, config)
    arguments["blocks"] = tuple(rows)
    kind = "EncoderTransformer" if bert else "DecoderTransformer"
    call = parse_call(f"archsmith.layers.transformer.{kind}", arguments)
    state = {
        name: tensor.detach().to("cpu", torch.float32).clone().contiguous()
        for name, tensor in (outer | weights).items()
    }
    return call, state


def _located(child: nn.Module, config: Any) -> tuple[tuple[str, ...], tuple[tuple[SubBlock, ...], ...]]:
    """Return where the sub-blocks of the child's parent are: found in a parent without weights."""
    kind: Any = type(child)
    with torch.device("meta"):
        parent = kind(type(config)(**{k: v for k, v in config.to_dict().items() if k != "archsmith_slots"}))
    return locate(parent)


def _sub_block(
    layer: nn.Module, block: SubBlock, name: str, config: Any, index: int
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return kind, settings and weights of one sub-block in plain layers."""
    if name == "none":
        return "none", {}, {}
    tensors = _tensors("norm", module_at(layer, block.norms[0]))
    if name == "norm":
        return "norm", {}, tensors
    core = module_at(layer, block.core)
    if name == "linear":
        outer = block.roles["output" if block.part == "attention" else "down"]
        linear = module_at(layer, outer) if block.closing else getattr(core, "linear", core)
        return "linear", {"bias": bias_of(linear) is not None}, tensors | _tensors("part.linear", linear)
    if block.part == "ffn" and (name == "parent" or name.startswith(("ffn", "width"))):
        return _ffn(layer, block, config, tensors)
    if block.part == "attention" and (name == "parent" or name.startswith("kv")):
        return _attention(layer, block, core, config, index, tensors)
    raise UserError(
        f"layer{index}.{block.part}",
        name,
        allowed="alternatives with plain layers: parent, kv, ffn, linear, norm, none",
    )


def _ffn(
    layer: nn.Module, block: SubBlock, config: Any, tensors: dict[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    for role, path in block.roles.items():
        tensors |= _tensors(f"part.{role}", module_at(layer, path))
    down = module_at(layer, block.roles["down"])
    act = getattr(config, "hidden_act", None) or config.activation_function
    if act not in _ACTIVATIONS:
        raise UserError("activation", act, allowed=f"for model.py: {sorted(_ACTIVATIONS)}")
    settings = {
        "inner": int(weight_of(down).shape[1]),
        "activation": _ACTIVATIONS[act],
        "gated": "gate" in block.roles,
        "bias": bias_of(down) is not None,
    }
    return "ffn", settings, tensors


def _attention(
    layer: nn.Module, block: SubBlock, core: Any, config: Any, index: int, tensors: dict[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    if isinstance(core, GroupedAttention):
        for role in "qkvo":
            state |= _tensors(f"{role}_proj", getattr(core, f"{role}_proj"))
    else:
        for role, path in block.roles.items():
            found = module_at(layer, path)
            inner = found.projection if isinstance(found, RepeatedHeads) else found
            if role == "qkv":
                for letter, part in zip("qkv", range(3), strict=True):
                    state |= {f"{letter}_proj.{key}": t.chunk(3)[part] for key, t in _tensors("", inner).items()}
            else:
                state |= _tensors(f"{role[0]}_proj", inner)
    normed = hasattr(core, "q_norm")
    if normed:
        state |= {"q_norm.weight": core.q_norm.weight, "k_norm.weight": core.k_norm.weight}
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    slides = window is not None and (kinds is None or kinds[index] == "sliding_attention")
    settings = {
        "heads": block.heads,
        "kv_heads": int(state["k_proj.weight"].shape[0]) // block.head_dim,
        "head_dim": block.head_dim,
        "causal": block.causal,
        "scale": float(core.scaling),
        "bias": "q_proj.bias" in state,
        "out_bias": "o_proj.bias" in state,
        "window": int(window) if slides and window is not None else 0,
        "head_norm": float(core.q_norm.variance_epsilon) if normed else 0.0,
    }
    return "attention", settings, tensors | {f"part.{key}": value for key, value in state.items()}


def _tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return weight (out, in) and bias of a projection or norm under a name."""
    dot = f"{name}." if name else ""
    weight: Any = module.weight
    found = {f"{dot}weight": weight_of(module) if weight.dim() == 2 else weight}
    bias = bias_of(module)
    return found if bias is None else {**found, f"{dot}bias": bias}


def _decoder(child: Any, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return arguments and weights of what surrounds the layers of a decoder."""
    gpt2 = config.model_type == "gpt2"
    base = child.transformer if gpt2 else child.model
    embedding, norm = (base.wte, base.ln_f) if gpt2 else (base.embed_tokens, base.norm)
    weights = {"embed.weight": embedding.weight, **_tensors("norm", norm)}
    tied = child.lm_head.weight is embedding.weight
    if not tied:
        weights |= _tensors("head", child.lm_head)
    arguments: dict[str, Any] = {
        "vocabulary": int(embedding.weight.shape[0]),
        "width": int(embedding.weight.shape[1]),
        "norm": "layer" if gpt2 else "rms",
        "eps": float(config.layer_norm_epsilon if gpt2 else config.rms_norm_eps),
        "tied": tied,
        "head_bias": not tied and child.lm_head.bias is not None,
    }
    if gpt2:
        weights["embed_positions.weight"] = base.wpe.weight
        return arguments | {"positions": int(base.wpe.weight.shape[0])}, weights
    rope = base.rotary_emb
    if rope.rope_type in ("dynamic", "longrope"):
        raise UserError("rope_type", rope.rope_type, allowed="rotary positions whose frequencies do not change")
    weights["frequencies"] = rope.inv_freq
    return arguments | {"rotary": 2 * len(rope.inv_freq), "rotary_scaling": float(rope.attention_scaling)}, weights


def _bert(child: Any, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return arguments and weights of what surrounds the layers of BERT."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or config.is_decoder:
        raise UserError(
            "config", Shown("relative positions, or a decoder"), allowed="an encoder with learned positions"
        )
    masked = type(child).__name__ == "BertForMaskedLM"
    embeddings = (child.bert if masked else child).embeddings
    weights = {
        "embed.weight": embeddings.word_embeddings.weight,
        "embed_positions.weight": embeddings.position_embeddings.weight,
        "embed_types.weight": embeddings.token_type_embeddings.weight,
        **_tensors("norm", embeddings.LayerNorm),
    }
    arguments = {
        "vocabulary": int(config.vocab_size),
        "width": int(config.hidden_size),
        "eps": float(config.layer_norm_eps),
        "positions": int(config.max_position_embeddings),
        "types": int(config.type_vocab_size),
        "head": "",
    }
    if masked:
        head = child.cls.predictions
        if head.decoder.weight is not embeddings.word_embeddings.weight:
            raise UserError("model", Shown("a head that is not tied"), allowed="the embedding's matrix as head")
        arguments["head"] = _ACTIVATIONS[config.hidden_act]
        weights |= {**_tensors("head_linear", head.transform.dense), **_tensors("head_norm", head.transform.LayerNorm)}
        weights["head_bias"] = head.decoder.bias
    return arguments, weights
