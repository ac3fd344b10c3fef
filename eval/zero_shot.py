"""Measure zero-shot accuracy on labelled images: a folder with one subfolder a class, or a table with labels.

    python eval/zero_shot.py clothes/ --model runs/clothes/model --template "a photo of a {}."
    torchrun --nproc_per_node 2 eval/zero_shot.py clothes/ --model runs/clothes/model
    accelerate launch eval/zero_shot.py clothes/ --model runs/clothes/model

Several templates are averaged: each prompt is normalised, their mean is normalised again (Radford et al. 2021, 3.1.4).
"""

import argparse
import time
from pathlib import Path

from clipkit import DualEncoder, ZeroShotEvaluator, load_pairs
from clipkit.distributed import is_main, start
from clipkit.errors import as_option, exit_with_message, speaking
from clipkit.evaluation.result import build_result
from clipkit.files import write_json
from clipkit.prompts import DEFAULT_TEMPLATE


def main() -> None:
    args = arguments()
    device = start()
    began = time.perf_counter()

    # 1. Images with a class. The names of the classes are those of the folders, or the values of the label column.
    table_format = {"separator": args.separator, "encoding": args.encoding, "quoting": args.quoting}
    images = load_pairs(args.images, image=args.image, label=args.label, on_bad=args.on_bad, **table_format)

    # 2. Measure, with the same classifier as `ZeroShotClassifier`: both turn `sea_lion` into "a photo of a sea lion.",
    #    as training does.
    options = {"batch_size": args.batch_size, "progress": is_main(), "on_bad": args.on_bad}
    evaluator = ZeroShotEvaluator(images, templates=args.template or DEFAULT_TEMPLATE, **options)
    model = DualEncoder.from_pretrained(args.model, device=device)
    metrics = evaluator(model)

    # 3. Print accuracy beside that of guessing, and of always naming the most frequent class.
    if is_main():
        chance, majority = evaluator.chance(), evaluator.majority()
        for key, value in metrics.items():
            print(f"{key:30} {value:.4f}   chance {chance[key]:.4f}   majority {majority[key]:.4f}")
        for true, named, count in evaluator.last.most_confused(5):
            print(f"{count} of {true!r} were taken for {named!r}")
        if args.to:
            write_json(args.to, build_result(model, metrics, [evaluator], None, time.perf_counter() - began))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a folder of class folders, a table, or a data set of the hub")
    parser.add_argument("--model", required=True, help="a folder, org/name, open_clip:ARCH/TAG or open_clip:FOLDER")
    parser.add_argument("--image", default=None, help="column of the image")
    parser.add_argument("--label", default=None, help="column of the class")
    parser.add_argument("--template", action="append", default=None, help="prompt with {}; repeat for several")
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
