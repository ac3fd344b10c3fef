"""The program in a folder of joined towers that shows how to use it without clipkit."""

from __future__ import annotations

from clipkit.models.backends.towers import Joint
from clipkit.models.image_transform import ImageTransform
from clipkit.models.processor import ImageSide, Processor

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


# In the card at most 20 lines, which a test counts.
_TEMPLATE = """{launch}import numpy as np, PIL.Image as Image, torch, torch.nn.functional as F
from safetensors.torch import load_file
from transformers import {classes}

{given}heads = {{name: tensor.float() for name, tensor in load_file({folder[heads.safetensors]}).items()}}

def head(side, x):
{head}

image, text = Image.open({path}).convert("RGB"){grey}, {caption}
{pixels}
ids = AutoTokenizer.from_pretrained({folder[here]})([text], {settings})
mask = ids.attention_mask
with torch.no_grad():
    pooled = {vision}.from_pretrained({folder[vision]}).eval().float()(pixel_values=pixels)
    image_embedding = F.normalize(head("image", {image_pool}), dim=-1)
    pooled = {text}.from_pretrained({folder[text]}).eval().float()(input_ids=ids.input_ids{mask_given})
    text_embedding = F.normalize(head("text", {text_pool}), dim=-1)
print((image_embedding @ text_embedding.T).item())
"""

_LAUNCH = """# The similarity of an image and a caption by this model, without clipkit:
#     python without_clipkit.py photo.jpg "a caption"
import sys
from pathlib import Path
"""

_PARTS = ("vision", "text", "heads.safetensors")
_LINEAR = '    return F.linear(x, heads[f"{side}_head.weight"])'
_MLP = """    x = F.gelu(F.linear(x, heads[f"{side}_head.0.weight"], heads[f"{side}_head.0.bias"]))
    return F.linear(x, heads[f"{side}_head.2.weight"], heads[f"{side}_head.2.bias"])"""


def program(joint: Joint, processor: Processor, vision: str, text: str, *, as_block: bool = False) -> str:
    """without_clipkit.py for the model folder, or the same for its card; tests run both without clipkit.

    Args:
        vision, text: names of the towers' classes.
        as_block: whether it is to run inside the folder, on photo.jpg, instead of on what the command line gives.
    """
    side = processor.image_side
    names = {"AutoTokenizer", vision, text}
    names |= set() if isinstance(side, ImageTransform) else {"AutoImageProcessor"}
    here = '"."' if as_block else "folder"
    settings = f'padding="{joint.padding}", truncation=True, max_length={joint.context_length}, return_tensors="pt"'
    return _TEMPLATE.format(
        launch="" if as_block else _LAUNCH,
        given="" if as_block else "folder = Path(__file__).parent\n",
        folder={"here": here, **{part: f'"./{part}"' if as_block else f'folder / "{part}"' for part in _PARTS}},
        path='"photo.jpg"' if as_block else "sys.argv[1]",
        caption='"a caption"' if as_block else "sys.argv[2]",
        grey='.convert("L")' if isinstance(side, ImageTransform) and len(side.mean) == 1 else "",
        classes=", ".join(sorted(names)),
        vision=vision,
        text=text,
        head=_LINEAR if joint.head == "linear" else _MLP,
        pixels=_pixels(side, here),
        settings=settings,
        image_pool=_IMAGE[joint.image_pooling],
        text_pool=_TEXT[joint.text_pooling].format(eos=joint.eos_token_id),
        mask_given=", attention_mask=mask" if joint.attention_mask else "",
    )


def _pixels(side: ImageSide, folder: str) -> str:
    if not isinstance(side, ImageTransform):
        opened = f"AutoImageProcessor.from_pretrained({folder})"
        return f'pixels = {opened}(images=image, return_tensors="pt").pixel_values'
    goal, kernel = side.image_size, f"Image.Resampling.{side.filter.upper()}"
    short = side.resize_to or goal
    if side.resize == "squash" and short == goal:
        lines = [f"image = image.resize(({goal}, {goal}), {kernel})"]
    else:
        squash = f"sides = [{short}, {short}]"
        shortest = f"sides = [max({short}, {short} * side // min(image.size)) for side in image.size]"
        lines = [
            squash if side.resize == "squash" else shortest,
            f"left, top = [round((side - {goal}) / 2) for side in sides]",
            f"image = image.resize(sides, {kernel}).crop((left, top, left + {goal}, top + {goal}))",
        ]
    scaled = f"(np.asarray(image).reshape({goal}, {goal}, -1) / 255 - {list(side.mean)}) / {list(side.std)}"
    return "\n".join([*lines, f"pixels = torch.tensor({scaled}).float().permute(2, 0, 1)[None]"])
