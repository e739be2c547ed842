"""Draws docs/loss.svg, the README's picture, from metrics/train.csv and metrics/valid.csv."""

from pathlib import Path

import pandas as pd
import vl_convert


def picture(metrics: Path) -> str:
    """The SVG of training and validation loss over tokens seen."""
    curves = [
        pd.read_csv(metrics / f"{name}.csv").rename(columns={f"{name}_loss": "loss"}).assign(curve=label)
        for name, label in (("train", "training"), ("valid", "validation"))
    ]
    loss = {"field": "loss", "type": "quantitative", "title": "loss (nats a token)", "scale": {"zero": False}}
    chart = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 480,
        "height": 240,
        "data": {"values": pd.concat(curves)[["tokens", "loss", "curve"]].round(4).to_dict("records")},
        "mark": "line",
        "encoding": {
            "x": {"field": "tokens", "type": "quantitative", "title": "tokens seen"},
            "y": loss,
            "color": {"field": "curve", "title": None, "scale": {"range": ["#9ecae1", "#d95f02"]}},
        },
    }
    return vl_convert.vegalite_to_svg(chart) + "\n"


if __name__ == "__main__":
    Path("docs/loss.svg").write_text(picture(Path("metrics")))
