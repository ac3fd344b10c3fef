"""Teach a model of photos the emoji: what does it forget, and what does the guardrail save?

A text tower learns to read what a locked image tower sees on photos (LiT, as in locked_image.py), and then goes on
with emoji. Recall on held-out photos is the reference, recall on held-out emoji the domain. Both held-out sets are
halved: on one half the guardrail chooses (TrainConfig.forget_budget), on the other one, which no choice has seen, it is
compared with plain fine-tuning, image by image. Start it with any of

    python train/forgetting.py PHOTOS EMOJI --vision TOWER --output runs/forgetting
    torchrun --nproc_per_node 2 train/forgetting.py PHOTOS EMOJI --vision TOWER --output runs/forgetting
    accelerate launch train/forgetting.py PHOTOS EMOJI --vision TOWER --output runs/forgetting

where PHOTOS and EMOJI are folders with captions.jsonl ({"image": …, "captions": […]}, of emoji "keywords", too) and
TOWER is a vision model of transformers, by name or folder. --figure FILE.svg draws the curves.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from clipkit import DualEncoder, EmbeddingStore, TrainConfig, Trainer, interpolate, load_pairs, split_pairs
from clipkit.distributed import is_main, start
from clipkit.embedding.image_features import with_image_features
from clipkit.errors import exit_with_message
from clipkit.evaluation.evaluator import Evaluator
from clipkit.files import write_json, write_text
from clipkit.metrics.ranking import Relevance, chance, rank

LENGTH = 48  # tokens, a word each; none of these texts has more
K = 10  # of recall@k


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = start()

    # 1. Pairs, with the features of the locked tower, computed once: training and evaluation need no image after that.
    photos, emoji = load(args.photos), load(args.emoji)
    model = build_model(args, [*photos["texts"], *emoji["texts"]]).to(device)  # of any words: the tower is the same
    with EmbeddingStore(args.features) as store:
        photos, emoji = (with_image_features(model, each, store=store, progress=is_main()) for each in (photos, emoji))

    found = [one_seed(args, photos, emoji, seed, device) for seed in args.seeds]
    if is_main():
        print("\n".join(table(found, args.budget)))
        write_json(args.output / "result.json", {"budget": args.budget, "seeds": found})
        if args.figure:
            draw(found, args.budget, args.figure)


def one_seed(args, photos, emoji, seed, device):
    folder = args.output / f"seed{seed}"

    # 2. Of each set some images are held out, one half for the guardrail to choose on, one half to report.
    photos, photos_held = split_pairs(photos, test=args.held_photos, by="image", seed=seed)
    emoji, emoji_held = split_pairs(emoji, test=args.held_emoji, by="image", seed=seed)
    (photos_a, photos_b), (emoji_a, emoji_b) = (
        split_pairs(pairs, test=0.5, by="image", seed=seed) for pairs in (photos_held, emoji_held)
    )

    # 3. Model: the locked tower, and a bag of the words of both sets. Those of the emoji alone wait for their turn.
    torch.manual_seed(seed)
    model = build_model(args, [*photos["texts"], *emoji["texts"]]).to(device)

    # 4. Before: the photos alone. Nothing is chosen here; the last weights are taken.
    rate = args.photo_learning_rate  # the text tower starts at random, too
    settings = settings_of(folder / "photos", args, seed, args.photo_epochs)
    Trainer(model, photos, TrainConfig(**settings, learning_rate=rate, head_learning_rate=rate)).train()
    before = DualEncoder.from_pretrained(folder / "photos" / "model", device=device)

    # 5. The emoji. One run gives both: `last` is plain fine-tuning, `model` what the guardrail takes of it.
    model = DualEncoder.from_pretrained(folder / "photos" / "model", device=device).freeze("image")
    settings = settings_of(folder / "emoji", args, seed, args.emoji_epochs)
    config = TrainConfig(**settings, learning_rate=args.emoji_learning_rate, forget_budget=args.budget)
    trainer = Trainer(model, emoji, config, evaluators=[Recall(emoji_a, "emoji")], reference=Recall(photos_a, "photos"))
    alpha = trainer.train().forgetting.alpha
    plain = DualEncoder.from_pretrained(folder / "emoji" / "last", device=device)

    # 6. Report on the halves that nothing was chosen on, image by image, so that the two can be paired.
    recalls = {"emoji": Recall(emoji_b, "emoji"), "photos": Recall(photos_b, "photos")}
    hits = {
        name: {"before": recall.hits(before), "plain": recall.hits(plain), "guardrail": recall.hits(model)}
        for name, recall in recalls.items()
    }
    curve = [
        {"alpha": step / 10} | {name: float(recall.hits(between).mean()) for name, recall in recalls.items()}
        for step in range(11)
        for between in [interpolate(before, plain, step / 10)]
    ]
    return {
        "seed": seed,
        "alpha": alpha,
        "images": {name: len(each["plain"]) for name, each in hits.items()},
        "chance": {name: recall.chance() for name, recall in recalls.items()},
        "recall": {name: {who: float(own.mean()) for who, own in each.items()} for name, each in hits.items()},
        "curve": curve,
        "hits": {name: {who: own.tolist() for who, own in each.items()} for name, each in hits.items()},
    }


class Recall(Evaluator):
    """Text-to-image recall@10 from cached features of the locked tower; an evaluator for `Trainer`."""

    def __init__(self, pairs, name):
        self.name = name
        self.features = torch.as_tensor(np.asarray(pairs["image_features"], np.float32))
        self.texts = [text for own in pairs["texts"] for text in own]
        self.image_of_text = [row for row, own in enumerate(pairs["texts"]) for _ in own]
        self.relevance = Relevance.by_group(self.image_of_text, range(len(pairs)))

    def __call__(self, model):
        return {f"{self.name}/text_to_image_recall@{K}": float(self.by_query(model).mean())}

    def by_query(self, model):
        """(texts,) 1 where the image of a text is among the ten that it finds, else 0."""
        with torch.no_grad():
            images = model.eval()(image_features=self.features.to(model.device)).image.cpu()
        return rank(model.encode_texts(self.texts), images, self.relevance).hits(K)

    def hits(self, model):
        """(images,) the part of each image's texts that find it."""
        rows, hits = np.asarray(self.image_of_text), self.by_query(model).numpy()
        return np.bincount(rows, hits) / np.bincount(rows)

    def identity(self):
        return {"texts": self.texts, "image_of_text": self.image_of_text}

    def chance(self):
        return chance(self.relevance, K)


def interval(found, name, one, other, draws=10_000):
    """Mean and 95 % bootstrap interval of what one model has over another; images are drawn, with all of their texts.

    Of several seeds it is the mean over them, each drawn from by itself.
    """
    random = np.random.default_rng(0)
    each = [np.subtract(seed["hits"][name][one], seed["hits"][name][other]) for seed in found]
    means = np.mean([own[random.integers(len(own), size=(draws, len(own)))].mean(axis=1) for own in each], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{np.mean([own.mean() for own in each]):+.3f} [{low:+.3f}, {high:+.3f}]"


def table(found, budget):
    """The figures of the reporting halves, as Markdown."""
    lines = [f"| seed | model | emoji recall@{K} | photos recall@{K} | lost of the photos |", "|---|---|---|---|---|"]
    for one in found:
        emoji, photos = one["recall"]["emoji"], one["recall"]["photos"]
        names = {"before": "before", "plain": "plain fine-tuning", "guardrail": f"guardrail, alpha {one['alpha']:g}"}
        for who, name in names.items():
            lost = photos["before"] - photos[who]
            lines.append(f"| {one['seed']} | {name} | {emoji[who]:.3f} | {photos[who]:.3f} | {lost:+.3f} |")
        lines.append(f"| {one['seed']} | chance | {one['chance']['emoji']:.3f} | {one['chance']['photos']:.3f} | |")
    lines += ["", f"Paired differences with 95 % intervals, over images; the budget is {budget:g} of the photos:", ""]
    lines += ["| seed | difference | emoji | photos |", "|---|---|---|---|"]
    for name, seeds in [*((one["seed"], [one]) for one in found), ("mean", found)]:
        for one, other in (("guardrail", "plain"), ("guardrail", "before"), ("plain", "before")):
            cells = [interval(seeds, what, one, other) for what in ("emoji", "photos")]
            lines.append(f"| {name} | {one} - {other} | {cells[0]} | {cells[1]} |")
    return lines


def draw(found, budget, path):
    """One curve a seed, of the reporting halves: what is learnt by what is lost."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for one in found:
        lost = [one["curve"][0]["photos"] - point["photos"] for point in one["curve"]]
        learnt = [point["emoji"] for point in one["curve"]]
        (line,) = axes.plot(lost, learnt, marker="o", markersize=3, linewidth=1.3, label=f"seed {one['seed']}")
        chosen = round(10 * one["alpha"])
        axes.plot(lost[chosen], learnt[chosen], "o", markersize=11, fillstyle="none", color=line.get_color())
        axes.annotate("plain", (lost[-1], learnt[-1]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.axvline(budget, color="grey", linestyle="--", linewidth=1)
    axes.annotate("budget", (budget, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", fontsize=8)
    axes.set(xlabel=f"lost of recall@{K} on held-out photos", ylabel=f"recall@{K} on held-out emoji")
    axes.set_title("From before (left) to plain fine-tuning (right); ringed: the guardrail's choice", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "clipkit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(path, buffer.getvalue())


def load(folder):
    """Images with their captions; where there are keywords they follow the caption in one text."""
    pairs = load_pairs(folder / "captions.jsonl", image="image", text="captions")
    if "keywords" not in pairs.column_names:
        return pairs
    texts = [
        [" ".join([text, *words]) for text in own] for own, words in zip(pairs["texts"], pairs["keywords"], strict=True)
    ]
    return pairs.remove_columns("texts").add_column("texts", texts)


def settings_of(folder, args, seed, epochs):
    return {
        "output_dir": str(folder),
        "epochs": epochs,
        "batch_size": args.batch_size,
        "augmentation": "none",  # features are of the images as they are
        "evaluate_every": 10**9,  # the last weights alone are measured
        "seed": seed,
        "resume": "auto",
    }


def build_model(args, captions):
    tokenizer = build_tokenizer(captions)
    text = build_text_tower(tokenizer)
    model = DualEncoder.from_towers(args.vision, text, tokenizer, dim=512, context_length=LENGTH, text_pooling="mean")
    return model.freeze("image")


def build_tokenizer(captions):
    """One token a word that the training texts use at least twice."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator((text for texts in captions for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LENGTH
    )


def build_text_tower(tokenizer):
    """A bag of words, which is enough here (see locked_image.py)."""
    from transformers import BertConfig, BertModel

    size = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=0,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.2,
    )
    return BertModel(size, add_pooling_layer=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder with captions.jsonl")
    parser.add_argument("emoji", type=Path, help="a folder with captions.jsonl")
    parser.add_argument("--vision", required=True, help="a vision model of transformers")
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--features", type=Path, default=Path("runs/features.sqlite"), help="where features are kept")
    parser.add_argument("--figure", type=Path, default=None, help="an SVG file for the curves")
    parser.add_argument("--budget", type=float, default=0.02, help="how much of the photos' recall may be lost")
    parser.add_argument("--held-photos", type=int, default=800, help="half to choose on, half to report")
    parser.add_argument("--held-emoji", type=int, default=400, help="half to choose on, half to report")
    parser.add_argument("--photo-epochs", type=float, default=20)
    parser.add_argument("--photo-learning-rate", type=float, default=3e-3)
    parser.add_argument("--emoji-epochs", type=float, default=20)
    parser.add_argument("--emoji-learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=450)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_message(main)
