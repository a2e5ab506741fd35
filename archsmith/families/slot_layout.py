"""Where the residual sub-blocks of a transformer sit: which modules of a layer are its attention, which its FFN.

A layer is a chain of residual sub-blocks, ``x + f(norm(x))`` or ``norm(x + f(x))``. ``locate`` finds a model's list of
layers and, by the structure and the usual names of projections, the sub-blocks of each; what it does not know can be
named by hand (``SubBlock``), or found by running the model (``archsmith.families.slot_discovery``).
"""

# E residual width, H query heads, K key-value heads, D head width, I intermediate width

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError

ATTENTION, FFN = "attention", "ffn"

_CORES: Mapping[str, tuple[str, ...]] = {
    ATTENTION: ("self_attn", "attn", "attention", "self_attention", "mixer"),
    FFN: ("mlp", "ffn", "feed_forward", "feedforward", "ff"),
}
_ROLES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    ATTENTION: {
        "query": ("q_proj", "query", "q_lin", "to_q", "wq", "q"),
        "key": ("k_proj", "key", "k_lin", "to_k", "wk", "k"),
        "value": ("v_proj", "value", "v_lin", "to_v", "wv", "v"),
        "qkv": ("c_attn",),
        "output": ("o_proj", "out_proj", "out_lin", "c_proj", "to_out", "wo", "proj", "o", "out", "dense"),
    },
    FFN: {
        "gate": ("gate_proj", "w1_gate", "gate"),
        "up": ("up_proj", "c_fc", "fc1", "lin1", "dense_h_to_4h", "fc_in", "up", "w1"),
        "down": ("down_proj", "c_proj", "fc2", "lin2", "dense_4h_to_h", "fc_out", "down", "w2"),
    },
}
# Norms of a layer: (of the attention, of the FFN, whether they stand behind the sum). The first row that exists whole.
_NORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], bool], ...] = (
    (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        False,
    ),
    (("post_attention_layernorm",), ("post_feedforward_layernorm",), False),
    (("input_layernorm",), ("post_attention_layernorm",), False),
    (("ln_1",), ("ln_2",), False),
    (("layernorm_before",), ("layernorm_after",), False),
    (("sa_layer_norm",), ("output_layer_norm",), True),
    (("attention_norm",), ("ffn_norm",), False),
    (("attn_norm",), ("mlp_norm",), False),
    (("layer_norm1",), ("layer_norm2",), False),
    (("self_attn_layer_norm",), ("final_layer_norm",), False),
    (("norm1",), ("norm2",), False),
    (("ln1",), ("ln2",), False),
)


@dataclass(frozen=True)
class SubBlock:
    """One residual sub-block of a layer; all paths are relative to the layer.

    Attributes:
        part: "attention", "ffn", or a name of the user's.
        core: Module that does the work and is called in the layer's forward; what replaces it is called the same way.
        roles: Path by role of the projections: query, key, value (or one ``qkv``, the three side by side) and output;
            up, down and, if gated, gate. Empty where only "none" and alternatives of the user's own are wanted.
        norms: Its own normalisations, which go with it when it is removed. One that other sub-blocks share is none.
        post_norm: They stand behind the residual sum.
        closing: Module called as ``closing(output, input)`` that projects, adds and normalises (BERT), or empty.
        returns_tuple: ``core`` returns (output, attention weights) instead of the output alone.
        heads: Query heads, for attention.
        kv_heads: Key-value heads; the same number unless attention is grouped.
        head_dim: Width of a head.
        causal: A token sees those before it only.
    """

    part: str
    core: str
    roles: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    post_norm: bool = False
    closing: str = ""
    returns_tuple: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False

    @property
    def owned(self) -> tuple[str, ...]:
        """Paths of the modules that belong to this sub-block, none below another."""
        paths = [path for path in (self.core, self.closing, *self.norms, *self.roles.values()) if path]
        return tuple(dict.fromkeys(path for path in paths if not any(path.startswith(f"{other}.") for other in paths)))


def module_at(layer: nn.Module, path: str) -> Any:
    """Return the module at a dotted path, or None when there is none."""
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, "_modules", {}).get(name)
        if found is None:
            return None
    return found


def replace_module_(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted path of ``layer``."""
    parent, _, name = path.rpartition(".")
    owner = module_at(layer, parent) if parent else layer
    owner._modules[name] = module


def is_projection(module: object) -> bool:
    """Return whether a module is a linear map of the last axis with one 2-D weight: ``nn.Linear``, or HF's Conv1D."""
    weight = getattr(module, "weight", None)
    kind = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return kind and isinstance(weight, Tensor) and weight.dim() == 2


def weight_of(projection: nn.Module) -> Tensor:
    """Return a projection's weight as (out, in)."""
    weight: Any = projection.weight
    return weight if isinstance(projection, nn.Linear) else weight.T


def bias_of(projection: nn.Module) -> Tensor | None:
    """Return a projection's bias, or None."""
    bias: Any = getattr(projection, "bias", None)
    return bias


def locate(
    model: nn.Module, *, layers: str | None = None, sub_blocks: Sequence[SubBlock] | None = None
) -> tuple[tuple[str, ...], tuple[tuple[SubBlock, ...], ...]]:
    """Return the path of every layer and its sub-blocks.

    Args:
        model: Any residual model.
        layers: Path of the list (or Sequential) of layers; found when absent.
        sub_blocks: What the sub-blocks of each layer are, where they have other names than the known ones.

    Raises:
        UserError: No list of layers whose every element has a sub-block; the text says what was looked for.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    if layers is not None:
        if layers not in lists:
            raise UserError("layers", layers, allowed=f"the path of a ModuleList or Sequential: {sorted(lists)}")
        lists = {layers: lists[layers]}
    found: dict[str, list[tuple[SubBlock, ...]]] = {}
    for name, module in lists.items():
        rows = [_named(layer, sub_blocks) if sub_blocks else sub_blocks_of(layer, model) for layer in module]
        if all(rows):
            found[name] = rows
    if not found:
        raise UserError(
            "model", Shown(f"{type(model).__name__}: {_seen(model, lists)}"), allowed=looked_for(), hint=_HINT
        )
    best = max(found, key=lambda name: (len(found[name]), -len(name)))
    return tuple(f"{best}.{index}" if best else str(index) for index in range(len(found[best]))), tuple(found[best])


_HINT = "Name the parts yourself: layers='path.of.the.list', sub_blocks=[SubBlock(part=..., core=..., roles=...), ...]."


def looked_for() -> str:
    """Return in words what ``locate`` looks for."""
    attention, ffn = _ROLES[ATTENTION], _ROLES[FFN]
    return (
        "a model with a ModuleList (or Sequential) whose every layer has an attention module "
        f"({'/'.join(_CORES[ATTENTION])}) with query ({'/'.join(attention['query'])}), key, value and output "
        f"projections, or one fused c_attn, and/or an FFN ({'/'.join(_CORES[FFN])}) with up ({'/'.join(ffn['up'])}) "
        f"and down ({'/'.join(ffn['down'])}) projections; BERT's attention.self/attention.output and "
        "intermediate/output count as well"
    )


def _seen(model: nn.Module, lists: Mapping[str, nn.Module]) -> str:
    rows = [
        f"{name or 'itself'} ({len(list(module.children()))} x {type(next(module.children())).__name__} with "
        f"{', '.join(child for child, _ in next(module.children()).named_children()) or 'no children'})"
        for name, module in lists.items()
    ]
    return "no list of layers" if not rows else "lists " + "; ".join(rows[:6])


def _named(layer: nn.Module, wanted: Sequence[SubBlock]) -> tuple[SubBlock, ...]:
    """Return the user's sub-blocks that this layer has."""
    found = []
    for block in wanted:
        if module_at(layer, block.core) is None:
            continue
        named = [*block.norms, *block.roles.values(), *filter(None, [block.closing])]
        if missing := [path for path in named if module_at(layer, path) is None]:
            raise UserError(
                f"sub_blocks[{block.part!r}]",
                missing,
                allowed=f"paths of modules in {type(layer).__name__}: {[n for n, _ in layer.named_modules() if n]}",
            )
        found.append(_with_heads(layer, block, None) if block.part == ATTENTION and block.roles else block)
    return tuple(found)


def sub_blocks_of(layer: nn.Module, model: nn.Module) -> tuple[SubBlock, ...]:
    """Return the sub-blocks of one layer that are known by structure and names; empty when there are none."""
    config = getattr(model, "config", None)
    if (bert := _bert(layer, config)) is not None:
        return bert
    norms: dict[str, tuple[str, ...]] = {ATTENTION: (), FFN: ()}
    post = False
    for of_attention, of_ffn, behind in _NORMS:
        if all(module_at(layer, name) is not None for name in (*of_attention, *of_ffn)):
            norms, post = {ATTENTION: of_attention, FFN: of_ffn}, behind
            break
    found = []
    for part in (ATTENTION, FFN):
        for core in _CORES[part]:
            module = module_at(layer, core)
            if module is None or adds_itself(module):
                continue
            # Without known projections there is still "none", where norms of the layer show that the core adds nothing.
            known = roles_of(module, part, core) or (two_projections(module, core) if part == FFN else {})
            roles = known or ({} if norms[part] and not post else None)
            if roles is None:
                continue
            tuples = isinstance(module, nn.MultiheadAttention) or (part == ATTENTION and config is not None)
            block = SubBlock(part, core, roles, norms[part], post_norm=post, returns_tuple=tuples)
            found.append(_with_heads(layer, block, config) if part == ATTENTION and roles else block)
            break
    return tuple(found)


def two_projections(module: nn.Module, prefix: str) -> dict[str, str]:
    """Return the roles of an FFN of two linear maps, out to a width and back, whatever their names."""
    rows = [(name, child) for name, child in module.named_modules() if is_projection(child)]
    if len(rows) != 2:
        return {}
    (up, first), (down, second) = rows
    if tuple(weight_of(first).shape) != tuple(reversed(weight_of(second).shape)):
        return {}
    return {"up": f"{prefix}.{up}", "down": f"{prefix}.{down}"} if up and down else {}


def adds_itself(core: nn.Module) -> bool:
    """Return whether a module takes the residual stream as an argument and adds it (Bloom): nothing can replace it."""
    return "residual" in inspect.signature(core.forward).parameters


def roles_of(module: nn.Module, part: str, prefix: str) -> dict[str, str] | None:
    """Return the paths of the projections of attention or an FFN that go by known names, or None."""
    roles = {}
    for role, names in _ROLES[part].items():
        for name in names:
            if is_projection(module_at(module, name)):
                roles[role] = f"{prefix}.{name}"
                break
    complete = {"up", "down"} <= set(roles)
    if part == ATTENTION:
        complete = "output" in roles and ("qkv" in roles or {"query", "key", "value"} <= set(roles))
    return roles if complete else None


def _bert(layer: nn.Module, config: Any) -> tuple[SubBlock, ...] | None:
    """Return the sub-blocks of a layer in BERT's manner, where a closing module adds and normalises."""
    found: list[SubBlock] = []
    core, closing = "attention.self", "attention.output"
    roles = {"query": f"{core}.query", "key": f"{core}.key", "value": f"{core}.value", "output": f"{closing}.dense"}
    if _closes(layer, closing) and all(is_projection(module_at(layer, path)) for path in roles.values()):
        norms = (f"{closing}.LayerNorm",)
        block = SubBlock(ATTENTION, core, roles, norms, post_norm=True, closing=closing, returns_tuple=True)
        found.append(_with_heads(layer, block, config))
    if _closes(layer, "output") and is_projection(module_at(layer, "intermediate.dense")):
        roles = {"up": "intermediate.dense", "down": "output.dense"}
        found.append(SubBlock(FFN, "intermediate", roles, ("output.LayerNorm",), post_norm=True, closing="output"))
    return tuple(found) or None


def _closes(layer: nn.Module, path: str) -> bool:
    return is_projection(module_at(layer, f"{path}.dense")) and module_at(layer, f"{path}.LayerNorm") is not None


def _with_heads(layer: nn.Module, block: SubBlock, config: Any) -> SubBlock:
    """Return an attention sub-block with its numbers of heads, read from the module, its weights, or the config."""
    core = module_at(layer, block.core)
    heads = block.heads or _first(core, config, ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    width = block.head_dim or _first(core, None, ("head_dim", "attention_head_size", "head_size"))
    if "qkv" in block.roles:
        total = weight_of(module_at(layer, block.roles["qkv"])).shape[0] // 3
        queries = keys = total
    else:
        queries, keys = (weight_of(module_at(layer, block.roles[role])).shape[0] for role in ("query", "key"))
    if not width and heads and queries % heads == 0:
        width = queries // heads
    if not width or queries % width or keys % width or (queries // width) % (keys // width):
        raise UserError(
            f"{type(layer).__name__}.{block.core}",
            Shown(f"query width {queries}, key width {keys}, head width {width or 'unknown'}"),
            allowed="widths that are multiples of the head width, and key-value heads that divide the query heads",
            hint="Give heads= and head_dim= of SubBlock.",
        )
    causal = block.causal or bool(getattr(core, "is_causal", False))
    facts = {**{name: getattr(block, name) for name in block.__dataclass_fields__}}
    facts |= {"heads": queries // width, "kv_heads": keys // width, "head_dim": width, "causal": causal}
    return SubBlock(**facts)


def _first(core: Any, config: Any, names: tuple[str, ...]) -> int:
    for source in (core, config):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def tensors_of(layer: nn.Module, block: SubBlock) -> Iterator[tuple[str, Tensor]]:
    """Yield name (relative to the layer) and tensor of every parameter and saved buffer of a sub-block."""
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if any(name == path or name.startswith(f"{path}.") for path in block.owned):
            yield name, tensor
