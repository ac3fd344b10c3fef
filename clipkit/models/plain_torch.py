"""The program in a folder of joined towers that shows how to use it without clipkit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipkit.models.processor import Processor
from clipkit.models.transform import ImageTransform

if TYPE_CHECKING:
    from clipkit.models.towers import Joint

_IMAGE = {
    "pooler": "pooled.pooler_output.flatten(1)",
    "cls": "pooled.last_hidden_state[:, 0]",
    "mean": "(lambda h: h.flatten(2).mean(2) if h.ndim == 4 else h.mean(1))(pooled.last_hidden_state)",
}
_TEXT = {
    "pooler": "pooled.pooler_output",
    "cls": "pooled.last_hidden_state[:, 0]",
    "mean": "(pooled.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)",
    "last": "pooled.last_hidden_state[range(len(mask)), (torch.arange(mask.shape[1]) * mask).argmax(1)]",
    "eos": "pooled.last_hidden_state[range(len(mask)), (ids.input_ids == {eos}).int().argmax(1)]",
}

_TEMPLATE = """{launch}
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import {classes}

{given}
heads = {{name: tensor.float() for name, tensor in load_file(folder / "heads.safetensors").items()}}
vision = {vision}.from_pretrained(folder / "vision").eval().float()
text_tower = {text}.from_pretrained(folder / "text").eval().float()

def head(side, x):
{head}

image = Image.open(path).convert("RGB")
{pixels}
ids = AutoTokenizer.from_pretrained(folder)(
    [text], padding="{padding}", truncation=True, max_length={length}, return_tensors="pt")
mask = ids.attention_mask
with torch.no_grad():
    pooled = vision(pixel_values=pixels)
    image_embedding = F.normalize(head("image", {image_pool}), dim=-1)
    pooled = text_tower(input_ids=ids.input_ids{mask_given})
    text_embedding = F.normalize(head("text", {text_pool}), dim=-1)
print((image_embedding @ text_embedding.T).item())
"""

_FILE = (
    """# The similarity of an image and a caption by this model, without clipkit:
#     python without_clipkit.py photo.jpg "a caption"
import sys
from pathlib import Path""",
    "folder, (path, text) = Path(__file__).parent, sys.argv[1:]",
)
_BLOCK = ("from pathlib import Path", 'folder, path, text = Path("."), "photo.jpg", "a caption"')

_LINEAR = '    return F.linear(x, heads[f"{side}_head.weight"])'
_MLP = """    x = F.gelu(F.linear(x, heads[f"{side}_head.0.weight"], heads[f"{side}_head.0.bias"]))
    return F.linear(x, heads[f"{side}_head.2.weight"], heads[f"{side}_head.2.bias"])"""


def program(joint: Joint, processor: Processor, vision: str, text: str, *, as_block: bool = False) -> str:
    """without_clipkit.py for the model folder, or the same for its card; tests run both without clipkit.

    Args:
        vision, text: names of the towers' classes.
        as_block: whether it is to run inside the folder, on photo.jpg, instead of on what the command line gives.
    """
    launch, given = _BLOCK if as_block else _FILE
    names = {"AutoTokenizer", vision, text} | (
        set() if isinstance(processor.image_side, ImageTransform) else {"AutoImageProcessor"}
    )
    return _TEMPLATE.format(
        launch=launch,
        given=given,
        classes=", ".join(sorted(names)),
        vision=vision,
        text=text,
        head=_LINEAR if joint.head == "linear" else _MLP,
        pixels=_pixels(processor),
        padding=joint.padding,
        length=joint.context_length,
        image_pool=_IMAGE[joint.image_pooling],
        text_pool=_TEXT[joint.text_pooling].format(eos=joint.eos_token_id),
        mask_given=", attention_mask=mask" if joint.attention_mask else "",
    )


def _pixels(processor: Processor) -> str:
    side = processor.image_side
    if not isinstance(side, ImageTransform):
        return 'pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt").pixel_values'
    goal, kernel = side.image_size, f"Image.Resampling.{side.filter.upper()}"
    lines = ['image = image.convert("L")'] if len(side.mean) == 1 else []
    short = side.resize_to or goal
    if side.resize == "squash" and short == goal:
        lines.append(f"image = image.resize(({goal}, {goal}), {kernel})")
    else:
        squash = f"sides = [{short}, {short}]"
        shortest = f"sides = [max({short}, {short} * side // min(image.size)) for side in image.size]"
        lines += [
            squash if side.resize == "squash" else shortest,
            f"left, top = [round((side - {goal}) / 2) for side in sides]",
            f"image = image.resize(sides, {kernel}).crop((left, top, left + {goal}, top + {goal}))",
        ]
    mean, std = list(side.mean), list(side.std)
    lines += [
        f"pixels = (np.asarray(image).reshape({goal}, {goal}, -1) / 255 - {mean}) / {std}",
        "pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]",
    ]
    return "\n".join(lines)
