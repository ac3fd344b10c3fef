"""How fast clipkit is at real size: each line is a ratio against what the same machine needs without clipkit.

Both sides of a line run in turn in one process, on a ViT-B/32 of random weights (151 M parameters); the ratio is the
median of the pairs. Below 1 clipkit is faster. A line with no peer (opening an index) shows seconds and memory alone.

    export PHOTOS=…
    python eval/speed.py --photos $PHOTOS
    python eval/speed.py --photos $PHOTOS --only open,save --pairs 5 --to speed.json
    python eval/speed.py --photos $PHOTOS --device cuda --only embed
"""

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipkit.errors import UsageError, exit_with_message
from clipkit.files import write_json

DIM = 512
BUSY = 0.5  # of load: other programs then decide what is measured


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name, peer: what was measured, and beside what.
        clock: wall or CPU seconds, or another unit.
        ours, theirs: of each pair; `theirs` is empty where there is no peer.
        limit: the largest ratio (or, without a peer, value) that this project accepts.
        note: what else was seen.
    """

    name: str
    peer: str
    clock: str
    ours: list[float]
    theirs: list[float] = field(default_factory=list)
    limit: float | None = None
    note: str = ""

    @property
    def value(self) -> float:
        if not self.theirs:
            return statistics.median(self.ours)
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))


class Bench:
    """What the lines share: options, a folder, and the ViT-B/32 as transformers saves it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.device = args, folder, args.device
        self.photos = Path(args.photos)

    def clip(self) -> Path:
        """The folder of a CLIP in ViT-B/32's shape, written once; the tokens are those in open_clip's package."""
        folder = self.folder / "clip"
        if not folder.exists():
            from open_clip.tokenizer import SimpleTokenizer
            from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

            source = SimpleTokenizer()
            ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
            vocabulary = {ends.get(token, token): number for token, number in source.encoder.items()}
            tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks), model_max_length=77)
            torch.manual_seed(0)
            CLIPModel(CLIPConfig()).save_pretrained(folder)
            CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
        return folder

    def saved(self) -> Path:
        """The same model as clipkit saves it."""
        folder = self.folder / "saved"
        if not folder.exists():
            self.model().save_pretrained(folder)
        return folder

    def model(self) -> Any:
        from clipkit import DualEncoder

        return DualEncoder.from_pretrained(self.clip(), device=self.device)

    def coco(self, count: int) -> list[Path]:
        """Photos at full size, mostly 640 pixels wide."""
        paths = sorted((self.photos / "coco_fullsize" / "images").iterdir())
        if len(paths) < count:
            raise UsageError(f"expected {count} photos, found {len(paths)}", where=self.photos / "coco_fullsize")
        return paths[:count]

    def large(self, count: int) -> list[Path]:
        """The same photos enlarged to 12 megapixels."""
        folder = self.folder / "large"
        folder.mkdir(exist_ok=True)
        for path in self.coco(count):
            if not (folder / path.name).exists():
                image = Image.open(path).convert("RGB").resize((4000, 3000), Image.Resampling.LANCZOS)
                image.save(folder / path.name, quality=90)
        return sorted(folder.iterdir())[:count]

    def synthetic_index(self, size: int) -> Path:
        """An index of random embeddings, whose files do not exist."""
        from clipkit.embedding.store import EmbeddingStore, Key
        from clipkit.search.index_file import Entry, Header, write_index

        path = self.folder / f"{size}.index"
        if path.exists():
            return path
        fingerprint = self.model().fingerprint()
        generator = np.random.default_rng(0)
        entries = []
        with EmbeddingStore(path) as store:
            for start in range(0, size, 10_000):
                vectors = generator.standard_normal((10_000, DIM), dtype=np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                contents = [number.to_bytes(32, "big") for number in range(start, start + 10_000)]
                store.put([Key(content, "image", fingerprint.image) for content in contents], vectors)
                entries += [Entry(f"/photos/{start + i:08}.jpg".encode(), 1, 1, c) for i, c in enumerate(contents)]
        write_index(path, Header(str(self.clip()), fingerprint, None), entries)
        return path

    def pairs(
        self, ours: Callable[[], Any], theirs: Callable[[], Any], *, clock: str = "wall", pairs: int | None = None
    ) -> tuple[list[float], list[float]]:
        """Seconds of each side, one after the other in alternating order; the first run of both is not counted."""
        ours(), theirs()
        times: dict[Callable[[], Any], list[float]] = {ours: [], theirs: []}
        for number in range(pairs or self.args.pairs):
            for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                times[side].append(seconds(side, clock))
        return times[ours], times[theirs]


def seconds(work: Callable[[], Any], clock: str = "wall") -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    begin = now()
    work()
    return now() - begin


def transformers_open(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    return AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


# -- opening and saving


def open_(bench: Bench) -> Iterator[Row]:
    """Opening a folder that clipkit saved, imports aside: the first time its content is proved, then remembered."""
    from clipkit import DualEncoder

    folder, peer = bench.saved(), "AutoModel and AutoProcessor"

    def first() -> None:
        os.environ["CLIPKIT_CACHE"] = tempfile.mkdtemp(dir=bench.folder)  # nothing is remembered
        DualEncoder.from_pretrained(folder)

    times = bench.pairs(first, lambda: transformers_open(folder))
    yield Row("open a saved folder, first time", peer, "wall", *times, limit=2.5)
    times = bench.pairs(lambda: DualEncoder.from_pretrained(folder), lambda: transformers_open(folder))
    yield Row("open a saved folder, again", peer, "wall", *times, limit=1.3)
    clip = bench.clip()
    times = bench.pairs(lambda: DualEncoder.from_pretrained(clip), lambda: transformers_open(clip))
    yield Row("open a transformers folder", peer, "wall", *times, limit=1.3)


def save(bench: Bench) -> Iterator[Row]:
    """A save with its proof, and that of a new best during training."""
    from clipkit import DualEncoder

    model, (native, processor) = bench.model(), transformers_open(bench.clip())

    def theirs() -> None:
        target = fresh(bench.folder / "saved-by-transformers")
        native.save_pretrained(target), processor.save_pretrained(target)

    def ours() -> None:
        with torch.no_grad():
            next(model.parameters()).add_(0.0)  # as training does: nothing remembered holds any longer
        model.save_pretrained(fresh(bench.folder / "saved-by-clipkit"))

    yield Row("save_pretrained", "save_pretrained of transformers", "wall", *bench.pairs(ours, theirs), limit=6)
    best = new_best(bench, DualEncoder.from_pretrained(bench.clip()))
    times = bench.pairs(best, theirs)
    yield Row("save a new best during training", "save_pretrained of transformers", "wall", *times, limit=3)


def new_best(bench: Bench, model: Any) -> Callable[[], None]:
    """What training does when an evaluation gives a better metric than all before."""
    from clipkit.progress import Progress
    from clipkit.training.run_folder.best_model import BestModel

    best = BestModel(model, bench.folder / "run", None, lambda key: True)
    progress, steps = Progress(0, "training", silent=True), count(1)

    def update() -> None:
        step = next(steps)
        with torch.no_grad():
            next(model.parameters()).add_(0.0)
        best.update(step, {"metric": float(step)}, {}, progress)

    return update


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


# -- search


def search(bench: Bench) -> Iterator[Row]:
    """The whole command, imports and all, beside a script that does only what must be done."""
    from clipkit import DualEncoder, EmbeddingIndex

    index = bench.folder / "photos.index"
    EmbeddingIndex.build(DualEncoder.from_pretrained(bench.saved()), bench.coco(16), index)
    bare = (
        "import sys, torch, numpy as np\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model, processor = AutoModel.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])\n"
        "with torch.inference_mode():\n"
        "    query = model.get_text_features(**processor(text=[sys.argv[3]], return_tensors='pt', padding=True))\n"
        "query = torch.nn.functional.normalize(getattr(query, 'pooler_output', query))\n"
        "vectors = torch.from_numpy(np.load(sys.argv[2]))\n"
        "print((query @ vectors.T).topk(10))\n"
    )
    vectors = bench.folder / "photos.npy"
    np.save(vectors, np.asarray(EmbeddingIndex.open(index).vectors))

    def ours() -> None:
        run([sys.executable, "-m", "clipkit", "search", str(index), "two birds on a branch"])

    def theirs() -> None:
        run([sys.executable, "-c", bare, str(bench.saved()), str(vectors), "two birds on a branch"])

    yield Row("clipkit search, the whole command", "a bare script", "wall", *bench.pairs(ours, theirs), limit=1.15)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


# -- photos


def decode(bench: Bench) -> Iterator[Row]:
    """From a file to the pixels that the model reads, on one core."""
    import open_clip

    from clipkit.images.load import load_image

    transform, processor = open_clip.image_transform(224, is_train=False), bench.model().processor
    for name, paths, limit in (("12 megapixels", bench.large(8), 0.5), ("640 pixels", bench.coco(64), 1 / 1.3)):

        def ours(paths: list[Path] = paths) -> None:
            for path in paths:
                processor.image(load_image(path, at_least=3 * 224))

        def exact(paths: list[Path] = paths) -> None:
            for path in paths:
                processor.image(load_image(path))

        def theirs(paths: list[Path] = paths) -> None:
            for path in paths:
                transform(Image.open(path))

        peer = "open_clip's preprocessing"
        yield Row(f"photo of {name}, decode=fast", peer, "CPU", *bench.pairs(ours, theirs, clock="cpu"), limit=limit)
        yield Row(f"photo of {name}, decode=exact", peer, "CPU", *bench.pairs(exact, theirs, clock="cpu"))


def embed_(bench: Bench) -> Iterator[Row]:
    """Images a second of embed(); on a CPU beside the forward pass and the decoding that it cannot do without."""
    from clipkit import EmbeddingStore, embed
    from clipkit.embedding.embed import space_of
    from clipkit.embedding.store import Key
    from clipkit.files import content_hash
    from clipkit.images.load import load_image

    model, paths = bench.model(), bench.coco(96)
    pixels = model.processor.images([load_image(path, at_least=3 * 224) for path in paths])

    def forward() -> None:
        with torch.inference_mode():
            for part in pixels.split(32):
                model.backend.embed(pixel_values=part.to(bench.device))

    def theirs() -> None:
        if bench.device == "cpu":
            model.processor.images([load_image(path, at_least=3 * 224) for path in paths])
        forward()
        if bench.device != "cpu":
            torch.cuda.synchronize()

    times = bench.pairs(lambda: embed(model, paths, batch_size=32, decode="fast"), theirs)
    yield Row(
        "embed() of 96 photos",
        "decode and forward" if bench.device == "cpu" else "forward",
        "wall",
        *times,
        limit=1 / 0.9,
    )

    files, row = distinct_files(bench.folder / "known", 100_000), "embed() of 100,000 files that the store knows"
    with EmbeddingStore(bench.folder / "known.store") as store:
        tower = model.fingerprint().image
        contents = [content_hash(file.read_bytes()) for file in files]
        keys = [Key(content, space_of("image", "fast"), tower) for content in contents]
        store.put(keys, np.random.default_rng(0).standard_normal((len(keys), model.dim), dtype=np.float32))
        embed(model, files, store=store, decode="fast")  # remembers size, time and inode
        rates = [len(files) / seconds(lambda: embed(model, files, store=store, decode="fast")) for _ in range(3)]
    yield Row(row, "", "files/s, at least 20,000", rates, limit=20_000)


def distinct_files(folder: Path, number: int) -> list[Path]:
    """Many small files of different content, written a day ago."""
    folder.mkdir()
    files = [folder / f"{i:07}.jpg" for i in range(number)]
    yesterday = time.time() - 86_400
    for i, file in enumerate(files):
        file.write_bytes(b"%d" % i)
        os.utime(file, (yesterday, yesterday))
    return files


def linked(paths: list[Path], folder: Path, count: int) -> list[Path]:
    """Many names for a few files."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:07}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        if not file.exists():
            os.link(paths[number % len(paths)], file)
    return files


# -- training


def features(bench: Bench) -> Iterator[Row]:
    """Heads on two frozen towers: the Trainer on kept features beside a plain loop over the same tensors."""
    from clipkit import EmbeddingStore, TrainConfig, Trainer, load_pairs
    from clipkit.embedding.text_features import with_features

    pairs = load_pairs(bench.photos / "flickr8k_train2600" / "captions.jsonl", image="image", text="captions")
    pairs = pairs.select(range(512))
    model = bench.model().freeze("image").freeze("text")
    with EmbeddingStore(bench.folder / "features.store") as store:
        kept = with_features(model, pairs, store=store)
    images = torch.tensor(np.array(kept["image_features"], dtype=np.float32), device=bench.device)
    first = [features[0] for features in kept["text_features"]]
    texts = torch.tensor(np.array(first, dtype=np.float32), device=bench.device)
    steps, batch, runs = 100, 256, count()

    def ours() -> None:
        settings = {"batch_size": batch, "max_steps": steps, "epochs": steps, "progress": False, "precision": "fp32"}
        Trainer(model, kept, TrainConfig(str(bench.folder / f"run{next(runs)}"), **settings)).train()

    def theirs() -> None:
        heads = torch.nn.ModuleDict({"image": torch.nn.Linear(768, DIM), "text": torch.nn.Linear(512, DIM)})
        scale = torch.nn.Parameter(torch.tensor(2.66))
        parameters = [*heads.to(bench.device).parameters(), scale]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        for _ in range(steps):
            rows = torch.randperm(len(images))[:batch]
            u = torch.nn.functional.normalize(heads["image"](images[rows]))
            v = torch.nn.functional.normalize(heads["text"](texts[rows]))
            logits = scale.exp() * u @ v.T
            labels = torch.arange(batch, device=bench.device)
            loss = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(
                logits.T, labels
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    times = bench.pairs(ours, theirs, clock="cpu")
    yield Row(f"heads on kept features, {steps} steps", "a plain loop over the tensors", "CPU", *times, limit=1.5)


def loader(bench: Bench) -> Iterator[Row]:
    """Batches of augmented photos of 640 pixels: files to tensors, two workers."""
    import csv
    from types import SimpleNamespace

    import open_clip
    from open_clip_train.data import get_csv_dataset

    from clipkit import TrainConfig, Trainer, load_pairs

    table, batch, rounds = bench.folder / "photos.csv", 32, 3
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        rows.writerows([str(path), f"a photo {path.stem}"] for path in bench.coco(96))
    config = TrainConfig(
        str(bench.folder / "loader"), epochs=10**6, batch_size=batch, workers=2, augmentation="crop", progress=False
    )
    trainer = Trainer(bench.model(), load_pairs(table, image="filepath", text="title"), config)
    settings = SimpleNamespace(
        train_data=str(table), csv_img_key="filepath", csv_caption_key="title", csv_separator=",", distributed=False,
        batch_size=batch, workers=2,
    )  # fmt: skip
    augmentation = {"scale": (0.9, 1.0)}
    transform = open_clip.image_transform(224, is_train=True, aug_cfg=augmentation)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def ours() -> None:
        for _ in trainer.loader.batches(0, 3 * rounds):
            pass

    def theirs() -> None:
        dataset = get_csv_dataset(settings, transform, is_train=True, tokenizer=tokenizer)
        for _ in range(rounds):
            for _ in dataset.dataloader:
                pass

    yield Row(
        "the data path, 640 pixels, 2 workers",
        "open_clip's CSV loader",
        "wall",
        *bench.pairs(ours, theirs),
        limit=1 / 1.5,
    )


def rows(bench: Bench) -> Iterator[Row]:
    """`clipkit train` to its first step with a table of a million files."""
    files = linked(bench.coco(96), bench.folder / "million", 1_000_000)
    table = bench.folder / "million.csv"
    with table.open("w") as file:
        file.write("file,caption\n")
        file.writelines(f"{path},photo number {number}\n" for number, path in enumerate(files))
    settings = {
        "model.name": bench.clip(), "data.train": table, "data.image": "file", "data.text": "caption", "data.test": 0,
        "train.output_dir": bench.folder / "million-run", "train.max_steps": 1, "train.batch_size": 8,
    }  # fmt: skip
    command = [sys.executable, "-m", "clipkit", "train", *(f"{key}={value}" for key, value in settings.items())]
    begin = time.perf_counter()
    peak = peak_of(command)
    yield Row(
        "clipkit train, 1,000,000 rows to the end of step 1",
        "",
        "seconds, at most 60",
        [time.perf_counter() - begin],
        limit=60,
        note=f"{peak / 1e9:.1f} GB",
    )


def peak_of(command: list[str]) -> int:
    """Run a command; the most anonymous memory it held, in bytes."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def anonymous_memory(process: int | str = "self") -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


# -- the index


def index(bench: Bench) -> Iterator[Row]:
    """Opening, and queries beside the product and topk of the same matrix."""
    from clipkit import EmbeddingIndex

    for size, limit in ((100_000, 0.1), (1_000_000, 0.3)):
        path = bench.synthetic_index(size)
        EmbeddingIndex.open(path)
        before = anonymous_memory()
        times = [seconds(lambda path=path: EmbeddingIndex.open(path)) for _ in range(bench.args.pairs)]
        grown = f"{max(0, anonymous_memory() - before) / 1e6:.0f} MB"
        yield Row(f"open an index of {size:,}", "", f"seconds, at most {limit}", times, limit=limit, note=grown)
    opened = EmbeddingIndex.open(bench.synthetic_index(100_000))
    vectors = torch.from_numpy(opened.vectors.numpy().copy())
    for many, limit in ((1, 1.05), (200, 1.2)):
        queries = torch.nn.functional.normalize(torch.randn(many, DIM))

        def ours(queries: torch.Tensor = queries) -> None:
            opened.search_many(list(queries), 10, missing=True)

        def theirs(queries: torch.Tensor = queries) -> None:
            (queries @ vectors.T).topk(10)

        times = bench.pairs(ours, theirs, clock="cpu", pairs=max(20, bench.args.pairs))
        yield Row(f"{many} queries on 100,000 × {DIM}", "product and topk", "CPU", *times, limit=limit)


LINES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "open": open_,
    "save": save,
    "search": search,
    "decode": decode,
    "embed": embed_,
    "features": features,
    "loader": loader,
    "rows": rows,
    "index": index,
}


def main() -> None:
    args = arguments()
    chosen = args.only.split(",") if args.only else list(LINES)
    if unknown := set(chosen) - set(LINES):
        raise UsageError(f"unknown lines: {', '.join(sorted(unknown))}", where="--only", fix=", ".join(LINES))
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {args.threads} threads, {args.device}, load {load:.2f}")
    if load > BUSY:
        print(f"warning: the load is above {BUSY}: other programs disturb what is measured", file=sys.stderr)
    print(
        f"\n| {'what':48} | {'beside':32} | clock | ratio | at most | clipkit | peer |\n|---|---|---|---|---|---|---|"
    )
    measured: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        bench = Bench(args, Path(folder))
        for name in chosen:
            for row in LINES[name](bench):
                measured.append(row)
                print(as_line(row), flush=True)
    if args.to:
        write_json(
            args.to,
            {
                "machine": machine,
                "load": load,
                "threads": args.threads,
                "rows": [asdict(row) | {"value": row.value} for row in measured],
            },
        )


def as_line(row: Row) -> str:
    ours = f"{statistics.median(row.ours):.3g}"
    theirs = f"{statistics.median(row.theirs):.3g}" if row.theirs else ""
    limit = "" if row.limit is None else f"{row.limit:.3g}"
    ratio = f"{row.value:.2f}" if row.theirs else ""
    return f"| {row.name:48} | {row.peer:32} | {row.clock} | {ratio} | {limit} | {ours} {row.note} | {theirs} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder with coco_fullsize and flickr8k_train2600")
    parser.add_argument("--only", help=f"some of: {', '.join(LINES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--pairs", type=int, default=5, help="how often both sides run (default: 5)")
    parser.add_argument("--scratch", help="folder for what is written meanwhile, some 5 GB (default: the system's)")
    parser.add_argument("--to", type=Path, help="write all times as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_message(main)
