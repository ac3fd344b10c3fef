"""Measure recall@k and median rank of a model on pairs, text to image and image to text.

    python eval/retrieval.py birds.csv --model runs/birds/model
    torchrun --nproc_per_node 2 eval/retrieval.py birds.csv --model runs/birds/model
    accelerate launch eval/retrieval.py birds.csv --model runs/birds/model

Several processes share the images and return the figures of one.
"""

import argparse
import time
from pathlib import Path

from clipkit import DualEncoder, RetrievalEvaluator, load_pairs
from clipkit.distributed import is_main, start
from clipkit.errors import as_option, exit_with_message, speaking
from clipkit.evaluation.result import build_result
from clipkit.files import write_json


def main() -> None:
    args = arguments()
    device = start()
    began = time.perf_counter()

    # 1. Every caption is a query and an item, as in the papers; equal captions count once, and so do equal images.
    table_format = {"separator": args.separator, "encoding": args.encoding, "quoting": args.quoting}
    pairs = load_pairs(args.pairs, image=args.image, text=args.text, on_bad=args.on_bad, **table_format)
    options = {"batch_size": args.batch_size, "progress": is_main(), "on_bad": args.on_bad}
    evaluator = RetrievalEvaluator(pairs, group=args.group, **options)

    # 2. Measure.
    model = DualEncoder.from_pretrained(args.model, device=device)
    metrics = evaluator(model)

    # 3. Print each figure beside chance.
    if is_main():
        chance = evaluator.chance()
        for key, value in metrics.items():
            comparison = f"   chance {chance[key]:.4f}" if key in chance else ""
            print(f"{key:40} {value:8.4f}{comparison}")
        if args.to:
            write_json(args.to, build_result(model, metrics, [evaluator], None, time.perf_counter() - began))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="a table, a folder, or a data set of the hub")
    parser.add_argument("--model", required=True, help="a folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER")
    parser.add_argument("--image", default=None, help="column of the image")
    parser.add_argument("--text", default=None, help="column of the text")
    parser.add_argument("--group", default=None, help="column whose members all count as correct")
    parser.add_argument("--separator", default=None, help="of a CSV file: a character, or semicolon, tab, bar")
    parser.add_argument("--encoding", default="utf-8-sig", help="of text files, such as cp1252")
    parser.add_argument("--quoting", default="double", choices=["double", "backslash", "none"])
    parser.add_argument("--on-bad", default="error", choices=["error", "skip"], help="rows that cannot be used")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--to", type=Path, default=None, help="write result.json here")
    return parser.parse_args()


if __name__ == "__main__":
    with speaking(as_option):  # errors name the options below
        exit_with_message(main)
