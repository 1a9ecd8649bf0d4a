"""What a `fit` ships: as a test needs it, whatever held-out rows say; or made up, without one."""

from unittest.mock import patch

import torch

from ia2mini import FitOptions
from ia2mini.engine.experiment import make_adapter
from ia2mini.fitting.predictor import FOREIGN, Predictor

LABELS = ["Friday", "apple"]


def shipping(name: str):
    """A context in which `fit` ships the candidate `name`."""
    return patch("ia2mini.fitting.fit.choose", lambda found: name)


def predictor(subject, method="sft", adapter="lora", **spec) -> Predictor:
    """What `fit` would ship: a random adapter for `sft` and `icl-sft`, else none."""
    made, theta = None, None
    if method in ("sft", "icl-sft"):
        made = make_adapter(subject.model, FitOptions(adapter=adapter))
        weights = sum(shape.numel() for shape in map(torch.Size, made.shapes.values()))
        theta = 0.3 * torch.randn(1, weights)
    asked = {"template": "Text:{text}\nLabel:", "labels": LABELS, "max_tokens": 1}
    about = {"method": method, "temperature": 1.7, "example": "Text:a good film\nLabel:"}
    about["confidences"] = [i / 20 for i in range(1, 20)]
    about["demonstrations"] = [
        {"prompt": "Text:a sour film.\nLabel:", "answer": "apple"},
        {"prompt": "Text:a fresh film.\nLabel:", "answer": "Friday"},
    ]
    report = {"name": "mine", "sentence": "It is good."}
    return Predictor(subject, made, theta, FOREIGN | asked | about | spec, report)
