"""What gate and penalty of neutral residues cost, and what closed gates save. See README.md.

    python benchmarks/neutral_residues_speed/run.py [--rounds 10] [--out results.jsonl]
    python benchmarks/neutral_residues_speed/run.py --run RUN --text FILE.jsonl    a trained adapter, on old text

Everything is a ratio between arms that take turns within one process; each row is written as soon as it is measured.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import graftlm
from graftlm.folder import load

VOCABULARY, WIDTH, LAYERS = 8192, 512, 6
VANILLA = {"gate": "none", "penalty_weight": 0.0, "initialisation": "he"}
OPEN = (0.5, 0.25, 0.1, 0.02, 0.0)


def backbone() -> nn.Module:
    """A decoder of Llama's kind with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=round(8 * WIDTH / 3),
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    return LlamaForCausalLM(config).to(device())


def adapted(**settings) -> nn.Module:
    """With blocks of 20 % whose weights are random in every place."""
    model = get_peft_model(backbone(), graftlm.NeutralResiduesConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator(device()).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "residues_out" in name:
                parameter.normal_(std=0.02, generator=generator)
    return model.to(device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def seconds(work) -> float:
    """Processor time on a CPU, which other people's work on the machine does not lengthen; wall time on a GPU."""
    if device() == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started


def kept_for_backward(step, besides=()) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once; those of `besides` are not counted."""
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    for tensor in besides:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())


def training(rows: int, tokens: int, rounds: int):
    """A whole step (forward, backward, AdamW), and the memory, over those of the vanilla adapter of equal size."""
    inputs, steps, memory = batch(rows, tokens), {}, {}
    domains = torch.arange(rows, device=device()) % 10 != 0  # a tenth of the sequences, the first among them
    arms = {"vanilla": VANILLA, "neutral residues": {}, "penalty not through input": {"penalty_through_input": False}}
    for arm, settings in arms.items():
        model = adapted(**settings).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        more = {} if arm == "vanilla" else {"domain": domains}

        def forward(model=model, more=more):
            return model(**inputs, **more).loss

        def step(forward=forward, optimizer=optimizer):
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[arm] = step
        memory[arm] = kept_for_backward(forward)
        step()
    for arm in list(arms)[1:]:
        yield {"what": f"memory for backward, {arm} / vanilla", "round": 0, "ratio": memory[arm] / memory["vanilla"]}
    for number in tqdm(range(rounds), desc="training step"):
        found = {arm: seconds(step) for arm, step in (steps.items() if number % 2 else reversed(steps.items()))}
        for arm in list(arms)[1:]:
            yield {"what": f"step, {arm} / vanilla", "round": number, "ratio": found[arm] / found["vanilla"]}


def shift_gates(model: nn.Module, share: float, inputs: dict[str, torch.Tensor]) -> None:
    """Shifts each gate so that about this share of the tokens opens it."""
    for name, leaf in model.named_modules():
        if name.endswith("residues_gate.default"):
            seen: list[torch.Tensor] = []
            handle = leaf.register_forward_hook(lambda module, args, z, seen=seen: seen.append(z.flatten()))
            leaf.bias = None
            model(**inputs)
            handle.remove()
            threshold = seen[0].quantile(1 - share) if share else seen[0].max() + 1
            leaf.bias = nn.Parameter(-threshold[None], requires_grad=False)


def gates_open(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """The share of tokens with an open gate, mean over layers."""
    gates = graftlm.gate_statistics(model, {"text": [inputs]})
    return statistics.mean(gate.open or 0.0 for gate in gates)


@torch.no_grad()
def inference(rows: int, tokens: int, rounds: int):
    """A forward pass over that of the bare backbone, for several shares of open gates."""
    inputs = {key: value for key, value in batch(rows, tokens).items() if key != "labels"}
    bare, model = backbone().eval(), adapted().eval()
    for share in OPEN:
        shift_gates(model, share, inputs)
        yield from passes(bare, model, inputs, rounds, f"{share:.0%} open")


@torch.no_grad()
def trained(run: Path, file: Path, rows: int, tokens: int, rounds: int):
    """The same for a trained adapter on text, at the sparsity that its gates have there."""
    model, tokenizer = load(run, tokenizer=True)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    ids = [token for found in tokenizer(texts)["input_ids"] for token in found][: rows * tokens]
    inputs = {"input_ids": torch.tensor(ids, device=device()).view(rows, tokens)}
    yield from passes(load(run).unload().to(device()).eval(), model.to(device()).eval(), inputs, rounds, run.name)


def passes(bare: nn.Module, model: nn.Module, inputs: dict[str, torch.Tensor], rounds: int, what: str):
    """Forward passes, dense and sparse, over those of the bare backbone, in turns."""
    config = model.peft_config["default"]
    config.sparse_inference = False
    measured = gates_open(model, inputs)
    arms = {"bare": lambda: bare(**inputs), "dense": lambda: model(**inputs), "sparse": lambda: model(**inputs)}
    for number in tqdm(range(rounds), desc=f"inference, {what}"):
        found = {}
        for arm, work in arms.items() if number % 2 else reversed(arms.items()):
            config.sparse_inference = arm == "sparse"
            work()  # the first pass after a switch pays for the allocator
            found[arm] = seconds(work)
        for arm in ("dense", "sparse"):
            ratio = found[arm] / found["bare"]
            yield {"what": f"inference, {arm} / bare, {what}", "round": number, "ratio": ratio, "open": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=["training", "inference"], default=["training", "inference"])
    parser.add_argument("--run", type=Path, help="a run with neutral residues: only its forward pass, on --text")
    parser.add_argument("--text", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    about = {"device": name, "torch": torch.__version__, "rows": chosen.rows, "tokens": chosen.tokens}
    measured: dict[str, list[float]] = {}
    shape = (chosen.rows, chosen.tokens, chosen.rounds)
    if chosen.run:
        found = trained(chosen.run, chosen.text, *shape)
    else:
        found = (row for part in chosen.parts for row in {"training": training, "inference": inference}[part](*shape))
    with chosen.out.open("a", encoding="utf-8") as file:
        for row in found:
            measured.setdefault(row["what"], []).append(row["ratio"])
            file.write(json.dumps(row | about) + "\n")
            file.flush()
    for what, ratios in measured.items():
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds"
        print(f"{what}: {statistics.median(ratios):.3f} ({spread})")


if __name__ == "__main__":
    main()
