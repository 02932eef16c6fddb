from __future__ import annotations

import json
from pathlib import Path

from worker import facts, runtime
from worker.byte_lru import ByteLRU
from worker.contract import RuntimeOptions, outcome_of


def test_a_cache_says_how_full_it_is() -> None:
    cache: ByteLRU[str, int] = ByteLRU(100)
    cache.put("a", 1, 60)
    cache.put("b", 2, 30)
    assert (cache.get("a"), cache.get("c"), cache.get("b")) == (1, None, 2)
    assert cache.usage() == {"bytes": 90, "max_bytes": 100, "entries": 2, "hits": 2, "misses": 1}


def test_a_worker_knows_itself_before_and_after_its_model_is_there(tmp_path: Path) -> None:
    runtime.configure(RuntimeOptions(data_dir=tmp_path, device="cpu", cache_mb=8))
    assert "backbone" not in facts.facts()
    runtime.runtime()
    assert facts.facts()["caches"]["logits"]["max_bytes"] == 1 << 20
    assert "backbone" not in facts.facts()
    runtime.warm_up()
    said = facts.facts()
    assert (said["backbone"][:5], said["device"]) == ("tiny-", "cpu")
    assert said["memory"] > 10_000_000
    assert {"python", "torch", "rq"} <= set(said["versions"])
    assert len(json.dumps(said)) < 1500


def test_outcomes() -> None:
    assert outcome_of({"kind": "failure", "error": "No.", "hint": "Try."}) == ("refused", "No. Try.")
    assert outcome_of({"kind": "segment"}) == outcome_of(None) == ("done", "")
