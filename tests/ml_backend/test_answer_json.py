from __future__ import annotations

import json

import flask
import numpy as np

from ml_backend.answer_json import answer_json, numbers


def test_numbers_are_those_of_json() -> None:
    values = [*range(256), *np.random.default_rng(0).integers(0, 256, 1000).tolist()]
    assert json.loads(numbers(values)) == values
    assert numbers([]) == "[]"


def test_the_answer_is_that_of_flask() -> None:
    brush = {"id": "a", "value": {"format": "rle", "rle": [0, 7, 255], "brushlabels": ['"x0"']}}
    ring = {"id": "b", "value": {"x": 1.5, "y": 2.0}, "score": None}
    one, none = {"result": [brush, ring, brush], "score": 0.5}, {"result": [], "score": 0.0}
    results = [one, none, [one, none], []]
    with flask.Flask(__name__).app_context():
        response = answer_json(results)
        assert response.get_json() == {"results": results}
        assert response.mimetype == "application/json"
    assert brush["value"]["rle"] == [0, 7, 255]
