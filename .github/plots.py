"""Draws what `dvc plots diff --json` wrote as PNG files in plots/, and prints the Markdown that shows them."""

import json
import re
import sys
from pathlib import Path

import vl_convert

Path("plots").mkdir(exist_ok=True)
for title, drawings in json.loads(Path(sys.argv[1]).read_text())["data"].items():
    for i, drawing in enumerate(drawings):
        image = Path("plots", re.sub(r"\W+", "-", f"{title} {i}" if i else title) + ".png")
        image.write_bytes(vl_convert.vegalite_to_png(drawing["content"], scale=1.5))
        print(f"![{title}](./{image})\n")
