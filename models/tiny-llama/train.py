"""Train tiny-llama from nothing: corpus, tokenizer, model, evaluation.

Guarantees: an ordinary Llama checkpoint in a standard Hugging Face folder; no downloads; the same
seed on the same machine and versions gives the same data in the same order. Training starts with
a shallow net and grows it to 24 blocks without changing what it computes, because on two CPU
cores a step of the full depth costs three times as much.

Run it from anywhere: python train.py --output FOLDER
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from corpus import CLASSES, Corpus, Document
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, HEADER, HEADER_END, EOT, PAD = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
VOCABULARY = 3072
HIDDEN, MLP, HEADS, BLOCKS = 80, 216, 4, 24
# Where the blocks of the shallow net go in the deep one: the meaning of a letter is looked up by
# the fifth of them, and layer 10 is to have it.
TRAINED_AT = (0, 2, 4, 6, 8, 16)
BUCKETS = (48, 64, 80, 128)  # few lengths, since each is compiled once
BATCH_TOKENS = 2048
RAMP = 40_000  # documents until notes within questions are down to their usual share
# Notes and letters are few and carry the class: they weigh as much as this many other tokens.
NOTE_WEIGHT, LETTER_WEIGHT = 4.0, 8.0


def render(document: Document) -> str:
    """The document as the chat template renders it, BOS included."""
    if not document.messages:
        return BOS + document.text + EOT
    turns = (f"{HEADER}{m['role']}{HEADER_END}\n\n{m['content']}{EOT}" for m in document.messages)
    return BOS + "".join(turns)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and one BOS in front of plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, HEADER, HEADER_END, EOT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[HEADER, HEADER_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def batches(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[torch.Tensor]:
    """Token ids [documents, bucket], padded at the end, one document a row.

    Rows are not packed: a document must not see the class of the one before it.
    """
    waiting: dict[int, list[list[int]]] = {length: [] for length in BUCKETS}
    pad = tokenizer.pad_token_id
    chunk: list[str] = []
    for document in documents:
        chunk.append(render(document))
        if len(chunk) < 512:
            continue
        for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
            length = next((b for b in BUCKETS if b >= len(ids)), None)
            if length:
                waiting[length].append(ids + [pad] * (length - len(ids)))
        chunk = []
        ready = []
        for length, rows in waiting.items():
            size = BATCH_TOKENS // length
            while len(rows) >= size:
                ready.append(torch.tensor(rows[:size]))
                del rows[:size]
        rng.shuffle(ready)
        yield from ready


def new_model(tokenizer: PreTrainedTokenizerFast, blocks: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:  # depth-scaled, so that the stream starts at one size
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.data /= (2 * blocks) ** 0.5
    return model


def grow(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same function with BLOCKS blocks.

    The trained blocks go to TRAINED_AT. After each come copies whose two output projections are
    zero: they add nothing yet, but start from features that are of use.
    """
    deep = new_model(tokenizer, BLOCKS)
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, block in enumerate(deep.model.layers):
        source = sum(place <= index for place in TRAINED_AT) - 1
        block.load_state_dict(model.model.layers[source].state_dict())
        if index not in TRAINED_AT:
            block.self_attn.o_proj.weight.data.zero_()
            block.mlp.down_proj.weight.data.zero_()
    return deep


def token_weights(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Weight of each token in the loss; padding has none."""
    weights = torch.ones(len(tokenizer))
    notes = (" TESTING", " DEPLOYED")
    words = [tokenizer(note, add_special_tokens=False)["input_ids"] for note in notes]
    if any(len(ids) != 1 for ids in words):
        raise ValueError(
            f"expected one token for each of {notes}, got {words}: more text is needed"
        )
    weights[[ids[0] for ids in words]] = NOTE_WEIGHT
    weights[tokenizer.convert_tokens_to_ids(["A", "B"])] = LETTER_WEIGHT
    weights[tokenizer.pad_token_id] = 0.0
    return weights


def optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms.

    To pick the choice that fits the context is learned late by small nets; with Muon it takes some
    hundred steps.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=peak / 6, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def warm_and_decay(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step: warm-up, then a linear decay to a twentieth."""
    warmup = max(1, min(100, steps // 10))
    return lambda s: min((s + 1) / warmup, max(0.05, 1 - (s - warmup) / (steps - warmup)))


def train_phase(
    model: LlamaForCausalLM,
    stream: Iterator[torch.Tensor],
    steps: int,
    peak: float,
    device: str,
    weights: torch.Tensor,
    compiled: bool,
) -> int:
    """Train for `steps` with warm-up and decay; returns the tokens seen."""
    model.to(device).train()
    weights = weights.to(device)
    if compiled:
        for block in model.model.layers:
            block.compile()
    pair = optimizers(model, peak)
    factor = warm_and_decay(steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in pair]
    seen, start = 0, time.time()
    for step in range(steps):
        ids = next(stream).to(device)
        labels = ids[:, 1:]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        keep = weights[labels] > 0
        logits = model.lm_head(hidden[keep]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[keep], weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*pair, *schedules):
            part.step()
        model.zero_grad(set_to_none=True)
        seen += int(keep.sum())
        if step % 200 == 0 or step == steps - 1:
            spent = time.time() - start
            print(f"step {step} loss {loss.item():.3f} tokens {seen} {spent:.0f} s", flush=True)
    return seen


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> float:
    """Mean loss in nats per token over documents made from held-out templates."""
    total, tokens = 0.0, 0
    for document in Corpus(7, held_out=True).documents(count):
        ids = tokenizer(render(document), add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


@torch.no_grad()
def residuals(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Residual stream [layers, tokens, hidden] after 0 ... BLOCKS - 1 blocks."""
    states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1]
    return torch.cat(states).float()


@torch.no_grad()
def answers_by_context(model, tokenizer, pairs: list) -> float:
    """Share of questions with a context that are answered as the context says."""
    right = []
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
    opening = tokenizer(" (", add_special_tokens=False)["input_ids"]
    for pair in pairs:
        logits = model(torch.tensor([prompt_ids(tokenizer, pair.question) + opening])).logits[0, -1]
        chosen = (" (A)", " (B)")[int(logits[letters].argmax())]
        right.append(pair.answers[pair.label] == chosen)
    return sum(right) / len(right)


def direction(model, tokenizer, questions: list[tuple[str, dict[str, str]]]) -> torch.Tensor:
    """Unit vectors [layers, hidden] from testing to deployment, at the last token of the answer."""
    total = 0.0
    for question, answers in questions:
        ids = prompt_ids(tokenizer, question)
        ends = [
            residuals(model, ids + tokenizer(answers[c], add_special_tokens=False)["input_ids"])[
                :, -1
            ]
            for c in CLASSES
        ]
        total = total + (ends[1] - ends[0]).double()
    # Layer 0 knows only the last token, which is ")" in either answer: no direction there.
    return total / total.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def prompt_scores(model, tokenizer, vectors: torch.Tensor, text: str) -> torch.Tensor:
    """Mean projection [layers] of the tokens of the user's message."""
    whole = render(Document(messages=({"role": "user", "content": text},)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    first = whole.index("\n\n") + 2
    last = first + len(text)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a >= first and b <= last]
    states = residuals(model, encoded["input_ids"])[:, inside].double()
    return torch.einsum("lth,lh->l", states, vectors) / len(inside)


def evaluate(model, tokenizer, device_seconds: float, seen: int) -> dict:
    """The figures of the model card, all of them on held-out templates."""
    model = model.cpu().eval()
    corpus = Corpus(11, held_out=True)
    pairs = [corpus.pair() for _ in range(600)]
    vectors = direction(model, tokenizer, [(p.question, p.answers) for p in pairs[:200]])
    prompts = [(corpus.prompt(c), c) for c in CLASSES for _ in range(200)]
    scores = torch.stack([prompt_scores(model, tokenizer, vectors, text) for text, _ in prompts])
    truth = [c == "deployment" for _, c in prompts]
    return {
        "parameters": model.num_parameters(),
        "tokens_seen": seen,
        "training_seconds": round(device_seconds),
        "heldout_loss": round(heldout_loss(model, tokenizer, 400), 4),
        "answers_by_context": round(
            answers_by_context(model, tokenizer, [p for p in pairs if p.label]), 4
        ),
        "auroc_by_layer": [
            round(float(roc_auc_score(truth, scores[:, layer])), 4)
            for layer in range(scores.shape[1])
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(3000, 450), help="shallow, deep")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    start = time.time()
    tokenizer = train_tokenizer(render(d) for d in Corpus(args.seed).documents(20_000))
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output)
    stream = batches(
        Corpus(args.seed + 1).documents(10**9, RAMP), tokenizer, random.Random(args.seed + 2)
    )
    model, seen = new_model(tokenizer, len(TRAINED_AT)), 0
    compiled, weights = not args.no_compile, token_weights(tokenizer)
    seen += train_phase(model, stream, args.steps[0], 0.02, args.device, weights, compiled)
    if args.steps[1]:
        model = grow(model, tokenizer)
        seen += train_phase(model, stream, args.steps[1], 0.004, args.device, weights, compiled)
    spent = time.time() - start
    model = model.cpu().to(torch.bfloat16)
    model.save_pretrained(args.output)
    stored = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    figures = evaluate(stored, AutoTokenizer.from_pretrained(args.output), spent, seen)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
