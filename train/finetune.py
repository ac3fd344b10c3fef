"""Fine-tune a CLIP-style model on your own pairs.

    python train/finetune.py birds.csv --model openai/clip-vit-base-patch32 --output runs/birds
    torchrun --nproc_per_node 2 train/finetune.py birds.csv --model … --output runs/birds
    accelerate launch train/finetune.py birds.csv --model … --output runs/birds

`clipkit train` does the same from a YAML file. Copy this program where you want to change what it does.
"""

import argparse
import json
import logging
from pathlib import Path

from clipkit import DualEncoder, Paired, RetrievalEvaluator, SameGroup, TrainConfig, Trainer, load_pairs, split_pairs
from clipkit.distributed import is_main, start
from clipkit.errors import exit_with_message


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start()

    # 1. Pairs. No image is on both sides, even if several rows name it.
    pairs = load_pairs(args.pairs, image=args.image, text=args.text)
    train, test = split_pairs(pairs, test=args.test, by="image", seed=args.seed)

    # 2. Model. Frozen towers stay in evaluation mode, with their dropout and BatchNorm.
    model = DualEncoder.from_pretrained(args.model)
    for tower in args.freeze:
        model.freeze(tower)

    # 3. What counts as similar: the given pairs, or everything that shares a value of a column.
    similar = SameGroup(args.group) if args.group else Paired()

    # 4. Train. The batch size is the global one, over all processes: it is the number of negatives.
    config = TrainConfig(
        output_dir=str(args.output),
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        workers=args.workers,
    )
    result = Trainer(
        model, train, config, similar=similar, evaluators=[RetrievalEvaluator(test, group=args.group)]
    ).train()

    # 5. The best weights are in the model, and in OUTPUT/model.
    if is_main():
        print(json.dumps({key: round(value, 4) for key, value in result.metrics.items()}, indent=2))
        print(f"step {result.step} of {result.steps} is in {args.output / 'model'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="a table, a folder, or a data set of the hub")
    parser.add_argument("--model", required=True, help="a folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER")
    parser.add_argument("--image", default=None, help="column of the image")
    parser.add_argument("--text", default=None, help="column of the text")
    parser.add_argument("--group", default=None, help="column whose members all belong together")
    parser.add_argument("--test", type=float, default=0.1, help="fraction of the images to hold out")
    parser.add_argument("--freeze", choices=["image", "text"], nargs="*", default=[], help="towers to freeze")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images, per rank")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_message(main)
