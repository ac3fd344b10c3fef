"""Check that the quickstart reaches the figures of the README; exit with 1 if it does not."""

import json
import sys
from pathlib import Path

AT_LEAST = {
    "unseen_characters/retrieval/text_to_image_recall@1": 0.38,
    "unseen_characters/retrieval/text_to_image_recall@5": 0.78,
    "unseen_face/retrieval/text_to_image_recall@1": 0.34,
    "unseen_face/retrieval/text_to_image_recall@5": 0.68,
}

metrics = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["metrics"]
too_low = {}
for key, least in AT_LEAST.items():
    print(f"{metrics[key]:.3f}  (at least {least})  {key}")
    if metrics[key] < least:
        too_low[key] = metrics[key]
sys.exit(f"below the figures of the README: {too_low}" if too_low else 0)
