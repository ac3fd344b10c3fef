"""Fine-tune a model of photos on emoji: what does it forget, and what does the guardrail save?

A text tower learns to match a locked image tower on photos (LiT, as in locked_image.py), and then continues with
emoji. Recall on held-out photos is the reference, recall on held-out emoji the domain. Both held-out sets are halved:
the guardrail chooses on one half (TrainConfig.forget_budget), and is compared with plain fine-tuning on the other half,
image by image. Start it with any of

    python train/forgetting.py PHOTOS EMOJI --vision TOWER --output runs/forgetting
    torchrun --nproc_per_node 2 train/forgetting.py PHOTOS EMOJI --vision TOWER --output runs/forgetting
    accelerate launch train/forgetting.py PHOTOS EMOJI --vision TOWER --output runs/forgetting

where PHOTOS and EMOJI are folders with captions.jsonl ({"image": …, "captions": […]}, for emoji also "keywords") and
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

LENGTH = 48  # tokens, one a word; none of these texts has more
K = 10  # of recall@k


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = start()

    # 1. Pairs, with the features of the locked tower, computed once: training and evaluation need no image after that.
    photos = load(args.photos)
    emoji = load(args.emoji)
    model = build_model(args, [*photos["texts"], *emoji["texts"]]).to(device)  # only its image tower is used here
    with EmbeddingStore(args.features) as store:
        photos = with_image_features(model, photos, store=store, progress=is_main())
        emoji = with_image_features(model, emoji, store=store, progress=is_main())

    results = [run_seed(args, photos, emoji, seed, device) for seed in args.seeds]
    if is_main():
        print("\n".join(table(results, args.budget)))
        write_json(args.output / "result.json", {"budget": args.budget, "seeds": results})
        if args.figure:
            draw(results, args.budget, args.figure)


def run_seed(args, photos, emoji, seed, device):
    folder = args.output / f"seed{seed}"

    # 2. Some images of each set are held out: the guardrail chooses on one half of them, the other half is reported.
    photos, photos_held = split_pairs(photos, test=args.held_photos, by="image", seed=seed)
    emoji, emoji_held = split_pairs(emoji, test=args.held_emoji, by="image", seed=seed)
    photos_a, photos_b = split_pairs(photos_held, test=0.5, by="image", seed=seed)
    emoji_a, emoji_b = split_pairs(emoji_held, test=0.5, by="image", seed=seed)

    # 3. Model: the locked tower, and a bag of the words of both sets. Words of the emoji alone train in step 5.
    torch.manual_seed(seed)
    model = build_model(args, [*photos["texts"], *emoji["texts"]]).to(device)

    # 4. Before: the photos alone, and their last weights.
    rate = args.photo_learning_rate  # the text tower has random weights, like the heads
    settings = settings_of(folder / "photos", args, seed, args.photo_epochs)
    Trainer(model, photos, TrainConfig(**settings, learning_rate=rate, head_learning_rate=rate)).train()
    before = DualEncoder.from_pretrained(folder / "photos" / "model", device=device)

    # 5. The emoji. One run gives both models: `last` is plain fine-tuning, `model` the choice of the guardrail.
    model = DualEncoder.from_pretrained(folder / "photos" / "model", device=device).freeze("image")
    settings = settings_of(folder / "emoji", args, seed, args.emoji_epochs)
    config = TrainConfig(**settings, learning_rate=args.emoji_learning_rate, forget_budget=args.budget)
    trainer = Trainer(model, emoji, config, evaluators=[Recall(emoji_a, "emoji")], reference=Recall(photos_a, "photos"))
    alpha = trainer.train().forgetting.alpha
    plain = DualEncoder.from_pretrained(folder / "emoji" / "last", device=device)

    # 6. Report on the halves that no choice depends on, image by image, so that differences can be paired.
    recalls = {"emoji": Recall(emoji_b, "emoji"), "photos": Recall(photos_b, "photos")}
    models = {"before": before, "plain": plain, "guardrail": model}
    result = {"seed": seed, "alpha": alpha, "images": {}, "chance": {}, "recall": {}, "curve": [], "hits": {}}
    for name, recall in recalls.items():
        hits = {model_name: recall.hits(compared) for model_name, compared in models.items()}
        result["images"][name] = len(hits["plain"])
        result["chance"][name] = recall.chance()
        result["recall"][name] = {model_name: float(values.mean()) for model_name, values in hits.items()}
        result["hits"][name] = {model_name: values.tolist() for model_name, values in hits.items()}
    for tenth in range(11):
        between = interpolate(before, plain, tenth / 10)
        point = {"alpha": tenth / 10}
        for name, recall in recalls.items():
            point[name] = float(recall.hits(between).mean())
        result["curve"].append(point)
    return result


class Recall(Evaluator):
    """Text-to-image recall@10 from cached features of the locked tower; an evaluator for `Trainer`."""

    def __init__(self, pairs, name):
        self.name = name
        self.features = torch.as_tensor(np.asarray(pairs["image_features"], np.float32))
        self.texts = []
        self.image_of_text = []
        for row, texts in enumerate(pairs["texts"]):
            self.texts += texts
            self.image_of_text += [row] * len(texts)
        self.relevance = Relevance.by_group(self.image_of_text, range(len(pairs)))

    def __call__(self, model):
        return {f"{self.name}/text_to_image_recall@{K}": float(self.text_hits(model).mean())}

    def text_hits(self, model):
        """Return (texts,) 1 where the image of a text is among the ten nearest to it, else 0."""
        with torch.no_grad():
            images = model.eval()(image_features=self.features.to(model.device)).image.cpu()
        return rank(model.encode_texts(self.texts), images, self.relevance).hits(K)

    def hits(self, model):
        """Return (images,) the fraction of each image's texts that hit it."""
        rows = np.asarray(self.image_of_text)
        return np.bincount(rows, self.text_hits(model).numpy()) / np.bincount(rows)

    def identity(self):
        return {"texts": self.texts, "image_of_text": self.image_of_text}

    def chance(self):
        return chance(self.relevance, K)


def interval(results, name, model, other, draws=10_000):
    """Return the mean difference between two models with its 95 % bootstrap interval, as text.

    Images are drawn, with all of their texts. The difference of several seeds is the mean over them, and the images of
    each seed are drawn separately.
    """
    random = np.random.default_rng(0)
    differences = [np.subtract(result["hits"][name][model], result["hits"][name][other]) for result in results]
    seed_means = []
    for values in differences:
        drawn = random.integers(len(values), size=(draws, len(values)))
        seed_means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.mean(seed_means, axis=0), [0.025, 0.975])
    mean = np.mean([values.mean() for values in differences])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(results, budget):
    """Return the figures of the reporting halves, as lines of Markdown."""
    lines = [f"| seed | model | emoji recall@{K} | photos recall@{K} | lost of the photos |", "|---|---|---|---|---|"]
    for result in results:
        seed, chance = result["seed"], result["chance"]
        emoji, photos = result["recall"]["emoji"], result["recall"]["photos"]
        names = {"before": "before", "plain": "plain fine-tuning", "guardrail": f"guardrail, alpha {result['alpha']:g}"}
        for model, name in names.items():
            lost = photos["before"] - photos[model]
            lines.append(f"| {seed} | {name} | {emoji[model]:.3f} | {photos[model]:.3f} | {lost:+.3f} |")
        lines.append(f"| {seed} | chance | {chance['emoji']:.3f} | {chance['photos']:.3f} | |")
    lines += ["", f"Paired differences with 95 % intervals, over images; the budget is {budget:g} of the photos:", ""]
    lines += ["| seed | difference | emoji | photos |", "|---|---|---|---|"]
    rows = [(result["seed"], [result]) for result in results]
    rows.append(("mean", results))
    for name, some_results in rows:
        for model, other in (("guardrail", "plain"), ("guardrail", "before"), ("plain", "before")):
            emoji = interval(some_results, "emoji", model, other)
            photos = interval(some_results, "photos", model, other)
            lines.append(f"| {name} | {model} - {other} | {emoji} | {photos} |")
    return lines


def draw(results, budget, path):
    """Write a figure with one curve a seed, of the reporting halves: what is learnt against what is lost."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for result in results:
        curve = result["curve"]
        lost = [curve[0]["photos"] - point["photos"] for point in curve]
        learnt = [point["emoji"] for point in curve]
        (line,) = axes.plot(lost, learnt, marker="o", markersize=3, linewidth=1.3, label=f"seed {result['seed']}")
        chosen = round(10 * result["alpha"])
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
    """Return images with their captions; keywords, if there are any, follow the caption in the same text."""
    pairs = load_pairs(folder / "captions.jsonl", image="image", text="captions")
    if "keywords" not in pairs.column_names:
        return pairs
    texts = []
    for captions, keywords in zip(pairs["texts"], pairs["keywords"], strict=True):
        texts.append([" ".join([caption, *keywords]) for caption in captions])
    return pairs.remove_columns("texts").add_column("texts", texts)


def settings_of(folder, args, seed, epochs):
    return {
        "output_dir": str(folder),
        "epochs": epochs,
        "batch_size": args.batch_size,
        "augmentation": "none",  # the features are those of unchanged images
        "evaluate_every": 10**9,  # only the last weights are measured
        "seed": seed,
        "resume": "auto",
    }


def build_model(args, captions):
    tokenizer = build_tokenizer(captions)
    text = build_text_tower(tokenizer)
    model = DualEncoder.from_towers(args.vision, text, tokenizer, dim=512, context_length=LENGTH, text_pooling="mean")
    return model.freeze("image")


def build_tokenizer(captions):
    """Return a tokenizer of the words that occur at least twice in the training texts."""
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
    """Return a bag of words, which is enough here (see locked_image.py)."""
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
    parser.add_argument(
        "--features", type=Path, default=Path("runs/features.sqlite"), help="file that keeps the features"
    )
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
