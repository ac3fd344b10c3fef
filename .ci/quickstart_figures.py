"""Does the quickstart reach what the README promises? Exits 1 where it does not."""

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
short = {key: metrics[key] for key, floor in AT_LEAST.items() if metrics[key] < floor}
for key, floor in AT_LEAST.items():
    print(f"{metrics[key]:.3f}  (at least {floor})  {key}")
sys.exit(f"below the promise: {short}" if short else 0)
