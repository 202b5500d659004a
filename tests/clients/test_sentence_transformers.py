"""sentence-transformers on our Trainer: the same losses and weights as on that of transformers."""

import datasets
import pytest
import torch
import transformers

from tests.clients.both import KINDS, Seeded, assert_same_run, logged, package
from tests.clients.loaded import on
from tests.clients.test_sft import no_bars, tokenizer
from tests.helpers import assert_close
from tests.hf.models import seeded

package("sentence_transformers")
pytestmark = [pytest.mark.usefixtures(no_bars.__name__), pytest.mark.filterwarnings("ignore::UserWarning")]
QUIET = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
WORDS = ["a b", "c d e", "f g", "h a", "b c d", "e", "f h h", "g a c", "d d", "e f g h"]


def rows(count=16, **extra):
    columns = {"anchor": lambda i: WORDS[i % 10], "positive": lambda i: WORDS[(3 * i + 1) % 10]}
    columns |= {"negative": lambda i: WORDS[(7 * i + 2) % 10]} if extra.get("negative") else {}
    columns |= {"label": extra["label"]} if "label" in extra else {}
    return datasets.Dataset.from_dict({name: [make(i) for i in range(count)] for name, make in columns.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    seeded(lambda: transformers.BertModel(transformers.BertConfig(vocab_size=13, **sizes, **off))).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


LABELS = {"pair": lambda i: i % 2, "score": lambda i: (i % 5) / 4}
CASES = {
    "in-batch negatives": ("MultipleNegativesRankingLoss", {}, {}),
    "triplets": ("TripletLoss", {}, {"negative": True}),
    "cosine": ("CosineSimilarityLoss", {}, {"label": LABELS["score"]}),
    "CoSENT": ("CoSENTLoss", {}, {"label": LABELS["score"]}),
    "contrastive": ("ContrastiveLoss", {}, {"label": LABELS["pair"]}),
    "a head of the loss": (
        "SoftmaxLoss", {"sentence_embedding_dimension": 8, "num_labels": 3}, {"label": lambda i: i % 3},
    ),
    "cached": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2}, {}),
    "nested": ("MatryoshkaLoss", {"matryoshka_dims": [8, 4]}, {}),
}  # fmt: skip


def run(kind, folder, path, train, loss, *, resume=None, evaluated=None, judges=None, **options):
    """A trained Trainer of the package, on the Trainer of a kind."""
    with Seeded(), on(kind, "sentence_transformers") as package:
        from sentence_transformers import losses, models

        words = models.Transformer(folder)
        model = package.SentenceTransformer(
            modules=[words, models.Pooling(words.get_word_embedding_dimension())], device="cpu"
        )
        args = package.SentenceTransformerTrainingArguments(str(path), **{**QUIET, **options})
        made = package.SentenceTransformerTrainer(
            model, args, train_dataset=train, eval_dataset=evaluated, loss=loss(losses, model),
            evaluator=None if judges is None else judges(),
        )  # fmt: skip
        assert isinstance(made, KINDS[kind][0])
        made.train(resume_from_checkpoint=resume)
    return made


def one(name, **options):
    def make(losses, model):
        if name == "MatryoshkaLoss":
            return losses.MatryoshkaLoss(model, losses.CachedMultipleNegativesRankingLoss(model), **options)
        return getattr(losses, name)(model, **options)

    return make


def both(folder, path, keys=("loss", "grad_norm"), **how):
    made = {kind: run(kind, folder, path / kind, **how) for kind in ("transformers", "trainfn")}
    assert_same_run(made["trainfn"], made["transformers"], keys, 1e-5)  # norms of gradients above 100 in float32
    return made


@pytest.mark.parametrize("case", CASES)
def test_losses(case, folder, tmp_path):
    name, options, columns = CASES[case]
    # The norm that ours logs has the gradients of such a head, and that of transformers has the model's alone.
    keys = ("loss",) if case == "a head of the loss" else ("loss", "grad_norm")
    made = both(folder, tmp_path, keys, train=rows(**columns), loss=one(name, **options))
    heads = [dict(trainer.loss.named_parameters()) for trainer in made.values()]
    found = [{n: p.detach() for n, p in head.items() if not n.startswith("model.")} for head in heads]
    assert_close(found[1], found[0], 1e-6)
    assert bool(found[0]) == (case == "a head of the loss")


def test_accumulation_and_adam(folder, tmp_path):
    options = {"gradient_accumulation_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3, "warmup_steps": 1}
    both(folder, tmp_path, train=rows(), loss=one("MultipleNegativesRankingLoss"), **options)


@pytest.mark.parametrize("sampler", ["proportional", "round_robin"])
def test_several_datasets_each_with_a_loss(sampler, folder, tmp_path):
    def several(losses, model):
        return {"a": losses.MultipleNegativesRankingLoss(model), "b": losses.CosineSimilarityLoss(model)}

    train = datasets.DatasetDict({"a": rows(12), "b": rows(8, label=LABELS["score"])})
    keys = ("loss", "grad_norm", "eval_a_loss", "eval_b_loss")
    options = {"multi_dataset_batch_sampler": sampler, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    both(folder, tmp_path, keys, train=train, evaluated=train, loss=several, **options)


def judge():
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    return EmbeddingSimilarityEvaluator(WORDS[:5], WORDS[5:], [0.1, 0.9, 0.3, 0.5, 0.7], name="test")


def test_evaluators_with_and_without_a_dataset(folder, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "loss": one("MultipleNegativesRankingLoss")}
    keys = ("loss", "eval_test_spearman_cosine", "eval_test_pearson_cosine")
    both(folder, tmp_path / "with", (*keys, "eval_loss"), train=rows(), evaluated=rows(8), judges=judge, **options)
    both(folder, tmp_path / "without", keys, train=rows(), judges=judge, **options)


def test_checkpoints_load_and_resume(folder, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "train": rows(),
        "loss": one("CachedMultipleNegativesRankingLoss"),
    }
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "evaluated": rows(8)}
    made = both(folder, tmp_path, ("loss", "eval_loss"), **options)
    for saved in made:
        again = run("trainfn", folder, tmp_path / "again", resume=str(tmp_path / saved / "checkpoint-1"), **options)
        assert again.state.global_step == 3
        assert_close(dict(again.model.named_parameters()), dict(made["trainfn"].model.named_parameters()), 1e-6)
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(tmp_path / "trainfn/checkpoint-3"), device="cpu")
    assert logged(made["trainfn"], "eval_loss") == pytest.approx(logged(made["transformers"], "eval_loss"))
    assert torch.equal(loaded.encode(["a b"], convert_to_tensor=True).isnan(), torch.zeros(1, 8, dtype=torch.bool))
