"""Recurrent cells that are small graphs, and language models of them.

A recipe is a tuple of nodes ``(name, operation, inputs)``. Inputs are other nodes, "x" (what enters the layer) or
"h_prev_k", state k of the step before; node "h_new_k" is the state after it, and the first state is the output.

Source: Klyuchnikov et al. 2020, NAS-Bench-NLP, arXiv 2006.07116.
"""

# B batch, T steps, I features that enter, H hidden units

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEAKY_SLOPE = 0.01


def ordered_nodes(
    recipe: tuple[tuple[str, str, tuple[str, ...]], ...],
) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the nodes so that each comes after its inputs.

    Raises:
        ValueError: An input that is nowhere, or a circle.
    """
    waiting, done, ordered = list(recipe), {"x"}, []
    done |= {name for _, _, inputs in recipe for name in inputs if name.startswith("h_prev_")}
    while waiting:
        ready = [node for node in waiting if set(node[2]) <= done]
        if not ready:
            names = ", ".join(node[0] for node in waiting)
            raise ValueError(f"recipe: got nodes {names} that wait for one another or for nodes that are nowhere.")
        ordered += ready
        done |= {node[0] for node in ready}
        waiting = [node for node in waiting if node[0] not in done]
    return ordered


class RecurrentCell(nn.Module):
    """One step of a recipe.

    Args:
        inputs: I.
        hidden: H, of every node and state.
        recipe: Nodes; operations are "linear" (a weight over all inputs side by side, one bias), "blend"
            (``a b + (1 - a) c``), "elementwise_sum", "elementwise_prod", "activation_tanh", "activation_sigm" and
            "activation_leaky_relu" (slope 0.01).
    """

    def __init__(self, inputs: int, hidden: int, recipe: tuple[tuple[str, str, tuple[str, ...]], ...]) -> None:
        super().__init__()
        self.inputs, self.hidden = inputs, hidden
        self.plan = ordered_nodes(recipe)
        self.states = sum(name.startswith("h_new_") and name[6:].isdigit() for name, _, _ in self.plan)
        self.nodes = nn.ModuleList(self._module(operation, sources) for _, operation, sources in self.plan)

    def _module(self, operation: str, sources: tuple[str, ...]) -> nn.Module:
        if operation == "linear":
            return nn.Linear(sum(self.inputs if name == "x" else self.hidden for name in sources), self.hidden)
        if operation == "activation_tanh":
            return nn.Tanh()
        if operation == "activation_sigm":
            return nn.Sigmoid()
        if operation == "activation_leaky_relu":
            return nn.LeakyReLU(LEAKY_SLOPE)
        if operation in ("blend", "elementwise_sum", "elementwise_prod"):
            return nn.Identity()
        raise ValueError(f"operation: got {operation!r}; allowed: those of NAS-Bench-NLP.")

    def forward(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next states, (B, H) each, for an input (B, I) and the states before."""
        values = {"x": x}
        for k, state in enumerate(states):
            values[f"h_prev_{k}"] = state
        for (name, operation, sources), module in zip(self.plan, self.nodes, strict=True):
            found = [values[source] for source in sources]
            if operation == "linear":
                values[name] = module(torch.cat(found, dim=-1))
            elif operation == "blend":
                values[name] = found[0] * found[1] + (1 - found[0]) * found[2]
            elif operation == "elementwise_sum":
                total = found[0]
                for each in found[1:]:
                    total = total + each
                values[name] = total
            elif operation == "elementwise_prod":
                total = found[0]
                for each in found[1:]:
                    total = total * each
                values[name] = total
            else:
                values[name] = module(found[0])
        return tuple(values[f"h_new_{k}"] for k in range(self.states))


class RecurrentLayer(nn.Module):
    """A cell run over a sequence.

    Args:
        inputs: I.
        hidden: H.
        recipe: See ``RecurrentCell``.
    """

    def __init__(self, inputs: int, hidden: int, recipe: tuple[tuple[str, str, tuple[str, ...]], ...]) -> None:
        super().__init__()
        self.cell = RecurrentCell(inputs, hidden, recipe)

    def forward(self, x: Tensor, states: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the first state after every step, (T, B, H), and all states after the last.

        Args:
            x: (T, B, I).
            states: Before the first step, (B, H) each; zeros if None.
        """
        if states is None:
            states = (x.new_zeros(x.shape[1], self.cell.hidden),) * self.cell.states
        made = []
        for step in x.unbind(0):
            states = self.cell(step, states)
            made.append(states[0])
        return torch.stack(made), states


class RecurrentLanguageModel(nn.Module):
    """Embedding, layers of one recipe, and a decoder that shares the embedding's matrix.

    Args:
        vocabulary: Number of tokens.
        embedding: Features of the embedding, and of the last layer.
        hidden: H of the layers before.
        layers: Their number.
        recipe: See ``RecurrentCell``.
        dropout: Behind the embedding and every layer; one mask element for each value.

    Weights begin as in ``torch.nn``, embeddings uniform within 0.1.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        layers: int,
        recipe: tuple[tuple[str, str, tuple[str, ...]], ...],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.recipe = tuple((name, operation, tuple(sources)) for name, operation, sources in recipe)
        self.hidden, self.drop_probability = hidden, dropout
        sizes = [embedding, *[hidden] * (layers - 1), embedding]
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layers = nn.ModuleList(RecurrentLayer(sizes[i], sizes[i + 1], self.recipe) for i in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(embedding, vocabulary)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the next token (B, T, vocabulary) for tokens (B, T) or (B, 1, 1, T), floats too."""
        logits, _ = self.step(x, None)
        return logits

    def step(self, x: Tensor, states: list[tuple[Tensor, ...]] | None) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Return the logits and each layer's states, to go on with the text behind ``x``."""
        values = self.dropout(self.embedding(x.flatten(1).long()).transpose(0, 1))
        after = []
        for k, layer in enumerate(self.layers):
            values, last = layer(values, None if states is None else states[k])
            values = self.dropout(values)
            after.append(last)
        return self.decoder(values.transpose(0, 1)), after

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {
            "vocabulary": self.embedding.num_embeddings,
            "embedding": self.embedding.embedding_dim,
            "hidden": self.hidden,
            "layers": len(self.layers),
            "recipe": self.recipe,
            "dropout": self.drop_probability,
        }
