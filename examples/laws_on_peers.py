"""The laws of `trainfn.testing` on other libraries' training loops: which hold, which fail, and by what factor.

::

    python examples/laws_on_peers.py             # all installed libraries; it names the absent ones
    python examples/laws_on_peers.py trainfn T5  # the libraries with one of these in their names

Every contestant gets the same rows of tokens, of unequal length, as micro-batches, and takes one step of SGD in the way
its documentation shows. Then the rows are cut differently: the step should be the same, and so should the loss of an
evaluation.
"""

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

import trainfn as tfn
import trainfn.testing as tt

VOCAB, WIDTH = 11, 8
Micro = list[dict[str, Tensor]]
Contestant = tuple[Callable[[list[Micro]], dict[str, Tensor]], Callable[[Micro], float] | None]


def rows() -> dict[str, Tensor]:
    """Eight rows of one to six tokens; what follows the end is -100 for the loss and 0 for attention."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (8, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 1, 2, 5, 1, 6, 3, 4])[:, None]
    return {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": tokens.where(mask, -100)}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def tagger() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB))


def change(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


# --- ours ----------------------------------------------------------------------------------------------------------
def ours() -> Contestant:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tfn.Mean:
        return tfn.losses.cross_entropy(model(batch["input_ids"]), batch["labels"])

    optimizer = tfn.optim.sgd(1.0)

    def update(ranks: list[Micro]) -> dict[str, Tensor]:
        state = tfn.init(seeded(tagger), optimizer)
        step = tfn.train_step(loss, optimizer, accumulate="stream")
        new, _ = step(state, [micro for rank in ranks for micro in rank])
        return tfn.tree.sub(new.params, state.params)

    def evaluate(batches: Micro) -> float:
        state = tfn.init(seeded(tagger), optimizer)
        return float(tfn.evaluate(tfn.eval_step(loss), state, batches)["loss"].value)

    return update, evaluate


# --- transformers --------------------------------------------------------------------------------------------------
def hugging_face(
    head: Callable[[], nn.Module], prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Contestant:
    from transformers import Trainer, TrainingArguments

    class Given(Trainer):
        """The Trainer as it is, on ready-made micro-batches."""

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

        def get_eval_dataloader(self, eval_dataset: object = None) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(eval_dataset, batch_size=None)

    def trainer(model: nn.Module, micro: Micro, folder: str) -> Trainer:
        arguments = TrainingArguments(
            folder,
            max_steps=1,
            gradient_accumulation_steps=len(micro),
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        return Given(model, arguments, train_dataset=micro, optimizers=(optimizer, None))  # type: ignore[arg-type]

    def update(ranks: list[Micro]) -> dict[str, Tensor]:
        model, micro = seeded(head), [prepare(m) for rank in ranks for m in rank]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer(model, micro, folder).train()
        return change(model, before)

    def evaluate(batches: Micro) -> float:
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(seeded(head), batches, folder)
            with contextlib.redirect_stdout(io.StringIO()):
                return float(made.evaluate([prepare(batch) for batch in batches])["eval_loss"])

    return update, evaluate


def bert_tagger() -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForTokenClassification(BertConfig(vocab_size=VOCAB, num_labels=VOCAB, **sizes, **off))


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=3, **sizes, **off))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 8, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **off))


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def one_label(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"][:, 0] % 3}


# --- torch: the loop of its examples, with the loss of a micro-batch divided by their number ------------------------
def mean_over_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).mT, batch["labels"])


def mean_of_means(batches: Micro) -> float:
    model = seeded(tagger)
    return float(torch.stack([mean_over_tokens(model, batch) for batch in batches]).mean())


def plain_loop() -> Contestant:
    def update(ranks: list[Micro]) -> dict[str, Tensor]:
        model = seeded(tagger)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        micro = [m for rank in ranks for m in rank]
        for batch in micro:
            (mean_over_tokens(model, batch) / len(micro)).backward()
        optimizer.step()
        return change(model, before)

    return update, mean_of_means


# --- Lightning Fabric: gradient accumulation as its guide shows it -------------------------------------------------
def fabric() -> Contestant:
    from lightning.fabric import Fabric

    def update(ranks: list[Micro]) -> dict[str, Tensor]:
        engine = Fabric(accelerator="cpu", devices=1)
        model = seeded(tagger)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wrapped, optimizer = engine.setup(model, torch.optim.SGD(model.parameters(), 1.0))
        micro = [m for rank in ranks for m in rank]
        for i, batch in enumerate(micro):
            with engine.no_backward_sync(wrapped, enabled=i < len(micro) - 1):
                engine.backward(mean_over_tokens(wrapped, batch) / len(micro))
        optimizer.step()
        return change(model, before)

    return update, mean_of_means


# --- optax.MultiSteps ----------------------------------------------------------------------------------------------
def multi_steps() -> Contestant:
    import jax
    import jax.numpy as jnp
    import optax

    def mean_loss(params: dict, tokens: object, labels: object) -> object:
        logits = params["0.weight"][tokens] @ params["1.weight"].T + params["1.bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        mask = labels != -100
        return (losses * mask).sum() / mask.sum()

    def parameters() -> dict:
        return {name: jnp.array(p.detach().numpy()) for name, p in seeded(tagger).named_parameters()}

    def update(ranks: list[Micro]) -> dict[str, Tensor]:
        micro = [m for rank in ranks for m in rank]
        optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=len(micro))
        params = before = parameters()
        state = optimizer.init(params)
        for batch in micro:
            grads = jax.grad(mean_loss)(params, batch["input_ids"].numpy(), batch["labels"].numpy())
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return {name: torch.tensor(jax.device_get(params[name] - before[name])) for name in params}

    return update, None


# --- the table -----------------------------------------------------------------------------------------------------
CONTESTANTS: dict[str, tuple[str | None, Callable[[], Contestant]]] = {
    "trainfn": (None, ours),
    "torch, a plain loop": (None, plain_loop),
    "transformers Trainer, GPT-2": ("transformers", lambda: hugging_face(gpt2, as_it_is)),
    "transformers Trainer, BERT tagging": ("transformers", lambda: hugging_face(bert_tagger, as_it_is)),
    "transformers Trainer, BERT classes": ("transformers", lambda: hugging_face(bert_classifier, one_label)),
    "transformers Trainer, T5": ("transformers", lambda: hugging_face(t5, as_it_is)),
    "Lightning Fabric": ("lightning", fabric),
    "optax.MultiSteps": ("optax", multi_steps),
}


def length(update: dict[str, Tensor]) -> float:
    return float(torch.cat([x.flatten() for x in update.values()]).norm())


def accumulation(update: Callable[[list[Micro]], dict[str, Tensor]]) -> str:
    """Does any cut into micro-batches give the same step? And by how much is one into single rows longer?"""
    batch = rows()
    singles = [piece.batch for piece in tt.Split(((1,) * 8,)).pieces(batch)[0]]
    whole, pieces = update([[batch]]), update([singles])
    try:
        tt.check_split_invariant(update, batch, tolerance=1e-3)
    except tt.LawViolation:
        cosine = F.cosine_similarity(*(torch.cat([x.flatten() for x in u.values()]) for u in (whole, pieces)), dim=0)
        return f"FAILS  8 x 1 rows: step {length(pieces) / length(whole):.2f} x as long, cosine {cosine:.3f}"
    return "holds"


def evaluation(evaluate: Callable[[Micro], float] | None) -> str:
    """Does the loss of an evaluation depend on the size of its batches?"""
    if evaluate is None:
        return "-"
    batch = rows()
    whole = evaluate([batch])
    singles = evaluate([piece.batch for piece in tt.Split(((1,) * 8,)).pieces(batch)[0]])
    return "holds" if abs(singles - whole) < 1e-5 * whole else f"FAILS  {singles / whole:.4f} x"


def main() -> None:
    tt.register_profiles()
    settings.load_profile("trainfn-ci")
    warnings.simplefilter("ignore")  # the peers', about their own settings
    print(f"{'':36}{'any split, the same update':54}any batch size, the same evaluation")
    for name, (needs, make) in CONTESTANTS.items():
        if sys.argv[1:] and not any(asked in name for asked in sys.argv[1:]):
            continue
        if needs is not None and find_spec(needs) is None:
            print(f"{name:36}skipped: {needs} is not installed")
            continue
        update, evaluate = make()
        print(f"{name:36}{accumulation(update):54}{evaluation(evaluate)}", flush=True)


if __name__ == "__main__":
    main()
