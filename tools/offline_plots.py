"""Lets the pages of `dvc plots show` and `dvc plots diff` do without a network.

DVC's pages load Vega from a CDN. This writes a page template that holds Vega itself, for this
clone alone (.dvc/plots_page.html, 0.9 MB), and names it in .dvc/config.local.
"""

import subprocess
from pathlib import Path

from stages.common.commands import CommandLine
from stages.common.errors import run
from stages.common.files import write_text

import vl_convert

PAGE = Path(".dvc/plots_page.html")
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>DVC plots</title>
<style>
body { font-family: sans-serif; display: flex; flex-wrap: wrap; gap: 2em; margin: 2em; }
</style>
<script>(() => {
VEGA
})();</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""
# DVC's templates are made for Vega-Lite 5. As SVG, plots stay sharp in print and can be looked into. A file
# without points has no data.
SNIPPET = "window.vegaEmbed = (element, spec) => spec.data && vegaEmbed(element, spec, {renderer: 'svg'});"


def main() -> None:
    CommandLine("tools.offline_plots", __doc__).parse_args()
    vega = vl_convert.javascript_bundle(SNIPPET, vl_version="5.8")
    write_text(PAGE, HTML.replace("VEGA", vega.replace("</script", "<\\/script")))
    subprocess.run(["dvc", "config", "--local", "plots.html_template", PAGE.name], check=True)


if __name__ == "__main__":
    run(main)
