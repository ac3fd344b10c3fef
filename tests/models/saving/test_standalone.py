"""Saved folders in a process that cannot import clipkit: the embeddings themselves, not only a similarity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from plain import run_plain
from safetensors.torch import load_file

from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, golden_images

FAMILIES = ["clip", "metaclip_2", "altclip", "chinese_clip", "align", "siglip", "siglip2"]

TRANSFORMERS = """
import json, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor
texts, found = json.loads(Path("texts.json").read_text()), {}
images = [Image.open(f"{i}.png") for i in range(4)]
for name, (padding, length, mask) in json.loads(Path("settings.json").read_text()).items():
    model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    settings = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}
    inputs = processor(images=images, text=texts, **settings)
    if not mask:
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        output = model(**inputs)
    found |= {f"{name} image": output.image_embeds, f"{name} text": output.text_embeds}
found = {name: torch.nn.functional.normalize(each).contiguous() for name, each in found.items()}
save_file(found, "found.safetensors")
"""

OPEN_CLIP = """
import json, open_clip, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
model, preprocess = open_clip.create_model_from_pretrained("local-dir:saved")
tokenizer = open_clip.get_tokenizer("local-dir:saved")
pixels = torch.stack([preprocess(Image.open(f"{i}.png")) for i in range(4)])
with torch.no_grad():
    image = model.eval().encode_image(pixels, normalize=True)
    text = model.encode_text(tokenizer(json.loads(Path("texts.json").read_text())), normalize=True)
save_file({"saved image": image, "saved text": text}, "found.safetensors")
"""

TOWERS = """
import os, torch
from safetensors.torch import save_file
os.chdir("saved")
{block}
save_file({{"image": image_embedding, "text": text_embedding}}, "../found.safetensors")
"""


def write_inputs(folder: Path) -> None:
    for index, image in enumerate(golden_images()):
        image.save(folder / f"{index}.png")
    (folder / "texts.json").write_text(json.dumps(GOLDEN_TEXTS))


def check(models: dict[str, DualEncoder], folder: Path) -> None:
    found = load_file(folder / "found.safetensors")
    for name, model in models.items():
        assert (model.encode_images(golden_images()) - found[f"{name} image"]).abs().max() <= 1e-5, name
        assert (model.encode_texts(GOLDEN_TEXTS) - found[f"{name} text"]).abs().max() <= 1e-5, name


def test_transformers_opens_every_family(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    write_inputs(tmp_path)
    models, settings = {}, {}
    for name in FAMILIES:
        model = models[name] = DualEncoder.from_pretrained(family_folder(name))
        with torch.no_grad():
            next(model.backend.parameters()).mul_(1.01)  # not the folder that was opened
        model.save_pretrained(tmp_path / name)
        text: Any = model.processor.text_side
        settings[name] = text.padding, text.context_length, text.mask
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run_plain(TRANSFORMERS, tmp_path)
    check(models, tmp_path)


def test_open_clip_opens_its_own(open_clip_arch: Callable[..., str], tmp_path: Path) -> None:
    write_inputs(tmp_path)
    arch = open_clip_arch("tiny-without-clipkit", quick_gelu=True)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    mine = DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    mine.save_pretrained(tmp_path / "saved")
    run_plain(OPEN_CLIP, tmp_path)
    check({"saved": mine}, tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"head": "mlp", "resize": "shortest", "image_pooling": "mean", "text_pooling": "last"}]
)
def test_the_program_of_the_card_opens_joined_towers(
    options: dict[str, Any], make_towers: Callable[..., DualEncoder], tmp_path: Path
) -> None:
    model = make_towers(**options)
    assert model.save_pretrained(tmp_path / "saved").form == "towers"
    golden_images()[3].save(tmp_path / "saved" / "photo.jpg", quality=95)
    card = (tmp_path / "saved" / "README.md").read_text()
    (block,) = re.findall(r"^With transformers.*?```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    run_plain(TOWERS.format(block=block), tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    assert (model.encode_images([tmp_path / "saved" / "photo.jpg"]) - found["image"]).abs().max() <= 1e-5
    assert (model.encode_texts(["a caption"]) - found["text"]).abs().max() <= 1e-5
