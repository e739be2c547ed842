"""`make lock`: prints the versions that pip would install, as constraints for pip.

python tests/lock.py REPORT: of `pip install --dry-run --ignore-installed --report REPORT`.
"""

import json
import sys
from pathlib import Path

print("# make lock: every package of requirements.txt and requirements-dev.txt, and what they need in turn.")
installed = [package["metadata"] for package in json.loads(Path(sys.argv[1]).read_text())["install"]]
for package in sorted(installed, key=lambda package: package["name"].lower()):
    # 2.13.0+cpu is 2.13.0 for another device.
    print(f"{package['name'].lower()}=={package['version'].split('+')[0]}")
